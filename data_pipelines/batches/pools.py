"""Rows of several widths: a pool of ranks computes one long row together, or several shorter ones side by side.

Every rank of a pool has a share of the same length in every micro-batch, so memory is even and nobody waits. A sample is packed
into rows of the smallest width that holds it; short clips then need no communication in their attention.
"""

from collections.abc import Sequence

import numpy as np

from data_pipelines.batches.balance import Assignment, spread


def assign_pools(
    tokens: Sequence[int],
    costs: Sequence[float],
    pools: int,
    widths: Sequence[int],
    capacity: int,
    multiple: int = 128,
) -> Assignment:
    """Spreads samples over the ranks of `pools` pools. `widths` are how many ranks may share a row, the last of them all.

    `capacity` and `multiple` are those of a row of all ranks; narrower rows have their part of it. The groups of the assignment
    are ranks, and those that share a row name the same samples; micro-batches run from wide to narrow. A pure function. Raises
    ValueError when a sample is larger than a row or the samples do not divide by the pools.
    """
    if max(tokens) > capacity:
        raise ValueError(f"a sample of {max(tokens)} tokens is larger than a row of {capacity}")
    if len(tokens) % pools:
        raise ValueError(f"{len(tokens)} samples do not divide over {pools} data-parallel groups")
    ranks = widths[-1]
    classes = by_width(tokens, widths, capacity, pools)
    rows: list[list[list[int]]] = [[] for _ in range(pools * ranks)]  # [rank][micro] samples
    micro_costs: list[list[float]] = [[] for _ in rows]
    lengths: list[int] = []
    row_widths: list[int] = []
    for width in reversed(widths):
        mine = classes[width]
        if not mine:
            continue
        found = spread(
            np.asarray(tokens, np.float64)[mine], np.asarray(costs, np.float64)[mine], pools * ranks // width,
            capacity * width // ranks, "micro", multiple * width // ranks,
        )  # fmt: skip
        for rank in range(pools * ranks):
            rows[rank] += [[mine[i] for i in row] for row in found.rows[rank // width]]
            micro_costs[rank] += (found.micro_costs[rank // width] / width).tolist()
        lengths += found.lengths
        row_widths += [width] * len(found.lengths)
    flat = [row for of_rank in rows for row in of_rank]
    return Assignment(
        samples=np.array([i for row in flat for i in row]),
        ends=np.cumsum([len(row) for row in flat]),
        micro_costs=np.array(micro_costs),
        lengths=lengths,
        tokens=sum(tokens),
        widths=row_widths,
    )


def by_width(tokens: Sequence[int], widths: Sequence[int], capacity: int, pools: int) -> dict[int, list[int]]:
    """The samples of each width: as many as its groups share evenly, for no group may be without. The largest that are over go to
    the next width."""
    classes: dict[int, list[int]] = {}
    left = sorted(range(len(tokens)), key=lambda i: (tokens[i], i))
    for width in widths:
        fitting = sum(tokens[i] * widths[-1] <= capacity * width for i in left)
        fitting -= fitting % (pools * widths[-1] // width)
        classes[width], left = sorted(left[:fitting]), left[fitting:]
    return classes
