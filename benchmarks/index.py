"""How long it takes to open an index of millions of samples, and how much memory: a synthetic one, written first.

    python benchmarks/index.py --samples 10000000 --json benchmarks/reports/NAME.json

Prints seconds to open the set, to sort its samples into buckets and to plan a global batch of 4,096, and the memory that
this process holds for itself (RssAnon; the mapped index is the page cache's, which gives it back under pressure).
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipelines.batches.loader import DataConfig, Loader, cached_opener
from data_pipelines.buckets import Bucket, BucketConfig
from data_pipelines.shards.index import DIGEST, SCHEMA
from data_pipelines.shards.tars import ShardSet

BUCKETS = BucketConfig(resolutions=(256, 480, 720), frames=(1, 17, 33, 65, 129))
RAW = replace(cached_opener(), encoded=False)


def write_index(directory: Path, samples: int, per_shard: int) -> None:
    """Indexes of raw videos of many lengths and sizes, beside empty tars."""
    rng = np.random.default_rng(0)
    sizes = np.array([(360, 640), (480, 854), (720, 1280), (1280, 720), (1080, 1920), (1024, 1024)], np.int32)
    for shard in range(samples // per_shard):
        first = shard * per_shard
        size = sizes[rng.integers(len(sizes), size=per_shard)]
        frames = np.clip(rng.lognormal(np.log(7 * 24), 0.7, per_shard), 1, 1440).astype(np.int32)
        columns = [
            pa.array([f"clip-{first + i:09d}" for i in range(per_shard)]),
            np.arange(per_shard) * 2_000_000, np.full(per_shard, 2_000_000), pa.array(["video"] * per_shard),
            frames, np.full(per_shard, 24.0), size[:, 0], size[:, 1], np.full(per_shard, 77, np.int32),
            np.zeros(per_shard, np.int16), pa.array([[("motion", 0.5), ("sharpness", 2.0)]] * per_shard, SCHEMA.types[-1]),
        ]  # fmt: skip
        schema = SCHEMA.with_metadata({DIGEST: f"{shard:016x}".encode()})
        arrays = [pa.array(column, kind) for column, kind in zip(columns, SCHEMA.types, strict=True)]
        path = str(directory / f"shard-{shard:06d}.arrow")
        with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, schema) as writer:
            writer.write_table(pa.table(arrays, schema=schema))
        (directory / f"shard-{shard:06d}.tar").touch()


def measure(directory: Path) -> dict[str, float]:
    before = memory()
    begin = time.perf_counter()
    shards = ShardSet.open(directory)
    fingerprint = shards.fingerprint
    opened = time.perf_counter()
    loader = Loader(
        {shards: 1.0}, RAW, BUCKETS, DataConfig(global_batch=4096, capacity=1 << 20), 1,
        tokens_of=lambda b: (1 + (b.frames - 1) // 4) * (b.height // 16) * (b.width // 16),
        flops_of=flops, cost_of=flops, ranks=64,
    )  # fmt: skip
    sorted_in = time.perf_counter()
    items = [loader.item_at(position) for position in range(4096)]
    planned = time.perf_counter()
    assert len(fingerprint) == 16
    assert len({item.row for item in items}) == 4096
    return {
        "samples": len(shards), "shards": len(shards.tars), "open_s": opened - begin, "buckets_s": sorted_in - opened,
        "batch_of_4096_s": planned - sorted_in, "memory_mb": (memory() - before) / 1e6,
    }  # fmt: skip


def flops(bucket: Bucket, text_tokens: int) -> float:
    return float(bucket.frames * bucket.height * bucket.width + text_tokens)


def memory() -> int:
    """Bytes of this process that no file backs."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--per-shard", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:  # in a process of its own, which has not written the index
        print(json.dumps(measure(args.measure)))
        return
    with tempfile.TemporaryDirectory() as directory:
        write_index(Path(directory), args.samples, args.per_shard)
        command = [sys.executable, __file__, "--measure", directory]
        result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    result["machine"] = {"python": platform.python_version(), "pyarrow": pa.__version__, "numpy": np.__version__}
    for name, value in result.items():
        print(f"{name:16} {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
