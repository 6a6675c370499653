"""The report of buckets, against sums done by hand."""

from pathlib import Path

import pytest

from data_pipelines.batches.bucket_report import bucket_report, table
from data_pipelines.buckets import BucketConfig
from data_pipelines.shards.tars import ShardSet, ShardWriter


def test_samples_tokens_cost_and_crop_by_bucket(tmp_path: Path) -> None:
    shapes = [(1, 64, 64)] * 3 + [(20, 128, 64), (20, 64, 100), (3, 40, 40), (9, 300, 20)]
    with ShardWriter(tmp_path, samples_per_shard=3) as writer:
        for i, (frames, height, width) in enumerate(shapes):
            facts = {"kind": "video", "frames": frames, "fps": 8.0, "height": height, "width": width}
            writer.write({"__key__": f"s{i}", "mp4": b"", "txt": "x", "json": facts})
    config = BucketConfig(
        resolutions=(64,), frames=(1, 17), aspects=("1:1", "9:16"), upscale=1.0, keep_frames=(1, 0.25)
    )
    report = bucket_report(
        ShardSet.open(tmp_path), config, lambda b: b.frames * b.height * b.width, lambda b, _: float(b.frames)
    )
    assert (report["samples"], report["unfit"]) == (7, 2)
    assert report["empty"] == []
    square = {name: line for name, line in report["buckets"].items() if name.endswith("x64x64")}
    tall = {name: line for name, line in report["buckets"].items() if name not in square}
    # three pictures, and three quarters of the clip that is not kept at 17 frames: 64x100 is nearest to a square
    assert square["1x64x64"]["samples"] == 3.75
    assert square["17x64x64"]["samples"] == 0.25
    assert square["1x64x64"]["tokens"] == 3.75 * 64 * 64
    assert square["17x64x64"]["cost"] == 0.25 * 17
    # 36 of 100 columns are cut away from three quarters of a sample, nothing from three
    assert square["1x64x64"]["cropped"] == pytest.approx(0.75 * 36 / (3 * 64 + 0.75 * 100))
    assert square["17x64x64"]["cropped"] == pytest.approx(0.36)
    assert sum(line["samples"] for line in tall.values()) == 1
    assert "7 samples, 2 fit no bucket" in table(report)


def test_empty_buckets_are_named(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        facts = {"kind": "image", "frames": 1, "fps": 0.0, "height": 64, "width": 64}
        writer.write({"__key__": "s", "jpg": b"", "txt": "x", "json": facts})
    config = BucketConfig(resolutions=(64,), frames=(1, 17), aspects=("1:1",))
    report = bucket_report(ShardSet.open(tmp_path), config, lambda b: 1, lambda b, _: 1.0)
    assert report["empty"] == ["17x64x64"]
    assert "warning: 1 buckets are empty: 17x64x64" in table(report)
