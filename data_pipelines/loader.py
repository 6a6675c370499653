"""Global batches of latents, read ahead of the training step: step -> positions -> samples -> this rank's packed rows.

Everything but the bytes follows from (index, seed, segment, step): every rank computes the same plan without a word to the
others, and a run resumes at any step on any number of ranks.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Protocol

import pyarrow

from data_pipelines.balance import Assignment, assign
from data_pipelines.buckets import Bucket, BucketConfig, choose_latent_bucket
from data_pipelines.errors import BadSample, DataError
from data_pipelines.latent_shards import Latent, read_latent
from data_pipelines.order import Permutation, epochs


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What training reads. `capacity` is the tokens of a packed row, the unit of memory: the row is padded to it."""

    path: str = "data/latents"
    global_batch: int = 8  # samples a step, whatever the number of processes
    capacity: int = 1024  # tokens
    prefetch: int = 3  # steps read ahead
    readers: int = 2  # threads
    max_replacements: int = 16  # tries for one position before the data set is given up

    def __post_init__(self) -> None:
        for name in ("global_batch", "capacity", "prefetch", "readers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")


class LatentSource(Protocol):
    """What the loader needs of a `ShardSet`: the index as a table, and a sample's members by row."""

    directory: Path

    @property
    def table(self) -> pyarrow.Table: ...
    def __len__(self) -> int: ...
    def key(self, index: int) -> str: ...
    def read(self, index: int) -> dict[str, bytes]: ...


@dataclass(frozen=True)
class Sample:
    """One sample of a batch. `position` names it in the segment's order: its noise and timestep follow from that."""

    position: int
    key: str
    bucket: Bucket
    latent: Latent


@dataclass(frozen=True)
class Replacement:
    """A sample that could not be read, and the one of the same bucket that took its place."""

    position: int
    key: str
    reason: str
    by: str


@dataclass(frozen=True)
class StepBatch:
    """This rank's rows of one global batch, and what every rank knows of the whole."""

    rows: list[list[Sample]]
    keys: list[str]  # of the global batch, in order of position
    buckets: dict[str, int]  # of the global batch: bucket -> samples
    tokens: int  # of the global batch, without padding
    cost: float  # of the global batch, in the unit of the cost function
    imbalance: float  # the dearest rank's cost over the mean
    replacements: list[Replacement]  # this rank's


@dataclass(frozen=True)
class _Ahead:
    """A batch whose samples are being read."""

    items: list[tuple[int, Bucket]]
    assignment: Assignment
    samples: list[list[Future[Sample]]]
    replacements: list[Replacement]


class LatentLoader:
    """Reads the segment of a run: `shards` through the stage's buckets, in the order of `seed`.

    `tokens_of(bucket)` and `cost_of(bucket, text tokens)` come from the model. `obey` maps positions to the keys that an
    earlier attempt read instead. Raises DataError if no sample fits a bucket, or if none of a bucket's can be read.
    """

    def __init__(
        self,
        shards: LatentSource,
        buckets: BucketConfig,
        config: DataConfig,
        seed: int,
        tokens_of: Callable[[Bucket], int],
        cost_of: Callable[[Bucket, int], float],
        rank: int = 0,
        ranks: int = 1,
        obey: dict[int, str] | None = None,
    ) -> None:
        self.shards, self.config, self.seed = shards, config, seed
        self.tokens_of, self.cost_of = tokens_of, lru_cache(maxsize=None)(cost_of)
        self.rank, self.ranks = rank, ranks
        self.obey = obey or {}
        self.items: list[tuple[int, Bucket]] = []  # (row of the index, bucket)
        columns = [shards.table.column(name).to_pylist() for name in ("frames", "height", "width", "caption_tokens")]
        self.text_tokens = columns[3]
        for i, (frames, height, width, _) in enumerate(zip(*columns, strict=True)):
            if (bucket := choose_latent_bucket(buckets, frames, height, width)) is not None:
                self.items.append((i, bucket))
        if not self.items:
            raise DataError(f"{shards.directory}: none of its {len(shards)} latents fits the buckets of the stage")
        self.by_bucket: dict[Bucket, list[int]] = {}
        for i, bucket in self.items:
            self.by_bucket.setdefault(bucket, []).append(i)
        self.item_at = epochs(len(self.items), lambda epoch: seed + epoch)

    def batches(self, step: int) -> Generator[StepBatch]:
        """The batches of the segment's steps `step`, `step` + 1, ... without end."""
        with ThreadPoolExecutor(self.config.readers, thread_name_prefix="reader") as pool:
            pending: deque[_Ahead] = deque()
            try:
                while True:
                    while len(pending) < self.config.prefetch:
                        pending.append(self._submit(pool, step))
                        step += 1
                    ahead = pending.popleft()
                    rows = [[future.result() for future in row] for row in ahead.samples]
                    buckets = [bucket for _, bucket in ahead.items]
                    yield StepBatch(
                        rows=rows,
                        keys=[self.shards.key(i) for i, _ in ahead.items],
                        buckets={str(bucket): n for bucket, n in sorted(Counter(buckets).items())},
                        tokens=sum(map(self.tokens_of, buckets)),
                        cost=sum(ahead.assignment.costs),
                        imbalance=ahead.assignment.imbalance,
                        replacements=sorted(ahead.replacements, key=lambda r: r.position),
                    )
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def plan(self, step: int) -> tuple[list[tuple[int, Bucket]], Assignment]:
        """The items of a step in order of position, and who computes which."""
        first = step * self.config.global_batch
        items = [self.items[self.item_at(p)] for p in range(first, first + self.config.global_batch)]
        tokens = [self.tokens_of(bucket) for _, bucket in items]
        costs = [self.cost_of(bucket, self.text_tokens[i]) for i, bucket in items]
        return items, assign(tokens, costs, self.ranks, self.config.capacity)

    def _submit(self, pool: ThreadPoolExecutor, step: int) -> _Ahead:
        items, assignment = self.plan(step)
        replacements: list[Replacement] = []
        first = step * self.config.global_batch
        samples = [
            [pool.submit(self._fetch, first + i, *items[i], replacements) for i in row]
            for row in assignment.rows[self.rank]
        ]
        return _Ahead(items, assignment, samples, replacements)

    def _fetch(self, position: int, index: int, bucket: Bucket, replacements: list[Replacement]) -> Sample:
        """The sample, or a replacement of the same bucket: the log's, else the first readable in an order of its own."""
        candidates = self.by_bucket[bucket]
        logged = self.obey.get(position)
        first = next((i for i in candidates if self.shards.key(i) == logged), index)
        others = map(Permutation(len(candidates), self.seed ^ position), range(len(candidates)))
        failures: list[BadSample] = []
        for place in chain([first], (candidates[i] for i in others)):
            try:
                sample = self._read(position, place, bucket)
            except BadSample as bad:
                failures.append(bad)
                if len(failures) > self.config.max_replacements:
                    break
                continue
            if failures:
                replacements.append(Replacement(position, failures[0].key, failures[0].reason, sample.key))
            return sample
        raise DataError(f"{self.shards.directory}: no readable sample of bucket {bucket} in place of {failures[0]}")

    def _read(self, position: int, index: int, bucket: Bucket) -> Sample:
        try:
            members = self.shards.read(index)
        except OSError:  # storage has its moods; a second failure counts
            time.sleep(0.1)
            try:
                members = self.shards.read(index)
            except OSError as error:
                raise BadSample(self.shards.key(index), str(error)) from None
        key = self.shards.key(index)
        return Sample(position, key, bucket, read_latent(key, members, bucket.frames))
