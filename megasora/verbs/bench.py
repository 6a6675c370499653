"""Measures the training step of a stage (the first; --bench.stage names another): warm-up until it is steady, then so many steps:
their median and spread, parts, tokens/s, MFU.

With --data=synthetic it draws latents of the stage's buckets itself and needs no files. --bench.against=OLD.json compares
with an earlier result, in units of each run's own matrix product, and exits 1 when the step got slower by more than the noise.
--sweep measures every combination of values, in turn and --rounds times over, each on the processes that its layout asks for.

examples:
  megasora bench --config configs/demo.yaml --data=synthetic --bench.stage=video
  megasora launch local --nproc 2 bench --config configs/demo.yaml --data=synthetic --parallel.layout=dp2,zero3 --json
  megasora bench --config configs/demo.yaml --data=synthetic --sweep 'parallel.layout=dp2;dp2,zero3;dp1,tp2' --html bench.html
  megasora bench --trend benchmarks/reports --html trend.html
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megasora.cli import add_config_argument
from megasora.cluster.command import choices, megasora, outcome
from megasora.config import load_config
from megasora.errors import CheckFailed, ConfigError, check_writable
from megasora.observe.bench_page import Point, bench_page, read_points, side_by_side, trend_page
from megasora.observe.logs import log, start_logging
from megasora.observe.regression import check_rounds, compare, read_result
from megasora.parallel.layout import parse_layout
from megasora.parallel.mesh import rank
from megasora.schema import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_argument(
        parser, "bench", "engine", "objective", "data", "model", "stages", "optim", "vae", "parallel", "precision",
        required=False,
    )  # fmt: skip
    parser.add_argument("--data", choices=("shards", "synthetic"), default="shards", help="where latents come from")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=A;B", help="every combination; several times"
    )
    parser.add_argument(
        "--rounds", type=int, default=1, metavar="N", help="of a sweep; of each point the fastest counts"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with charts")
    parser.add_argument(
        "--trend", nargs="+", type=Path, default=[], metavar="RESULT", help="earlier results, on a page"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args: argparse.Namespace) -> None:
    if args.trend:
        if args.html is None:
            raise ConfigError("bench: --trend wants --html FILE")
        write(args.html, trend_page(read_points(args.trend)))
        return
    if args.config is None:
        raise ConfigError("bench: the following arguments are required: --config")
    start_logging(None, rank())
    if args.sweep:
        sweep(args)
        return
    from megasora.bench import bench, table

    config = load_config(args.config, args.overrides)
    old = None
    if config.bench.against:
        old = read_result(config.bench.against)
        check_rounds(old, min(config.bench.rounds, config.bench.steps))
    check_outputs(config, args)
    result = bench(config, synthetic=args.data == "synthetic")
    if rank() == 0:
        print(json.dumps(result) if args.json else table(result))
        if args.html:
            write(args.html, bench_page([Point(result["layout"], result)]))
    if old:
        log.info("%s", compare(result, old, config.bench.against, config.bench.tolerance))


def check_outputs(config: Config, args: argparse.Namespace) -> None:
    """What cannot be written is known before the measuring, not after it."""
    for key, file in (("bench.output", config.bench.output), ("--html", args.html or "")):
        if file and rank() == 0:
            check_writable(f"{key}={file}", Path(file))


def sweep(args: argparse.Namespace) -> None:
    """Every point in processes of its own. One that fails is told with its reason, and the others go on."""
    if "RANK" in os.environ:
        raise ConfigError("bench: --sweep starts its own processes; run it without a launcher")
    from megasora.bench import SCHEMA

    if args.rounds < 1:
        raise ConfigError(f"bench: --rounds={args.rounds}: at least 1")
    points = choices(args.sweep)
    config = load_config(args.config, args.overrides)
    check_outputs(config, args)
    output = config.bench.output
    for point in points:  # what is misspelt is known before anything is measured
        parse_layout(load_config(args.config, [*args.overrides, *point]).parallel.layout)
    results: dict[tuple[str, ...], list[dict[str, Any]]] = {point: [] for point in points}
    for number in range(args.rounds):
        for place, point in enumerate(points):
            log.info("round %d of %d, point %d of %d", number + 1, args.rounds, place + 1, len(points))
            results[point].append(measure(args, point))
            found = [Point(name_of(point), fastest(rounds)) for point, rounds in results.items() if rounds]
            text = json.dumps({"schema": SCHEMA, "sweep": args.sweep, "points": [vars(point) for point in found]})
            if output:  # after every point: what is measured outlives what goes wrong later
                write(Path(output), text + "\n")
    print(text if args.json else side_by_side(found))
    if args.html:
        write(args.html, bench_page(found))
    if all(point.failed for point in found):
        raise CheckFailed(f"every point failed; {found[0].name}: {found[0].result['error']}")


def measure(args: argparse.Namespace, point: Sequence[str]) -> dict[str, Any]:
    """The result of one point, or its `error`."""
    words = [f"--data={args.data}", "--json", *args.overrides, *point, "--bench.output="]
    world = parse_layout(load_config(args.config, [*args.overrides, *point]).parallel.layout).world
    threads = max(1, (os.cpu_count() or 1) // world)
    done = outcome(megasora("bench", "--config", str(args.config), *words, nproc=world), threads)
    if done["exit"]:
        return {"error": done["error"].removeprefix("megasora: ")}
    result: dict[str, Any] = done.get("result", {"error": "it ended well and printed no result"})
    return result


def fastest(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The round that was disturbed least; one with an error counts for all."""
    for result in rounds:
        if "error" in result:
            return result
    return min(rounds, key=lambda result: float(result["step_time_s"]))


def name_of(point: Sequence[str]) -> str:
    """("--model.depth=8", "--parallel.layout=dp2") -> depth=8 dp2."""
    words = [word.partition("=") for word in point]
    return " ".join(
        f"{key.removeprefix('--').rpartition('.')[2]}={value}".removeprefix("layout=") for key, _, value in words
    )


def write(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
