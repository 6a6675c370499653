"""The order of samples: every epoch visits all, shard windows stay together, mixtures keep their weights."""

import random
from collections import Counter
from itertools import pairwise

import pytest

from data_pipelines.batches.order import Mixture, Order, Permutation, shuffled, uniform


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


def test_neighbours_in_a_half_do_not_stay_neighbours() -> None:
    # Two Feistel rounds keep the difference of the left halves of indices whose right halves agree.
    p = Permutation(4096, 5)
    kept = sum((p(i) ^ p(i + 64)) >> 6 == (i ^ (i + 64)) >> 6 for i in range(4096 - 64))
    assert kept < 4 * 4096 / 64  # by chance one in 64; after two rounds all


def murmur_finaliser(i: int, seed: int) -> int:
    x = (i * 0x9E3779B97F4A7C15 + seed) % 2**64
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ x >> 33) * factor % 2**64
    return x ^ x >> 33


def test_shuffled_is_a_permutation_of_its_seed_alone() -> None:
    for n in (0, 1, 2, 1000):
        assert sorted(shuffled(n, 3).tolist()) == list(range(n))
    a, b = shuffled(1000, 1), shuffled(1000, 2)
    assert (a == b).sum() < 20
    assert max(Counter((y - x) % 1000 for x, y in pairwise(a.tolist())).values()) < 15
    assert shuffled(1000, 7).tolist() == sorted(range(1000), key=lambda i: murmur_finaliser(i + 1, 7))


def test_every_epoch_visits_every_item_once_in_its_own_order() -> None:
    draw = random.Random(0)
    for _ in range(60):
        sizes = [draw.choice([0, 1, 2, 7, 30]) for _ in range(draw.randrange(1, 12))] + [1]
        order = Order(sizes, seed=draw.randrange(99), window=draw.choice([1, 2, 3, 50]))
        n = sum(sizes)
        epochs = [[order(epoch * n + i) for i in range(n)] for epoch in range(3)]
        assert all(sorted(visited) == list(range(n)) for visited in epochs)
        assert n < 8 or epochs[0] != epochs[1] != epochs[2]
        assert [order(p) for p in (2 * n, 0, 2 * n)] == [epochs[2][0], epochs[0][0], epochs[2][0]]


def test_items_come_window_by_window_of_shards() -> None:
    sizes = [50] * 20
    order = Order(sizes, seed=1, window=4)
    shards = [order(p) // 50 for p in range(1000)]
    windows = [set(shards[first : first + 200]) for first in range(0, 1000, 200)]
    assert all(len(window) == 4 for window in windows)
    assert len(set().union(*windows)) == 20
    for first in range(0, 1000, 200):  # mixed inside
        assert all(len(set(shards[first + i : first + i + 40])) == 4 for i in range(0, 160, 40))


def test_a_mixture_keeps_its_weights_and_each_sources_order() -> None:
    mixture = Mixture([0.7, 0.25, 0.05], seed=4)
    found = [mixture(p) for p in range(25_000)]
    for source, weight in enumerate([0.7, 0.25, 0.05]):
        mine = [place for who, place in found if who == source]
        assert mine == list(range(len(mine)))
        assert sum(who == source for who, _ in found[:20_000]) == round(weight * 20_000)
        assert abs(sum(who == source for who, _ in found[:1000]) - 1000 * weight) < 5 * (1000 * weight) ** 0.5
    assert [mixture(p) for p in (24_000, 3, 24_000)] == [found[24_000], found[3], found[24_000]]


def test_a_small_weight_is_not_lost_and_odd_weights_add_up() -> None:
    assert Mixture([1.0, 1e-9], seed=0).quotas.tolist() == [9999, 1]
    assert Mixture([100e6, 5000, 5000], seed=0).quotas.tolist() == [9998, 1, 1]
    assert Mixture([1, 1, 1], seed=0).quotas.sum() == 10_000
    assert Mixture([2], seed=0)(12345) == (0, 12345)
    for weights in ([], [1, 0], [1, -1]):
        with pytest.raises(ValueError, match="positive"):
            Mixture(weights, seed=0)


def test_uniform_is_uniform() -> None:
    values = [uniform(1, i) for i in range(10_000)]
    assert abs(sum(values) / 10_000 - 0.5) < 0.02
    assert 0 <= min(values) < max(values) < 1
