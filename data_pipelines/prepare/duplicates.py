"""Clips that look like an earlier one: perceptual hashes compared by the bits in which they differ."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_pipelines.prepare.clip_scores import HASH_BITS, HASH_FRAMES

CHUNK = 1 << 16  # pairs that are Python's numbers at a time
COLOUR_DISTANCE = 32  # of 255: what differs more in the mean of red, green or blue is not the same picture


def find_duplicates(signatures: np.ndarray, distance: int) -> np.ndarray:
    """uint64 [N, 5] in input order (`Meter.signature`) -> int64 [N], the kept one that each repeats, or -1 where it is kept.

    A clip is a duplicate if it differs from an earlier one that is kept in at most `distance` bits of all hashes together
    (below 0: never) and hardly in its mean colour; flat pictures, which have no waves, only if all is equal. Exact: of
    distance + 1 groups of bits, two such clips have one at least in common. Some 100 bytes a clip and 40 a
    similar pair, in however many groups it is found.
    """
    original = np.full(len(signatures), -1, np.int64)
    if distance < 0 or len(signatures) < 2:
        return original
    _, leaders, group = np.unique(signatures, axis=0, return_index=True, return_inverse=True)
    first = leaders[group.ravel()]  # of the clips with the same signature
    searched = np.sort(leaders[signatures[leaders, :HASH_FRAMES].any(1)])
    pairs = np.empty(0, np.int64)
    for found in _close_pairs(signatures[searched], distance):
        pairs = np.union1d(pairs, found)
    for begin in range(0, len(pairs), CHUNK):
        later, earlier = (
            searched[places].tolist() for places in np.divmod(pairs[begin : begin + CHUNK], len(searched))
        )
        for one, other in zip(earlier, later, strict=True):
            if original[other] < 0 and original[one] < 0:  # final: pairs that end in a clip come before others
                original[other] = one
    repeats = first != np.arange(len(first))
    original[repeats] = np.where(original[first] < 0, first, original[first])[repeats]
    return original


def _close_pairs(signatures: np.ndarray, distance: int) -> Iterator[np.ndarray]:
    """int64 [P] for each group of bits: the pairs that agree in it and are close, as later * N + earlier. N: all clips."""
    hashes, colours = signatures[:, :HASH_FRAMES], signatures[:, HASH_FRAMES].astype(np.int64)
    for group in range(distance + 1):
        values = _bits(hashes, range(group, HASH_FRAMES * HASH_BITS, distance + 1))
        order = np.lexsort(values.T)  # stable: of equal values, the earlier clip first
        ranked = values[order]
        places, step = np.arange(len(order)), 0
        found = [np.empty(0, np.int64)]
        while len(places):  # with a clip, the one `step` places on
            step += 1
            places = places[places + step < len(order)]
            places = places[(ranked[places] == ranked[places + step]).all(1)]
            earlier, later = order[places], order[places + step]
            close = np.bitwise_count(hashes[earlier] ^ hashes[later]).sum(1) <= distance
            close &= _similar_colour(colours[earlier], colours[later])
            found.append(later[close] * len(signatures) + earlier[close])
        yield np.concatenate(found)


def _bits(hashes: np.ndarray, chosen: range) -> np.ndarray:
    """uint64 [N, 4] -> uint64 [N, W], those bits of each clip's hashes packed into words."""
    words = np.zeros((len(hashes), -(-len(chosen) // 64)), np.uint64)
    for place, bit in enumerate(chosen):
        frame, shift = divmod(bit, HASH_BITS)
        words[:, place // 64] |= ((hashes[:, frame] >> np.uint64(shift)) & np.uint64(1)) << np.uint64(place % 64)
    return words


def _similar_colour(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """int64 [P] each -> bool [P]."""
    similar = np.ones(len(first), bool)
    for shift in (0, 8, 16):
        similar &= np.abs((first >> shift & 255) - (second >> shift & 255)) <= COLOUR_DISTANCE
    return similar
