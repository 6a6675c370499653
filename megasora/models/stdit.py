"""STDiT: attention within each frame and attention along time, in turn, instead of attention over the whole video.

ViViT's factorised attention (Arnab et al. 2021, model 3) in Latte's order (Ma et al. 2024, variant 1): a spatial block, then a
temporal one. As STDiT3 of Open-Sora 1.2 (Zheng et al. 2024): both are full blocks with text and MLP, modulated by PixArt's
shared vector and a table a block (Chen et al. 2023), with QK-norm and rotary time. Or as Latte's text-to-video model.

A frame may have its own timestep: a given one is data, at 0, beside noisy ones. A dropped caption is the text encoder's empty
one, so the null caption that Open-Sora keeps beside its weights has no place here.
"""

import math
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import torch
from megasora_kernels.gated import gated
from megasora_kernels.layernorm_modulate import layernorm_modulate
from megasora_kernels.qknorm_rope import rotation_table
from torch import Tensor, nn

from megasora.models.attention import Attention, find_attention
from megasora.models.base import Model, ModelConfig, Setting
from megasora.models.layers import (
    MLP,
    RMSNorm,
    TableHead,
    axial_angles,
    init_linears_and_norms,
    rotate,
    sincos_axis,
    timestep_embedding,
)
from megasora.models.packing import Order, PackedRow, Segments, Shape, on_device


@dataclass(frozen=True, kw_only=True)
class STDiTConfig(ModelConfig):
    """Shape of the model. `depth` counts pairs of a spatial and a temporal block, `ffn` is the hidden width of the MLP."""

    family: Literal["stdit"] = "stdit"
    ffn: int = 1024
    text_width: int = 128
    qk_norm: bool = True  # of each head
    time_position: Literal["rope", "sincos"] = "rope"  # sincos: added once, before the first temporal block
    time_text: bool = True  # temporal blocks see the text too
    fps_condition: bool = True
    base_size: int = 32  # patches: the side of the square that every frame's positions are scaled to
    area_scale: bool = True  # positions times round(√(H·W)) / √(H·W), as in Open-Sora
    eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ffn", "text_width", "base_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")
        if self.width % 4:
            raise ValueError(f"width={self.width}: not divisible by 4; nearest is {max(4, 4 * round(self.width / 4))}")
        if self.time_position == "rope" and self.head_width % 2:
            raise ValueError(f"heads={self.heads}: a head of {self.head_width} channels cannot be rotated in pairs")


STDIT3_XL = STDiTConfig(width=1152, depth=28, heads=16, ffn=4608, channels=4, learn_sigma=True, text_width=4096)
PRESETS: dict[str, STDiTConfig] = {
    "STDiT3-XL/2": STDIT3_XL,  # of Open-Sora 1.2
    "STDiT3-3B/2": replace(STDIT3_XL, width=1872, heads=26, ffn=7488),
    # maxin-cn/Latte-1
    "Latte-XL/2-T2V": replace(
        STDIT3_XL, qk_norm=False, time_position="sincos", time_text=False, fps_condition=False, area_scale=False
    ),
}


def space_order(row: PackedRow) -> Order:
    """The row's own, (t h w): a frame sees itself."""
    return Order(row.frames)


def time_order(row: PackedRow) -> Order:
    """(h w t): a place sees itself in every frame."""
    areas = [(T, H * W) for T, H, W in row.shapes]
    boxes = tuple((len(list(same)), T, area) for (T, area), same in groupby(areas))
    lengths = tuple(T for T, area in areas for _ in range(area))
    return Order(Segments(lengths, row.tokens.device), boxes)


class HeadNormAttention(nn.Module):
    """Multi-head attention; with `qk_norm`, queries and keys are RMS-normalised in each head."""

    def __init__(self, width: int, heads: int, qk_norm: bool, eps: float) -> None:
        super().__init__()
        self.head_width = width // heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm_q = RMSNorm(width // heads, eps) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(width // heads, eps) if qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        queries: Segments | Order,
        keys: Segments | Order,
        rotation: Tensor | None,
        attention: Attention,
    ) -> Tensor:
        q = self.norm_q(self.q(x).unflatten(-1, (-1, self.head_width)))  # [L, N, K]
        k = self.norm_k(self.k(context).unflatten(-1, (-1, self.head_width)))  # [M, N, K]
        v = self.v(context).unflatten(-1, (-1, self.head_width))  # [M, N, K]
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return self.out(attention(q, k, v, queries, keys).flatten(-2))  # [L, D]


@dataclass(frozen=True)
class STSetting(Setting):
    """What the pairs are given."""

    text: Tensor  # [M, D]
    time: Tensor  # [R, D] fp32
    modulation: Tensor  # [R, 6, D] fp32, before each block's own table
    rotation: Tensor | None  # [L, K/2, 2] fp32, or what the first temporal block is `added`, [L, D] fp32
    added: Tensor | None
    orders: tuple[Order, Order]  # in space, in time


class Block(nn.Module):
    """Self-attention in an order, cross-attention to the text where it has any, MLP."""

    def __init__(self, config: STDiTConfig, text: bool) -> None:
        super().__init__()
        D = config.width
        self.eps = config.eps
        self.self_attention = HeadNormAttention(D, config.heads, config.qk_norm, config.eps)
        self.cross_attention = HeadNormAttention(D, config.heads, False, config.eps) if text else None
        self.mlp = MLP(D, config.ffn, D, nn.GELU(approximate="tanh"))
        self.modulation = nn.Parameter(torch.zeros(6, D))

    def forward(self, x: Tensor, setting: STSetting, rotation: Tensor | None, order: Order) -> Tensor:
        row, attention = setting.row, setting.attention
        run = row.runs.index  # [L]
        modulation = self.modulation.float() + setting.modulation  # [R, 6, D]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(1)  # six [R, D]
        y = layernorm_modulate(x, scale1, shift1, run, self.eps)  # [L, D]
        y = self.self_attention(y, y, order, order, rotation, attention)  # [L, D]
        x = gated(x, y, gate1, run)
        if self.cross_attention is not None:
            x = x + self.cross_attention(x, setting.text, row.attended.video, row.caption, None, attention)
        y = self.mlp(layernorm_modulate(x, scale2, shift2, run, self.eps))  # [L, D]
        return gated(x, y, gate2, run)


class Pair(nn.Module):
    """A spatial block, then a temporal one. In the `first` pair, what is added to the tokens comes between them."""

    def __init__(self, config: STDiTConfig, first: bool) -> None:
        super().__init__()
        self.first = first
        self.space = Block(config, text=True)
        self.time = Block(config, text=config.time_text)

    def forward(self, x: Tensor, setting: STSetting) -> Tensor:
        space, time = setting.orders
        x = self.space(x, setting, None, space)  # [L, D]
        if setting.added is not None and self.first:
            x = x + setting.added.type_as(x)
        return self.time(x, setting, setting.rotation, time)  # [L, D]


class STDiT(Model[STSetting]):
    """Predicts, for every patch of a packed row, what the objective asks for."""

    def __init__(self, config: STDiTConfig) -> None:
        super().__init__()
        D = config.width
        self.config = config
        self.attention = find_attention(config.attention)
        self.patch_embed = nn.Linear(config.patch_values, D)
        self.text_embed = MLP(config.text_width, D, D, nn.GELU(approximate="tanh"))
        self.time_embed = MLP(256, D, D, nn.SiLU())
        self.fps_embed = MLP(256, D, D, nn.SiLU()) if config.fps_condition else None
        self.time_modulation = nn.Linear(D, 6 * D)
        self.blocks = nn.ModuleList(Pair(config, first=i == 0) for i in range(config.depth))
        self.head = TableHead(D, config.output_values, config.eps)

    def init_weights(self) -> None:
        """As Open-Sora 1.2: Xavier for linears, tables of variance 1/D, torch's own for the patches. What temporal blocks add
        starts at zero: frames do not see each other yet, as in the image model that they start from."""
        init_linears_and_norms(self)
        for module in self.modules():
            if isinstance(module, Block | TableHead):
                nn.init.normal_(module.modulation, std=self.config.width**-0.5)
        self.patch_embed.reset_parameters()
        zero_at_first = ("self_attention.out.weight", "cross_attention.out.weight", "mlp.2.weight")
        for name, parameter in self.named_parameters():
            if name.startswith("fps_embed.2.") or (".time." in name and name.endswith(zero_at_first)):
                nn.init.zeros_(parameter)
            elif name == "fps_embed.0.weight":
                nn.init.normal_(parameter, std=0.02)

    def setting(self, row: PackedRow) -> STSetting:
        config = self.config
        text = self.text_embed(row.text)  # [M, D]
        rotation = added = None
        with torch.autocast(row.tokens.device.type, enabled=False):
            time = self.time_embed(timestep_embedding(row.timestep))  # [R, D], fp32
            if self.fps_embed is not None:
                fps = self.fps_embed(timestep_embedding(row.fps / 1000))  # [S, D]: the cosines are of the rate itself
                time = time + fps[row.run_sample]
            modulation = self.time_modulation(nn.functional.silu(time)).unflatten(-1, (6, -1))  # [R, 6, D], fp32
            if config.time_position == "rope":
                angles = axial_angles(row.attended.grid, (config.head_width, 0, 0))  # [L, K/2], fp32
                rotation = rotation_table(angles)
            else:
                added = time_sincos(row, config.width)  # [L, D], fp32
        orders = space_order(row), time_order(row)
        return STSetting(row, self.attention, text, time, modulation, rotation, added, orders)

    def enter(self, setting: STSetting) -> Tensor:
        x = self.patch_embed(setting.row.tokens)  # [L, D]
        return x + sincos_plane(scaled_places(setting.row, self.config), self.config.width).type_as(x)  # [L, D]

    def leave(self, x: Tensor, setting: STSetting) -> Tensor:
        return self.head(x, setting.time, setting.row.runs.index)  # [L, output_values]


def scaled_places(row: PackedRow, config: STDiTConfig) -> Tensor:
    """[L, 2] fp32: row and column of each patch, scaled so that a frame of any size and form reaches to `base_size`."""
    scales = []
    for _, H, W in row.shapes:
        side = math.sqrt(H * W)
        base = config.base_size * (round(side) / side if config.area_scale else 1.0)
        scales.append((base / H, base / W))
    return row.grid[:, 1:] * on_device(torch.tensor(scales), row.tokens.device)[row.video.index]


def sincos_plane(places: Tensor, width: int) -> Tensor:
    """[L, 2] row and column -> [L, width] fp32: half of the channels tell the column, then half the row, as in MAE and DiT."""
    rows, columns = places.unbind(1)
    return torch.cat([sincos_axis(columns, width // 2), sincos_axis(rows, width // 2)], dim=-1)


def time_sincos(row: PackedRow, width: int) -> Tensor:
    """[L, width] fp32: Latte's embedding of the frame, which an image goes without."""
    moves = on_device([float(T > 1) for T, _, _ in row.shapes], row.tokens.device)  # [S]
    return sincos_axis(row.grid[:, 0], width) * moves[row.video.index, None]


def forward_macs(config: STDiTConfig, shape: Shape, text_tokens: int) -> int:
    """Multiply-adds of one sample's forward pass: a `shape` of patches, `text_tokens` valid tokens of its caption."""
    D, (T, H, W) = config.width, shape
    tokens = T * H * W
    block = tokens * (4 * D * D + 2 * D * config.ffn)  # self-attention's linears and the MLP
    text = 2 * D * D * (tokens + text_tokens)
    layers = 2 * block + text * (2 if config.time_text else 1)
    vectors = 256 * D + D * D  # what embeds a timestep, and the frame rate
    embed = text_tokens * (config.text_width * D + D * D) + vectors * (2 if config.fps_condition else 1) + 6 * D * D
    ends = tokens * (config.patch_values + config.output_values) * D
    return config.depth * layers + attention_macs(config, shape, text_tokens) + embed + ends


def attention_macs(config: STDiTConfig, shape: Shape, text_tokens: int) -> int:
    """Of `forward_macs` what both products of attention take."""
    T, H, W = shape
    pairs = T * (H * W) ** 2 + H * W * T**2  # that the spatial and the temporal block see
    pairs += T * H * W * text_tokens * (2 if config.time_text else 1)
    return config.depth * 2 * pairs * config.width
