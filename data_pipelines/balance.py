"""Which rank computes which samples of a global batch, in which packed row: decided alike by every rank, from costs alone.

Ranks meet once a step (plain data parallelism) or in every micro-batch (ZeRO-3, the stages of a pipeline). Rows that run at the
same time are alike: the largest samples open the rows of one micro-batch, and smaller ones fill each row up to the
micro-batch's *level*, the cost that none of its rows exceeds. Each micro-batch's rows are dealt to the groups so that the sums
come out even. The last micro-batches are filled together: to one level, or to what the sums still lack.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[Any]
Meet = Literal["micro", "step"]

FULL = 0.98  # of the cost of a full row: what samples of uneven sizes can be expected to fill
TOGETHER = 3  # micro-batches at the end that may share a level; each way of ending is tried, the cheapest taken
LIKE = 1.5  # the largest sample over the common level, beyond which such an ending is not worth a try
SAND = 0.1  # of a level: samples cheaper than this are kept for the end, when the dearer ones have found their rows
AT_ONCE = 8  # with 8, 16, ... micro-batches to go, 2, 3, ... are filled at once: quicker, and hardly less even


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
        return 1 - self.tokens / (len(self.micro_costs) * sum(self.lengths))


class _Samples(NamedTuple):
    """Samples not yet in a row, largest first. No sample before one of `floors` is smaller than it."""

    place: Ints
    tokens: Floats
    costs: Floats
    token_floors: Floats  # negative, so that they ascend
    cost_floors: Floats

    def take(self, which: Ints) -> "_Samples":
        return _Samples(*(column.take(which) for column in self))


def assign(
    tokens: Sequence[int],
    costs: Sequence[float],
    groups: int,
    capacity: int,
    meet: Meet = "micro",
    multiple: int = 128,
) -> Assignment:
    """Spreads samples over groups x rows of at most `capacity` tokens. A pure function: the same on every rank.

    `costs` are positive; a row's cost is the sum of its samples'. `meet` says when groups wait for each other: with "step" the
    last rows even out the sums, with "micro" each other. Rows are padded to a `multiple`. Raises ValueError when a sample is
    larger than a row or the samples do not divide by the groups.
    """
    token, cost = np.asarray(tokens, np.float64), np.asarray(costs, np.float64)
    if token.max() > capacity:
        raise ValueError(f"a sample of {int(token.max())} tokens is larger than a row of {capacity}")
    if len(token) % groups:
        raise ValueError(f"{len(token)} samples do not divide over {groups} data-parallel groups")
    row, rows = _pack(token, cost, groups, capacity, meet)
    micros = rows // groups
    slot_of, _ = _deal(np.bincount(row, cost, rows), groups, meet)
    slot = slot_of[row]
    longest = np.bincount(slot, token, rows).reshape(groups, micros).max(axis=0)
    return Assignment(
        samples=_ascending(slot, rows),
        ends=np.bincount(slot, minlength=rows).cumsum(),
        micro_costs=np.bincount(slot, cost, rows).reshape(groups, micros),
        lengths=[-(-int(length) // multiple) * multiple for length in longest],
        tokens=int(token.sum()),
    )


def _deal(cost: Floats, groups: int, meet: Meet) -> tuple[Ints, Floats]:
    """Place of every row, group x micro-batches + micro-batch, and the cost of each group.

    The dearest row of a micro-batch goes to the cheapest group; the most uneven micro-batch first, and each again, twice,
    against the sum of all others.
    """
    micros = len(cost) // groups
    if meet == "micro":  # like meets like: no other grouping has a smaller sum of dearest rows
        rows = np.argsort(-cost, kind="stable").reshape(micros, groups)
    else:
        rows = np.argsort(-cost.reshape(micros, groups), axis=1, kind="stable") + groups * np.arange(micros)[:, None]
    own = np.zeros((micros, groups))
    total = np.zeros(groups)
    place = np.empty(len(cost), np.int64)
    uneven_first = np.argsort(cost[rows[:, -1]] - cost[rows[:, 0]], kind="stable")
    for _ in range(3):
        for micro in uneven_first:
            total -= own[micro]
            cheapest = total.argsort(kind="stable")
            place[rows[micro]] = cheapest * micros + micro
            own[micro, cheapest] = cost[rows[micro]]
            total += own[micro]
    return place, total


def _pack(tokens: Floats, costs: Floats, groups: int, capacity: int, meet: Meet) -> tuple[Ints, int]:
    """Row of every sample and the number of rows, a multiple of `groups`."""
    order = np.argsort(-(tokens / capacity + costs / costs.max()), kind="stable")
    token, cost = tokens[order], costs[order]
    left = _Samples(order, token, cost, -np.minimum.accumulate(token), -np.minimum.accumulate(cost))
    # The first micro-batches whose rows have no room for another sample.
    rows = int(left.token_floors.searchsorted(tokens.min() - capacity)) // groups * groups
    row = np.full(len(tokens), -1)
    row[order[:rows]] = np.arange(rows)
    left = left.take(np.arange(rows, len(tokens)))
    mean = costs.sum() / groups
    endings: list[tuple[float, int, Ints]] = []  # (sum of dearest rows, rows, row of every sample)

    def end(row: Ints, rows: int) -> None:
        dearest = np.sort(np.bincount(row, costs, rows))[groups - 1 :: groups]
        endings.append((float(dearest.sum()), rows, row))

    while len(left.place) >= groups:
        to_go = max(1, int(-(-left.tokens.sum() // (groups * capacity))))  # micro-batches, if all were full
        ended = False
        if to_go <= TOGETHER:
            lack = np.full(groups, left.costs.sum() / groups)
            if meet == "step" and rows:
                placed = np.flatnonzero(row >= 0)
                _, total = _deal(np.bincount(row[placed], costs[placed], rows), groups, meet)
                lack = np.sort(mean - total)[::-1]
            for micros in range(to_go, min(to_go + 1, len(left.place) // groups) + 1):
                if to_go > 1 and left.costs[0] > LIKE * lack[0] / micros:
                    continue
                owner = _fill_all(left, lack, micros, capacity, meet)
                if ended := bool((owner >= 0).all()):
                    ending = row.copy()
                    ending[left.place] = rows + owner
                    end(ending, rows + micros * groups)
                    break
        if ended and (to_go == 1 or meet == "step"):
            break
        micros = min(1 + to_go // AT_ONCE, len(left.place) // groups)
        levels = np.repeat([_level(left, groups, micro, capacity) for micro in range(micros)], groups)
        owner, room, slack = _open(left, levels, capacity)
        _fill(left, np.arange(len(levels), len(owner)), owner, room, slack)
        row[left.place] = np.where(owner < 0, -1, rows + owner)
        rows += len(levels)
        left = left.take(np.flatnonzero(owner < 0))
    else:
        if len(left.place):
            _open_last(row, left.place, order, rows, groups)
            rows += groups
        end(row, rows)
    _, rows, row = min(endings, key=lambda ending: ending[:2])
    return row, rows


def _level(left: _Samples, groups: int, micro: int, capacity: int) -> float:
    """What the rows of a micro-batch may cost: its dearest first sample, or a full row of copies of its smallest."""
    first = slice(micro * groups, (micro + 1) * groups)
    smallest = left.tokens[first][-1]
    copies = capacity // smallest
    level = copies * left.costs[first][-1]
    rest = int(left.token_floors.searchsorted(copies * smallest - capacity))
    if rest < len(left.costs):
        level += left.costs[rest]
    return max(float(left.costs[first].max()), FULL * float(level))


def _fill(left: _Samples, free: Ints, row: Ints, room: Floats, slack: Floats) -> None:
    """Gives rows to `free` samples, in place; `room` and `slack` are the tokens and the cost that each row may still take.

    In every round each row takes the largest sample that fits. All choose at once, the roomiest first: a row that wants a
    taken sample gets the next one.
    """
    active, after = np.arange(len(room)), np.zeros(len(room), np.int64)
    step = 1
    while len(free):
        wanted = left.token_floors.searchsorted(-room.take(active))
        wanted = np.maximum(wanted, left.cost_floors.searchsorted(-slack.take(active)))
        wanted = free.searchsorted(np.maximum(wanted, after))
        turn = _ascending(wanted, len(row))
        wanted = wanted.take(turn)
        turn = turn[: wanted.searchsorted(len(free))]
        if not len(turn):
            return
        active, after = active.take(turn), after.take(turn)
        rank = np.arange(len(turn))
        got = rank + np.maximum.accumulate(wanted[: len(turn)] - rank)
        sample = free.take(got[: got.searchsorted(len(free))])
        taker = active[: len(sample)]
        fits = (left.tokens.take(sample) <= room.take(taker)) & (left.costs.take(sample) <= slack.take(taker))
        if not fits.all():  # large in one, small in the other: such a row looks further on, in growing steps
            after[: len(sample)][~fits] = sample[~fits] + step
            step *= 2
            sample, taker = sample[fits], taker[fits]
        room[taker] -= left.tokens.take(sample)
        slack[taker] -= left.costs.take(sample)
        row[sample] = taker
        free = free.take(np.flatnonzero(row.take(free) < 0))


def _fill_all(left: _Samples, lack: Floats, micros: int, capacity: int, meet: Meet) -> Ints:
    """Row of every sample when `micros` micro-batches must hold all of them, or -1 for what has no room.

    `lack` is the cost that each group should still get, the most first; the largest samples open those groups' rows.
    """
    lack, groups, levels = lack.copy(), len(lack), []
    for micro in range(micros):
        first = left.costs[micro * groups : (micro + 1) * groups]
        levels.append(np.maximum(first.max() if meet == "micro" else first, lack / (micros - micro)))
        lack -= levels[-1]
    level = np.concatenate(levels) * (1 + 1e-9)
    row, room, slack = _open(left, level, capacity)
    for end in (int(left.cost_floors.searchsorted(-SAND * level.max())), len(row)):
        _fill(left, np.flatnonzero(row[:end] < 0), row, room, slack)
        over = np.flatnonzero(row[:end] < 0)
        # What is over goes above the level: the largest to the cheapest rows that have room (Graham 1969, LPT).
        while len(over := over[left.tokens[over] <= room.max()]):
            roomy = np.flatnonzero(room >= left.tokens[over].max())
            cheapest = roomy[(-slack[roomy]).argsort(kind="stable")][: len(over)]
            samples, over = over[: len(cheapest)], over[len(cheapest) :]
            row[samples] = cheapest
            room[cheapest] -= left.tokens[samples]
            slack[cheapest] -= left.costs[samples]
    return row


def _open(left: _Samples, level: Floats, capacity: int) -> tuple[Ints, Floats, Floats]:
    """Rows of these levels opened by the first samples: row of every sample or -1, room and slack of the rows."""
    rows = len(level)
    row = np.full(len(left.place), -1)
    row[:rows] = np.arange(rows)
    return row, capacity - left.tokens[:rows], level - left.costs[:rows]


def _open_last(row: Ints, last: Ints, order: Ints, rows: int, groups: int) -> None:
    """Gives `last`, fewer than the groups, rows of their own; the smallest samples that share a row open the others."""
    placed = order[row[order] >= 0]
    _, first = np.unique(row[placed], return_index=True)
    shared = np.delete(placed, first)
    row[np.concatenate((last, shared[len(shared) - (groups - len(last)) :]))] = np.arange(rows, rows + groups)


def _ascending(keys: Ints, limit: int) -> Ints:
    """Stable order of keys in 0..limit. numpy sorts 16 bits by radix, several times as fast as 64."""
    return (keys.astype(np.uint16) if limit < 1 << 16 else keys).argsort(kind="stable")
