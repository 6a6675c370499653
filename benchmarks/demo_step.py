"""Where a step of the demo's training goes, and how long its start takes: two processes, on the demo's own latents.

    make demo && python benchmarks/demo_step.py --json benchmarks/reports/DATE-demo-step.json

Start-up is from the start of the launcher to the end of the first step. A step's wall time is from one line of metrics.jsonl to
the next, so that what the trainer does around its parts counts; `overhead` is all but forward, backward, clipping and update.
The largest costs are those that `--profile.steps` writes, in a run of its own. `start_up_compiled_s` is of compiled blocks,
with an empty cache and again.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from megasora.observe.hardware import device_name
from megasora.observe.metrics import history

ROOT = Path(__file__).parents[1]
WORK = ("forward_backward", "clip", "update")
WARM = 3  # steps of a stage that do not count


def train(run: Path, steps: int, overrides: list[str], cache: Path | None = None) -> float:
    """Both stages of the demo, shortened; seconds from its start to the end of its first step."""
    stages = [f"--stages.{stage}.steps={steps}" for stage in (0, 1)]
    command = [sys.executable, "-m", "megasora", "launch", "local", "--nproc", "2", "train", "--config", "configs/demo.yaml",
               f"--run.dir={run}", "--eval.every=0", "--checkpoint.every=1000", *stages, *overrides]  # fmt: skip
    begin = time.time()
    env = os.environ | {"OMP_NUM_THREADS": "1"} | ({"TORCHINDUCTOR_CACHE_DIR": str(cache)} if cache else {})
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    return round(history(run)[0]["time"] - begin, 2)


def shares(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Of a stage's wall time: medians over its steps."""
    found: dict[str, list[float]] = {}
    for before, line in pairwise(lines[WARM:]):
        wall = line["time"] - before["time"]
        parts = line["parts"] | {"data_wait": line["data_wait_s"]}
        parts["overhead"] = wall - sum(line["parts"][name] for name in WORK)
        for name, seconds in parts.items():
            found.setdefault(name, []).append(seconds / wall)
        found.setdefault("wall_s", []).append(wall)
    return {name: round(statistics.median(values), 4) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of each of the two stages")
    parser.add_argument("--json", type=Path)
    args, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        run, profiled = Path(folder) / "plain", Path(folder) / "profiled"
        start_up = train(run, args.steps, overrides)
        lines = history(run)
        last = 2 * args.steps
        train(profiled, args.steps, [f"--profile.steps={last - 3}-{last - 1}", *overrides])
        compiled = [
            train(Path(folder) / name, 1, ["--parallel.compile=true", *overrides], Path(folder) / "cache")
            for name in ("cold", "warm")
        ]
        largest = (profiled / "profile" / "rank-00000.txt").read_text().splitlines()
    facts = {
        "date": str(date.today()), "command": sys.argv[1:], "start_up_s": start_up, "start_up_compiled_s": compiled,
        "stages": {name: shares([line for line in lines if line["stage"] == name]) for name in ("image", "video")},
        "largest_of_rank_0": largest,
        "machine": {"cpu": device_name(torch.device("cpu")), "cores": os.cpu_count(), "torch": torch.__version__,
                    "python": platform.python_version()},
    }  # fmt: skip
    print(json.dumps({name: facts[name] for name in ("start_up_s", "start_up_compiled_s", "stages")}, indent=1))
    print("\n".join(largest[:12]))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
