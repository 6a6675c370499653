"""Packing samples of many sizes into rows that are alike: a batch's rows, micro-batch by micro-batch, in numpy.

The largest samples open the rows of one micro-batch, and smaller ones fill each row up to the micro-batch's *level*, the cost
that none of its rows exceeds. The last micro-batches are filled together: to one level, or to what the groups' sums still
lack. Everything is a pure function; equal keys are taken in order, so that every rank finds the same rows.
"""

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[Any]
Meet = Literal["micro", "step"]

FULL = 0.98  # of the cost of a full row: what samples of uneven sizes can be expected to fill
TOGETHER = 3  # micro-batches at the end that may share a level; each way of ending is tried, the cheapest taken
LIKE = 1.5  # the largest sample over the common level, beyond which such an ending is not worth a try
SAND = 0.2  # of a level: samples cheaper than this are kept for the end, when the dearer ones have found their rows
ROUNDING = 1e-9
AT_ONCE = 6  # with 6, 12, ... micro-batches to go, 2, 3, ... are filled at once: quicker, and hardly less even


class _Samples(NamedTuple):
    """Samples not yet in a row, largest first. No sample before one of `floors` is smaller than it."""

    place: Ints
    tokens: Floats
    costs: Floats
    token_floors: Floats  # negative, so that they ascend
    cost_floors: Floats
    alike: bool  # the dearer sample is the longer one: floors are the samples' own

    def take(self, which: Ints) -> "_Samples":
        floors = self.token_floors.take(which), self.cost_floors.take(which)
        return _Samples(self.place.take(which), self.tokens.take(which), self.costs.take(which), *floors, self.alike)


def deal(cost: Floats, groups: int, meet: Meet) -> tuple[Ints, Floats]:
    """Place of every row, group x micro-batches + micro-batch, and the cost of each group.

    The dearest row of a micro-batch goes to the cheapest group; the most uneven micro-batch first, and each once more,
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
    for _ in range(2):
        for micro in uneven_first:
            total -= own[micro]
            cheapest = total.argsort(kind="stable")
            place[rows[micro]] = cheapest * micros + micro
            own[micro, cheapest] = cost[rows[micro]]
            total += own[micro]
    return place, total


def pack(tokens: Floats, costs: Floats, groups: int, capacity: int, meet: Meet) -> tuple[Ints, int]:
    """Row of every sample and the number of rows, a multiple of `groups`."""
    order = np.argsort(-(tokens / capacity + costs / costs.max()), kind="stable")
    token, cost = tokens[order], costs[order]
    token_floors, cost_floors = -np.minimum.accumulate(token), -np.minimum.accumulate(cost)
    alike = bool((token_floors == -token).all() and (cost_floors == -cost).all())
    left = _Samples(order, token, cost, token_floors, cost_floors, alike)
    # The first micro-batches whose rows have no room for another sample.
    rows = int(left.token_floors.searchsorted(tokens.min() - capacity)) // groups * groups
    row = np.full(len(tokens), -1)
    row[order[:rows]] = np.arange(rows)
    left = left.take(np.arange(rows, len(tokens)))
    mean = costs.sum() / groups
    endings: list[tuple[float, int, Ints]] = []  # (imbalance, rows, row of every sample)

    def end(row: Ints, rows: int) -> None:
        dearest = np.sort(np.bincount(row, costs, rows))[groups - 1 :: groups]
        endings.append((round(float(dearest.sum() / mean), 6), rows, row))

    while len(left.place) >= groups:
        to_go = max(1, int(-(-left.tokens.sum() // (groups * capacity))))  # micro-batches, if all were full
        ended = False
        if to_go <= TOGETHER:
            lack = np.full(groups, left.costs.sum() / groups)
            if meet == "step" and rows:
                placed = np.flatnonzero(row >= 0)
                _, total = deal(np.bincount(row[placed], costs[placed], rows), groups, meet)
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
    level = left.costs[first][-1] * copies
    rest = int(left.token_floors.searchsorted(copies * smallest - capacity))
    full = level + left.costs[rest] if rest < len(left.costs) else level
    return float(max(left.costs[first].max(), level, FULL * full)) * (1 + ROUNDING)


def _fill(left: _Samples, free: Ints, row: Ints, room: Floats, slack: Floats) -> None:
    """Gives rows to `free` samples, in place; `room` and `slack` are the tokens and the cost that each row may still take.

    In every round each row takes the largest sample that fits. All choose at once, the roomiest first: a row that wants a
    taken sample gets the next one.
    """
    active, after = np.arange(len(room)), np.zeros(len(room), np.int64)  # where each row begins to look
    step = 1
    while len(free):
        wanted = left.token_floors.searchsorted(-room.take(active))
        wanted = np.maximum(wanted, left.cost_floors.searchsorted(-slack.take(active)))
        if not left.alike:
            wanted = np.maximum(wanted, after.take(active))
        wanted = free.searchsorted(wanted)
        turn = ascending(wanted, len(row))
        wanted = wanted.take(turn)
        turn = turn[: wanted.searchsorted(len(free))]
        if len(turn) <= len(room) // 8:  # the rest of the rows is not worth a round
            return
        active = active.take(turn)
        rank = np.arange(len(turn))
        got = rank + np.maximum.accumulate(wanted[: len(turn)] - rank)
        sample = free.take(got[: got.searchsorted(len(free))])
        taker = active[: len(sample)]
        if not left.alike:  # a sample may fit in tokens and not in cost: its row looks further on, in growing steps
            fits = (left.tokens.take(sample) <= room.take(taker)) & (left.costs.take(sample) <= slack.take(taker))
            after[taker[~fits]] = sample[~fits] + step
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
    level = np.concatenate(levels) * (1 + ROUNDING)
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


def ascending(keys: Ints, limit: int) -> Ints:
    """Stable order of keys in 0..limit. numpy sorts 16 bits by radix, several times as fast as 64."""
    return (keys.astype(np.uint16) if limit < 1 << 16 else keys).argsort(kind="stable")
