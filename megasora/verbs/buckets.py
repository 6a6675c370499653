"""Shows what the stages' buckets make of the raw shards of encode.input: the samples of each bucket, their tokens and FLOPs,
the share of the pixels that is cut away, buckets that are empty and samples that fit none. Reads indexes only.

examples:
  megasora buckets --config configs/demo.yaml --stages.1.buckets.resolutions=[112,256]
"""

import argparse
import json

from data_pipelines.batches.bucket_report import bucket_report, table
from data_pipelines.buckets import Bucket
from data_pipelines.shards.tars import ShardSet
from megasora.cli import add_config_argument
from megasora.config import load_config
from megasora.errors import made_by
from megasora.microbatch import patches_of, tokens_of
from megasora.models.flops import training_flops
from megasora.schema import Config, Stage
from megasora.training_data import UNKNOWN_TEXT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_argument(parser, "stages", "encode")
    parser.add_argument("--json", action="store_true", help="print {stage: report} as one JSON object")


def run(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    with made_by("prepare", "encode.input"):
        shards = ShardSet.open(config.encode.input, config.data.cache_config())
    reports = {stage.name: report_of(config, stage, shards) for stage in config.stages}
    if args.json:
        print(json.dumps(reports))
        return
    for name, report in reports.items():
        print(f"stage {name} on {shards.address}\n{table(report)}\n")


def report_of(config: Config, stage: Stage, shards: ShardSet) -> dict[str, object]:
    """By the compression of `vae` and the patches and FLOPs of `model`."""
    compression, patch = config.vae.compression, config.model.patch

    def tokens(bucket: Bucket) -> int:
        return tokens_of(bucket, compression, patch)

    def cost(bucket: Bucket, text_tokens: int) -> float:
        return float(training_flops(config.model, patches_of(bucket, compression, patch), UNKNOWN_TEXT))

    return bucket_report(shards, stage.buckets, tokens, cost)
