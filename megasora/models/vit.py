"""ViT and ViViT: a plain pre-norm transformer over patches with a class token, trained as a classifier on labels.

ViT (Dosovitskiy et al. 2021) reads pictures. ViViT (Arnab et al. 2021, its model 1) is the same trunk over tubelets of a
video: every token of space and time attends to every other. Positions are learned, so all samples have the config's grid.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from megasora.models.attention import find_attention
from megasora.models.base import Model, ModelConfig, Setting
from megasora.models.layers import MLP, LayerNorm, MultiHeadAttention, join, together
from megasora.models.packing import PackedRow, Patch, Segments, Shape, on_device


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(ModelConfig):
    """Shape of the model. `image_size` is the side of a frame in rows of what comes in: pixels, or a latent's."""

    channels: int = 3
    patch: Patch = (1, 16, 16)
    classes: int = 1000
    ffn: int = 1024  # hidden width of the MLP
    image_size: int = 224
    frames: int = 1
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    eps: float = 1e-12

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ffn", "image_size", "frames", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")
        for name in ("text_width", "pooled_width", "learn_sigma"):
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)}: a classifier has none; leave it out")
        pt, ph, pw = self.patch
        for name, step in (("frames", pt), ("image_size", ph), ("image_size", pw)):
            size = getattr(self, name)
            if size % step:
                nearest = max(1, round(size / step)) * step
                raise ValueError(f"{name}={size}: patch {list(self.patch)} does not divide it; nearest is {nearest}")

    @property
    def grid(self) -> Shape:
        """(T, H, W) in patches of every sample."""
        pt, ph, pw = self.patch
        return self.frames // pt, self.image_size // ph, self.image_size // pw


@dataclass(frozen=True, kw_only=True)
class ViTConfig(ClassifierConfig):
    """Of an image classifier (Dosovitskiy et al. 2020)."""

    family: Literal["vit"] = "vit"


@dataclass(frozen=True, kw_only=True)
class ViViTConfig(ClassifierConfig):
    """Of a video classifier over tubelets (Arnab et al. 2021, model 1: all pairs attend)."""

    family: Literal["vivit"] = "vivit"
    patch: Patch = (2, 16, 16)
    frames: int = 32
    classes: int = 400
    activation: Literal["gelu", "gelu_tanh"] = "gelu_tanh"
    eps: float = 1e-6


PRESETS: dict[str, ClassifierConfig] = {
    "vit-b16": ViTConfig(width=768, depth=12, heads=12, ffn=3072),
    "vivit-b16x2": ViViTConfig(width=768, depth=12, heads=12, ffn=3072),
}


@dataclass(frozen=True)
class JointSetting(Setting):
    """What the blocks are given."""

    joint: Segments  # of the tokens that go through blocks: each sample's class token, say, and its patches


class Block(nn.Module):
    """ViT's block: attention and MLP, each after its LayerNorm and beside the residual."""

    def __init__(self, width: int, heads: int, ffn: int, activation: Literal["gelu", "gelu_tanh"], eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(width, eps), LayerNorm(width, eps)
        self.attention = MultiHeadAttention(width, heads)
        self.mlp = MLP(width, ffn, width, nn.GELU(approximate="tanh" if activation == "gelu_tanh" else "none"))

    def forward(self, x: Tensor, setting: JointSetting) -> Tensor:
        y = self.norm1(x)  # [L, D]
        x = x + self.attention(y, y, setting.joint, setting.joint, setting.attention)  # [L, D]
        return x + self.mlp(self.norm2(x))  # [L, D]


class ViT(Model[JointSetting]):
    """Says for every sample of a packed row which class it is of; ViViT too, given its config."""

    ENTRY = ("patch_embed", "cls", "positions")
    EXIT = ("norm", "head")

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        D, (T, H, W) = config.width, config.grid
        self.config = config
        self.attention = find_attention(config.attention)
        self.patch_embed = nn.Linear(config.patch_values, D)
        self.cls = nn.Parameter(torch.zeros(1, D))
        self.positions = nn.Parameter(torch.zeros(1 + T * H * W, D))  # the class token's first
        self.blocks = nn.ModuleList(
            Block(D, config.heads, config.ffn, config.activation, config.eps) for _ in range(config.depth)
        )
        self.norm = LayerNorm(D, config.eps)
        self.head = nn.Linear(D, config.classes)

    def init_weights(self) -> None:
        """As ViT's own code: Xavier for linears, normal positions, zero for the class token, the biases and the head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.positions, std=0.02)
        nn.init.zeros_(self.cls)
        nn.init.zeros_(self.head.weight)

    def setting(self, row: PackedRow) -> JointSetting:
        """Timesteps, text and labels of the row are not looked at. Raises ValueError for a sample of another grid."""
        self._check(row)
        return JointSetting(row, self.attention, together(class_tokens(row), row.video))

    def enter(self, setting: JointSetting) -> Tensor:
        """[L, P] clean patches -> [S + L, D]."""
        row, (_, H, W) = setting.row, self.config.grid
        place = (row.grid * row.grid.new_tensor([H * W, W, 1])).sum(1)  # [L] of each patch among those of its sample
        x = self.patch_embed(row.tokens)  # [L, D]
        x = x + self.positions[1 + place].type_as(x)  # [L, D]
        cls = (self.cls + self.positions[:1]).type_as(x).expand(len(row.shapes), -1)  # [S, D]
        return join(cls, class_tokens(row), x, row.video)[0]  # [S + L, D]

    def leave(self, x: Tensor, setting: JointSetting) -> Tensor:
        """[S + L, D] -> [S, classes] logits, those of padding without meaning."""
        cls = x[on_device(setting.joint.starts, x.device)]  # [S, D]
        return self.head(self.norm(cls))  # [S, classes]

    def carried(self, row: PackedRow) -> int:
        return len(row.shapes) + len(row.tokens)

    def _check(self, row: PackedRow) -> None:
        """Padding, a single row of patches after the samples, may have any length."""
        *samples, last = row.shapes
        padding = bool(samples) and last[:2] == (1, 1)
        for shape in samples if padding else row.shapes:
            if shape != self.config.grid:
                raise ValueError(
                    f"shape={list(shape)} in patches: positions are learned for {list(self.config.grid)} "
                    f"(image_size={self.config.image_size}, frames={self.config.frames})"
                )


def class_tokens(row: PackedRow) -> Segments:
    """One a sample."""
    return Segments((1,) * len(row.shapes), row.tokens.device)


def forward_macs(config: ClassifierConfig, shape: Shape, text_tokens: int) -> int:
    """Multiply-adds of one sample's forward pass; the class token is one token more."""
    D, (T, H, W) = config.width, shape
    tokens = T * H * W + 1
    blocks = config.depth * tokens * (4 * D * D + 2 * D * config.ffn) + attention_macs(config, shape, text_tokens)
    return blocks + (tokens - 1) * config.patch_values * D + D * config.classes


def attention_macs(config: ClassifierConfig, shape: Shape, text_tokens: int) -> int:
    """Of `forward_macs` what both products of attention take."""
    T, H, W = shape
    tokens = T * H * W + 1
    return config.depth * 2 * tokens * tokens * config.width
