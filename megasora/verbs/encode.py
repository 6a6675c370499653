"""Encodes shards into latent shards: every clip through the VAE, every caption through the text encoder, once for each
size that the stages' buckets want. A killed run goes on; latents remember the encoders that made them.

Any number of processes on any number of machines share the shards, as long as they see the same output directory: start them
with `megasora launch`, as a SLURM array, or by hand, at any time. The same bytes come out.

examples:
  megasora encode --config configs/demo.yaml --encode.input=data/shards --encode.output=data/latents
"""

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data_pipelines.buckets import merge
from data_pipelines.encode.report import describe
from data_pipelines.encode.run import PRIVATE, encode_shards
from data_pipelines.errors import BadSample, DataError
from data_pipelines.samples.latents import read_about
from data_pipelines.shards.tars import ShardSet
from megasora.cli import add_config_argument
from megasora.cluster.signals import ended_by_warning
from megasora.config import load_config
from megasora.device import pick_device
from megasora.encoders import NULL_TEXT, make_encoders, null_text_bytes, open_stage, open_text, text_directory
from megasora.errors import made_by, writing
from megasora.models.text import SmallTextEncoder, TextEncoder
from megasora.observe.logs import log, start_logging
from megasora.observe.progress import Progress
from megasora.parallel.mesh import rank
from megasora.schema import Config

TEXT_WIDTH = 128  # of the small encoder, where the model takes no text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_argument(parser, "encode", "stages", "model")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    start_logging(None, rank())
    with ended_by_warning(), writing(f"encode.output={config.encode.output}"):
        report = encode(config)
    if args.json and rank() == 0:
        print(json.dumps(report))
    speed = report["speed"]
    kept, dropped = (", ".join(f"{name} {n}" for name, n in report[part].items()) for part in ("kept", "dropped"))
    log.info("latents %s, dropped %s -> %s", kept, dropped or "none", config.encode.output)
    log.info("%s; this process made %d of %d shards at %s frames/s, %.0f %% of the time waiting for decode",
             describe(report), speed["shards"], report["shards"], speed["frames_per_second"],
             100 * speed["waiting_for_decode"])  # fmt: skip


def encode(config: Config) -> dict[str, Any]:
    """Encodes shards until all are there, beside other processes that do the same; returns the report."""
    settings = config.encode
    with made_by("prepare", "encode.input"):
        source, output = ShardSet.open(settings.input), Path(settings.output)
    device = pick_device()
    vae = open_stage(settings, device)
    text = find_text(config, source, output, device)
    buckets = merge(stage.buckets for stage in config.stages)
    with Progress("encode") as progress:
        return encode_shards(
            source,
            output,
            buckets,
            make_encoders(settings, vae, text, buckets, device),
            progress,
            beside={NULL_TEXT: null_text_bytes(text.encode([""])[0])},
            batch_pixels=int(settings.batch_megapixels * 1e6),
            claim_seconds=settings.claim_seconds,
            workers=settings.workers,
        )


def find_text(config: Config, source: ShardSet, output: Path, device: torch.device) -> TextEncoder:
    """The text encoder of encode.text; where none is named, the small one, made from the captions beside the latents."""
    directory = Path(text_directory(config.encode, output))
    if not config.encode.text and not (directory / "config.json").exists():
        captions = sorted(set(readable_captions(source)))
        if not captions:
            raise DataError(f"{source.address}: no readable sample with a caption")
        log.info("making a small text encoder from %d captions", len(captions))
        made = output / PRIVATE / f"text-{rank()}-{os.getpid()}"
        SmallTextEncoder.create(captions, config.model.text_width or TEXT_WIDTH).save(made)
        with contextlib.suppress(OSError):  # another process was faster and made the same
            made.rename(directory)
    return open_text(config.encode, output, device)


def readable_captions(source: ShardSet) -> Iterator[str]:
    for index in range(len(source)):
        with contextlib.suppress(BadSample):  # encode_shards counts it
            yield from (caption for caption, _ in read_about(source.key(index), source.read(index)).captions)
