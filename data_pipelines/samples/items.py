"""What a run reads of a set of shards: the samples that fit a stage's buckets, as arrays that 10 million of them fit into."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data_pipelines.buckets import (
    Bucket,
    BucketConfig,
    Ladder,
    choose,
    frames_at,
    latent_ladder,
    raw_ladder,
    shares,
)
from data_pipelines.errors import DataError


class SampleSource(Protocol):
    """What the loader needs of a `ShardSet`: columns of the index shard by shard, and a sample's members by row."""

    @property
    def address(self) -> str: ...
    def __len__(self) -> int: ...
    def columns(self, *names: str) -> Iterator[tuple[np.ndarray, ...]]: ...
    def key(self, index: int) -> str: ...
    def shard_of(self, index: int) -> str: ...
    def read(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Items:
    """One item a sample, in the order of the shards; a sample's latents of several sizes (variants) are one item."""

    rows: np.ndarray  # int64 [n]: of the index, the first variant's
    text_tokens: np.ndarray  # int32 [n]: of the caption, -1 where unknown
    kinds: np.ndarray  # uint16 [n]: into `ladders`
    ladders: list[Ladder]  # the distinct ways to fit
    sizes: np.ndarray  # int64 [shards]: items of each
    unfit: int  # samples that fit no bucket
    refused: int  # samples whose scores are out of bounds

    def __len__(self) -> int:
        return len(self.rows)

    def choose(self, item: int, draws: tuple[float, float]) -> tuple[int, Bucket]:
        """The row of the index and the bucket that an item is trained as."""
        variant, bucket = choose(self.ladders[self.kinds[item]], draws)
        return int(self.rows[item]) + variant, bucket

    def variant_for(self, kind: int, bucket: Bucket) -> int | None:
        """The variant that items of a kind can be trained as in a bucket; None if they cannot."""
        return next((variant for variant, found in shares(self.ladders[kind]) if found == bucket), None)

    def expected(self) -> dict[Bucket, float]:
        """Samples of one epoch by bucket; what is seldom kept counts by its share."""
        counts: dict[Bucket, float] = {}
        for kind, n in enumerate(np.bincount(self.kinds, minlength=len(self.ladders))):
            for (_, bucket), share in shares(self.ladders[kind]).items():
                counts[bucket] = counts.get(bucket, 0.0) + share * int(n)
        return counts


def find_items(
    source: SampleSource,
    config: BucketConfig,
    *,
    encoded: bool,
    bounds: dict[str, tuple[float, float]] | None = None,
    fps: float = 0.0,
) -> Items:
    """The items of `source` for a stage: of latents (`encoded`), cut in time alone, or of raw samples, which are scaled and, if
    they are faster, sampled at `fps`.

    bounds: {score: (least, most)}; a sample without that score passes. Raises DataError when nothing fits.
    """
    bounds = bounds or {}
    numbers: dict[tuple[tuple[int, int, int], ...], int] = {}  # shapes -> kind, -1: fits nothing
    kinds: dict[Ladder, int] = {}

    def kind_of(shapes: tuple[tuple[int, int, int], ...]) -> int:
        if shapes not in numbers:
            ladder = latent_ladder(config, shapes) if encoded else raw_ladder(config, *shapes[0])
            numbers[shapes] = kinds.setdefault(ladder, len(kinds)) if ladder else -1
        return numbers[shapes]

    lengths = np.array([0, *sorted(config.frames)], np.int64)
    rows, tokens, which, sizes = [], [], [], []
    first, unfit, refused = 0, 0, 0
    names = ["frames", "height", "width", "variant", "caption_tokens", *["fps"] * bool(fps)]
    names += [f"scores.{name}" for name in bounds]
    for frames, height, width, variant, caption, *more in source.columns(*names):
        rates, scores = more[: bool(fps)], more[bool(fps) :]
        begins = np.flatnonzero((variant == 0) | (np.arange(len(variant)) == 0))
        if fps:
            frames = _sampled(frames, rates[0], fps)
        filled = lengths[np.searchsorted(lengths, frames, side="right") - 1]  # few distinct ones
        shapes = (filled << 40) | (height.astype(np.int64) << 20) | width
        kind = _kinds(shapes, begins, kind_of)
        unfit += int((kind < 0).sum())
        for score, (least, most) in zip(scores, bounds.values(), strict=True):
            outside = (score[begins] < least) | (score[begins] > most)
            refused += int((outside & (kind >= 0)).sum())
            kind = np.where(outside, -1, kind)
        fits = kind >= 0
        rows.append(first + begins[fits])
        tokens.append(caption[begins[fits]].astype(np.int32))
        which.append(kind[fits].astype(np.uint16))
        sizes.append(int(fits.sum()))
        first += len(variant)
    found = Items(
        np.concatenate(rows), np.concatenate(tokens), np.concatenate(which), list(kinds), np.array(sizes), unfit, refused
    )  # fmt: skip
    if not len(found):
        raise DataError(f"{source.address}: none of its {len(source)} samples fits the buckets of the stage")
    return found


def _sampled(frames: np.ndarray, rates: np.ndarray, fps: float) -> np.ndarray:
    """`frames_at` of many; few rates and lengths are distinct."""
    pairs = list(zip(frames.tolist(), rates.tolist(), strict=True))
    found = {pair: frames_at(*pair, fps)[0] for pair in set(pairs)}
    return np.array([found[pair] for pair in pairs], np.int64)


def _kinds(shapes: np.ndarray, begins: np.ndarray, kind_of: Any) -> np.ndarray:
    """int64 [items]: the kind of each item, from the packed shapes of its rows."""
    counts = np.diff(np.append(begins, len(shapes)))
    most = int(counts.max(initial=1))
    # One line an item, filled up with zeros: few lines are distinct.
    lines = np.zeros((len(begins), most), np.int64)
    for variant in range(most):
        has = counts > variant
        lines[has, variant] = shapes[begins[has] + variant]
    distinct, inverse = np.unique(lines[:, 0] if most == 1 else lines, axis=0, return_inverse=True)
    found = [
        kind_of(tuple((int(s) >> 40, int(s) >> 20 & 0xFFFFF, int(s) & 0xFFFFF) for s in np.atleast_1d(line) if s))
        for line in distinct
    ]
    return np.array(found, np.int64)[inverse] if found else np.empty(0, np.int64)
