"""When steps have settled, and when one run is slower than another: on times of which the answer is known."""

import json
import random
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest

from megasora.errors import CheckFailed, ConfigError
from megasora.observe.noise import AGREEING, WINDOW, counts, difference, is_steady, rank_limit
from megasora.observe.regression import check_rounds, compare, read_result


@pytest.mark.parametrize(
    ("times", "steady"),
    [
        ([1.0] * 5, False),  # too few to say
        ([1.0] * 6, True),
        ([9.0, 1.01, 1.0, 1.02, 0.99, 1.01, 1.0], True),  # what the first step compiled is over
        ([1.3, 1.2, 1.15, 1.1, 1.06, 1.03], False),
        ([1.0, 1.05, 1.1, 1.2, 1.3, 1.4], False),  # a device that gets hot
        ([1.0, 1.001, 1.002, 1.003, 1.004, 1.005], True),  # a trend, but of nothing
        ([1.0, 3.0, 0.9, 1.1, 2.0, 1.0], True),  # noise
    ],
)
def test_a_trend_is_told_from_noise(times: list[float], steady: bool) -> None:
    assert is_steady(times) is steady


def test_the_chance_of_a_trend_that_is_none() -> None:
    """What the comment beside AGREEING says."""
    pairs = [sum(a > b for a, b in combinations(order, 2)) for order in permutations(range(WINDOW))]
    assert sum(max(falls, 15 - falls) >= AGREEING for falls in pairs) / len(pairs) == pytest.approx(0.14, abs=0.005)


def test_the_counts_are_those_of_all_orders() -> None:
    m, n = 3, 2
    found = [0] * (m * n + 1)
    for order in set(permutations("a" * m + "b" * n)):
        found[sum(order[i] == "b" and order[j] == "a" for j in range(m + n) for i in range(j))] += 1
    assert counts(m, n) == found
    assert sum(counts(7, 6)) == 1716


def test_the_limits_are_those_of_the_tables() -> None:
    """Mann and Whitney's critical values at 5 %, two-sided, are one less than our k: 2 for 5 and 5, 0 for 4 and 4, 23 for 10."""
    assert [rank_limit(n, n) for n in (3, 4, 5, 6, 8, 10)] == [0, 1, 3, 6, 14, 24]


def test_the_interval_holds_what_it_should() -> None:
    """19 in 20 times, of noise with disturbed rounds among it."""
    draw, inside = random.Random(0), 0
    for _ in range(400):
        before, after = ([draw.gauss(1, 0.02) + draw.choice([0, 0, 0, 0.2]) for _ in range(6)] for _ in range(2))
        found = difference([1.1 * x for x in after], before)
        inside += found.low <= 0.1 <= found.high
    assert 0.92 < inside / 400 < 0.995


def result(costs: list[float]) -> dict[str, Any]:
    return {"schema": 2, "step_time_s": 1.0, "parts": {}, "rounds": [{"cost": cost} for cost in costs]}


NOISE = [1.0, 1.02, 0.99, 1.01, 1.3, 1.0, 0.98, 1.01]


def test_ten_percent_are_seen_in_noise_and_noise_is_not() -> None:
    old = result(NOISE)
    assert "slower than old.json" in compare(result([1.01 * x for x in NOISE]), old, "old.json", 0.05)
    with pytest.raises(CheckFailed, match=r"step_time_s: 10\.0 % slower than old\.json .*95 %.*bench\.tolerance=0\.05"):
        compare(result([1.1 * x for x in NOISE]), old, "old.json", 0.05)
    assert "10.0 % slower" in compare(result([1.1 * x for x in NOISE]), old, "old.json", 0.2)
    wild = result([0.7, 1.5, 1.1, 2.0, 0.9, 1.2])  # whose median is slower by as much, but nobody can tell
    assert "slower" in compare(wild, old, "old.json", 0.05)
    assert "faster" in compare(result([0.8 * x for x in NOISE]), old, "old.json", 0.05)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    with pytest.raises(ConfigError, match="No such file"):
        read_result(str(file))
    for text in ("{}", "[]", "no", json.dumps({"step_time_s": 1, "parts": 1, "rounds": [1]})):
        file.write_text(text)
        with pytest.raises(ConfigError, match="not a result of `megasora bench`"):
            read_result(str(file))
    file.write_text(json.dumps({"schema": 1, "step_time_s": 1, "parts": {}}))
    with pytest.raises(ConfigError, match="schema 1, which has no rounds"):
        read_result(str(file))
    check_rounds(result(NOISE), 4)
    with pytest.raises(ConfigError, match=r"bench\.rounds=1: too few"):
        check_rounds(result(NOISE), 1)
