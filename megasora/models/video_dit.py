"""VideoDiT: full 3-D attention over spacetime patches with text cross-attention, the default family.

DiT's adaLN-zero (Peebles and Xie 2022) and PixArt's shared modulation with a table a block (Chen et al. 2023), laid out as in
Wan 2.1, whose weights it can hold. A row of packed samples goes in; each sample keeps its own timestep and text.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from megasora_kernels.layernorm_modulate import layernorm_modulate
from torch import Tensor, nn

from megasora.models.attention import Attention, find_attention
from megasora.models.layers import MLP, LayerNorm, RMSNorm, rotary_angles, rotate, sincos_embedding, timestep_embedding
from megasora.models.packing import PackedRow, Patch, Segments


@dataclass(frozen=True, kw_only=True)
class VideoDiTConfig:
    """Shape of the model. `ffn` is the hidden width of the MLP, `text_width` that of the text encoder's embeddings."""

    width: int = 256
    depth: int = 8
    heads: int = 4
    ffn: int = 1024
    channels: int = 16
    patch: Patch = (1, 2, 2)
    text_width: int = 128
    position: Literal["rope", "rope+sincos"] = (
        "rope"  # sincos tells small models where a patch is, not only how far apart
    )
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "ffn", "channels", "text_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")
        if min(self.patch) < 1:
            raise ValueError(f"patch={list(self.patch)}: at least 1 each")
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} heads do not divide width {self.width}")
        if (self.width // self.heads) % 2:
            raise ValueError(f"heads: a head of {self.width // self.heads} channels cannot be rotated in pairs")

    @property
    def patch_values(self) -> int:
        """P, the numbers in one patch."""
        pt, ph, pw = self.patch
        return self.channels * pt * ph * pw


WAN_14B = VideoDiTConfig(width=5120, depth=40, heads=40, ffn=13824, text_width=4096)
PRESETS: dict[str, VideoDiTConfig] = {
    "MegaSora-demo": VideoDiTConfig(depth=4, position="rope+sincos"),
    "MegaSora-10M": VideoDiTConfig(depth=8),
    "MegaSora-100M": VideoDiTConfig(width=768, depth=8, heads=12, ffn=3072, text_width=4096),
    "Wan2.1-1.3B": replace(WAN_14B, width=1536, depth=30, heads=12, ffn=8960),
    "Wan2.1-14B": WAN_14B,
    "Wan2.2-5B": replace(WAN_14B, width=3072, depth=30, heads=24, ffn=14336, channels=48),
}


class QKNormAttention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys; self- or cross-attention by what is passed as context."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(width, eps), RMSNorm(width, eps)

    def forward(
        self, x: Tensor, context: Tensor, queries: Segments, keys: Segments, angles: Tensor | None, attention: Attention
    ) -> Tensor:
        q = self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))  # [L, N, K]
        k = self.norm_k(self.k(context)).unflatten(-1, (self.heads, -1))  # [M, N, K]
        v = self.v(context).unflatten(-1, (self.heads, -1))  # [M, N, K]
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        return self.out(attention(q, k, v, queries, keys).flatten(-2))  # [L, D]


class Block(nn.Module):
    """Self-attention, cross-attention to the text, MLP; the first and the last modulated and gated by the timestep."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        D = config.width
        self.eps = config.eps
        self.self_attention = QKNormAttention(D, config.heads, config.eps)
        self.norm_cross = LayerNorm(D, config.eps)
        self.cross_attention = QKNormAttention(D, config.heads, config.eps)
        self.mlp = MLP(D, config.ffn, D, nn.GELU(approximate="tanh"))
        self.modulation = nn.Parameter(torch.zeros(6, D))

    def forward(
        self, x: Tensor, text: Tensor, modulation: Tensor, angles: Tensor, row: PackedRow, attention: Attention
    ) -> Tensor:
        sample = row.video.sample  # [L]
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + modulation).unbind(1)  # six [S, D]
        y = layernorm_modulate(x, scale1, shift1, sample, self.eps)  # [L, D]
        y = self.self_attention(y, y, row.video, row.video, angles, attention)  # [L, D]
        x = x + (gate1[sample] * y).type_as(x)
        x = x + self.cross_attention(self.norm_cross(x), text, row.video, row.caption, None, attention)
        y = self.mlp(layernorm_modulate(x, scale2, shift2, sample, self.eps))  # [L, D]
        return x + (gate2[sample] * y).type_as(x)


class Head(nn.Module):
    """Modulated LayerNorm and the projection back to patches."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.out = nn.Linear(config.width, config.patch_values)
        self.modulation = nn.Parameter(torch.zeros(2, config.width))

    def forward(self, x: Tensor, time: Tensor, sample: Tensor) -> Tensor:
        shift, scale = (self.modulation.float() + time[:, None]).unbind(1)  # two [S, D]
        return self.out(layernorm_modulate(x, scale, shift, sample, self.eps))  # [L, P]


class VideoDiT(nn.Module):
    """Predicts, for every patch of a packed row, what the objective asks for (velocity in rectified flow)."""

    def __init__(self, config: VideoDiTConfig, attention: str = "sdpa") -> None:
        super().__init__()
        D = config.width
        self.config = config
        self.attention = find_attention(attention)
        self.patch_embed = nn.Linear(config.patch_values, D)
        self.text_embed = MLP(config.text_width, D, D, nn.GELU(approximate="tanh"))
        self.time_embed = MLP(256, D, D, nn.SiLU())
        self.time_modulation = nn.Linear(D, 6 * D)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Head(config)

    def init_weights(self) -> None:
        """Xavier for linears; zero for what adaLN-zero starts at zero: gates, cross-attention's and the head's output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm | LayerNorm):
                nn.init.ones_(module.weight)
                if isinstance(module, LayerNorm):
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Block | Head):
                nn.init.zeros_(module.modulation)
        for name, parameter in self.named_parameters():
            if name.startswith(("time_modulation.", "head.out.")) or ".cross_attention.out." in name:
                nn.init.zeros_(parameter)
            elif name.startswith("time_embed.") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)

    def forward(self, row: PackedRow) -> Tensor:
        """[L, P] noisy patches -> [L, P] prediction."""
        x = self.patch_embed(row.tokens)  # [L, D]
        if self.config.position == "rope+sincos":
            x = x + sincos_embedding(row.grid, self.config.width).type_as(x)
        text = self.text_embed(row.text)  # [M, D]
        with torch.autocast(row.tokens.device.type, enabled=False):
            time = self.time_embed(timestep_embedding(row.timestep))  # [S, D], fp32
            modulation = self.time_modulation(nn.functional.silu(time)).unflatten(-1, (6, -1))  # [S, 6, D], fp32
            angles = rotary_angles(row.grid, self.config.width // self.config.heads)  # [L, K/2], fp32
        for block in self.blocks:
            x = block(x, text, modulation, angles, row, self.attention)  # [L, D]
        return self.head(x, time, row.video.sample)  # [L, P]
