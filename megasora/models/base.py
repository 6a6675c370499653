"""What every family shares: the numbers that say how a model meets its data, and the small interface that the rest relies on."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from megasora.models.attention import NAMES
from megasora.models.packing import PackedRow, Patch

Cache = dict[
    nn.Module, tuple[Tensor, Tensor]
]  # of each attention layer the keys and values [M, N, K] of the frames before


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """`preset` gives every number that the file or the command line does not. A width of 0 means: takes no such condition."""

    preset: str = ""
    attention: str = "auto"
    width: int = 256
    depth: int = 8
    heads: int = 4
    channels: int = 16  # of the latent
    patch: Patch = (1, 2, 2)
    learn_sigma: bool = (
        False  # gives each value's variance too, for objective=gaussian with gaussian.variance=learned_range
    )
    text_width: int = 0  # of the text encoder's embeddings
    pooled_width: int = 0  # of its pooled vector
    classes: int = 0

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


class Model(Protocol):
    """A generator gives [L, output_values] for a row, a classifier [S, classes]. It knows nothing of processes."""

    def init_weights(self) -> None:
        """Draws every parameter from torch's global generator."""
        ...

    def __call__(self, row: PackedRow) -> Tensor: ...
