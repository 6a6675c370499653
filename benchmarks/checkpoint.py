"""What a checkpoint costs: how long a step waits, and how fast the files are written and read, beside dd in the same run.

    python benchmarks/checkpoint.py --megabytes 1024 [--directory DIR] [--json benchmarks/reports/NAME.json]

Each figure is the median of `--repeats` rounds, in which the competitors take turns. For every cold read the pages of the file
are dropped from the cache (posix_fadvise), for both. Wanted: async blocks at most 10 % of what sync does, a save reaches at
least 70 % of `dd conv=fsync`, a load with verification at least 40 % of a cold read.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from megasora.checkpoint.directory import CheckpointConfig
from megasora.checkpoint.load import load
from megasora.checkpoint.saver import Saver

TENSOR = 4 << 20  # values of fp32: 16 MiB


def timed(act: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def drop(directory: Path) -> None:
    """Takes the files of a directory out of the page cache."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def saver(root: Path, background: bool) -> Saver:
    return Saver(root, CheckpointConfig(background=background, keep_last=1), None, torch.device("cpu"))


def finish(made: Saver) -> Any:
    saved = made.finish()
    assert saved is not None
    return saved


def measure(directory: Path, megabytes: int, repeats: int) -> dict[str, Any]:
    tensors = {f"model/{i:03d}": torch.randn(TENSOR) for i in range(max(1, megabytes >> 4))}
    size = sum(tensor.nbytes for tensor in tensors.values())
    later, now = saver(directory / "later", background=True), saver(directory / "now", background=False)
    later.start(0, tensors, {})  # makes the copies' memory, once a run
    first = finish(later).blocked
    seconds: dict[str, list[float]] = {name: [] for name in ("async", "async_whole", "sync", "dd", "read", "load")}
    blank = {name: torch.empty_like(tensor).fill_(0) for name, tensor in tensors.items()}
    file = directory / "dd"
    for step in range(1, repeats + 1):
        seconds["async"].append(timed(partial(later.start, step, tensors, {})))
        while not later.done:  # training goes on
            time.sleep(0.01)
        seconds["async_whole"].append(finish(later).seconds)

        def save_now(step: int = step) -> None:
            now.start(step, tensors, {})
            finish(now)

        seconds["sync"].append(timed(save_now))
        write = ["dd", "if=/dev/zero", f"of={file}", "bs=4M", f"count={size >> 22}", "conv=fsync", "status=none"]
        seconds["dd"].append(timed(partial(subprocess.run, write, check=True)))
        file.unlink()
        path = directory / "now" / f"step-{step:08d}"
        shard = max(path.iterdir(), key=lambda entry: entry.stat().st_size)
        drop(path)
        read = ["dd", f"if={shard}", "of=/dev/null", "bs=4M", "status=none"]
        seconds["read"].append(timed(lambda read=read: subprocess.run(read, check=True)))  # type: ignore[misc]
        drop(path)
        seconds["load"].append(timed(lambda path=path: load(path, blank)))  # type: ignore[misc]
    assert all(torch.equal(tensor, blank[name]) for name, tensor in tensors.items())
    middle = {name: median(values) for name, values in seconds.items()}
    return {
        "megabytes": size / 1e6,
        "blocked_async_s": middle["async"],
        "blocked_async_first_s": first,
        "blocked_sync_s": middle["sync"],
        "blocked_ratio": middle["async"] / middle["sync"],
        "save_mb_s": size / 1e6 / middle["sync"],
        "dd_fsync_mb_s": size / 1e6 / middle["dd"],
        "save_ratio": middle["dd"] / middle["sync"],
        "load_verified_mb_s": size / 1e6 / middle["load"],
        "cold_read_mb_s": size / 1e6 / middle["read"],
        "load_ratio": middle["read"] / middle["load"],
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="on the disk to measure; default: the temporary one")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp(dir=args.directory))
    try:
        found = measure(directory, args.megabytes, args.repeats)
    finally:
        shutil.rmtree(directory)
    found["machine"] = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    for key, value in found.items():
        if isinstance(value, float):
            print(f"{key:<24} {value:.3g}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
