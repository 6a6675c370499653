"""Buckets: the few shapes (frames, height, width) that samples of any resolution, duration and aspect ratio are cut to."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, kw_only=True)
class BucketConfig:
    """Resolutions x frame counts x aspect ratios. A resolution R stands for an area of at most R x R pixels."""

    resolutions: tuple[int, ...] = (256,)
    frames: tuple[int, ...] = (1, 17)  # 1 + a multiple of the VAE's temporal compression; 1 is an image
    aspects: tuple[str, ...] = ("21:9", "16:9", "4:3", "1:1", "3:4", "9:16")  # width:height
    multiple: int = 16  # of height and width: the VAE's compression times the model's patch

    def __post_init__(self) -> None:
        if not (self.resolutions and self.frames and self.aspects):
            raise ValueError("resolutions, frames and aspects: at least one each")
        for name in ("resolutions", "frames"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name}={list(getattr(self, name))}: positive numbers only")
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


def choose_size(config: BucketConfig, resolution: int, height: int, width: int) -> tuple[int, int]:
    """The (height, width) of a resolution whose aspect ratio is nearest to that of a height x width picture."""
    sizes = {frame_size(resolution, aspect, config.multiple) for aspect in config.aspects}
    return min(sorted(sizes), key=lambda size: abs(math.log(size[1] / size[0]) - math.log(width / height)))


def choose_frames(config: BucketConfig, frames: int) -> int | None:
    """The longest duration of the buckets that a clip of `frames` fills; None if it is shorter than all."""
    return max((f for f in config.frames if f <= frames), default=None)


def choose_latent_bucket(config: BucketConfig, frames: int, height: int, width: int) -> Bucket | None:
    """The bucket of a latent encoded at exactly (frames, height, width) pixels; None if its size is not one of the buckets'.

    A causal VAE encodes the first frames alike whatever follows, so a longer latent may be cut in time, never in space.
    """
    length = choose_frames(config, frames)
    if length is None:
        return None
    sizes = {frame_size(r, aspect, config.multiple) for r in config.resolutions for aspect in config.aspects}
    return Bucket(length, height, width) if (height, width) in sizes else None


def merge(configs: Iterable[BucketConfig]) -> list[BucketConfig]:
    """The distinct configs, in order: what `encode` must provide latents for."""
    return list(dict.fromkeys(configs))
