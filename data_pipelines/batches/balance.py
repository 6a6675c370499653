"""Which rank computes which samples of a global batch, in which packed row: decided alike by every rank, from costs alone.

Ranks meet once a step, or in every micro-batch (ZeRO-3, rows of many widths): their sums must be equal, or the rows that run
at the same time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from data_pipelines.batches.row_packing import Floats, Ints, Meet, ascending, deal, pack


@dataclass(frozen=True, eq=False)
class Assignment:
    """Every group has the same number of rows, none empty. Samples are named by their place in the batch.

    A group is the ranks that share a row: one, or those of a context-parallel group. `micro_costs` are [group, micro];
    `lengths[micro]` are the tokens to which the rows of a micro-batch are padded, in all groups alike.
    """

    samples: Ints  # by group, micro-batch and place
    ends: Ints  # of the rows in `samples`
    micro_costs: Floats
    lengths: list[int]
    tokens: int  # of all samples
    widths: list[int] = field(default_factory=list)  # how many groups share each row; none: all rows are of one group

    def of(self, group: int) -> list[list[int]]:
        """A group's rows, one a micro-batch."""
        micros = len(self.lengths)
        ends = self.ends[group * micros : (group + 1) * micros]
        starts = [self.ends[group * micros - 1] if group else 0, *ends[:-1]]
        return [self.samples[start:end].tolist() for start, end in zip(starts, ends, strict=True)]

    @cached_property
    def rows(self) -> list[list[list[int]]]:
        """`rows[group][micro]`: samples."""
        return [self.of(group) for group in range(len(self.micro_costs))]

    @property
    def costs(self) -> list[float]:
        """Cost of each group."""
        return self.micro_costs.sum(axis=1).tolist()

    @property
    def imbalance(self) -> float:
        """Time of a step over the mean, when groups meet once a step: the dearest group's cost over the mean."""
        return float(self.micro_costs.sum(axis=1).max() * len(self.micro_costs) / self.micro_costs.sum())

    @property
    def micro_imbalance(self) -> float:
        """Time of a step over the mean, when groups meet in every micro-batch: sum of the dearest rows over the mean."""
        return float(self.micro_costs.max(axis=0).sum() * len(self.micro_costs) / self.micro_costs.sum())

    @property
    def padding(self) -> float:
        """Share of padding in the rows."""
        widths = self.widths or [1] * len(self.lengths)
        places = sum(length / width for length, width in zip(self.lengths, widths, strict=True))
        return 1 - self.tokens / (len(self.micro_costs) * places)


def assign(
    tokens: Sequence[int],
    costs: Sequence[float],
    groups: int,
    capacity: int,
    meet: Meet = "micro",
    multiple: int = 128,
) -> Assignment:
    """Spreads samples over groups x rows of at most `capacity` tokens. A pure function: the same on every rank.

    `costs` are positive; a row's cost is the sum of its samples'. `meet` says when groups wait for each other: once a "step",
    then the sums are evened out above all, or in every "micro"-batch, then the rows are. Rows are padded to a `multiple`.
    Raises ValueError when a sample is larger than a row or the samples do not divide by the groups.
    """
    token, cost = np.asarray(tokens, np.float64), np.asarray(costs, np.float64)
    if token.max() > capacity:
        raise ValueError(f"a sample of {int(token.max())} tokens is larger than a row of {capacity}")
    if len(token) % groups:
        raise ValueError(f"{len(token)} samples do not divide over {groups} data-parallel groups")
    return spread(token, cost, groups, capacity, meet, multiple)


def spread(token: Floats, cost: Floats, groups: int, capacity: int, meet: Meet, multiple: int) -> Assignment:
    """`assign` of any number of samples that leaves no group without."""
    row, rows = pack(token, cost, groups, capacity, meet)
    micros = rows // groups
    slot_of, _ = deal(np.bincount(row, cost, rows), groups, meet)
    slot = slot_of[row]
    longest = np.bincount(slot, token, rows).reshape(groups, micros).max(axis=0)
    return Assignment(
        samples=ascending(slot, rows),
        ends=np.bincount(slot, minlength=rows).cumsum(),
        micro_costs=np.bincount(slot, cost, rows).reshape(groups, micros),
        lengths=[-(-int(length) // multiple) * multiple for length in longest],
        tokens=int(token.sum()),
    )
