"""Buckets: the few shapes (frames, height, width) that samples of any resolution, duration and aspect ratio are cut to."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class BucketConfig:
    """Resolutions x frame counts x aspect ratios. A resolution R stands for an area of at most R x R pixels.

    A sample goes to the largest resolution that it fills, and there to the most frames that it has. `keep_resolutions` and
    `keep_frames` (one for each, or none) let only that share of such samples stay; the others move to the next smaller
    bucket of theirs, and none is lost.
    """

    resolutions: tuple[int, ...] = (256,)
    frames: tuple[int, ...] = (1, 17)  # 1 + a multiple of the VAE's temporal compression; 1 is an image
    aspects: tuple[str, ...] = ("21:9", "16:9", "4:3", "1:1", "3:4", "9:16")  # width:height
    multiple: int = 16  # of height and width: the VAE's compression times the model's patch
    upscale: float = 1.25  # the largest enlargement of a side; what is smaller does not fit
    keep_resolutions: tuple[float, ...] = ()
    keep_frames: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not (self.resolutions and self.frames and self.aspects):
            raise ValueError("resolutions, frames and aspects: at least one each")
        for name in ("resolutions", "frames"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name}={list(getattr(self, name))}: positive numbers only")
        for name, others in (("keep_resolutions", self.resolutions), ("keep_frames", self.frames)):
            kept = getattr(self, name)
            if kept and (len(kept) != len(others) or not all(0 <= share <= 1 for share in kept)):
                raise ValueError(f"{name}={list(kept)}: {len(others)} numbers from 0 to 1, or none")
        if not self.upscale >= 1:
            raise ValueError(f"upscale={self.upscale}: at least 1")
        for aspect in self.aspects:
            width, _, height = aspect.partition(":")
            if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
                raise ValueError(f"aspects: {aspect!r} is not of the form 16:9")


@dataclass(frozen=True, order=True)
class Bucket:
    """A shape in pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@lru_cache
def frame_size(resolution: int, aspect: str, multiple: int) -> tuple[int, int]:
    """(height, width): of the multiples around the ideal size, with at most resolution² pixels, the nearest in aspect ratio."""
    width, height = (int(part) for part in aspect.split(":"))
    ratio = width / height
    ideal = resolution / math.sqrt(ratio)
    candidates = []
    for rows in {math.floor(ideal / multiple), math.ceil(ideal / multiple)}:
        h = max(1, rows) * multiple
        for columns in {math.floor(h * ratio / multiple), math.ceil(h * ratio / multiple)}:
            w = max(1, columns) * multiple
            if h * w <= resolution**2 or (h == multiple and w == multiple):
                candidates.append((abs(math.log(w / h / ratio)), -h * w, h, w))
    if not candidates:
        return multiple, multiple
    # The nearest aspect ratio; of equals the larger picture.
    _, _, h, w = min(candidates)
    return h, w


def buckets_of(config: BucketConfig) -> list[Bucket]:
    """All buckets, sorted; aspect ratios that round to the same shape are one."""
    return sorted(
        {
            Bucket(frames, *frame_size(resolution, aspect, config.multiple))
            for resolution in config.resolutions
            for frames in config.frames
            for aspect in config.aspects
        }
    )


def choose_size(config: BucketConfig, resolution: int, height: int, width: int) -> tuple[int, int] | None:
    """The (height, width) of a resolution whose aspect ratio is nearest to that of a height x width picture.

    None if the picture would have to be enlarged by more than `config.upscale`.
    """
    sizes = {frame_size(resolution, aspect, config.multiple) for aspect in config.aspects}
    size = min(sorted(sizes), key=lambda size: abs(math.log(size[1] / size[0]) - math.log(width / height)))
    return size if cover_scale(size, height, width) <= config.upscale else None


def cover_scale(size: tuple[int, int], height: int, width: int) -> float:
    """By how much a height x width picture is scaled to cover a size."""
    return max(size[0] / height, size[1] / width)


def choose_frames(config: BucketConfig, frames: int) -> int | None:
    """The longest duration of the buckets that a clip of `frames` fills; None if it is shorter than all."""
    return max((f for f in config.frames if f <= frames), default=None)


def frames_at(frames: int, fps: float, target: float) -> tuple[int, float]:
    """The frames that a clip has at a rate of `target`, and that rate. A slower clip, and any at a target of 0, keeps its own."""
    if not 0 < target < fps:
        return frames, fps
    seconds = (frames - 1) / Fraction(fps).limit_denominator(1001)
    return int(seconds * Fraction(target).limit_denominator(1001)) + 1, target


# What a sample can be trained as: resolutions from the largest, in each the frame counts from the longest; with the share
# that stays. `variant` says which of its latents that is.
Rung = tuple[float, tuple[int, Bucket]]
Ladder = tuple[tuple[float, tuple[Rung, ...]], ...]


def raw_ladder(config: BucketConfig, frames: int, height: int, width: int) -> Ladder:
    """Of a video or picture of that size. Empty if it fits no bucket."""
    sizes = {r: size for r in config.resolutions if (size := choose_size(config, r, height, width)) is not None}
    return _ladder(config, {r: (0, frames, size) for r, size in sizes.items()})


def latent_ladder(config: BucketConfig, shapes: tuple[tuple[int, int, int], ...]) -> Ladder:
    """Of the latents of one sample, encoded at these (frames, height, width) in pixels.

    A causal VAE encodes the first frames alike whatever follows, so a latent may be cut in time, never in space.
    """
    found: dict[int, tuple[int, int, tuple[int, int]]] = {}
    for variant, (frames, height, width) in enumerate(shapes):
        for r in config.resolutions:
            if (height, width) in {frame_size(r, aspect, config.multiple) for aspect in config.aspects}:
                found.setdefault(r, (variant, frames, (height, width)))
    return _ladder(config, found)


def _ladder(config: BucketConfig, found: dict[int, tuple[int, int, tuple[int, int]]]) -> Ladder:
    """{resolution: (variant, frames, size)} -> the ladder."""
    keep_resolutions = dict(zip(config.resolutions, config.keep_resolutions, strict=bool(config.keep_resolutions)))
    keep_frames = dict(zip(config.frames, config.keep_frames, strict=bool(config.keep_frames)))
    ladder = []
    for r in sorted(found, reverse=True):
        variant, frames, size = found[r]
        lengths = sorted((f for f in config.frames if f <= frames), reverse=True)
        rungs = tuple((keep_frames.get(f, 1.0), (variant, Bucket(f, *size))) for f in lengths)
        if rungs:
            ladder.append((keep_resolutions.get(r, 1.0), rungs))
    return tuple(ladder)


def choose(ladder: Ladder, draws: tuple[float, float]) -> tuple[int, Bucket]:
    """The variant and bucket that a sample is trained as, by two numbers in [0, 1)."""
    return _descend(_descend(ladder, draws[0]), draws[1])


def _descend(options: tuple[tuple[float, T], ...], draw: float) -> T:
    for keep, option in options[:-1]:
        if draw < keep:
            return option
        draw = (draw - keep) / (1 - keep)
    return options[-1][1]


def shares(ladder: Ladder) -> dict[tuple[int, Bucket], float]:
    """With which probability a sample becomes what."""
    found: dict[tuple[int, Bucket], float] = {}
    for share, rungs in _spread(ladder):
        for part, rung in _spread(rungs):
            if share * part:
                found[rung] = found.get(rung, 0.0) + share * part
    return found


def _spread(options: tuple[tuple[float, T], ...]) -> list[tuple[float, T]]:
    spread, left = [], 1.0
    for keep, option in options[:-1]:
        spread.append((left * keep, option))
        left *= 1 - keep
    return [*spread, (left, options[-1][1])] if options else []


def merge(configs: Iterable[BucketConfig]) -> list[BucketConfig]:
    """The distinct configs, in order: what `encode` must provide latents for."""
    return list(dict.fromkeys(configs))
