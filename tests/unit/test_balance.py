import random

import pytest

from data_pipelines.balance import assign


def test_every_sample_once_no_row_empty_none_too_long() -> None:
    rng = random.Random(0)
    for _ in range(200):
        ranks = rng.choice([1, 2, 3, 4, 8])
        tokens = [rng.choice([16, 64, 200, 640]) for _ in range(ranks * rng.randint(1, 8))]
        costs = [t * (1 + t / 1000) for t in tokens]
        result = assign(tokens, costs, ranks, capacity=640)
        placed = [i for rank in result.rows for row in rank for i in row]
        assert sorted(placed) == list(range(len(tokens)))
        assert len({len(rank) for rank in result.rows}) == 1
        for rank, cost in zip(result.rows, result.costs, strict=True):
            assert all(row and sum(tokens[i] for i in row) <= 640 for row in rank)
            assert cost == pytest.approx(sum(costs[i] for row in rank for i in row))
        assert result.imbalance == pytest.approx(max(result.costs) / (sum(result.costs) / ranks))


def test_longest_first_beats_arrival_order() -> None:
    tokens = [100, 100, 100, 100, 300, 500] * 4
    result = assign(tokens, [float(t) for t in tokens], ranks=4, capacity=1200)
    assert result.imbalance <= 1.001  # 1200 tokens a rank is possible
    blocks = [sum(tokens[rank * 6 : rank * 6 + 6]) for rank in range(4)]
    assert max(blocks) == 1200
    shuffled = [500, 300, 500, 300, 100, 100] * 2 + [100] * 12
    assert assign(shuffled, [float(t) for t in shuffled], 4, 1200).imbalance < 1.15
    in_order = [sum(shuffled[rank * 6 : rank * 6 + 6]) for rank in range(4)]
    assert max(in_order) * 4 / sum(in_order) > 1.4


def test_too_long_or_uneven_is_refused() -> None:
    with pytest.raises(ValueError, match="larger than a row"):
        assign([700], [1.0], 1, 640)
    with pytest.raises(ValueError, match="do not divide"):
        assign([10, 10, 10], [1.0] * 3, 2, 640)
