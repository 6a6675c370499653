"""Cuts raw videos into clips, takes images and captions along, and writes webdataset shards with an index.

Captions lie beside the files (NAME.txt) or in captions.jsonl. What cannot be used is skipped and counted in report.json.

example:
  megasora prepare --config configs/demo.yaml --prepare.input=my-videos --prepare.output=data/shards
"""

import argparse
import json

from data_pipelines.prepare import prepare
from megasora.cli import add_config_argument
from megasora.config import load_config
from megasora.observe.logs import log, start_logging
from megasora.observe.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_argument(parser, "prepare")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    start_logging(None, rank=0)
    with Progress("prepare") as progress:
        report = prepare(config.prepare, progress)
    if args.json:
        print(json.dumps(report))
    log.info("kept %s, dropped %s -> %s", report["kept"], report["dropped"], config.prepare.output)
