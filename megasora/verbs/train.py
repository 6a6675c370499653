"""Trains the generator on latent shards: buckets packed and balanced over the ranks, checkpoints, metrics, sample videos.

Run again with the same config it goes on from the newest good checkpoint. SIGTERM, SIGUSR1 or Ctrl-C save and exit 75.

examples:
  megasora train --config configs/demo.yaml
  megasora launch local --nproc 2 train --config configs/demo.yaml --optim.lr=2e-4 --run.dir=runs/second
  megasora train --config configs/demo.yaml --run.dir=runs/profiled --run.steps=12 --profile.steps=10-12
"""

import argparse

from megasora.cli import add_config_argument
from megasora.config import load_config
from megasora.trainer import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_argument(
        parser, "engine", "objective", "run", "data", "encode", "model", "flow", "gaussian", "optim", "stages", "parallel",
        "precision", "deepspeed", "checkpoint", "spikes", "eval", "sample", "observe", "profile",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    train(load_config(args.config, args.overrides))
