"""Makes videos from prompts with a checkpoint of run.dir: an mp4 each and a PNG contact sheet.

example:
  megasora sample --config configs/demo.yaml '--sample.prompts=["a rabbit in a meadow"]' --sample.steps=50
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch

from megasora.checkpoint.load import load, read_facts, resume_path
from megasora.cli import add_config_argument
from megasora.config import Config, SampleConfig, load_config
from megasora.encoders import open_encoders, open_facts
from megasora.errors import CheckpointError, ConfigError
from megasora.models.video_dit import VideoDiT
from megasora.observe.logs import log, start_logging
from megasora.observe.progress import Progress
from megasora.parallel.mesh import pick_device
from megasora.sampling import decode_latent, generate, latent_shape, write_samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_argument(parser, "sample", "run", "data", "encode", "model")
    parser.add_argument("--json", action="store_true", help="print the files as one JSON object")


def run(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    start_logging(None, rank=0)
    files = sample(config)
    if args.json:
        print(json.dumps({"files": [str(file) for file in files]}))
    for file in files:
        log.info("%s", file)


def sample(config: Config) -> list[Path]:
    """Writes the samples of config.sample; returns their files."""
    wanted = config.sample
    if not wanted.prompts:
        raise ConfigError('sample.prompts=[]: give at least one, as in --sample.prompts=["a rabbit in a meadow"]')
    latents = Path(config.data.path)
    facts = open_facts(latents)
    shape = latent_shape(wanted, facts.channels, facts.compression, config.model.patch)
    vae, text = open_encoders(config.encode, latents)
    device = pick_device()
    model, step = load_generator(config, device)
    *embeddings, negative = text.encode([*wanted.prompts, wanted.negative])
    videos, begin = [], time.perf_counter()
    with Progress("sample") as progress:
        for i, embedding in enumerate(embeddings):
            tick = partial(_tick, progress, i, len(embeddings), wanted)
            latent = generate(
                model, config.model.patch, shape, embedding, negative, wanted, wanted.seed + i, device, tick
            )
            videos.append(decode_latent(vae, latent))
    log.info("%d videos of %d frames in %.1f s", len(videos), len(videos[0]), time.perf_counter() - begin)
    directory = Path(wanted.output) if wanted.output else Path(config.run.dir) / "samples" / f"step-{step:08d}"
    return write_samples(videos, list(wanted.prompts), directory, wanted.fps)


def load_generator(config: Config, device: torch.device) -> tuple[VideoDiT, int]:
    """The model with the weights of sample.checkpoint, and the step that they are from."""
    root = Path(config.run.dir) / "checkpoints"
    named = config.sample.checkpoint
    path = resume_path(root, "auto" if named == "latest" else named).path
    if path is None:
        raise CheckpointError(f"{root}: no checkpoint; train first, or give sample.checkpoint=PATH")
    with torch.device("meta"):
        model = VideoDiT(config.model, config.model.attention)
    model.to_empty(device=device)
    prefix = f"{config.sample.weights}/"
    load(path, {prefix + name: p.detach() for name, p in model.named_parameters()}, prefix=prefix)
    return model.eval(), int(read_facts(path)["step"])


def _tick(progress: Progress, video: int, videos: int, wanted: SampleConfig, step: int) -> None:
    progress(video * wanted.steps + step, videos * wanted.steps, wanted.prompts[video])
