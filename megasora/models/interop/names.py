"""Weights under other people's names: a map is a table of (our name, their name, how the tensor changes), read both ways."""

from collections.abc import Callable
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor

from megasora.models.packing import Patch


@dataclass(frozen=True)
class Change:
    """How a tensor of theirs becomes ours, and back."""

    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rename:
    """One line of a map. `{i}` stands for the number of a block and is tried for 0, 1, 2, ..."""

    ours: str
    theirs: str
    change: Change | None = None


def linear(ours: str, theirs: str) -> list[Rename]:
    """A weight and a bias that only change their names."""
    return [Rename(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in ("weight", "bias")]


def patch_convolution(patch: Patch) -> Change:
    """A convolution [D, C, pt, ph, pw] whose stride is its kernel, and the linear layer [D, pt·ph·pw·C] that it is."""
    pt, ph, pw = patch
    return Change(
        to_ours=lambda w: rearrange(w, "D C pt ph pw -> D (pt ph pw C)"),
        to_theirs=lambda w: rearrange(w, "D (pt ph pw C) -> D C pt ph pw", pt=pt, ph=ph, pw=pw),
    )


def leading_one() -> Change:
    """[1, ...] and [...]."""
    return Change(to_ours=lambda w: w[0], to_theirs=lambda w: w[None])


def import_weights(theirs: dict[str, Tensor], table: list[Rename], blocks: int) -> dict[str, Tensor]:
    """Their state dict under our names. Raises KeyError for a name that is missing, ValueError for names that are left over."""
    return _translate(
        theirs, [(line.theirs, line.ours, line.change.to_ours if line.change else None) for line in table], blocks
    )


def export_weights(ours: dict[str, Tensor], table: list[Rename], blocks: int) -> dict[str, Tensor]:
    """Our state dict under their names. Raises like `import_weights`."""
    return _translate(
        ours, [(line.ours, line.theirs, line.change.to_theirs if line.change else None) for line in table], blocks
    )


def _translate(
    source: dict[str, Tensor], table: list[tuple[str, str, Callable[[Tensor], Tensor] | None]], blocks: int
) -> dict[str, Tensor]:
    result, used = {}, set()
    for before, after, change in table:
        for i in range(blocks) if "{i}" in before else (0,):
            name = before.format(i=i)
            tensor = source[name]
            result[after.format(i=i)] = (change(tensor) if change else tensor).contiguous()
            used.add(name)
    if left := sorted(source.keys() - used):
        raise ValueError(f"{len(left)} weights have no place in the map, such as {left[0]}")
    return result
