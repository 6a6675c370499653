"""Writes the index of webdataset tars in place: a .arrow beside each, so that any sample is one read away.

Samples that cannot be used (no caption, damaged, hostile names) are left out and counted.

examples:
  megasora index data/my-webdataset
  megasora index s3://bucket/webdataset
"""

import argparse
import json

from data_pipelines.shards.index import index_directory
from data_pipelines.shards.storage import open_storage
from megasora.errors import ConfigError
from megasora.observe.logs import log, start_logging
from megasora.observe.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIRECTORY", help="with tars of one data set; s3:// and the like too")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(args: argparse.Namespace) -> None:
    if args.overrides:
        raise ConfigError(f"{args.overrides[0]}: `index` takes no keys, only a directory")
    start_logging(None, rank=0)
    with Progress("index") as progress:
        report = index_directory(open_storage(args.directory), progress)
    if args.json:
        print(json.dumps(report))
    log.info("%s -> %s", {key: value for key, value in report.items() if key != "examples"}, args.directory)
