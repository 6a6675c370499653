"""Cuts raw videos into clips, takes images and captions along, and writes webdataset shards with an index.

prepare.input is a directory tree or a file with captions beside them (NAME.txt, captions.jsonl), a webdataset, or a list of
files (.parquet, .csv or .jsonl with path, caption or captions and weights, perhaps label, start and end in seconds), all of them
below prepare.root.
Each clip is measured: side, aspect, fps, seconds, black, static, motion, sharpness; prepare.keep limits any of them.
What is not used is counted in report.json and report.png. A killed run goes on when it is started again. As a SLURM array,
under torchrun or with prepare.part=0/8 the machines share the work, and the last to finish writes the output.

examples:
  megasora prepare --config configs/demo.yaml --prepare.input=my-videos --prepare.output=data/shards
  megasora prepare --config configs/demo.yaml --prepare.input=list.parquet --prepare.root=/videos --prepare.workers=16 \\
      --prepare.keep.motion=[0.02,null] --prepare.keep.side=[480,null] --prepare.scorers.aesthetic=model.pt
"""

import argparse
import json

from data_pipelines.prepare.run import prepare
from megasora.cli import add_config_argument
from megasora.cluster.signals import ended_by_warning
from megasora.config import load_config
from megasora.errors import writing
from megasora.observe.logs import log, start_logging
from megasora.observe.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_argument(parser, "prepare")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    start_logging(None, rank=0)
    output = f"prepare.output={config.prepare.output}"
    with Progress("prepare") as progress, ended_by_warning(), writing(output):
        report = prepare(config.prepare, progress)
    if args.json:
        print(json.dumps(report))
    if report["left_to_others"]:
        log.info("done; %d parts are left to other machines, the last writes the output", report["left_to_others"])
    else:
        dropped = ", ".join(f"{reason} {count}" for reason, count in report["dropped"].items())
        log.info("kept %d clips and images of %d files, dropped %s -> %s", report["kept"], report["sources"],
                 f"{dropped} (see report.json)" if dropped else "none", config.prepare.output)  # fmt: skip
        if report["dropped"].get("too short", 0) > report["kept"]:
            log.warning("most pieces are shorter than prepare.min_frames=%d: are they cut too often? Shots change above "
                        "prepare.shot_threshold=%g", config.prepare.min_frames, config.prepare.shot_threshold)  # fmt: skip
