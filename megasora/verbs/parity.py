"""Checks that layouts compute what one process computes: the config's own model at seeded inputs, its loss, the gradient of every
parameter, their norm, and the parameters after three steps of SGD. It starts the processes itself, on this machine.

The error of a gradient is |g - ref| / max(|ref|, a thousandth of the mean gradient). Exits 1 above the tolerance.

examples:
  megasora parity --config configs/demo.yaml --layout dp2,tp2 --layout cp4
  megasora parity --config configs/demo.yaml --layout dp2,zero3 --engine deepspeed
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

from megasora.build import check_engine
from megasora.cli import add_config_argument
from megasora.cluster.command import megasora, outcome
from megasora.config import load_config
from megasora.errors import CheckFailed, ConfigError
from megasora.observe.logs import log, start_logging
from megasora.parallel.layout import parse_layout
from megasora.parallel.mesh import processes, rank
from megasora.parallel.plan import check_layout
from megasora.parity import compare, load, save
from megasora.parity import run as run_layout
from megasora.schema import Config

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_argument(parser, "model", "precision")
    parser.add_argument(
        "--layout", action="append", default=[], metavar="L", help="to compare; may be given several times"
    )
    parser.add_argument("--engine", default="", help="which engine computes on the layouts; default: the config's")
    parser.add_argument("--tolerance", type=float, help="default: 1e-5, in bf16 2e-2")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--outcome", type=Path, help=argparse.SUPPRESS)  # a worker: compute, and write it here


def run(args: argparse.Namespace) -> None:
    if args.engine:
        args.overrides.append(f"--engine={args.engine}")
    config = load_config(args.config, args.overrides)
    start_logging(None, rank())
    if args.outcome:
        compute(config, args.layout[0], args.outcome)
        return
    if not args.layout:
        raise ConfigError("parity: give at least one --layout, such as --layout dp2,tp2")
    for text in args.layout:
        check_layout(config.model, parse_layout(text))
        check_engine(config, parse_layout(text))
    tolerance = TOLERANCE[config.precision.precision] if args.tolerance is None else args.tolerance
    results = []
    with tempfile.TemporaryDirectory() as directory:
        reference = Path(directory) / "reference"
        start(args, "dp1", reference, "--engine=torch_native")
        for number, text in enumerate(args.layout):
            file = Path(directory) / str(number)
            start(args, text, file)
            found = compare(load(reference), load(file))
            results.append(
                {"layout": text, "worst": found.worst, "parameter": found.where, "ok": found.worst <= tolerance,
                 "without_gradient": found.without}
            )  # fmt: skip
            file.unlink()
    if args.json:
        print(json.dumps({"layouts": results}))
    else:
        print(table(results))
    if bad := [result for result in results if not result["ok"]]:
        worst = max(bad, key=lambda result: float(str(result["worst"])))
        raise CheckFailed(
            f"{worst['layout']}: {worst['parameter']} is off by {worst['worst']:.2e}, above {tolerance:.0e}"
        )


def compute(config: Config, layout: str, file: Path) -> None:
    """What a worker does."""
    with processes(layout) as group:
        outcome = run_layout(config, group)
        if group.is_main:
            save(outcome, file)


def start(args: argparse.Namespace, layout: str, file: Path, *overrides: str) -> None:
    """Runs this verb as workers on as many processes as the layout asks for."""
    world = parse_layout(layout).world
    log.info("%s on %d processes", layout, world)
    words = [f"--layout={layout}", f"--outcome={file}", *args.overrides, *overrides]
    command = megasora("parity", "--config", str(args.config), *words, nproc=world)
    done = outcome(command, threads=max(1, (os.cpu_count() or 1) // world))
    if done["exit"]:
        raise CheckFailed(f"{layout}: ended with {done['exit']}: {done['error']}")


def table(results: list[dict[str, object]]) -> str:
    """The result for people."""
    lines = [f"{'layout':<28} {'worst error':>12}      where"]
    lines += [
        f"{result['layout']!s:<28} {float(str(result['worst'])):12.2e} {'ok' if result['ok'] else 'BAD':>4} {result['parameter']}"
        for result in results
    ]
    return "\n".join(lines)
