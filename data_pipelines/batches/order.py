"""The global order of samples: a seeded function of position. No permutation of the samples is made, stored or sent."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xxhash


class Permutation:
    """A seeded bijection of 0..n-1, computed for one index at a time: a Feistel network, walked until it lands inside.

    Black and Rogaway 2002, "Ciphers with arbitrary finite domains". Four rounds of a 64-bit hash; under four tries on average.
    """

    ROUNDS = 4

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation of {n} items")
        self.n, self.seed = n, seed
        self.half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
        self.mask = (1 << self.half_bits) - 1

    def __call__(self, index: int) -> int:
        while True:
            index = self._encrypt(index)
            if index < self.n:
                return index

    def _encrypt(self, index: int) -> int:
        left, right = index >> self.half_bits, index & self.mask
        for round_number in range(self.ROUNDS):
            key = right.to_bytes(8, "little") + round_number.to_bytes(1, "little")
            left, right = right, left ^ (xxhash.xxh3_64_intdigest(key, seed=self.seed) & self.mask)
        return left << self.half_bits | right


@dataclass(frozen=True)
class _Epoch:
    """Shards in the order of one epoch, and at which item of the epoch each begins."""

    seed: int
    shards: np.ndarray
    begins: np.ndarray


class Order:
    """position -> item, for ever: each epoch visits all items once, in an order of its own.

    The shards are shuffled and cut into windows of `window` shards, and the items of a window are shuffled among themselves:
    whoever reads along needs no more than a window of shards at a time. `sizes` are the items of each shard.
    """

    def __init__(self, sizes: Sequence[int] | np.ndarray, seed: int, window: int) -> None:
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.seed, self.window = seed, window
        self.items = int(self.starts[-1])
        self._epoch = lru_cache(maxsize=2)(self._begin)
        self._inside = lru_cache(maxsize=8)(Permutation)

    def __call__(self, position: int) -> int:
        number, index = divmod(position, self.items)
        epoch = self._epoch(number)
        slot = int(np.searchsorted(epoch.begins, index, side="right")) - 1
        first = slot - slot % self.window
        last = min(first + self.window, len(epoch.shards))
        low, high = int(epoch.begins[first]), int(epoch.begins[last])
        index = low + self._inside(high - low, draw(epoch.seed, first))(index - low)
        slot = int(np.searchsorted(epoch.begins, index, side="right")) - 1
        return int(self.starts[epoch.shards[slot]] + index - epoch.begins[slot])

    def _begin(self, number: int) -> _Epoch:
        seed = draw(self.seed, number)
        shards = shuffled(len(self.starts) - 1, seed)
        sizes = np.diff(self.starts)[shards]
        return _Epoch(seed, shards, np.concatenate([[0], np.cumsum(sizes)]))


class Mixture:
    """position -> (source, position in that source), for ever, by weight.

    Each block of 10,000 positions has the same number of every source (its share, at least one), in an order of its own; so
    the weights hold to one in 10,000 and each source's own positions follow each other without a gap.
    """

    BLOCK = 10_000

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        if not weights or not all(weight > 0 for weight in weights) or len(weights) > self.BLOCK:
            raise ValueError(f"weights {list(weights)}: positive numbers are expected")
        self.seed = seed
        ideal = np.array(weights, np.float64) / sum(weights) * self.BLOCK
        self.quotas = np.maximum(1, np.floor(ideal)).astype(np.int64)
        while (missing := self.BLOCK - int(self.quotas.sum())) != 0:  # by largest remainder
            remainders = np.sign(missing) * (ideal - self.quotas)
            remainders[(self.quotas == 1) & (missing < 0)] = -np.inf  # of one, nothing can be taken
            self.quotas[np.argmax(remainders)] += np.sign(missing)
        self._arranged = lru_cache(maxsize=2)(self._arrange)

    def __call__(self, position: int) -> tuple[int, int]:
        if len(self.quotas) == 1:
            return 0, position
        block, place = divmod(position, self.BLOCK)
        sources, ranks = self._arranged(block)
        source = int(sources[place])
        return source, block * int(self.quotas[source]) + int(ranks[place])

    def _arrange(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each place of a block its source, and how many of that source come before it in the block."""
        sources = np.repeat(np.arange(len(self.quotas)), self.quotas)[shuffled(self.BLOCK, draw(self.seed, block))]
        ranks = np.empty(self.BLOCK, np.int64)
        for source, quota in enumerate(self.quotas):
            ranks[sources == source] = np.arange(quota)
        return sources, ranks


def shuffled(n: int, seed: int) -> np.ndarray:
    """0..n-1 in an order drawn from the seed: sorted by a hash of each number (the finaliser of MurmurHash3)."""
    with np.errstate(over="ignore"):
        hashed = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed & (2**64 - 1))
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            hashed = (hashed ^ (hashed >> np.uint64(33))) * np.uint64(factor)
        hashed ^= hashed >> np.uint64(33)
    return np.argsort(hashed, kind="stable")


def draw(*parts: int | str) -> int:
    """A 64-bit number that follows from its parts."""
    return xxhash.xxh3_64_intdigest(repr(parts).encode())


def uniform(*parts: int | str) -> float:
    """A number in [0, 1) that follows from its parts."""
    return (draw(*parts) >> 11) / 2**53
