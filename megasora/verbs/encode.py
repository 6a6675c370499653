"""Encodes shards into latent shards: every clip through the VAE, every caption through the text encoder, once for each
size that the stages' buckets want. A killed run goes on; latents remember the encoders that made them.

example:
  megasora encode --config configs/demo.yaml --encode.input=data/shards --encode.output=data/latents
"""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipelines.buckets import merge
from data_pipelines.errors import BadSample, DataError
from data_pipelines.latent_shards import Encoders, encode_shards, write_whole
from data_pipelines.shards import ShardSet
from megasora.cli import add_config_argument
from megasora.config import load_config
from megasora.encoders import from_pixels, make_manifest, open_stage, open_text, save_null_text, text_directory
from megasora.models.text import SmallTextEncoder, TextEncoder
from megasora.observe.logs import log, start_logging
from megasora.observe.progress import Progress
from megasora.parallel.mesh import pick_device, rank, world_size
from megasora.schema import Config

TEXT_WIDTH = 128  # of the small encoder, where the model takes no text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_argument(parser, "encode", "stages", "model")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    start_logging(None, rank())
    report = encode(config)
    if args.json and rank() == 0:
        print(json.dumps(report))
    log.info("latents %s, dropped %s -> %s", report["kept"], report["dropped"], config.encode.output)


def encode(config: Config) -> dict[str, dict[str, int]]:
    """Encodes this process's share of the shards (all of them, when it is alone); returns the report."""
    source, output = ShardSet.open(Path(config.encode.input)), Path(config.encode.output)
    device = pick_device()
    vae = open_stage(config.encode, device)
    text = find_text(config, source, output, device)

    @torch.no_grad()
    def encode_video(frames: np.ndarray) -> tuple[Tensor, Tensor]:
        mean, logvar = vae.encode_long(from_pixels(torch.from_numpy(frames).to(device))[None])
        return mean[0].cpu(), logvar[0].cpu()

    def encode_text(caption: str) -> tuple[Tensor, Tensor]:
        encoded = text.encode([caption])[0]
        return encoded.tokens, encoded.pooled

    encoders = Encoders(
        video=encode_video,
        text=encode_text,
        temporal_compression=vae.compression[0],
        dtype=getattr(torch, config.encode.latent_dtype),
        manifest=make_manifest(vae, text, config.encode),
    )
    buckets = merge(stage.buckets for stage in config.stages)
    with Progress("encode") as progress:
        report = encode_shards(source, output, buckets, encoders, progress, worker=rank(), workers=world_size())
    save_null_text(output, text.encode([""])[0])
    write_whole(output / "report.json", json.dumps(report, indent=1))
    return report


def find_text(config: Config, source: ShardSet, output: Path, device: torch.device) -> TextEncoder:
    """The text encoder of encode.text; where none is named, the small one, made from the captions beside the latents."""
    directory = text_directory(config.encode, output)
    if not config.encode.text and not (Path(directory) / "config.json").exists():
        captions = sorted(set(readable_captions(source)))
        if not captions:
            raise DataError(f"{source.directory}: no readable sample with a caption")
        log.info("making a small text encoder from %d captions", len(captions))
        SmallTextEncoder.create(captions, config.model.text_width or TEXT_WIDTH).save(Path(directory))
    return open_text(config.encode, output, device)


def readable_captions(source: ShardSet) -> Iterator[str]:
    for index in range(len(source)):
        with contextlib.suppress(BadSample):  # encode_shards counts it
            yield source.read(index)["txt"].decode()
