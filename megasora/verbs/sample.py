"""Makes videos from prompts with a checkpoint of run.dir: an mp4 each and a PNG contact sheet.

example:
  megasora sample --config configs/demo.yaml '--sample.prompts=["a rabbit in a meadow"]' --sample.steps=50
"""

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import torch
from torch import nn

from megasora.build import find_objective
from megasora.checkpoint.load import load, read_facts, resume_path
from megasora.cli import add_config_argument
from megasora.config import load_config
from megasora.encoders import open_encoders
from megasora.errors import CheckpointError, ConfigError
from megasora.models.families import build_model, chunk_of
from megasora.models.first_stage import FirstStage
from megasora.observe.hardware import peak_memory
from megasora.observe.logs import log, start_logging
from megasora.observe.progress import Progress
from megasora.parallel.mesh import pick_device
from megasora.rendering import first_shape, make_prompts, render, write_sheet, write_video
from megasora.sampling import Generator
from megasora.schema import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_argument(parser, "sample", "run", "data", "encode", "model", "objective")
    parser.add_argument("--json", action="store_true", help="print the files as one JSON object")


def run(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    start_logging(None, rank=0)
    begin = time.perf_counter()
    files = sample(config)
    if args.json:
        seconds, memory = round(time.perf_counter() - begin, 3), peak_memory(pick_device())
        print(json.dumps({"files": [str(file) for file in files], "seconds": seconds, "peak_memory_bytes": memory}))
    for file in files:
        log.info("%s", file)


def sample(config: Config) -> list[Path]:
    """Writes the samples of config.sample; returns their files."""
    wanted = config.sample
    objective = find_objective(config)
    if objective is None:
        raise ConfigError(f"model.family={config.model.family}: a classifier makes no videos")
    device = pick_device()
    stage, text = open_encoders(config.encode, config.data.latents_at, device)
    prompts = make_prompts(wanted, text)
    with Progress("sample") as progress:
        ticks = itertools.count(1)
        generator = Generator(
            nn.Identity(), config.model, objective, config.objective, wanted, device,
            lambda: progress(next(ticks), predictions(config, stage) * len(prompts), "predictions"),
        )  # fmt: skip
        first_shape(generator, stage)  # refuses sizes before weights are read
        generator.model, step = load_model(config, device)
        directory = Path(wanted.output) if wanted.output else Path(config.run.dir) / "samples" / f"step-{step:08d}"
        previews, files, begin = [], [], time.perf_counter()
        for i, (_, prompt) in enumerate(prompts):
            files.append(directory / f"{i:02d}.mp4")
            previews.append(write_video(render(generator, stage, prompt), wanted, files[-1]))
    log.info("%d videos of %d frames in %.1f s", len(files), wanted.frames, time.perf_counter() - begin)
    return [*files, write_sheet(previews, [caption for caption, _ in prompts], directory)]


def predictions(config: Config, stage: FirstStage) -> int:
    """How often the model is asked for one video, about: Heun's steps ask twice."""
    wanted, chunk = config.sample, chunk_of(config.model)
    stretches = 1
    if chunk:
        stretches = math.ceil(wanted.frames / (stage.compression[0] * chunk * config.model.patch[0]))
    elif 0 < wanted.window < wanted.frames:
        stretches = math.ceil((wanted.frames - wanted.overlap) / (wanted.window - wanted.overlap))
    return stretches * wanted.steps * (2 if wanted.sampler == "heun" else 1)


def load_model(config: Config, device: torch.device) -> tuple[nn.Module, int]:
    """The model with the weights of sample.checkpoint, and the step that they are from."""
    root = Path(config.run.dir) / "checkpoints"
    named = config.sample.checkpoint
    path = resume_path(root, "auto" if named == "latest" else named, config.checkpoint.durable).path
    if path is None:
        raise CheckpointError(f"{root}: no checkpoint; train first, or give sample.checkpoint=PATH")
    with torch.device("meta"):
        model = build_model(config.model)
    model.to_empty(device=device)
    prefix = f"{config.sample.weights}/"
    load(path, {prefix + name: p.detach() for name, p in model.named_parameters()}, prefix=prefix, verified=True)
    return model.eval(), int(read_facts(path)["step"])
