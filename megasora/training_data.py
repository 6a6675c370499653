"""The data of a run as `data.*` asks for it: where samples come from, how they become latents, and what they cost."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import xxhash

from data_pipelines.batches.loader import Loader, Opener, Replacement, cached_opener
from data_pipelines.batches.row_packing import Meet
from data_pipelines.batches.synthetic import SyntheticLatents
from data_pipelines.buckets import Bucket
from data_pipelines.errors import DataError
from data_pipelines.samples.items import SampleSource
from data_pipelines.shards.tars import ShardSet
from megasora.device import on_gpu
from megasora.encoders import LatentFacts, check_latents, open_facts, open_online
from megasora.errors import ConfigError, made_by
from megasora.microbatch import patches_of, tokens_of
from megasora.models.flops import training_flops
from megasora.models.text import Text
from megasora.parallel.layout import Layout
from megasora.parallel.mesh import Processes
from megasora.schema import Config, Stage
from megasora.seeding import fold

UNKNOWN_TEXT = 128  # tokens of a caption that nobody has counted: raw shards, read online


@dataclass(frozen=True)
class TrainingData:
    """Sources by weight, the facts of their latents, and how a sample is opened."""

    sources: dict[SampleSource, float]
    facts: LatentFacts
    opener: Opener
    digests: dict[str, dict[str, str]]  # address -> shard -> what it holds

    @property
    def fingerprint(self) -> str:
        """Another one when any sample of any source changes place, key, size or shape; not when a source moves."""
        shards = [sorted(digests.items()) for digests in self.digests.values()]
        return xxhash.xxh3_64_hexdigest(repr(shards).encode())

    @property
    def samples(self) -> int:
        return sum(map(len, self.sources))


def open_data(config: Config, device: torch.device) -> TrainingData:
    """The latents of data.path or data.mixture, or raw shards and the encoders. Raises DataError."""
    cache = config.data.cache_config()
    maker, key = ("prepare", "encode.input") if config.data.latents == "online" else ("encode", "data.path")
    with made_by(maker, "data.mixture" if config.data.mixture else key):
        opened = {ShardSet.open(path, cache): weight for path, weight in config.data.weights.items()}
    sources: dict[SampleSource, float] = dict(opened.items())
    digests = {shards.address: shards.digests for shards in opened}
    if config.data.latents == "online":
        facts, opener = open_online(config.encode, device)
        return TrainingData(sources, facts, opener, digests)
    every = [open_facts(shards.address) for shards in opened]
    for shards, facts in zip(opened, every, strict=True):
        if facts.manifest != every[0].manifest:
            raise DataError(f"{shards.address}: latents of other encoders than those of {next(iter(opened)).address}")
    return TrainingData(sources, every[0], cached_opener(), digests)


def check_current(config: Config) -> None:
    """Raises DataError for latents that are not those of the config any more: stale, foreign, or of other buckets."""
    if config.data.latents == "cached":
        for address in config.data.weights:
            check_latents(address, config.encode, [stage.buckets for stage in config.stages])


def synthetic_data(config: Config, text_tokens: int) -> TrainingData:
    """Drawn latents that fit the model, for every bucket of the stages."""
    compression, model = config.vae.compression, config.model
    manifest = {"channels": model.channels, "compression": list(compression)}
    buckets = [stage.buckets for stage in config.stages]
    source = SyntheticLatents(
        buckets, model.channels, compression, (text_tokens, model.text_width), model.pooled_width, model.classes
    )
    facts = LatentFacts(manifest, Text(torch.zeros(1, model.text_width), torch.zeros(model.pooled_width)))
    return TrainingData({source: 1.0}, facts, cached_opener(), {})


def data_at(config: Config, path: str) -> Config:
    """The same config, reading another set of latents."""
    return replace(config, data=replace(config.data, path=path, mixture={}))


def describe_difference(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> str:
    """In words, which shards came, went or changed; sources are compared in their order."""
    parts = [f"{len(before)} data sets before, {len(now)} now"] if len(before) != len(now) else []
    for address, old, new in zip(now, before.values(), now.values(), strict=False):
        kinds = {
            "new": sorted(new.keys() - old.keys()),
            "missing": sorted(old.keys() - new.keys()),
            "changed": sorted(name for name in new.keys() & old.keys() if new[name] != old[name]),
        }
        said = [
            f"{len(names)} {kind} ({names[0]}{', ...' * (len(names) > 1)})" for kind, names in kinds.items() if names
        ]
        if said:
            parts.append(f"{address}: {', '.join(said)} of {len(new)} shards")
    return "; ".join(parts) or "the order of its data sets"


def build_loader(
    config: Config, group: Processes, data: TrainingData, stage: Stage, segment: int, obey: dict[int, dict[int, str]]
) -> Loader:
    """The stage's view of the data, balanced by the model's own FLOPs or by measured seconds."""
    compression, patch, layout = data.facts.compression, config.model.patch, group.layout

    def tokens(bucket: Bucket) -> int:
        return tokens_of(bucket, compression, patch)

    def flops(bucket: Bucket, text_tokens: int) -> float:
        text = UNKNOWN_TEXT if text_tokens < 0 else text_tokens
        return float(training_flops(config.model, patches_of(bucket, compression, patch), text))

    seconds = read_costs(config.data.costs) if config.data.costs else {}
    # What was not measured costs its FLOPs at the median speed of what was.
    speed = median(flops(bucket, UNKNOWN_TEXT) / s for bucket, s in seconds.items()) if seconds else 1.0

    def cost(bucket: Bucket, text_tokens: int) -> float:
        return seconds[bucket] if bucket in seconds else flops(bucket, text_tokens) / speed

    return Loader(
        data.sources,
        data.opener,
        stage.buckets,
        config.data,
        seed=fold(config.run.seed, "order", segment),
        tokens_of=tokens,
        flops_of=flops,
        cost_of=cost,
        rank=group.data_rank * layout.cp + group.place["cp"] if layout.dynamic else group.data_rank,
        ranks=layout.dp * (layout.cp if layout.dynamic else 1),
        widths=layout.widths if layout.dynamic else (),
        meet=meeting(layout),
        obey=obey.get(segment, {}),
        pin=on_gpu(group.device),
    )


def settle_replacements(
    found: Sequence[Sequence[Replacement]], own: Sequence[Mapping[int, str]]
) -> tuple[list[Replacement], str]:
    """Of what all ranks had to replace, one replacement a position; and, where ranks that share a row did not read the same
    sample (a disk of one node failed), what they read. `own`: each rank's keys by position."""
    settled = {one.position: one for of_rank in reversed(found) for one in of_rank}
    read = [{keys[position] for keys in own if position in keys} for position in sorted(settled)]
    quarrel = next((f"ranks that share a row read {' and '.join(sorted(keys))}" for keys in read if len(keys) > 1), "")
    return [settled[position] for position in sorted(settled)], quarrel


def meeting(layout: Layout) -> Meet:
    """When ranks wait for each other."""
    return "micro" if layout.zero == 3 or layout.dynamic else "step"


def read_costs(path: str) -> dict[Bucket, float]:
    """{"17x128x224": seconds, ...}. Raises ConfigError."""
    try:
        found: dict[str, Any] = json.loads(Path(path).read_text())
        seconds = {Bucket(*map(int, name.split("x"))): float(value) for name, value in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"data.costs={path}: no table of seconds by bucket ({error})") from None
    if not seconds or not all(value > 0 for value in seconds.values()):
        raise ConfigError(f"data.costs={path}: positive seconds by bucket are expected")
    return seconds
