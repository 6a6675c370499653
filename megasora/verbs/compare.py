"""Runs side by side: how far they got, how fast, on what, and their curves.

--tolerance X holds every step's loss to that of the first run, over the steps that both have, and its samples too; the first
step that is off by more (relatively; 0 means the same bits) is named, and the exit code is 1.

examples:
  megasora compare runs/a runs/b --html compare.html
  megasora compare runs/straight runs/resumed --tolerance 1e-5
"""

import argparse
import json
from pathlib import Path

from megasora.errors import ConfigError
from megasora.observe.compare import check, comparison, read_runs, side_by_side, summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories; the first is the reference")
    parser.add_argument("--tolerance", type=float, metavar="X", help="exit 1 where losses differ by more, relatively")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the curves")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    if args.overrides:
        raise ConfigError(f"compare: {args.overrides[0]} is no option of compare")
    if args.tolerance is not None and (len(args.runs) < 2 or not args.tolerance >= 0):
        raise ConfigError(f"compare: --tolerance={args.tolerance:g} wants two runs or more, and is not negative")
    runs = read_runs(args.runs)
    found = [summary(run) for run in runs]
    if args.html:
        try:
            args.html.write_text(comparison(runs, found))
        except OSError as error:
            raise ConfigError(f"--html={args.html}: {error.strerror}") from None
    if not args.json:
        print(side_by_side(found))
    worst = check(runs, args.tolerance) if args.tolerance is not None else None
    if args.json:
        print(json.dumps({"runs": found, "worst": worst}))
    elif worst is not None:
        for name, off in worst.items():
            print(f"{name}: losses differ from {runs[0].name}'s by {off:.2g} at most")
