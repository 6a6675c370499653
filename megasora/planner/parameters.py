"""The parameters of a model, module by module, and how much of each lies on one rank: counted on the model itself, built without
memory, so that no formula can disagree with the code."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from megasora.models.families import build_model
from megasora.parallel.plan import split_dim


@dataclass(frozen=True)
class Parameter:
    """One weight. `split`: the dimension that tensor parallelism divides, if it does; `block`: the number of the block that it is
    of, None for what comes before and after them."""

    name: str
    shape: tuple[int, ...]
    split: int | None
    block: int | None

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        """The part of the model that it is of."""
        return self.name.partition(".")[0]

    @property
    def is_hidden_matrix(self) -> bool:
        """Whether Muon updates it (engines/optim.py)."""
        return self.block is not None and len(self.shape) == 2 and ".weight" in self.name

    def divided(self, tp: int) -> tuple[int, ...]:
        """Its shape on a rank of a tensor group."""
        if self.split is None or tp == 1:
            return self.shape
        return tuple(n // tp if dim == self.split else n for dim, n in enumerate(self.shape))

    def here(self, tp: int) -> int:
        return math.prod(self.divided(tp))

    def stored(self, tp: int, shards: int) -> int:
        """Numbers that a rank stores where FSDP cuts the first dimension: padded, so that all ranks have alike."""
        rows, *rest = self.divided(tp)
        return math.ceil(rows / shards) * math.prod(rest)

    def owned(self, tp: int, shards: int, place: int = 0) -> int:
        """Numbers of it that the rank at this place of the shards really has."""
        rows, *rest = self.divided(tp)
        share = math.ceil(rows / shards)
        return max(0, min(share, rows - place * share)) * math.prod(rest)


@lru_cache(maxsize=64)
def model_parameters(config: Any) -> tuple[Parameter, ...]:
    """Of a family's config, in the model's order."""
    with torch.device("meta"):
        model = build_model(config)
    return tuple(
        Parameter(name, tuple(tensor.shape), split_dim(config.family, name), block_number(name))
        for name, tensor in model.named_parameters()
    )


@dataclass(frozen=True)
class Sizes:
    """Numbers of some parameters on one rank: whole, as FSDP stores them, and what is really its own; the first two also of what
    tensor parallelism leaves whole; and those that an optimizer keeps for its own."""

    here: int
    stored: int
    owned: int
    whole_here: int
    whole_stored: int
    adamw: int
    muon: int


@lru_cache(maxsize=4096)
def sizes(config: Any, tp: int, shards: int) -> dict[int | str, Sizes]:
    """By block number, and of what is around the blocks by module."""
    found: dict[int | str, list[tuple[int, ...]]] = {}
    for p in model_parameters(config):
        here, stored, owned = p.here(tp), p.stored(tp, shards), p.owned(tp, shards)
        whole = (here, stored) if p.split is None else (0, 0)
        adamw = 2 * owned + 1  # two moments and a counter
        values = (here, stored, owned, *whole, adamw, owned if p.is_hidden_matrix else adamw)
        found.setdefault(p.module if p.block is None else p.block, []).append(values)
    return {key: Sizes(*map(sum, zip(*values, strict=True))) for key, values in found.items()}


def block_number(name: str) -> int | None:
    found = re.match(r"blocks\.(\d+)\.", name)
    return int(found[1]) if found else None


def by_module(parameters: Iterable[Parameter]) -> dict[str, int]:
    """Numbers of each module: of a block its parts, summed over the blocks."""
    counts: dict[str, int] = {}
    for parameter in parameters:
        name = re.sub(r"^blocks\.\d+\.", "blocks.", parameter.name)
        parts = name.split(".")
        key = ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
        counts[key] = counts.get(key, 0) + parameter.count
    return counts
