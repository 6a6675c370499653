"""Which rank computes which samples of a global batch, in which packed row: decided alike by every rank, from costs alone."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Assignment:
    """`rows[rank][micro]` lists samples (their place in the batch); every rank has the same number of rows, none empty."""

    rows: list[list[list[int]]]
    costs: list[float]  # per rank

    @property
    def imbalance(self) -> float:
        """Cost of the dearest rank over the mean."""
        return max(self.costs) * len(self.costs) / sum(self.costs)


def assign(tokens: Sequence[int], costs: Sequence[float], ranks: int, capacity: int) -> Assignment:
    """Spreads samples over ranks x rows of at most `capacity` tokens, in as few rows as fit.

    Dearest first, each to the cheapest row that has room (Graham 1969, LPT). Raises ValueError when a sample is larger than
    a row or the samples do not divide by the ranks.
    """
    if max(tokens) > capacity:
        raise ValueError(f"a sample of {max(tokens)} tokens is larger than a row of {capacity}")
    if len(tokens) % ranks:
        raise ValueError(f"{len(tokens)} samples do not divide over {ranks} data-parallel ranks")
    fewest = -(-sum(tokens) // (capacity * ranks))
    for rows_per_rank in range(max(1, fewest), len(tokens) // ranks + 1):
        if (assignment := _try(tokens, costs, ranks, rows_per_rank, capacity)) is not None:
            return assignment
    raise AssertionError("one sample a row always fits")


def _try(
    tokens: Sequence[int], costs: Sequence[float], ranks: int, rows_per_rank: int, capacity: int
) -> Assignment | None:
    rows: list[list[list[int]]] = [[[] for _ in range(rows_per_rank)] for _ in range(ranks)]
    used = [[0] * rows_per_rank for _ in range(ranks)]
    load = [[0.0] * rows_per_rank for _ in range(ranks)]
    for sample in sorted(range(len(tokens)), key=lambda i: (-costs[i], -tokens[i], i)):
        places = [
            (load[rank][row], sum(load[rank]), rank, row)
            for rank in range(ranks)
            for row in range(rows_per_rank)
            if used[rank][row] + tokens[sample] <= capacity
        ]
        if not places:
            return None
        _, _, rank, row = min(places)
        rows[rank][row].append(sample)
        used[rank][row] += tokens[sample]
        load[rank][row] += costs[sample]
    if not all(row for rank in rows for row in rank):
        return None
    # Within a row samples lie in order of their place in the batch.
    return Assignment([[sorted(row) for row in rank] for rank in rows], [sum(rank) for rank in load])
