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
from megasora.parallel.layout import Layout
from megasora.parallel.plan import PLANS


@dataclass(frozen=True)
class Parameter:
    """One weight. `split`: the dimension that tensor parallelism divides, if it does."""

    name: str
    shape: tuple[int, ...]
    split: int | None

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def block(self) -> int | None:
        """The number of the block that it is of; None for what comes before and after them."""
        found = re.match(r"blocks\.(\d+)\.", self.name)
        return int(found[1]) if found else None

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
        Parameter(name, tuple(tensor.shape), split_dim(config.family, name)) for name, tensor in model.named_parameters()
    )


def split_dim(family: str, name: str) -> int | None:
    """The dimension of a parameter that the family's plan divides among the ranks of a tensor group."""
    module, _, kind = name.rpartition(".")
    for pattern, style in PLANS.get(family, []):
        if re.fullmatch(pattern, module):
            return (1 if kind == "weight" else None) if style == "row" else 0
    return None


def by_module(parameters: Iterable[Parameter]) -> dict[str, int]:
    """Numbers of each module: of a block its parts, summed over the blocks."""
    counts: dict[str, int] = {}
    for parameter in parameters:
        name = re.sub(r"^blocks\.\d+\.", "blocks.", parameter.name)
        parts = name.split(".")
        key = ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
        counts[key] = counts.get(key, 0) + parameter.count
    return counts


def stage_of(config: Any, layout: Layout, block: int) -> int:
    """The pipeline stage of a block: stages have equal numbers of blocks, the first ones one more where they do not divide."""
    blocks = config.depth + (config.single_depth if config.family == "mmdit" else 0)
    small, longer = divmod(blocks, layout.pp)
    edge = longer * (small + 1)
    return block // (small + 1) if block < edge else longer + (block - edge) // small
