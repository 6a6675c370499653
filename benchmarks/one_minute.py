"""One minute of 1080p at 24 frames a second as one sample of the 14B model: on how many H100s a training step fits, how long it
takes, and one rank of it built and stepped on fake tensors.

  python benchmarks/one_minute.py --json benchmarks/reports/DATE-one-minute-1080p.json

Times are predictions at the efficiencies of the H100's profile; no such step ever ran on GPUs.
"""

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).parents[1] / "configs" / "one-minute-1080p.yaml"


def plan(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "megasora", "plan", "--config", str(CONFIG), "--gpu", "h100", "--json", *arguments]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--worlds", type=int, nargs="*", default=[128, 256, 512], help="also planned, with their best layouts"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    plans = [plan("--fewest"), *(plan("--world", str(world), "--search", "--top", "3") for world in args.worlds)]
    print(f"{'H100s':>6} {'layout':32} {'recompute':>10} {'GiB':>6} {'step':>9} {'MFU':>6}")
    for found in plans:
        policy = f"every {found['recompute_every']}" if found["recompute_every"] > 1 else found["recompute"]
        print(f"{found['world']:6} {found['layout']:32} {policy:>10} {found['memory_bytes'] / 2**30:6.1f} "
              f"{found['step_time_s']:7.0f} s {found['mfu']:6.1%}")  # fmt: skip
    least = plans[0]
    policy = f"every{least['recompute_every']}" if least["recompute_every"] > 1 else least["recompute"]
    layout = [f"--parallel.layout={least['layout']}", f"--parallel.recompute={policy}"]
    stepped = plan("--world", str(least["world"]), *layout, "--dry-run")
    print(f"{least['row_tokens']:,} tokens; dry run of rank {stepped['rank']} of {least['world']}: "
          f"{'as planned' if not stepped['differences'] else stepped['differences']}")  # fmt: skip
    for name, (ours, closed) in stepped["compared"].items():
        print(f"  {name:56} {ours / 1e6:16,.3f} MB {closed / 1e6:16,.3f}")
    if args.json:
        facts = {
            "date": str(date.today()),
            "command": sys.argv[1:],
            "config": CONFIG.name,
            "plans": plans,
            "dry_run": stepped,
        }
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
