"""VideoDiT: full 3-D attention over spacetime patches with text cross-attention, the default family.

DiT's adaLN-zero (Peebles and Xie 2022) and PixArt's shared modulation with a table a block (Chen et al. 2023), laid out as in
Wan 2.1, whose weights it can hold. A row of packed samples goes in; each keeps its own timesteps and text.

With `temporal="chunk_causal"` a frame sees its own chunk of frames and those before, each chunk at its own timestep (Diffusion
Forcing, Chen et al. 2024; MAGI-1, 2025): next-patch prediction over stretches of video, which rolls out with cached keys.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from megasora_kernels.gated import gated
from megasora_kernels.gated_layernorm import gated_layernorm
from megasora_kernels.layernorm_modulate import layernorm_modulate
from megasora_kernels.qknorm_rope import rotation_table
from torch import Tensor, nn

from megasora.models.attention import Attention, find_attention
from megasora.models.base import Cache, Model, ModelConfig, Setting
from megasora.models.layers import (
    MLP,
    LayerNorm,
    RMSNorm,
    TableHead,
    init_linears_and_norms,
    rotary_angles,
    sincos_embedding,
    timestep_embedding,
)
from megasora.models.packing import PackedRow, Segments, Shape, Windows, chunk_windows, on_device


@dataclass(frozen=True, kw_only=True)
class VideoDiTConfig(ModelConfig):
    """Shape of the model. `ffn` is the hidden width of the MLP; chunks are counted in frames of patches."""

    family: Literal["video_dit"] = "video_dit"
    ffn: int = 1024
    text_width: int = 128
    position: Literal["rope", "rope+sincos"] = "rope"  # sincos tells small models where a patch is, not only how far
    temporal: Literal["full", "chunk_causal"] = "full"
    chunk: int = 4  # frames that see each other in chunk_causal
    window: int = 0  # chunks before its own that a chunk sees; 0: all
    eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("ffn", 1), ("text_width", 1), ("chunk", 1), ("window", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least}")
        if self.head_width % 2:
            raise ValueError(f"heads={self.heads}: a head of {self.head_width} channels cannot be rotated in pairs")


WAN_14B = VideoDiTConfig(width=5120, depth=40, heads=40, ffn=13824, text_width=4096)
PRESETS: dict[str, VideoDiTConfig] = {
    "MegaSora-demo": VideoDiTConfig(depth=4, position="rope+sincos"),
    "MegaSora-10M": VideoDiTConfig(depth=8),
    "MegaSora-100M": VideoDiTConfig(width=768, depth=8, heads=12, ffn=3072, text_width=4096),
    "MegaSora-1B": replace(WAN_14B, width=1536, depth=24, heads=12, ffn=6144),
    "MegaSora-3B": replace(WAN_14B, width=2560, depth=26, heads=20, ffn=10240),
    "MegaSora-8B": replace(WAN_14B, width=4096, depth=36, heads=32, ffn=11008),
    "MegaSora-30B": replace(WAN_14B, width=7168, depth=44, heads=56, ffn=19456),
    "Wan2.1-1.3B": replace(WAN_14B, width=1536, depth=30, heads=12, ffn=8960),
    "Wan2.1-14B": WAN_14B,
    "Wan2.2-5B": replace(WAN_14B, width=3072, depth=30, heads=24, ffn=14336, channels=48),
}


class QKNormAttention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys; self- or cross-attention by what is passed as context.

    With a `cache`, this layer's keys and values of the frames before come first, and it remembers those of the row.
    """

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.head_width = width // heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(width, eps), RMSNorm(width, eps)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        queries: Segments,
        keys: Segments | Windows,
        rotation: Tensor | None,
        attention: Attention,
        cache: Cache | None = None,
    ) -> Tensor:
        q = self.norm_q.by_head(self.q(x), self.head_width, rotation)  # [L, N, K]
        k = self.norm_k.by_head(self.k(context), self.head_width, rotation)  # [M, N, K]
        v = self.v(context).unflatten(-1, (-1, self.head_width))  # [M, N, K]
        if cache is not None:
            if self in cache:
                k, v = (torch.cat([before, now]) for before, now in zip(cache[self], (k, v), strict=True))
            cache[self] = k, v
        return self.out(attention(q, k, v, queries, keys).flatten(-2))  # [L, D]


@dataclass(frozen=True)
class VideoSetting(Setting):
    """What the blocks are given."""

    text: Tensor  # [M, D]
    time: Tensor  # [R, D] fp32
    modulation: Tensor  # [R, 6, D] fp32, before each block's own table
    rotation: Tensor  # [L, K/2, 2] fp32
    seen: tuple[Segments, Segments | Windows]  # the queries of self-attention and the keys that they see
    cache: Cache | None


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

    def forward(self, x: Tensor, setting: VideoSetting) -> Tensor:
        row, attention = setting.row, setting.attention
        run = row.runs.index  # [L]
        modulation = self.modulation.float() + setting.modulation  # [R, 6, D]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(1)  # six [R, D]
        y = layernorm_modulate(x, scale1, shift1, run, self.eps)  # [L, D]
        y = self.self_attention(y, y, *setting.seen, setting.rotation, attention, setting.cache)  # [L, D]
        x = gated(x, y, gate1, run)
        y = self.norm_cross(x)  # [L, D]
        y = self.cross_attention(y, setting.text, row.attended.video, row.caption, None, attention)  # [L, D]
        x, y = gated_layernorm(x, y, None, scale2, shift2, run, self.eps)  # x + y, and that normed and modulated
        return gated(x, self.mlp(y), gate2, run)


class VideoDiT(Model[VideoSetting]):
    """Predicts, for every patch of a packed row, what the objective asks for (velocity in rectified flow)."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        D = config.width
        self.config = config
        self.attention = find_attention(config.attention)
        self.patch_embed = nn.Linear(config.patch_values, D)
        self.text_embed = MLP(config.text_width, D, D, nn.GELU(approximate="tanh"))
        self.time_embed = MLP(256, D, D, nn.SiLU())
        self.time_modulation = nn.Linear(D, 6 * D)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = TableHead(D, config.output_values, config.eps)

    def init_weights(self) -> None:
        """Xavier for linears; zero for what adaLN-zero starts at zero: gates, cross-attention's and the head's output."""
        init_linears_and_norms(self)
        for module in self.modules():
            if isinstance(module, Block | TableHead):
                nn.init.zeros_(module.modulation)
        for name, parameter in self.named_parameters():
            if name.startswith(("time_modulation.", "head.out.")) or ".cross_attention.out." in name:
                nn.init.zeros_(parameter)
            elif name.startswith("time_embed.") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)

    def setting(self, row: PackedRow, cache: Cache | None = None) -> VideoSetting:
        """With a `cache` (chunk_causal; empty at first) the row is the next stretch of one video, which sees what the cache
        holds; its own keys and values are added there."""
        text = self.text_embed(row.text)  # [M, D]
        with torch.autocast(row.tokens.device.type, enabled=False):
            time = self.time_embed(timestep_embedding(row.timestep))  # [R, D], fp32
            modulation = self.time_modulation(nn.functional.silu(time)).unflatten(-1, (6, -1))  # [R, 6, D], fp32
            rotation = rotation_table(rotary_angles(row.attended.grid, self.config.head_width))  # [L, K/2, 2], fp32
        seen = self._seen(row.attended, cache)
        return VideoSetting(row, self.attention, text, time, modulation, rotation, seen, cache)

    def enter(self, setting: VideoSetting) -> Tensor:
        x = self.patch_embed(setting.row.tokens)  # [L, D]
        if self.config.position == "rope+sincos":
            x = x + sincos_embedding(self._where(setting.row), self.config.width).type_as(x)
        return x

    def leave(self, x: Tensor, setting: VideoSetting) -> Tensor:
        return self.head(x, setting.time, setting.row.runs.index)  # [L, output_values]

    def _where(self, row: PackedRow) -> Tensor:
        """[L, 3] coordinates for sincos. A chunk-causal video has no end: there only row and column are absolute."""
        return row.grid if self.config.temporal == "full" else row.grid * on_device([0, 1, 1], row.grid.device)

    def _seen(self, row: PackedRow, cache: Cache | None) -> tuple[Segments, Segments | Windows]:
        """The queries of self-attention and the keys that they see."""
        if self.config.temporal == "full":
            return row.video, row.video
        if cache is None:
            return chunk_windows(row.shapes, self.config.chunk, self.config.window, row.tokens.device)
        known = next((len(keys) for keys, _ in cache.values()), 0)
        first, *padding = row.video.lengths  # one video; padding sees itself
        starts = (0, *(known + start for start in row.video.starts[1:]))
        return row.video, Windows(starts, (known + first, *padding))


def forward_macs(config: VideoDiTConfig, shape: Shape, text_tokens: int) -> int:
    """Multiply-adds of one sample's forward pass: a `shape` of patches, `text_tokens` valid tokens of its caption."""
    D, (T, H, W) = config.width, shape
    tokens = T * H * W
    per_token = 4 * D * D + 2 * D * D + 2 * D * config.ffn  # self-attention, cross-attention's q and out, MLP
    per_text_token = 2 * D * D  # cross-attention's k and v
    blocks = config.depth * (tokens * per_token + text_tokens * per_text_token)
    blocks += attention_macs(config, shape, text_tokens)
    embed = text_tokens * (config.text_width * D + D * D) + 256 * D + D * D + 6 * D * D
    return blocks + embed + tokens * (config.patch_values + config.output_values) * D


def attention_macs(config: VideoDiTConfig, shape: Shape, text_tokens: int) -> int:
    """Of `forward_macs` what both products of attention take: every pair of a query and a key that it sees."""
    T, H, W = shape
    tokens = T * H * W
    pairs = tokens * tokens
    if config.temporal == "chunk_causal":
        pairs = seen_frames(T, config.chunk, config.window) * (H * W) ** 2
    return config.depth * 2 * (pairs + tokens * text_tokens) * config.width


def seen_frames(frames: int, chunk: int, window: int) -> int:
    """Pairs (frame, frame that it sees) of block-causal attention."""
    pairs = 0
    for first in range(0, frames, chunk):
        end = min(first + chunk, frames)
        pairs += (end - first) * (end - (max(0, first - window * chunk) if window else 0))
    return pairs
