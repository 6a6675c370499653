from collections import Counter
from itertools import pairwise

import pytest

from data_pipelines.order import Permutation, epochs


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_permutation_is_a_bijection(n: int) -> None:
    for seed in (0, 1, 2**63 - 1):
        permutation = Permutation(n, seed)
        assert sorted(permutation(i) for i in range(n)) == list(range(n))


def test_permutation_depends_on_the_seed_and_is_no_rotation() -> None:
    a, b = ([Permutation(1000, seed)(i) for i in range(1000)] for seed in (1, 2))
    assert sum(x == y for x, y in zip(a, b, strict=True)) < 20  # two random orders agree in one place on average
    steps = Counter((y - x) % 1000 for x, y in pairwise(a))
    assert max(steps.values()) < 15


def test_every_epoch_visits_every_sample_once_in_its_own_order() -> None:
    sample_at = epochs(17, lambda epoch: 100 + epoch)
    visited = [[sample_at(epoch * 17 + i) for i in range(17)] for epoch in range(3)]
    assert all(sorted(order) == list(range(17)) for order in visited)
    assert visited[0] != visited[1] != visited[2]
    assert [sample_at(p) for p in (40, 3, 40)] == [visited[2][6], visited[0][3], visited[2][6]]


def test_neighbours_in_a_half_do_not_stay_neighbours() -> None:
    # Two Feistel rounds keep the difference of the left halves of indices whose right halves agree.
    p = Permutation(4096, 5)
    kept = sum((p(i) ^ p(i + 64)) >> 6 == (i ^ (i + 64)) >> 6 for i in range(4096 - 64))
    assert kept < 4 * 4096 / 64  # by chance one in 64; after two rounds all
