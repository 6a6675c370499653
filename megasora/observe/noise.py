"""What can be said of times that scatter: whether steps have settled, and whether one run is slower than another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

WINDOW = 6  # steps that are looked at for a trend
AGREEING = 12  # of their 15 pairs: as many or more that go one way are a trend (by chance alone, in 14 % of cases)
DRIFT = 0.02  # a trend that changes less than this is none
CONFIDENCE = 0.95


def is_steady(costs: Sequence[float]) -> bool:
    """Whether the last WINDOW times show no trend. A trend: nearly all pairs of them go the same way (Kendall's count, which no
    single outlier moves much), and the medians of the older and of the newer half differ by more than DRIFT."""
    if len(costs) < WINDOW:
        return False
    last = costs[-WINDOW:]
    falls = sum(before > after for before, after in combinations(last, 2))
    rises = sum(before < after for before, after in combinations(last, 2))
    drift = abs(median(last[WINDOW // 2 :]) / median(last[: WINDOW // 2]) - 1)
    return max(falls, rises) < AGREEING or drift <= DRIFT


@dataclass(frozen=True)
class Difference:
    """How much more one costs than the other, relatively: the estimate, and the interval that holds it at CONFIDENCE."""

    slower: float
    low: float
    high: float


def difference(after: Sequence[float], before: Sequence[float]) -> Difference:
    """Hodges and Lehmann's estimate from the costs of rounds: the median of all ratios of one round after to one before. The
    interval is that of Mann and Whitney's rank test: the k-th least and k-th largest ratio, k by the number of rounds alone.
    No distribution is assumed, and a disturbed round counts as one. Raises ValueError for too few rounds to say anything."""
    k = rank_limit(len(after), len(before))
    if k == 0:
        raise ValueError(f"{len(before)} and {len(after)} rounds are too few to tell noise from a difference")
    ratios = sorted(math.log(a / b) for a in after for b in before)
    return Difference(*(math.expm1(ratio) for ratio in (median(ratios), ratios[k - 1], ratios[-k])))


def rank_limit(m: int, n: int) -> int:
    """The largest k such that fewer than k of m·n differences have one sign by chance in (1 - CONFIDENCE) / 2 of cases at most; 0
    where there is none."""
    ways = counts(m, n)
    total, below = sum(ways), 0
    for k, count in enumerate(ways):
        below += count
        if below / total > (1 - CONFIDENCE) / 2:
            return k
    return len(ways)


def counts(m: int, n: int) -> list[int]:
    """In how many orders of m and n numbers 0, 1, ... m·n of the pairs are inverted: the coefficients of Gauss's binomial."""
    ways = [1] + [0] * (m * n)
    for i in range(1, m + 1):
        for u in range(m * n, n + i - 1, -1):  # times (1 - q^(n + i))
            ways[u] -= ways[u - n - i]
        for u in range(i, m * n + 1):  # over (1 - q^i)
            ways[u] += ways[u - i]
    return ways
