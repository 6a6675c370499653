"""What became of the samples that were encoded: counts beside each latent shard, and one report over all."""

import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.buckets import Bucket
from data_pipelines.errors import DataError
from data_pipelines.samples.latents import REPORT, shard_report
from data_pipelines.shards.tars import ShardSet

QUARANTINE = "quarantine.jsonl"


@dataclass
class Tally:
    """Of one latent shard. `source` is the digest of what it was made of."""

    source: str
    kept: Counter[str] = field(default_factory=Counter)  # bucket -> latents
    bytes: Counter[str] = field(default_factory=Counter)  # of those, with their text and headers
    seconds: Counter[str] = field(default_factory=Counter)  # of video
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> samples
    bad: list[list[str]] = field(default_factory=list)  # [key, reason] of each that is broken, not merely unfit

    def keep(self, bucket: Bucket, fps: float, size: int) -> None:
        self.kept[str(bucket)] += 1
        self.bytes[str(bucket)] += size
        if bucket.frames > 1 and fps:
            self.seconds[str(bucket)] += bucket.frames / fps  # type: ignore[assignment]  # a Counter adds up anything

    def drop_bad(self, key: str, reason: str) -> None:
        self.dropped[reason] += 1
        self.bad.append([key, reason])

    def text(self) -> str:
        return json.dumps(vars(self), indent=1, sort_keys=True)


def read_tally(output: Path, tar: str, digest: str) -> Tally:
    """Of a shard that is written. Raises DataError where it was made of other samples than the source now has."""
    path = output / shard_report(tar)
    try:
        found = json.loads(path.read_text())
        counters = {name: Counter(found[name]) for name in ("kept", "bytes", "seconds", "dropped")}
        tally = Tally(source=found["source"], bad=found["bad"], **counters)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no report of {tar} ({error}); choose another output or delete it") from None
    if tally.source != digest:
        raise DataError(
            f"{output}/{tar}: stale latents: its source shard has changed; choose another output or delete it"
        )
    return tally


def write_reports(source: ShardSet, output: Path, private: Path) -> dict[str, Any]:
    """Adds up the shards; writes the report and the list of broken samples. Every worker that comes here writes the same.

    Raises DataError when nothing could be encoded.
    """
    whole, lines = Tally(source.fingerprint), []
    for tar, digest in source.digests.items():
        tally = read_tally(output, tar, digest)
        for name in ("kept", "bytes", "seconds", "dropped"):
            getattr(whole, name).update(getattr(tally, name))
        lines += [json.dumps({"shard": tar, "key": key, "reason": reason}) for key, reason in tally.bad]
    if not whole.kept:
        raise DataError(f"{source.address}: no sample could be encoded ({dict(whole.dropped)})")
    report = {
        "input": source.address,
        "source": whole.source,
        "shards": len(source.tars),
        "kept": dict(sorted(whole.kept.items())),
        "dropped": dict(sorted(whole.dropped.items())),
        "bytes": dict(sorted(whole.bytes.items())),
        "seconds": {bucket: round(seconds, 3) for bucket, seconds in sorted(whole.seconds.items())},
        "bytes_per_hour": {b: round(whole.bytes[b] * 3600 / seconds) for b, seconds in sorted(whole.seconds.items())},
    }
    if lines:
        publish(output / QUARANTINE, "".join(f"{line}\n" for line in lines).encode(), private)
    publish(output / REPORT, json.dumps(report, indent=1).encode(), private)
    return report


def publish(path: Path, content: bytes, private: Path) -> None:
    """The file appears complete. Whoever else writes it writes the same."""
    while not (path.exists() and path.read_bytes() == content):
        private.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another worker is through as well and has tidied up
            (private / path.name).write_bytes(content)
            (private / path.name).replace(path)


def describe(report: dict[str, Any]) -> str:
    """In words: how much it is, and what an hour of video takes."""
    hours = [f"an hour of {bucket} takes {size / 1e9:.3g} GB" for bucket, size in report["bytes_per_hour"].items()]
    return ", ".join([f"{sum(report['bytes'].values()) / 1e9:.3g} GB of latents", *hours])
