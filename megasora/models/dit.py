"""DiT: a transformer on latent patches that is told the timestep and the class (Peebles and Xie 2023).

The paper's four block designs (section 3.2, figure 3): `in_context` appends the conditions to the sequence as tokens and has
plain ViT blocks; `cross_attention` adds an attention to them; `adaln` regresses the norms' scale and shift from their sum;
`adaln_zero` also gates each branch, starting at zero. The decoder predicts the noise and, with `learn_sigma`, its variance.

Frames of a sample may have timesteps of their own, each stretch of equal ones being a run. The adaLN designs modulate by run;
the other two have one timestep token a run, marked with the place in time where the run begins, and one token of the class.
A class of -1 is the null class of classifier-free guidance, the last row of the table; with `classes=0` it is the only one.
"""

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from megasora_kernels.gated import gated
from megasora_kernels.gated_layernorm import gated_layernorm
from megasora_kernels.layernorm_modulate import layernorm_modulate
from torch import Tensor, nn

from megasora.models.attention import find_attention
from megasora.models.base import Model, ModelConfig
from megasora.models.layers import (
    MLP,
    LayerNorm,
    Modulation,
    MultiHeadAttention,
    first_part,
    join,
    sincos_axis,
    timestep_embedding,
    together,
)
from megasora.models.packing import PackedRow, Segments, Shape, on_device
from megasora.models.vit import Block as ViTBlock
from megasora.models.vit import JointSetting

EPS = 1e-6  # of every norm


@dataclass(frozen=True, kw_only=True)
class DiTConfig(ModelConfig):
    """Shape of the model. `ffn` is the hidden width of the MLP."""

    family: Literal["dit"] = "dit"
    design: Literal["in_context", "cross_attention", "adaln", "adaln_zero"] = "adaln_zero"
    ffn: int = 1024
    time_period: float = 10_000.0  # longest wave of the timestep's embedding; see interop/dit.py for diffusers'

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ffn < 1:
            raise ValueError(f"ffn={self.ffn}: at least 1")
        if self.time_period <= 1:
            raise ValueError(f"time_period={self.time_period}: above 1")
        for name in ("text_width", "pooled_width"):
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)}: DiT takes no text; 0")
        if self.width % 4:
            nearest = max(1, round(self.width / 4)) * 4
            raise ValueError(
                f"width={self.width}: sin-cos positions of rows and columns need a multiple of 4; nearest is {nearest}"
            )

    @property
    def adaptive(self) -> bool:
        return self.design in ("adaln", "adaln_zero")


SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # depth, width, heads
PRESETS: dict[str, DiTConfig] = {
    f"DiT-{size}/{p}": DiTConfig(
        depth=depth, width=width, heads=heads, ffn=4 * width,
        channels=4, patch=(1, p, p), classes=1000, learn_sigma=True,
    )
    for size, (depth, width, heads) in SIZES.items()
    for p in (2, 4, 8)
}  # fmt: skip


def position_table(config: DiTConfig) -> int:
    """Numbers in the fixed table of positions that DiT's own code counts among its parameters, for 32 x 32 latents."""
    _, ph, pw = config.patch
    return (32 // ph) * (32 // pw) * config.width


def frame_embedding(frame: Tensor, width: int) -> Tensor:
    """[L] frames -> [L, width] fp32: sincos of the frame less that of frame 0, which so has zero."""
    return sincos_axis(frame, width) - sincos_axis(torch.zeros_like(frame[:1]), width)


def position_embedding(grid: Tensor, width: int) -> Tensor:
    """[L, 3] coordinates -> [L, width] fp32: columns in the first half and rows in the second, as in DiT, plus the frame's.

    The first frame of a video, and so every picture, has exactly DiT's embedding.
    """
    frame, row, column = grid.unbind(1)
    picture = torch.cat([sincos_axis(column, width // 2), sincos_axis(row, width // 2)], dim=-1)
    return picture + frame_embedding(frame, width)


@dataclass(frozen=True)
class DiTSetting(JointSetting):
    """What the blocks are given: one vector a run, or tokens of the conditions, side by side sample by sample."""

    condition: Tensor  # adaptive: [R, D] fp32; else [M, D]
    of_condition: Segments  # of the tokens; adaptive: the runs


class AdaLNBlock(nn.Module):
    """Attention and MLP; the condition scales and shifts their norms and, in adaLN-zero, gates what they add."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D = config.width
        self.attention = MultiHeadAttention(D, config.heads)
        self.mlp = MLP(D, config.ffn, D, nn.GELU(approximate="tanh"))
        self.modulation = Modulation(D, 6 if config.design == "adaln_zero" else 4)

    def forward(self, x: Tensor, setting: DiTSetting) -> Tensor:
        run, segments, attention = setting.of_condition.index, setting.joint, setting.attention
        parts = self.modulation(setting.condition)  # six, without gates four, of [R, D], fp32
        half = len(parts) // 2
        (shift1, scale1, *gate1), (shift2, scale2, *gate2) = parts[:half], parts[half:]
        y = layernorm_modulate(x, scale1, shift1, run, EPS)  # [L, D]
        y = self.attention(y, y, segments, segments, attention)  # [L, D]
        x, y = gated_layernorm(x, y, gate1[0] if gate1 else None, scale2, shift2, run, EPS)  # [L, D] each
        return add(x, self.mlp(y), gate2, run)  # [L, D]


def add(x: Tensor, y: Tensor, gates: list[Tensor], run: Tensor) -> Tensor:
    """x + gate · y of [L, D], the gate [R, D] being each token's run's; x + y where there is none."""
    return gated(x, y, gates[0], run) if gates else x + y.type_as(x)


class CrossBlock(nn.Module):
    """ViT's block with an attention to the conditions between its two parts."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D = config.width
        self.norm1, self.norm_cross, self.norm2 = (LayerNorm(D, EPS) for _ in range(3))
        self.attention, self.cross_attention = (MultiHeadAttention(D, config.heads) for _ in range(2))
        self.mlp = MLP(D, config.ffn, D, nn.GELU(approximate="tanh"))

    def forward(self, x: Tensor, setting: DiTSetting) -> Tensor:
        segments, attention = setting.joint, setting.attention
        y = self.norm1(x)  # [L, D]
        x = x + self.attention(y, y, segments, segments, attention)  # [L, D]
        y = self.norm_cross(x)  # [L, D]
        x = x + self.cross_attention(y, setting.condition, segments, setting.of_condition, attention)  # [L, D]
        return x + self.mlp(self.norm2(x))  # [L, D]


class DiT(Model[DiTSetting]):
    """Predicts, for every patch of a packed row, what the objective asks for (the noise in the paper)."""

    EXIT = ("out_modulation", "out_norm", "out")

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D = config.width
        self.config = config
        self.attention = find_attention(config.attention)
        self.patch_embed = nn.Linear(config.patch_values, D)
        self.time_embed = MLP(256, D, D, nn.SiLU())
        self.label_embed = nn.Embedding(config.classes + 1, D)
        self.blocks = nn.ModuleList(build_block(config) for _ in range(config.depth))
        if config.adaptive:
            self.out_modulation = Modulation(D, 2)
        else:
            self.out_norm = LayerNorm(D, EPS)
        self.out = nn.Linear(D, config.output_values)

    def init_weights(self) -> None:
        """As DiT's own code: Xavier for linears, zero for the output and for all of adaLN-zero's modulations."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.startswith("out.") or ("modulation." in name and self.config.design == "adaln_zero"):
                nn.init.zeros_(parameter)
            elif name.startswith("time_embed.") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)

    def setting(self, row: PackedRow) -> DiTSetting:
        with torch.autocast(row.tokens.device.type, enabled=False):
            time = self.time_embed(timestep_embedding(row.timestep, max_period=self.config.time_period))  # [R, D], fp32
            label = self.label_embed(self._classes(row.label))  # [S, D], fp32
        if self.config.adaptive:
            return DiTSetting(row, self.attention, row.attended.video, time + label[row.run_sample], row.runs)
        tokens, of_tokens = condition_tokens(row, time, label)
        joint = together(row.video, of_tokens) if self.config.design == "in_context" else row.video
        return DiTSetting(row, self.attention, joint, tokens, of_tokens)

    def enter(self, setting: DiTSetting) -> Tensor:
        """[L, P] -> [L, D], or [L + M, D] with the conditions in context."""
        row = setting.row
        x = self.patch_embed(row.tokens)  # [L, D]
        x = x + position_embedding(row.grid, self.config.width).type_as(x)  # [L, D]
        if self.config.design == "in_context":
            x, _ = join(x, row.video, setting.condition.type_as(x), setting.of_condition)
        return x

    def leave(self, x: Tensor, setting: DiTSetting) -> Tensor:
        """[L, D] or [L + M, D] -> [L, output_values]: the prediction and, with `learn_sigma`, then the variance's."""
        if self.config.adaptive:
            shift, scale = self.out_modulation(setting.condition)  # two [R, D], fp32
            return self.out(layernorm_modulate(x, scale, shift, setting.of_condition.index, EPS))
        if self.config.design == "in_context":
            x = first_part(x, setting.row.video, setting.of_condition)  # [L, D]
        return self.out(self.out_norm(x))

    def carried(self, row: PackedRow) -> int:
        conditions = len(row.runs.lengths) + len(row.shapes) if self.config.design == "in_context" else 0
        return len(row.tokens) + conditions

    def _classes(self, label: Tensor) -> Tensor:
        """[S] -> [S]: rows of the table."""
        null = self.config.classes
        return torch.where(label < 0, null, label) if null else torch.zeros_like(label)


def build_block(config: DiTConfig) -> nn.Module:
    if config.adaptive:
        return AdaLNBlock(config)
    if config.design == "cross_attention":
        return CrossBlock(config)
    return ViTBlock(config.width, config.heads, config.ffn, "gelu_tanh", EPS)


def condition_tokens(row: PackedRow, time: Tensor, label: Tensor) -> tuple[Tensor, Segments]:
    """time [R, D] and label [S, D] -> [R + S, D], of each sample its runs' timesteps and then its class; and the segments.

    A timestep's token has its run's first frame added, which is zero for frame 0: a sample of one run has the paper's two
    tokens, and several runs can be told apart.
    """
    starts = row.runs.starts
    frame = row.grid[on_device(starts, time.device), 0]  # [R]
    runs = tuple(bisect_left(starts, end) - bisect_left(starts, start) for start, end in pairwise(row.video.offsets))
    time = time + frame_embedding(frame, time.shape[-1])  # [R, D]
    return join(time, Segments(runs, time.device), label, Segments((1,) * len(label), time.device))


def forward_macs(config: DiTConfig, shape: Shape, text_tokens: int) -> int:
    """Multiply-adds of one sample's forward pass, its frames having one timestep: then the conditions are two tokens."""
    D, (T, H, W) = config.width, shape
    tokens = T * H * W
    sequence = tokens + 2 if config.design == "in_context" else tokens
    block = sequence * (4 * D * D + 2 * D * config.ffn)
    if config.design == "cross_attention":
        block += tokens * 2 * D * D + 2 * 2 * D * D  # q and out, k and v
    modulations = {"in_context": 0, "cross_attention": 0, "adaln": 4, "adaln_zero": 6}[config.design]
    embed = 256 * D + D * D + (2 * D * D if config.adaptive else 0)
    ends = tokens * (config.patch_values + config.output_values) * D
    attention = attention_macs(config, shape, text_tokens)
    return config.depth * (block + modulations * D * D) + attention + embed + ends


def attention_macs(config: DiTConfig, shape: Shape, text_tokens: int) -> int:
    """Of `forward_macs` what both products of attention take."""
    T, H, W = shape
    tokens = T * H * W
    sequence = tokens + 2 if config.design == "in_context" else tokens
    pairs = sequence * sequence + (2 * tokens if config.design == "cross_attention" else 0)
    return config.depth * 2 * pairs * config.width
