"""HunyuanVideo's token refiner (Kong et al. 2024, section 4.2): full attention among a caption's tokens, gated by the timestep
and the caption's mean. A language model's own attention is causal, so its first tokens know nothing of the last."""

import torch
from megasora_kernels.gated import gated
from torch import Tensor, nn

from megasora.models.attention import Attention
from megasora.models.layers import MLP, LayerNorm, Modulation, timestep_embedding
from megasora.models.packing import Segments


class RefinerBlock(nn.Module):
    """Self-attention and MLP within each caption. The condition gates both and modulates nothing."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.head_width = width // heads
        self.norm1, self.norm2 = LayerNorm(width, eps), LayerNorm(width, eps)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = MLP(width, 4 * width, width, nn.SiLU())
        self.modulation = Modulation(width, 2)

    def forward(self, x: Tensor, condition: Tensor, caption: Segments, attention: Attention) -> Tensor:
        gate1, gate2 = self.modulation(condition)  # two [S, D]
        y = self.norm1(x)  # [M, D]
        q, k, v = (project(y).unflatten(-1, (-1, self.head_width)) for project in (self.q, self.k, self.v))  # [M, N, K]
        y = self.out(attention(q, k, v, caption, caption).flatten(-2))  # [M, D]
        x = gated(x, y, gate1, caption.index)
        y = self.mlp(self.norm2(x))  # [M, D]
        return gated(x, y, gate2, caption.index)


class TokenRefiner(nn.Module):
    """Text embeddings to the model's width, each token by then aware of its whole caption and of the noise."""

    def __init__(self, text_width: int, width: int, heads: int, depth: int, eps: float) -> None:
        super().__init__()
        self.embed = nn.Linear(text_width, width)
        self.time_embed = MLP(256, width, width, nn.SiLU())
        self.mean_embed = MLP(text_width, width, width, nn.SiLU())
        self.blocks = nn.ModuleList(RefinerBlock(width, heads, eps) for _ in range(depth))

    def forward(self, text: Tensor, caption: Segments, timestep: Tensor, attention: Attention) -> Tensor:
        """text [M, E] of a row, the timestep [S] of each sample -> [M, D]."""
        with torch.autocast(text.device.type, enabled=False):
            captions = text.float().split(caption.lengths)  # S times [M of the sample, E]
            mean = torch.stack([tokens.sum(0) / max(len(tokens), 1) for tokens in captions])  # [S, E]
            condition = self.time_embed(timestep_embedding(timestep)) + self.mean_embed(mean)  # [S, D], fp32
        x = self.embed(text)  # [M, D]
        for block in self.blocks:
            x = block(x, condition, caption, attention)  # [M, D]
        return x
