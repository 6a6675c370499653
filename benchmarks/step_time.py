"""The planner's step time against `megasora bench` on this machine's CPU, after calibration.

  python benchmarks/step_time.py --json benchmarks/reports/DATE-step-time.json

Models and rows of several shapes are benched, `rounds` times in turn, and the device's efficiencies fitted to them
(megasora/planner/calibrate.py). `fitted` is how far a prediction is off where all shapes are known, `left out` where the shape
was not among those that the efficiencies were fitted to. Times are in units of each run's own matrix product: a machine drifts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from megasora.bench import TEXT_TOKENS
from megasora.planner.calibrate import Run, calibrate, fit

CONFIG = Path(__file__).parents[1] / "configs" / "base.yaml"
# Width, depth, frames, side in pixels, samples of a step.
SHAPES = [
    (256, 4, 17, 128, 4), (256, 4, 33, 256, 1), (384, 4, 17, 128, 4), (384, 8, 5, 128, 4), (512, 4, 17, 128, 2),
    (512, 6, 1, 256, 4), (512, 4, 33, 256, 1), (768, 4, 5, 256, 2),
]  # fmt: skip


def overrides(width: int, depth: int, frames: int, side: int, batch: int) -> list[str]:
    tokens = (1 + (frames - 1) // 4) * (side // 16) ** 2
    capacity = max(128, -(-tokens * 4 // 128) * 128)
    return [
        f"--model.width={width}", f"--model.heads={width // 64}", f"--model.ffn={4 * width}", f"--model.depth={depth}",
        "--model.text_width=64", "--vae.preset=4x8x8", f"--data.global_batch={batch}", f"--data.capacity={capacity}",
        f"--stages=[{{buckets: {{resolutions: [{side}], frames: [{frames}], aspects: ['1:1']}}}}]",
    ]  # fmt: skip


def measure(shape: tuple[int, int, int, int, int], steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "megasora", "bench", "--config", str(CONFIG), "--data=synthetic", "--json"]
    command += overrides(*shape)
    command += ["--bench.warmup=2", f"--bench.steps={steps}", "--bench.rounds=1"]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return found


def quickest(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The round that was least disturbed: the shortest step in units of its own matrix product."""
    return min(rounds, key=lambda result: result["step_time_s"] * result["gemm_flops"])


def compare(results: list[dict[str, Any]]) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Seconds of each, and how far predictions are off; and the efficiencies that were fitted to all."""
    with tempfile.TemporaryDirectory() as directory:
        files = [Path(directory) / f"{number}.json" for number in range(len(results))]
        for file, result in zip(files, results, strict=True):
            file.write_text(json.dumps(result))
        device, runs = calibrate(files, TEXT_TOKENS)
    rows = []
    for number, run in enumerate(runs):
        others: list[Run] = runs[:number] + runs[number + 1 :]
        rows.append({"seconds": run.seconds, "fitted": run.predicted(device) / run.seconds - 1,
                     "left_out": run.predicted(fit(device, others)) / run.seconds - 1})  # fmt: skip
    return rows, vars(device.efficiency)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    every: list[list[dict[str, Any]]] = [[] for _ in SHAPES]
    for _ in range(args.rounds):
        for results, shape in zip(every, SHAPES, strict=True):
            results.append(measure(shape, args.steps))
    results = [quickest(rounds) for rounds in every]
    rows, efficiency = compare(results)
    print(f"{'width depth frames side batch':32} {'seconds':>9} {'fitted':>8} {'left out':>9}")
    for shape, row in zip(SHAPES, rows, strict=True):
        print(f"{' '.join(map(str, shape)):32} {row['seconds']:9.4f} {row['fitted']:+8.1%} {row['left_out']:+9.1%}")
    if args.json:
        facts = {"date": str(date.today()), "command": sys.argv[1:], "machine": results[0]["machine"], "shapes": SHAPES,
                 "efficiency": efficiency, "predicted": rows, "bench": results}  # fmt: skip
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
