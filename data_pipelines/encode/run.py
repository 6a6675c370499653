"""Raw shards -> latent shards: decoded ahead, encoded in batches of one shape, written in the order of the source.

Many workers share the shards (claims.py). What a latent shard holds follows from its source shard alone, so it does not matter
who writes it, how often somebody began, or whether two did. It appears complete, by renaming, or not at all.
"""

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.buckets import Bucket, BucketConfig, choose_frames, choose_size, frames_at
from data_pipelines.claims import Claim, Claims, Lost
from data_pipelines.encode.decode_ahead import (
    Ahead,
    Batch,
    Meter,
    Raw,
    bounds_of,
    pieces_of,
    plan_batches,
)
from data_pipelines.encode.report import Tally, publish, read_tally, write_reports
from data_pipelines.errors import BadSample, DataError
from data_pipelines.samples.latents import About, Latent, claim_manifest, latent_sample, pick, shard_report
from data_pipelines.shards.index import Row, index_name
from data_pipelines.shards.storage import sync_directory
from data_pipelines.shards.tars import ShardFile, ShardSet
from data_pipelines.video.reader import Undecodable
from data_pipelines.workers import WorkerPool

PRIVATE = ".encode"  # in the output while it is being made: claims, and what each worker is at
THREADS = 4  # that read and decode
CAPTIONS = 64  # encoded at a time

Moments = tuple[Tensor, Tensor]  # mean and log-variance [C, T, H, W]
Texts = list[tuple[Tensor, Tensor]]  # [M, E] and pooled [V] of each caption


@dataclass(frozen=True)
class Encoders:
    """What turns samples into latents. `manifest` says which encoders these are: latents of others are stale."""

    # Pieces uint8 [B, T, H, W, 3] -> [B, C, T', H', W'] each
    video: Callable[[Iterable[np.ndarray]], Iterator[Moments]]
    text: Callable[[list[str]], Texts]
    temporal_compression: int
    dtype: torch.dtype  # of the latents on disk
    manifest: dict[str, Any]
    fps: float = 0.0  # that faster clips are sampled at; 0: their own

    def clips(self, pieces: Iterable[np.ndarray], frames: int, dtype: torch.dtype) -> list[Moments]:
        """The latents of clips of one shape, of so many frames, that arrive in pieces. Raises Undecodable."""
        whole, end = torch.empty(0), 0
        for moments in self.video(pieces):
            begin, end = end, end + moments[0].shape[2]
            if begin == 0:  # all at once: small tensors that stay, among large ones that go, would make the heap grow
                B, C, _, H, W = moments[0].shape
                whole = torch.empty(2, B, C, 1 + (frames - 1) // self.temporal_compression, H, W, dtype=dtype)
            for part, values in zip(whole, moments, strict=True):
                part[:, :, begin:end] = values
        return list(zip(whole[0], whole[1], strict=True))

    def captions(self, captions: list[str]) -> Texts:
        batches = (captions[begin : begin + CAPTIONS] for begin in range(0, len(captions), CAPTIONS))
        return [text for batch in batches for text in self.text(batch)]


@dataclass(frozen=True)
class Work:
    """What all workers of an output do alike, and this one's part in it."""

    source: ShardSet
    digests: dict[str, str]  # of its shards
    output: Path
    buckets: list[BucketConfig]
    encoders: Encoders
    pixels: int  # of a batch
    claims: Claims
    ahead: Ahead
    meter: Meter

    @property
    def private(self) -> Path:
        return self.output / PRIVATE / f"of-{self.claims.token}"

    def in_order(self) -> list[int]:
        """The shards, the dearest first: what is left for the end is then small."""
        longest = max(frames for config in self.buckets for frames in config.frames)
        costs = [int(np.minimum(frames, longest).sum()) for (frames,) in self.source.columns("frames")]
        return sorted(range(len(costs)), key=lambda number: (-costs[number], number))


def encode_shards(
    source: ShardSet,
    output: Path,
    buckets: list[BucketConfig],
    encoders: Encoders,
    progress: Callable[[int, int, str], None],
    *,
    beside: dict[str, bytes] | None = None,
    batch_pixels: int = 16_000_000,
    claim_seconds: float = 300.0,
    workers: int = 0,
) -> dict[str, Any]:
    """Encodes every sample once for each size that the buckets want, a latent shard for each shard; returns the report.

    Any number of workers may do so at once; each returns when all shards are there, and the files `beside` them. Shards
    already written under the same manifest are kept: a killed run goes on. Samples that cannot be used are skipped and
    counted by reason. Raises DataError when the output belongs to other encoders or another source, or nothing can be used.
    """
    claims, meter = Claims(output / PRIVATE, claim_seconds), Meter()
    with ExitStack() as stack:
        pool = stack.enter_context(WorkerPool(workers)) if workers else None
        threads = workers + 2 if workers else THREADS
        ahead = Ahead(source, batch_pixels, encoders.temporal_compression, threads, pool, encoders.fps)
        work = Work(source, source.digests, output, buckets, encoders, batch_pixels, claims, ahead, meter)
        work.private.mkdir(parents=True, exist_ok=True)
        claim_manifest(output, encoders.manifest, work.private)
        shards = _work_through(work, progress)
    report = write_reports(source, output, work.private)
    for name, content in (beside or {}).items():
        publish(output / name, content, work.private)
    shutil.rmtree(output / PRIVATE, ignore_errors=True)  # with what killed workers left
    return {**report, "speed": {**meter.report(), "shards": shards}}


def _work_through(work: Work, progress: Callable[[int, int, str], None]) -> int:
    """Until all shards are there, whoever makes them; returns how many this worker made."""
    tars, order = work.source.tars, work.in_order()
    for path in sorted(work.output.glob("*.tar")):
        if path.name not in work.digests:
            raise DataError(f"{path}: stale latents: {work.source.address} has no such shard; choose another output")
        read_tally(work.output, path.name, work.digests[path.name])  # refuses what was made of something else
    total, made = -1, 0
    while True:
        there = {path.name for path in work.output.iterdir()}
        todo = [number for number in order if tars[number] not in there]
        left = sum(len(work.source.rows_of(number)) for number in todo)
        total = left if total < 0 else total
        if not todo:
            break
        takes = ((number, work.claims.take(tars[number])) for number in todo)
        number, claim = next((taken for taken in takes if taken[1]), (todo[0], None))
        if claim is None:
            progress(total - left, total, f"waiting for another worker's {tars[number]}")
            time.sleep(min(1.0, work.claims.seconds / 10))
            continue
        with claim:
            made += _make_shard(work, number, claim, partial(_show, work, progress, total, total - left))
    if total:
        progress(total, total, str(work.meter))
    return made


def _show(work: Work, progress: Callable[[int, int, str], None], total: int, before: int, done: int) -> None:
    progress(before + done, total, str(work.meter))


def _make_shard(work: Work, number: int, claim: Claim, progress: Callable[[int], None]) -> bool:
    """Makes a latent shard and moves it to its place, unless it is there or another worker took it over."""
    tar = work.source.tars[number]
    if (work.output / tar).exists():
        return False
    try:
        shutil.rmtree(work.private, ignore_errors=True)  # of a shard that was lost
        work.private.mkdir(parents=True)
        tally = _write_shard(work, number, work.private / tar, claim, progress)
        (work.private / shard_report(tar)).write_text(tally.text())
        if not claim.held:
            return False
        for name in (shard_report(tar), index_name(tar), tar):  # the tar last: what is there is whole
            (work.private / name).replace(work.output / name)
        sync_directory(work.output)
    except Lost:
        return False
    except Exception:
        if claim.held:
            raise
        return False  # who has it now may have tidied up already
    return True


@dataclass
class _Sample:
    """A source sample on its way through the encoders."""

    row: Row
    buckets: list[Bucket]
    about: About | None = None
    texts: Texts = field(default_factory=list)
    latents: dict[int, Moments] = field(default_factory=dict)  # by variant
    bad: str = ""

    @property
    def complete(self) -> bool:
        return bool(self.bad) or len(self.latents) == len(self.buckets)


def _at_rate(row: Row, fps: float) -> Row:
    """The row as it is encoded."""
    frames, rate = frames_at(row.frames, row.fps, fps)
    return replace(row, frames=frames, fps=rate)


def _write_shard(work: Work, number: int, path: Path, claim: Claim, progress: Callable[[int], None]) -> Tally:
    """Encodes a shard batch by batch, and writes each sample once it and those before it are complete."""
    rows = {index: _at_rate(work.source.row(index), work.encoders.fps) for index in work.source.rows_of(number)}
    wanted = {i: wanted_buckets(work.buckets, row.frames, row.height, row.width) for i, row in rows.items()}
    samples = {i: _Sample(row, wanted[i]) for i, row in rows.items()}
    waiting, tally = deque(samples), Tally(work.digests[work.source.tars[number]])
    with ShardFile(path) as shard:
        for batch, loaded in work.ahead.batches(plan_batches(wanted, work.pixels), work.meter):
            if claim.lost:
                raise Lost
            progress(len(rows) - len(waiting))
            _encode_batch(work, samples, batch, loaded)
            while waiting and samples[waiting[0]].complete:
                _write_sample(work, samples.pop(waiting.popleft()), shard, tally)
        while waiting:  # the last ones, where they fit no bucket
            _write_sample(work, samples.pop(waiting.popleft()), shard, tally)
    return tally


def _encode_batch(work: Work, samples: dict[int, _Sample], batch: Batch, loaded: list[Raw | BadSample]) -> None:
    """Through both encoders; the captions of a sample go with the first of its latents."""
    good: list[tuple[_Sample, int, Raw]] = []
    for (index, variant), found in zip(batch.members, loaded, strict=True):
        sample = samples.get(index)
        if sample is None or sample.bad:
            continue  # another of its sizes is broken
        if isinstance(found, BadSample):
            sample.bad = found.reason
        else:
            good.append((sample, variant, found))
    if not good:
        return
    bounds = bounds_of(batch.bucket.frames, work.encoders.temporal_compression)
    try:
        pieces = pieces_of([found.clip for _, _, found in good], bounds, work.meter)
        moments = work.encoders.clips(pieces, batch.bucket.frames, work.encoders.dtype)
    except Undecodable as error:  # in the middle of a long clip, which is alone
        good[0][0].bad = str(error)
        return
    work.meter.frames += batch.bucket.frames * len(good)
    for (sample, variant, found), latent in zip(good, moments, strict=True):
        sample.about, sample.latents[variant] = found.about, latent
    new = [(sample, found.about.captions) for sample, _, found in good if not sample.texts]
    texts = iter(work.encoders.captions([caption for _, captions in new for caption, _ in captions]))
    for sample, captions in new:
        sample.texts = [next(texts) for _ in captions]


def _write_sample(work: Work, sample: _Sample, shard: ShardFile, tally: Tally) -> None:
    """All sizes of a source sample, one after the other, or none."""
    if sample.bad:
        tally.drop_bad(sample.row.key, sample.bad)
        return
    if sample.about is None:
        tally.dropped["fits no bucket"] += 1
        return
    encoders = work.encoders
    for variant, bucket in enumerate(sample.buckets):
        latent, before = sample.latents[variant], shard.bytes
        shard.write(
            latent_sample(
                sample.row,
                sample.about,
                variant,
                bucket,
                latent,
                sample.texts,
                encoders.temporal_compression,
                encoders.dtype,
            )
        )
        tally.keep(bucket, sample.row.fps, shard.bytes - before)


def encode_one(encoders: Encoders, raw: Raw, bucket: Bucket, choice: float) -> Latent:
    """A raw sample as a latent, without a detour over the disk: what `encode_shards` would give, in fp32.

    `choice`: see `read_latent`.
    """
    pieces = pieces_of([raw.clip], bounds_of(bucket.frames, encoders.temporal_compression), Meter())
    ((mean, logvar),) = encoders.clips(pieces, bucket.frames, torch.float32)
    captions, weights = zip(*raw.about.captions, strict=True)
    text, pooled = encoders.text([captions[pick(weights, choice)]])[0]
    return Latent(mean, logvar, text.float(), pooled.float(), raw.fps, raw.about.label)


def wanted_buckets(configs: list[BucketConfig], frames: int, height: int, width: int) -> list[Bucket]:
    """The shapes in which a sample is encoded: each size once, at the longest duration that any stage uses of it."""
    longest: dict[tuple[int, int], int] = {}
    for config in configs:
        length = choose_frames(config, frames)
        for resolution in config.resolutions if length else ():
            size = choose_size(config, resolution, height, width)
            if size is not None:
                longest[size] = max(longest.get(size, 0), length or 0)
    return [Bucket(length, *size) for size, length in sorted(longest.items())]
