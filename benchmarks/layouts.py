"""The training step at several layouts, on synthetic latents: a table, and a report with everything needed to repeat it.

python benchmarks/layouts.py --config configs/demo.yaml --nproc 2 dp2 dp2,zero2 dp2,zero3
python benchmarks/layouts.py --config configs/demo.yaml --engines torch_native deepspeed -- dp2,zero1 dp2,zero3 dp1,tp2,zero1
"""

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path

REPORTS = Path(__file__).parent / "reports"


def measure(config: str, nproc: int, engine: str, layout: str, steps: int) -> dict:
    command = [sys.executable, "-m", "megasora", "launch", "local", "--nproc", str(nproc), "bench", "--config", config]
    command += [
        "--data=synthetic",
        "--json",
        f"--engine={engine}",
        f"--parallel.layout={layout}",
        f"--bench.steps={steps}",
        "--bench.rounds=1",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each round")
    parser.add_argument("--rounds", type=int, default=2, help="the layouts in turn, so often: the machine drifts")
    parser.add_argument("--engines", nargs="+", default=["torch_native"], help="each of them at each layout")
    parser.add_argument("layouts", nargs="+")
    args = parser.parse_args()
    cases = {f"{layout} {engine}": (engine, layout) for layout in args.layouts for engine in args.engines}
    results: dict[str, list[dict]] = {name: [] for name in cases}
    for _ in range(args.rounds):
        for name, case in cases.items():
            results[name].append(measure(args.config, args.nproc, *case, args.steps))
    best = {name: min(rounds, key=lambda r: r["step_time_s"]) for name, rounds in results.items()}
    first = next(iter(best.values()))["step_time_s"]
    print(f"{'layout and engine':<32} {'step s':>8} {'ratio':>6} {'of GEMM':>8} {'memory GiB':>11} {'sent MiB':>9}")
    for name, r in best.items():
        memory, sent = r["peak_memory_bytes"] / 2**30, r["bytes_sent"] / 2**20
        share = r["step_time_s"] / first
        print(f"{name:<32} {r['step_time_s']:8.3f} {share:6.2f} {r['mfu_gemm']:8.2f} {memory:11.2f} {sent:9.2f}")
    REPORTS.mkdir(exist_ok=True)
    report = REPORTS / f"{date.today()}-layouts.json"
    report.write_text(json.dumps({"command": sys.argv[1:], "results": results}, indent=1))
    print(report)


if __name__ == "__main__":
    main()
