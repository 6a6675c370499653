"""The training step at several layouts, on synthetic latents: a table, and a report with everything needed to repeat it.

python benchmarks/layouts.py --config configs/demo.yaml --nproc 2 dp2 dp2,zero2 dp2,zero3
"""

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path

REPORTS = Path(__file__).parent / "reports"


def measure(config: str, nproc: int, layout: str, steps: int) -> dict:
    command = [sys.executable, "-m", "megasora", "launch", "local", "--nproc", str(nproc), "bench", "--config", config]
    command += ["--data=synthetic", "--json", f"--parallel.layout={layout}", f"--bench.steps={steps}"]
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
    parser.add_argument("layouts", nargs="+")
    args = parser.parse_args()
    results: dict[str, list[dict]] = {layout: [] for layout in args.layouts}
    for _ in range(args.rounds):
        for layout in args.layouts:
            results[layout].append(measure(args.config, args.nproc, layout, args.steps))
    best = {layout: min(rounds, key=lambda r: r["step_time_s"]) for layout, rounds in results.items()}
    first = best[args.layouts[0]]["step_time_s"]
    print(f"{'layout':<16} {'step s':>8} {'ratio':>6} {'of GEMM':>8} {'memory GiB':>11}")
    for layout, r in best.items():
        memory = r["peak_memory_bytes"] / 2**30
        print(
            f"{layout:<16} {r['step_time_s']:8.3f} {r['step_time_s'] / first:6.2f} {r['mfu_gemm']:8.2f} {memory:11.2f}"
        )
    REPORTS.mkdir(exist_ok=True)
    report = REPORTS / f"{date.today()}-layouts.json"
    report.write_text(json.dumps({"command": sys.argv[1:], "results": results}, indent=1))
    print(report)


if __name__ == "__main__":
    main()
