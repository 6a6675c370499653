"""What every family shares: the numbers that say how a model meets its data, and the shape of a model: entry, blocks, exit."""

from collections import UserDict
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from megasora.models.attention import NAMES, Attention
from megasora.models.packing import PackedRow, Patch


class Cache(UserDict[nn.Module, tuple[Tensor, Tensor]]):
    """Of each attention layer the keys and values [M, N, K] of the frames before. No dict: wrappers of models (FSDP2 on a GPU)
    copy those among the arguments, and what layers add would be in the copy."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """`preset` gives every number that the file or the command line does not. A width of 0 means: takes no such condition."""

    preset: str = ""  # `megasora plan --list-presets` lists them
    attention: str = "auto"  # which kernels: the best that is here, or one by name
    width: int = 256
    depth: int = 8
    heads: int = 4
    channels: int = 16  # of the latent
    patch: Patch = (1, 2, 2)  # frames, rows and columns of the latent that make a token
    learn_sigma: bool = False  # each value's variance too: objective=gaussian with gaussian.variance=learned_range
    text_width: int = 0  # of the text encoder's embeddings
    pooled_width: int = 0  # of its pooled vector
    classes: int = 0  # that samples are labelled with

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")
        if self.attention not in NAMES:
            raise ValueError(f"attention={self.attention}: is not one of {', '.join(NAMES)}")
        for name in ("text_width", "pooled_width", "classes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: not below 0")
        if min(self.patch) < 1:
            raise ValueError(f"patch={list(self.patch)}: at least 1 each")
        if self.width % self.heads:
            divisors = [n for n in range(1, self.width + 1) if self.width % n == 0]
            nearest = min(divisors, key=lambda n: (abs(n - self.heads), n))
            raise ValueError(f"heads={self.heads}: do not divide width {self.width}; nearest is {nearest}")

    @property
    def block_count(self) -> int:
        """How many blocks the model has."""
        return self.depth

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def patch_values(self) -> int:
        """P, the numbers in one patch."""
        pt, ph, pw = self.patch
        return self.channels * pt * ph * pw

    @property
    def output_values(self) -> int:
        """Numbers that the model says of one patch: P, or 2·P with `learn_sigma` (P of the mean, then P of the variance)."""
        return self.patch_values * (2 if self.learn_sigma else 1)


@dataclass(frozen=True)
class Setting:
    """What all blocks are given beside the tokens: the row, who sees whom, and what a family adds."""

    row: PackedRow
    attention: Attention


S = TypeVar("S", bound=Setting)


class Model(nn.Module, Generic[S]):
    """Tokens enter, go through blocks that all have one setting, and leave. It knows nothing of processes.

    A generator gives [L, output_values] for a row, a classifier [S, classes]. `ENTRY` and `EXIT` name what only `enter` and
    only `leave` use; all else but the blocks makes the setting.
    """

    ENTRY: ClassVar[tuple[str, ...]] = ("patch_embed",)
    EXIT: ClassVar[tuple[str, ...]] = ("head",)
    config: Any
    attention: Attention
    blocks: nn.ModuleList  # each: (x [L, D], setting) -> [L, D]

    def init_weights(self) -> None:
        """Draws every parameter from torch's global generator."""
        raise NotImplementedError

    def setting(self, row: PackedRow, *options: Any) -> S:
        """What the blocks are given for this row."""
        raise NotImplementedError

    def enter(self, setting: S) -> Tensor:
        """The row's tokens [L, P] -> [L, D], for some families with tokens of the conditions among them."""
        raise NotImplementedError

    def leave(self, x: Tensor, setting: S) -> Tensor:
        """[L, D] -> the model's answer."""
        raise NotImplementedError

    def carried(self, row: PackedRow) -> int:
        """How many tokens go from block to block."""
        return len(row.tokens)

    def forward(self, row: PackedRow, *options: Any) -> Tensor:
        """[L, P] patches -> the model's answer. The options are those of `setting`."""
        setting = self.setting(row, *options)
        x = self.enter(setting)  # [L, D]
        for block in self.blocks:
            x = block(x, setting)  # [L, D]
        return self.leave(x, setting)
