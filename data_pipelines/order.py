"""The global order of samples: a seeded function of position. Nothing is shuffled, stored or sent."""

from collections.abc import Callable

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


def epochs(n: int, seed: Callable[[int], int]) -> Callable[[int], int]:
    """position -> sample, for ever: each epoch visits 0..n-1 once, in an order of its own drawn from `seed(epoch)`."""
    current: tuple[int, Permutation] | None = None

    def sample_at(position: int) -> int:
        nonlocal current
        epoch, index = divmod(position, n)
        if current is None or current[0] != epoch:
            current = epoch, Permutation(n, seed(epoch))
        return current[1](index)

    return sample_at
