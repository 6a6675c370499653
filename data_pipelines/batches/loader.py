"""Global batches, read ahead of the training step: step -> positions -> samples -> this rank's packed rows.

Everything but the bytes follows from (index, seed, segment, step): every rank computes the same plan without a word to the
others, and a run resumes at any step on any number of ranks and workers.
"""

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_pipelines.batches.balance import Assignment, Meet, assign
from data_pipelines.batches.order import Mixture, Order, Permutation, draw, uniform
from data_pipelines.batches.pools import assign_pools
from data_pipelines.buckets import Bucket, BucketConfig
from data_pipelines.errors import BadSample, DataError
from data_pipelines.samples.items import Items, SampleSource, find_items
from data_pipelines.samples.latents import Latent, read_latent
from data_pipelines.samples.reading import Decode, as_they_are, read
from data_pipelines.shards.storage import CacheConfig
from data_pipelines.workers import WorkerPool


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What training reads. `capacity` is the most tokens of a packed row, the unit of memory."""

    path: str = "data/latents"  # a directory, or an address such as s3://bucket/latents
    mixture: dict[str, float] = field(default_factory=dict)  # several such paths by weight, in place of `path`
    latents: Literal["cached", "online"] = "cached"  # online: raw shards, through the encoders of `encode` on the way
    global_batch: int = 8  # samples a step, whatever the number of processes
    capacity: int = 1024  # tokens
    row_multiple: int = 128  # rows are padded to a multiple of so many tokens; `capacity` makes all of them alike
    window: int = 16  # shards that the order mixes at a time
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)  # what `prepare` measured: least and most
    costs: str = ""  # a JSON file {bucket: seconds}, measured, in place of FLOPs
    segments: Literal["refuse", "open"] = "refuse"  # changed data under a resumed run; open: a new segment
    prefetch: int = 3  # steps read ahead
    readers: int = 2  # threads
    workers: int = 0  # processes that read and decode for them; 0: the threads themselves
    cache: str = ""  # directory for blocks of remote shards; default: megasora/blocks in the user's cache
    cache_gb: float = 20.0  # 0: none
    max_replacements: int = 16  # tries for one position before the data set is given up

    def __post_init__(self) -> None:
        for name in ("global_batch", "capacity", "row_multiple", "window", "prefetch", "readers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")
        for name in ("workers", "cache_gb", "max_replacements"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: not below 0")
        if not all(weight > 0 for weight in self.mixture.values()):
            raise ValueError(f"mixture={self.mixture}: the weights are positive numbers")

    @property
    def weights(self) -> dict[str, float]:
        """Each data set's share."""
        return self.mixture or {self.path: 1.0}

    @property
    def latents_at(self) -> str | None:
        """The address of the first data set, whose manifest names its encoders; None if nothing is cached."""
        return next(iter(self.weights)) if self.latents == "cached" else None

    def cache_config(self) -> CacheConfig:
        default = CacheConfig.default()
        return CacheConfig(Path(self.cache) if self.cache else default.directory, int(self.cache_gb * 2**30))


@dataclass(frozen=True)
class Opener:
    """From the members of a sample to its latent, in two steps.

    `decode(key, members, bucket)` runs where the sample is read, in a worker process if there are any: it is a function of a
    module. `finish(key, what that gave, bucket, choice)` runs in this process; `choice` in [0, 1) picks one of several captions.
    Both raise BadSample.
    """

    decode: Decode
    finish: Callable[[str, Any, Bucket, float], Latent]
    encoded: bool  # the members are latents
    fps: float = 0.0  # that faster raw clips are sampled at; 0: their own


def cached_opener() -> Opener:
    """Of latent shards."""
    return Opener(decode=as_they_are, finish=_open_latent, encoded=True)


def _open_latent(key: str, members: dict[str, Any], bucket: Bucket, choice: float) -> Latent:
    return read_latent(key, members, bucket.frames, choice)


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
    shard: str
    reason: str
    by: str


@dataclass(frozen=True)
class StepBatch:
    """This rank's rows of one global batch, and what every rank knows of the whole."""

    rows: list[list[Sample]]
    lengths: list[int]  # tokens that each row is padded to, the same on all ranks
    widths: list[int]  # how many ranks share each row; 0: as many as always
    keys: list[str]  # of the global batch, in order of position
    buckets: dict[str, int]  # of the global batch: bucket -> samples
    tokens: int  # of the global batch, without padding
    flops: float  # of the global batch
    imbalance: float  # time over the mean, for ranks that wait for each other as these do
    padding: float  # share of the rows of all ranks
    replacements: list[Replacement]  # this rank's

    @property
    def own(self) -> dict[int, str]:
        """The keys of this rank's samples by position."""
        return {sample.position: sample.key for row in self.rows for sample in row}


@dataclass(frozen=True)
class Item:
    """What the plan says of one position."""

    source: int  # of the mixture
    row: int  # of its index
    bucket: Bucket
    text_tokens: int


@dataclass(frozen=True)
class _Ahead:
    """A batch whose samples are being read."""

    items: list[Item]
    assignment: Assignment
    samples: list[list[Future[Sample]]]
    replacements: list[Replacement]


class Loader:
    """Reads the segment of a run: the sources, by weight, through the stage's buckets, in the order of `seed`.

    `tokens_of(bucket)`, `flops_of(bucket, text tokens)` and `cost_of` come from the model; a cost may be of any unit. Ranks
    `meet` once a step or in every micro-batch; given `widths`, so many of them may share a row, the last of which form a pool.
    `obey` maps positions to the keys that an earlier attempt read instead; `pin`
    puts latents where a GPU copies from while it computes. Raises DataError if no sample of a source fits a bucket, or if
    none of a bucket's can be read.
    """

    def __init__(
        self,
        sources: Mapping[SampleSource, float],
        opener: Opener,
        buckets: BucketConfig,
        config: DataConfig,
        seed: int,
        tokens_of: Callable[[Bucket], int],
        flops_of: Callable[[Bucket, int], float],
        cost_of: Callable[[Bucket, int], float],
        rank: int = 0,
        ranks: int = 1,
        meet: Meet = "step",
        widths: Sequence[int] = (),
        obey: dict[int, str] | None = None,
        pin: bool = False,
    ) -> None:
        self.sources, self.opener, self.config, self.seed = list(sources), opener, config, seed
        self.tokens_of, self.flops_of, self.cost_of = tokens_of, lru_cache(None)(flops_of), lru_cache(None)(cost_of)
        self.rank, self.ranks, self.meet, self.widths, self.pin = rank, ranks, meet, widths, pin
        self.obey = obey or {}
        self.items: list[Items] = [
            find_items(source, buckets, encoded=opener.encoded, bounds=config.scores, fps=opener.fps)
            for source in self.sources
        ]
        self.mixture = Mixture(list(sources.values()), draw(seed, "mixture"))
        self.orders = [
            Order(items.sizes, draw(seed, "order", i), config.window) for i, items in enumerate(self.items)
        ]  # fmt: skip

    @property
    def samples(self) -> int:
        """Of one epoch of each source."""
        return sum(map(len, self.items))

    @property
    def unfit(self) -> int:
        """Samples that fit no bucket."""
        return sum(items.unfit for items in self.items)

    def expected(self) -> dict[Bucket, float]:
        """Samples by bucket of one epoch of each source."""
        counts: dict[Bucket, float] = {}
        for items in self.items:
            for bucket, n in items.expected().items():
                counts[bucket] = counts.get(bucket, 0.0) + n
        return dict(sorted(counts.items()))

    def batches(self, step: int) -> Generator[StepBatch]:
        """The batches of the segment's steps `step`, `step` + 1, ... without end. Raises OSError where storage fails for minutes:
        whoever starts the process again may go on."""
        with ExitStack() as stack:
            workers = stack.enter_context(WorkerPool(self.config.workers)) if self.config.workers else None
            threads = max(self.config.readers, self.config.workers)
            readers = ThreadPoolExecutor(threads, thread_name_prefix="reader")
            planner = ThreadPoolExecutor(1, thread_name_prefix="planner")
            for pool in (readers, planner):
                stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            pending: deque[Future[_Ahead]] = deque()
            while True:
                while len(pending) < self.config.prefetch:
                    pending.append(planner.submit(self._submit, readers, workers, step))
                    step += 1
                yield self._batch(pending.popleft().result())

    def _batch(self, ahead: _Ahead) -> StepBatch:
        rows = [[future.result() for future in row] for row in ahead.samples]
        buckets = [item.bucket for item in ahead.items]
        return StepBatch(
            rows=rows,
            lengths=ahead.assignment.lengths,
            widths=ahead.assignment.widths or [0] * len(ahead.assignment.lengths),
            keys=[self.sources[item.source].key(item.row) for item in ahead.items],
            buckets={str(bucket): n for bucket, n in sorted(Counter(buckets).items())},
            tokens=sum(map(self.tokens_of, buckets)),
            flops=sum(self.flops_of(item.bucket, item.text_tokens) for item in ahead.items),
            imbalance=ahead.assignment.micro_imbalance if self.meet == "micro" else ahead.assignment.imbalance,
            padding=ahead.assignment.padding,
            replacements=sorted(ahead.replacements, key=lambda r: r.position),
        )

    def example(self, bucket: Bucket, position: int) -> Sample:
        """Some sample of a bucket, to measure with."""
        for source, items in enumerate(self.items):
            for kind in range(len(items.ladders)):
                if (variant := items.variant_for(kind, bucket)) is not None:
                    row = int(items.rows[np.argmax(items.kinds == kind)]) + variant
                    return self._read(None, position, source, row, bucket)
        raise DataError(f"{self.sources[0].address}: no sample of bucket {bucket}")

    def item_at(self, position: int) -> Item:
        """What is trained at a position."""
        source, place = self.mixture(position)
        items = self.items[source]
        item = self.orders[source](place)
        draws = uniform(self.seed, position, "resolution"), uniform(self.seed, position, "frames")
        row, bucket = items.choose(item, draws)
        return Item(source, row, bucket, int(items.text_tokens[item]))

    def plan(self, step: int) -> tuple[list[Item], Assignment]:
        """The items of a step in order of position, and who computes which."""
        first = step * self.config.global_batch
        items = [self.item_at(p) for p in range(first, first + self.config.global_batch)]
        tokens = [self.tokens_of(item.bucket) for item in items]
        costs = [self.cost_of(item.bucket, item.text_tokens) for item in items]
        capacity, multiple = self.config.capacity, self.config.row_multiple
        if self.widths:
            return items, assign_pools(tokens, costs, self.ranks // self.widths[-1], self.widths, capacity, multiple)
        return items, assign(tokens, costs, self.ranks, capacity, self.meet, multiple)

    def _submit(self, readers: ThreadPoolExecutor, workers: WorkerPool | None, step: int) -> _Ahead:
        items, assignment = self.plan(step)
        replacements: list[Replacement] = []
        first = step * self.config.global_batch
        samples = [
            [readers.submit(self._fetch, workers, first + i, items[i], replacements) for i in row]
            for row in assignment.of(self.rank)
        ]
        return _Ahead(items, assignment, samples, replacements)

    def _fetch(self, workers: WorkerPool | None, position: int, item: Item, replacements: list[Replacement]) -> Sample:
        """The sample, or a replacement of the same bucket: the log's, else the first readable in an order of its own."""
        source = self.sources[item.source]
        failures: list[tuple[int, BadSample]] = []
        for row in chain([self._logged(position, item)], self._others(position, item)):
            try:
                sample = self._read(workers, position, item.source, row, item.bucket)
            except BadSample as bad:
                failures.append((row, bad))
                if len(failures) > self.config.max_replacements:
                    break
                continue
            if failures:
                first, why = failures[0]
                replacements.append(Replacement(position, why.key, source.shard_of(first), why.reason, sample.key))
            return sample
        last, why = failures[-1]
        raise DataError(
            f"{source.address}/{source.shard_of(last)}: {len(failures)} samples of bucket {item.bucket} in a row cannot be "
            f"read, the last {why}"
        )

    def _logged(self, position: int, item: Item) -> int:
        """The row to read first: the one that an earlier attempt agreed on, or the plan's."""
        logged = self.obey.get(position)
        return item.row if logged is None else self.row_of(logged, position, item)

    def row_of(self, key: str, position: int, item: Item) -> int:
        """The row of the sample `key` that took the place of an item; the item's own where no such sample could have."""
        source = self.sources[item.source]
        others = islice(self._others(position, item), self.config.max_replacements)
        return next((row for row in others if source.key(row) == key), item.row)

    def _others(self, position: int, item: Item) -> Iterator[int]:
        candidates = self._candidates(item)  # only now that one is wanted: it goes through all items of the source
        chosen = Permutation(len(candidates), draw(self.seed, position, "replacement"))
        for i in range(len(candidates)):
            yield int(candidates[chosen(i)])

    def _candidates(self, item: Item) -> np.ndarray:
        """The rows of a source that can be trained in an item's bucket."""
        items = self.items[item.source]
        variants = [items.variant_for(kind, item.bucket) for kind in range(len(items.ladders))]
        offsets = np.array([-1 if variant is None else variant for variant in variants])[items.kinds]
        return (items.rows + offsets)[offsets >= 0]

    def _read(self, workers: WorkerPool | None, position: int, source: int, row: int, bucket: Bucket) -> Sample:
        key = self.sources[source].key(row)
        content = read(workers, self.sources[source], row, self.opener.decode, bucket)
        latent = self.opener.finish(key, content, bucket, uniform(self.seed, position, "caption"))
        return Sample(position, key, bucket, latent.pinned() if self.pin else latent)
