"""Measures the training step: warm-up, then so many steps, their median and spread, tokens/s, TFLOP/s and MFU.

With --data=synthetic it draws latents of the stages' buckets itself and needs no files. --bench.against=OLD.json compares
with an earlier result and exits 1 when the step got slower by more than the noise of both.

examples:
  megasora bench --config configs/demo.yaml --data=synthetic
  megasora launch local --nproc 2 bench --config configs/demo.yaml --data=synthetic --parallel.layout=dp2,zero3 --json
"""

import argparse
import json

from megasora.bench import bench, compare, read_result, table
from megasora.cli import add_config_argument
from megasora.config import load_config
from megasora.observe.logs import start_logging
from megasora.parallel.mesh import rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_argument(parser, "bench", "data", "model", "stages", "optim", "vae", "parallel", "precision")
    parser.add_argument("--data", choices=("shards", "synthetic"), default="shards", help="where latents come from")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    start_logging(None, rank())
    old = read_result(config.bench.against) if config.bench.against else None
    result = bench(config, synthetic=args.data == "synthetic")
    if rank() == 0:
        print(json.dumps(result) if args.json else table(result))
    if old:
        compare(result, old, config.bench.against)
