"""Raw samples read and decoded in the background, in the batches that an encoder takes.

The batches of a shard follow from its index: whoever encodes it, with however many threads, puts the same clips together.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np

from data_pipelines.buckets import Bucket
from data_pipelines.errors import BadSample
from data_pipelines.samples.latents import About, read_about
from data_pipelines.samples.reading import read
from data_pipelines.shards.index import MEDIA, read_metadata
from data_pipelines.shards.tars import ShardSet
from data_pipelines.video.files import decode, is_image, iter_frames
from data_pipelines.video.reader import Undecodable, VideoReader
from data_pipelines.workers import WorkerPool

PIECE = 16  # frames that an encoder takes at a time
WINDOW = 64  # source samples among which clips of one shape are put together
DEPTH = 2  # pieces of a long clip that are decoded before they are wanted
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Clips of one shape that are encoded together: (row of the index, variant) each."""

    bucket: Bucket
    members: tuple[tuple[int, int], ...]


def plan_batches(wanted: dict[int, list[Bucket]], pixels: int) -> list[Batch]:
    """{row: its buckets} -> batches of at most so many pixels, or of one clip, in the order of their first members.

    So that finished samples need not wait long for those before them, only near ones are put together.
    """
    batches: list[tuple[Bucket, list[tuple[int, int]]]] = []
    rows = iter(wanted)
    while window := list(islice(rows, WINDOW)):
        filling: dict[Bucket, list[tuple[int, int]]] = {}
        for row in window:
            for variant, bucket in enumerate(wanted[row]):
                members = filling.get(bucket, [])
                if not members or (len(members) + 1) * pixels_of(bucket) > pixels:
                    members = filling[bucket] = []
                    batches.append((bucket, members))
                members.append((row, variant))
    return [Batch(bucket, tuple(members)) for bucket, members in batches]


def pixels_of(bucket: Bucket) -> int:
    return bucket.frames * bucket.height * bucket.width


def bounds_of(frames: int, compression: int) -> list[tuple[int, int]]:
    """The pieces [begin, end) that a clip goes through the encoder in: 1 + a multiple of the compression, then multiples."""
    step = max(compression, PIECE // compression * compression)
    ends = [*range(min(1 + step, frames), frames, step), frames]
    return list(zip([0, *ends], ends, strict=False))


@dataclass
class Meter:
    """How fast it goes, and what it waits for."""

    frames: int = 0  # encoded
    waited: float = 0.0  # seconds for frames that were not decoded yet

    def __post_init__(self) -> None:
        self.begin = time.monotonic()

    def wait(self, get: Callable[[], T]) -> T:
        begin = time.monotonic()
        try:
            return get()
        finally:
            self.waited += time.monotonic() - begin

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.begin, 1e-9)

    def report(self) -> dict[str, float]:
        rate, waiting = self.frames / self.seconds, self.waited / self.seconds
        return {"frames": self.frames, "frames_per_second": round(rate, 2), "waiting_for_decode": round(waiting, 4)}

    def __str__(self) -> str:
        return f"{self.frames / self.seconds:.1f} frames/s, {self.waited / self.seconds:.0%} waiting for decode"


@dataclass(frozen=True)
class Raw:
    """A raw sample, decoded for a bucket: all frames uint8 [T, H, W, 3], or the pieces of a long clip; frames a second (0: an
    image)."""

    about: About
    fps: float
    clip: np.ndarray | Iterator[np.ndarray]


def decode_raw(key: str, members: dict[str, bytes], bucket: Bucket, fps: float = 0.0) -> Raw:
    """All frames of a sample that was read; a faster clip at a rate of `fps`. Raises BadSample."""
    about, media = read_about(key, members), media_of(key, members)
    try:
        rate = rate_of(members, media, fps)
        return Raw(about, rate.shown, decode_clip(media, bucket, rate.sampled))
    except Undecodable as error:
        raise BadSample(key, str(error)) from None


def stream_raw(source: ShardSet, row: int, bucket: Bucket, bounds: list[tuple[int, int]], fps: float) -> Raw:
    """Reads a long clip and begins to decode it, in a thread of its own. Raises BadSample; its pieces raise Undecodable."""
    key, members = source.key(row), source.read(row)
    about, media = read_about(key, members), media_of(key, members)
    try:
        rate = rate_of(members, media, fps)
        return Raw(about, rate.shown, read_ahead(stream_clip(media, bucket, bounds, rate.sampled)))
    except Undecodable as error:
        raise BadSample(key, str(error)) from None


@dataclass(frozen=True)
class Rate:
    """Frames a second of a clip as it is encoded, and the rate to sample it at; None: it keeps its own frames."""

    shown: float
    sampled: float | None


def rate_of(members: dict[str, bytes], media: bytes, target: float) -> Rate:
    """Raises Undecodable."""
    fps = fps_of(members, media)
    return Rate(target, target) if 0 < target < fps else Rate(fps, None)


def fps_of(members: dict[str, bytes], media: bytes) -> float:
    """By the sample's json as the index has it, or else by the file. Raises Undecodable."""
    about = read_metadata(members["json"]) if "json" in members else None
    if about is not None:
        return float(about["fps"])
    if is_image(media):
        return 0.0
    with VideoReader(media) as reader:
        return reader.fps


class Ahead:
    """Loads batches on `threads` threads, about as many batches ahead. Clips of more than `pixels` pixels come in pieces.

    With a pool, short clips are read and decoded in its processes, which the threads then only wait for.
    """

    def __init__(
        self, source: ShardSet, pixels: int, compression: int, threads: int, pool: WorkerPool | None, fps: float = 0.0
    ) -> None:
        self.source, self.pixels, self.compression = source, pixels, compression
        self.threads, self.pool, self.fps = threads, pool, fps

    def batches(self, batches: list[Batch], meter: Meter) -> Iterator[tuple[Batch, list[Raw | BadSample]]]:
        """In their order, each with its members in theirs."""
        threads = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        try:
            coming: deque[tuple[Batch, list[Future[Raw | BadSample]]]] = deque()
            left = iter(batches)
            while True:
                for batch in islice(left, self.threads + 1 - len(coming)):
                    coming.append((batch, [threads.submit(self.load, row, batch.bucket) for row, _ in batch.members]))
                if not coming:
                    return
                batch, members = coming.popleft()
                yield batch, [meter.wait(member.result) for member in members]
        finally:
            threads.shutdown(cancel_futures=True)

    def load(self, row: int, bucket: Bucket) -> Raw | BadSample:
        try:
            if pixels_of(bucket) > self.pixels and bucket.frames > 1:
                return stream_raw(self.source, row, bucket, bounds_of(bucket.frames, self.compression), self.fps)
            raw: Raw = read(self.pool, self.source, row, partial(decode_raw, fps=self.fps), bucket)
            return raw
        except BadSample as bad:
            return bad


def pieces_of(
    clips: list[np.ndarray | Iterator[np.ndarray]], bounds: list[tuple[int, int]], meter: Meter
) -> Iterator[np.ndarray]:
    """Clips of one shape, or one long one -> uint8 [B, T, H, W, 3], piece after piece. Raises Undecodable."""
    for begin, end in bounds:
        piece = [clip[begin:end] if isinstance(clip, np.ndarray) else meter.wait(clip.__next__) for clip in clips]
        yield np.stack(piece)


def media_of(key: str, members: dict[str, bytes]) -> bytes:
    """The video or image of a raw sample. Raises BadSample."""
    media = next((content for suffix, content in members.items() if suffix in MEDIA), None)
    if media is None:
        raise BadSample(key, "no video or image")
    return media


def decode_clip(media: bytes, bucket: Bucket, fps: float | None = None) -> np.ndarray:
    """The whole clip of a bucket as uint8 [T, H, W, 3]. Raises Undecodable."""
    return decode(media, frames=bucket.frames, height=bucket.height, width=bucket.width, fps=fps)


def stream_clip(
    media: bytes, bucket: Bucket, bounds: list[tuple[int, int]], fps: float | None = None
) -> Iterator[np.ndarray]:
    """`decode_clip` in pieces: one piece in memory, however long the clip."""
    frames = iter_frames(media, frames=bucket.frames, height=bucket.height, width=bucket.width, fps=fps)
    for begin, end in bounds:
        piece = np.empty((end - begin, bucket.height, bucket.width, 3), np.uint8)
        for place in range(end - begin):
            piece[place] = next(frames)
        yield piece


def read_ahead(pieces: Iterator[np.ndarray], depth: int = DEPTH) -> Iterator[np.ndarray]:
    """The same, made in a thread of its own, the first `depth` from now on."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="stream")
    coming = deque(thread.submit(next, pieces, None) for _ in range(depth))

    def follow() -> Iterator[np.ndarray]:
        try:
            while (piece := coming.popleft().result()) is not None:
                coming.append(thread.submit(next, pieces, None))
                yield piece
        finally:
            thread.shutdown(cancel_futures=True)

    return follow()
