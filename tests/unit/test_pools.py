"""Rows of several widths: every sample once, no row empty or too long, ranks of one row agree, and memory is even."""

import random

import pytest

from data_pipelines.batches.pools import assign_pools


@pytest.mark.parametrize("pools", [1, 2, 3])
@pytest.mark.parametrize("widths", [[1, 2], [1, 2, 4], [1, 2, 4, 8]])
def test_every_sample_once_in_rows_of_the_smallest_width_that_holds_it(pools: int, widths: list[int]) -> None:
    rng, capacity = random.Random(0), 1024 * widths[-1]
    for _ in range(60):
        count = pools * rng.randint(1, 40)
        tokens = [min(capacity, int(rng.lognormvariate(6.5, 1.2)) + 1) for _ in range(count)]
        costs = [t + t * t / 5000 for t in tokens]
        found = assign_pools(tokens, costs, pools, widths, capacity, 128 * widths[-1])
        assert len(found.rows) == pools * widths[-1]
        assert found.widths == sorted(found.widths, reverse=True)
        counted = [0.0] * count
        for rank, rows in enumerate(found.rows):
            assert len(rows) == len(found.lengths) == len(found.widths)
            for row, length, width in zip(rows, found.lengths, found.widths, strict=True):
                assert row
                assert sum(tokens[i] for i in row) <= length <= capacity * width // widths[-1]
                assert length % (128 * width) == 0
                first = rank // width * width
                assert row == found.rows[first][rows.index(row)]  # those that share a row agree on it
                for i in row:
                    counted[i] += 1 / width
        assert counted == pytest.approx([1.0] * count)
        assert sum(found.costs) == pytest.approx(sum(costs))
        assert 0 <= found.padding < 1


def test_what_a_width_cannot_share_evenly_goes_to_the_next() -> None:
    found = assign_pools([3900, 100, 90, 80, 70, 60], [1.0] * 6, 1, [1, 2, 4], 4096)
    assert found.widths == [4, 1]
    assert [rows[0] for rows in found.rows] == [[0, 1]] * 4
    assert sorted(i for rows in found.rows for i in rows[-1]) == [2, 3, 4, 5]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="larger than a row"):
        assign_pools([5000, 1], [1.0, 1.0], 1, [1, 2], 4096)
    with pytest.raises(ValueError, match="do not divide"):
        assign_pools([10, 10, 10], [1.0] * 3, 2, [1, 2], 4096)
