"""MMDiT: text and video attend jointly, first with weights of their own (double-stream blocks), then with the same ones.

Esser et al. 2024 (double), Flux's parallel single-stream blocks (Dehghani et al. 2023 for the parallel MLP), laid out as in
Open-Sora 2.0 and HunyuanVideo, whose weights it can hold. A row of packed samples goes in; each keeps its own text and timesteps.

Further shape: J = M + L tokens of the joint sequence (see `Joint`).
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from megasora_kernels.gated import gated
from megasora_kernels.gated_layernorm import gated_layernorm
from megasora_kernels.layernorm_modulate import layernorm_modulate
from megasora_kernels.qknorm_rope import rotation_table
from torch import Tensor, nn

from megasora.models.attention import find_attention
from megasora.models.base import Model, ModelConfig, Setting
from megasora.models.joint import Joint, join, pieces_of
from megasora.models.layers import (
    MLP,
    Modulation,
    RMSNorm,
    axial_angles,
    init_linears_and_norms,
    timestep_embedding,
)
from megasora.models.packing import PackedRow, Shape
from megasora.models.token_refiner import TokenRefiner


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig(ModelConfig):
    """Shape of the model: `depth` double-stream and `single_depth` single-stream blocks; `ffn` is the MLPs' hidden width."""

    family: Literal["mmdit"] = "mmdit"
    single_depth: int = 8
    ffn: int = 1024
    text_width: int = 128
    pooled_width: int = 128
    axes: tuple[int, int, int] = (8, 28, 28)  # channels of a head that are rotated by time, row and column
    theta: float = 10_000.0  # of the rotation
    text: Literal["linear", "refiner"] = "linear"  # how text embeddings reach the model's width
    refiner_depth: int = 2
    guidance_embed: bool = False  # takes the guidance scale as an input: models distilled from guided ones
    eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("single_depth", "ffn", "text_width", "pooled_width", "theta", "refiner_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")
        K = self.head_width
        if K % 2 or K < 6:
            raise ValueError(f"heads={self.heads}: a head of {K} channels has no pair for each of three axes")
        if sum(self.axes) != K or any(axis < 2 or axis % 2 for axis in self.axes):
            spatial = max(2, 2 * (7 * K // 32))
            fitting = [K - 2 * spatial, spatial, spatial]
            raise ValueError(
                f"axes={list(self.axes)}: must be even and sum to a head's {K} channels, such as {fitting}"
            )
        if self.ffn % self.heads:
            nearest = max(1, round(self.ffn / self.heads)) * self.heads
            raise ValueError(f"ffn={self.ffn}: each of {self.heads} heads has its share; nearest is {nearest}")

    @property
    def block_count(self) -> int:
        return self.depth + self.single_depth


OPEN_SORA_2 = MMDiTConfig(
    width=3072,
    depth=19,
    single_depth=38,
    heads=24,
    ffn=12288,
    text_width=4096,
    pooled_width=768,
    axes=(16, 56, 56),
)
HUNYUAN_VIDEO = replace(OPEN_SORA_2, depth=20, single_depth=40, theta=256.0, text="refiner")
PRESETS: dict[str, MMDiTConfig] = {
    "MegaSora-MMDiT-demo": MMDiTConfig(width=192, depth=4, single_depth=4, ffn=768, axes=(8, 20, 20)),
    "Open-Sora-2.0": OPEN_SORA_2,
    "HunyuanVideo": HUNYUAN_VIDEO,
}


@dataclass(frozen=True)
class MMSetting(Setting):
    """What the blocks are given."""

    joint: Joint
    condition: Tensor  # [S + R, D] fp32: of the samples' texts, then of the runs
    rotation: Tensor  # [pieces · (M + L), K/2, 2] fp32, before tokens meet; text is not turned
    video_rotation: Tensor  # [pieces · L, K/2, 2], the video's


def text_timestep(row: PackedRow) -> Tensor:
    """[S] fp32: the largest timestep of each sample. Its text sees this one where some frames are given at timestep 0, as in
    HunyuanVideo-I2V: it is what tells how far the sampling is."""
    return row.timestep.new_zeros(len(row.shapes)).scatter_reduce(0, row.run_sample, row.timestep, "amax")


class QKV(nn.Module):
    """Queries, keys and values by heads; queries and keys RMS-normalised within each head."""

    def __init__(self, width: int, head_width: int, eps: float) -> None:
        super().__init__()
        self.head_width = head_width
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = RMSNorm(head_width, eps), RMSNorm(head_width, eps)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        q = self.norm_q.by_head(self.q(x), self.head_width, rotation)  # [L, N, K]
        k = self.norm_k.by_head(self.k(x), self.head_width, rotation)  # [L, N, K]
        return q, k, self.v(x).unflatten(-1, (-1, self.head_width))


class Stream(nn.Module):
    """What a double-stream block has for the text, and again for the video."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        D = config.width
        self.eps = config.eps
        self.modulation = Modulation(D, 6)
        self.qkv = QKV(D, config.head_width, config.eps)
        self.out = nn.Linear(D, D)
        self.mlp = MLP(D, config.ffn, D, nn.GELU(approximate="tanh"))

    def before(
        self, x: Tensor, modulation: tuple[Tensor, ...], owner: Tensor, rotation: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [L, D], six of [R, D], the row of them of each token [L] -> q, k, v [L, N, K]."""
        shift, scale = modulation[:2]
        return self.qkv(layernorm_modulate(x, scale, shift, owner, self.eps), rotation)

    def after(self, x: Tensor, y: Tensor, modulation: tuple[Tensor, ...], owner: Tensor) -> Tensor:
        """x [L, D] and what attention found for it, y [L, D] -> [L, D]."""
        gate1, shift2, scale2, gate2 = modulation[2:]
        x, y = gated_layernorm(x, self.out(y), gate1, scale2, shift2, owner, self.eps)  # [L, D] each
        return gated(x, self.mlp(y), gate2, owner)


class DoubleBlock(nn.Module):
    """Text and video each with weights of their own; in attention they meet."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.text, self.video = Stream(config), Stream(config)

    def forward(self, x: Tensor, setting: MMSetting) -> Tensor:
        joint, S = setting.joint, len(setting.row.pooled)
        text, video = x.tensor_split([joint.text])  # [M, D], [L, D]
        sample, run = joint.text_owner, setting.row.runs.index  # [M], [L]
        text_modulation = self.text.modulation(setting.condition[:S])  # six [S, D]
        video_modulation = self.video.modulation(setting.condition[S:])  # six [R, D]
        text_qkv = self.text.before(text, text_modulation, sample)  # three [M, N, K]
        video_qkv = self.video.before(video, video_modulation, run, setting.video_rotation)  # three [L, N, K]
        q, k, v = (joint.meet(*pair) for pair in zip(text_qkv, video_qkv, strict=True))  # [J, N, K]
        y = setting.attention(q, k, v, joint.samples, joint.samples).flatten(-2)  # [J, D]
        text_seen, video_seen = joint.part(y)  # [M, D], [L, D]
        text = self.text.after(text, text_seen, text_modulation, sample)  # [M, D]
        video = self.video.after(video, video_seen, video_modulation, run)  # [L, D]
        return torch.cat([text, video])  # [M + L, D]


class SingleBlock(nn.Module):
    """Text and video with the same weights, attention and MLP side by side. The inputs of `out` are sorted by head: what the
    head has found, then its share of the hidden values; so a share of the heads is a stretch of the inputs."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        D = config.width
        self.eps = config.eps
        self.modulation = Modulation(D, 3)
        self.qkv = QKV(D, config.head_width, config.eps)
        self.mlp = nn.Linear(D, config.ffn)
        self.out = nn.Linear(D + config.ffn, D)

    def forward(self, x: Tensor, setting: MMSetting) -> Tensor:
        joint = setting.joint
        shift, scale, gate = self.modulation(setting.condition)  # three [S + R, D]
        y = layernorm_modulate(x, scale, shift, joint.owner, self.eps)  # [M + L, D]
        q, k, v = (joint.enter(part) for part in self.qkv(y, setting.rotation))  # [J, N, K]
        seen = joint.leave(setting.attention(q, k, v, joint.samples, joint.samples))  # [M + L, N, K]
        # [M + L, N, ffn/N]
        hidden = nn.functional.gelu(self.mlp(y), approximate="tanh").unflatten(-1, (seen.shape[1], -1))
        y = self.out(torch.cat([seen, hidden], dim=-1).flatten(-2))  # [M + L, D]
        return gated(x, y, gate, joint.owner)


class Head(nn.Module):
    """Modulated LayerNorm and the projection back to patches."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = Modulation(config.width, 2)
        self.out = nn.Linear(config.width, config.output_values)

    def forward(self, x: Tensor, condition: Tensor, run: Tensor) -> Tensor:
        shift, scale = self.modulation(condition)  # two [R, D]
        return self.out(layernorm_modulate(x, scale, shift, run, self.eps))  # [L, output_values]


class MMDiT(Model[MMSetting]):
    """Predicts, for every patch of a packed row, what the objective asks for (velocity in rectified flow)."""

    ENTRY = ("patch_embed", "text_embed")

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        D = config.width
        self.config = config
        self.attention = find_attention(config.attention)
        self.patch_embed = nn.Linear(config.patch_values, D)
        self.text_embed = (
            nn.Linear(config.text_width, D)
            if config.text == "linear"
            else TokenRefiner(config.text_width, D, config.heads, config.refiner_depth, config.eps)
        )
        self.time_embed = MLP(256, D, D, nn.SiLU())
        self.pooled_embed = MLP(config.pooled_width, D, D, nn.SiLU())
        self.guidance_embed = MLP(256, D, D, nn.SiLU()) if config.guidance_embed else None
        doubles = [DoubleBlock(config) for _ in range(config.depth)]
        singles = [SingleBlock(config) for _ in range(config.single_depth)]
        self.blocks = nn.ModuleList([*doubles, *singles])
        self.head = Head(config)

    def init_weights(self) -> None:
        """Xavier for linears; zero for modulations and the head's output, so that every block starts as the identity."""
        init_linears_and_norms(self)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.weight)
        nn.init.zeros_(self.head.out.weight)
        for name, parameter in self.named_parameters():
            if ("time_embed." in name or "guidance_embed." in name) and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)

    def setting(self, row: PackedRow) -> MMSetting:
        joint = join(row)
        with torch.autocast(row.tokens.device.type, enabled=False):
            condition = self._condition(row)  # [S + R, D], fp32
            angles = axial_angles(row.attended.grid, self.config.axes, self.config.theta)  # [pieces · L, K/2], fp32
            text_angles = angles.new_zeros(joint.pieces * joint.text, angles.shape[1])
            both = rotation_table(joint.beside(text_angles, angles))  # [pieces · (M + L), K/2, 2]
        return MMSetting(row, self.attention, joint, condition, both, rotation_table(angles))

    def enter(self, setting: MMSetting) -> Tensor:
        """[L, P] -> [M + L, D]: this part's text and video."""
        row, M = setting.row, setting.joint.text
        text = self._embed_text(row)[slice(*row.own_text)]
        text = nn.functional.pad(text, (0, 0, 0, M - len(text)))  # [M, D]
        return torch.cat([text, self.patch_embed(row.tokens)])  # [M + L, D]

    def leave(self, x: Tensor, setting: MMSetting) -> Tensor:
        """[M + L, D] -> [L, output_values]."""
        row = setting.row
        return self.head(x[setting.joint.text :], setting.condition[len(row.shapes) :], row.runs.index)

    def carried(self, row: PackedRow) -> int:
        return max(map(sum, pieces_of(row, row.own_caption))) + len(row.tokens)

    def _embed_text(self, row: PackedRow) -> Tensor:
        if isinstance(self.text_embed, TokenRefiner):
            return self.text_embed(row.text, row.caption, text_timestep(row), self.attention)  # [M, D]
        return self.text_embed(row.text)  # [M, D]

    def _condition(self, row: PackedRow) -> Tensor:
        """[S + R, D] fp32: what modulates the text of each sample, then each run: timestep and pooled text, and guidance."""
        timestep = torch.cat([text_timestep(row), row.timestep])  # [S + R]
        of_sample = self.pooled_embed(row.pooled.float())  # [S, D]
        if self.guidance_embed is not None:
            of_sample = of_sample + self.guidance_embed(timestep_embedding(row.guidance))  # [S, D]
        of_part = torch.cat([of_sample, of_sample[row.run_sample]])  # [S + R, D]
        return self.time_embed(timestep_embedding(timestep)) + of_part  # [S + R, D]


def forward_macs(config: MMDiTConfig, shape: Shape, text_tokens: int) -> int:
    """Multiply-adds of one sample of one run. See `megasora.models.flops` for what is counted."""
    D, (T, H, W), M = config.width, shape, text_tokens
    tokens = T * H * W
    joint = tokens + M
    blocks = config.depth + config.single_depth
    per_block = joint * (4 * D * D + 2 * D * config.ffn)  # the same in both kinds of blocks
    modulation = 2 * (6 * config.depth + 3 * config.single_depth) * D * D + 2 * D * D  # of text and run; the head's
    condition = 2 * (256 * D + D * D) + config.pooled_width * D + D * D
    if config.guidance_embed:
        condition += 256 * D + D * D
    text = M * config.text_width * D
    if config.text == "refiner":
        text += 256 * D + D * D + config.text_width * D + D * D  # its own condition
        text += config.refiner_depth * (M * 12 * D * D + 2 * D * D)
    ends = tokens * (config.patch_values + config.output_values) * D
    return blocks * per_block + attention_macs(config, shape, M) + modulation + condition + text + ends


def attention_macs(config: MMDiTConfig, shape: Shape, text_tokens: int) -> int:
    """Of `forward_macs` what both products of attention take."""
    T, H, W = shape
    joint = T * H * W + text_tokens
    pairs = (config.depth + config.single_depth) * joint * joint
    if config.text == "refiner":
        pairs += config.refiner_depth * text_tokens * text_tokens
    return 2 * pairs * config.width
