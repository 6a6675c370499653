"""What a stage's buckets make of a data set: how many samples each gets, what they cost, what is cut away, what fits none."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_pipelines.buckets import Bucket, BucketConfig, buckets_of, cover_scale, raw_ladder, shares
from data_pipelines.samples.items import SampleSource


@dataclass
class BucketLine:
    """One bucket. Shares of samples count where `keep_*` moves some of them on."""

    samples: float = 0.0
    tokens: float = 0.0
    cost: float = 0.0  # FLOPs of one epoch
    shown: float = 0.0  # pixels of its samples' frames, scaled
    kept: float = 0.0  # of them, in the bucket

    @property
    def cropped(self) -> float:
        """Share of the pixels that is cut away."""
        return 1 - self.kept / self.shown if self.shown else 0.0


def bucket_report(
    source: SampleSource,
    config: BucketConfig,
    tokens_of: Callable[[Bucket], int],
    cost_of: Callable[[Bucket, int], float],
) -> dict[str, Any]:
    """Of raw shards: {"buckets": {name: {samples, tokens, cost, cropped}}, "empty": [...], "unfit": n, "samples": n}."""
    shapes: Counter[tuple[int, int, int]] = Counter()
    for columns in source.columns("frames", "height", "width"):
        distinct, counts = np.unique(np.stack(columns, axis=1), axis=0, return_counts=True)
        shapes.update({(int(f), int(h), int(w)): int(n) for (f, h, w), n in zip(distinct, counts, strict=True)})
    lines = {bucket: BucketLine() for bucket in buckets_of(config)}
    unfit = 0
    for (frames, height, width), n in shapes.items():
        ladder = raw_ladder(config, frames, height, width)
        unfit += n if not ladder else 0
        for (_, bucket), share in shares(ladder).items():
            line, scale = lines[bucket], cover_scale((bucket.height, bucket.width), height, width)
            line.samples += n * share
            line.tokens += n * share * tokens_of(bucket)
            line.cost += n * share * cost_of(bucket, -1)
            line.shown += n * share * height * width * scale**2 * bucket.frames
            line.kept += n * share * bucket.height * bucket.width * bucket.frames
    return {
        "samples": sum(shapes.values()),
        "unfit": unfit,
        "empty": [str(bucket) for bucket, line in lines.items() if not line.samples],
        "buckets": {
            str(bucket): {name: value for name, value in asdict(line).items() if name not in ("shown", "kept")}
            | {"cropped": line.cropped}
            for bucket, line in lines.items()
            if line.samples
        },
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    total = {
        name: sum(line[name] for line in report["buckets"].values()) or 1.0 for name in ("samples", "tokens", "cost")
    }
    lines = [f"{'bucket':>16} {'samples':>12} {'share':>7} {'tokens':>7} {'cost':>7} {'cropped':>8}"]
    for name, line in report["buckets"].items():
        parts = [line[kind] / total[kind] for kind in ("samples", "tokens", "cost")]
        lines.append(
            f"{name:>16} {line['samples']:12,.1f} {parts[0]:7.1%} {parts[1]:7.1%} {parts[2]:7.1%} {line['cropped']:8.1%}"
        )
    lines.append(f"{report['samples']:,} samples, {report['unfit']:,} fit no bucket")
    if report["empty"]:
        more = ", ..." if len(report["empty"]) > 8 else ""
        lines.append(f"warning: {len(report['empty'])} buckets are empty: {', '.join(report['empty'][:8])}{more}")
    return "\n".join(lines)
