"""One step of a run again, on one process: its samples, what was drawn for each, each one's loss and gradient norm.

A table here, JSON and a page with thumbnails in RUN/replay/step-XXXXXXXX. What stands out is marked: it is what to look at
behind a spike or a step that was skipped.

examples:
  megasora replay runs/demo --step 120
  megasora launch local --nproc 2 replay runs/demo --step 120 --layout tp2 --json
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from megasora.config import load_config
from megasora.errors import ConfigError
from megasora.observe.logs import log, start_logging
from megasora.parallel.mesh import processes, rank
from megasora.replay import replay, table, write_page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="the directory of a run")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="the step to replay, from 1")
    parser.add_argument("--layout", default="dp1", help="one data-parallel rank; more processes by `megasora launch`")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    if not (args.run_dir / "config.yaml").exists():
        raise ConfigError(f"{args.run_dir}: no run here, it has no config.yaml")
    config = load_config(args.run_dir / "config.yaml", args.overrides)
    config = replace(
        config,
        run=replace(config.run, dir=str(args.run_dir)),
        parallel=replace(config.parallel, layout=args.layout),
    )
    start_logging(None, rank())
    with processes(args.layout) as group:
        found = replay(config, args.step, group)
    if rank() == 0:
        page = write_page(found, args.run_dir / "replay" / f"step-{args.step:08d}")
        print(json.dumps(asdict(found)) if args.json else table(found))
        log.info("%s", page)
