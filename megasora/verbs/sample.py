"""Makes videos from prompts with a checkpoint of run.dir: an mp4 each and a PNG contact sheet. On several processes, started by
`launch`, parallel.layout says how they share the prompts (dp) and the work on each (cp, tp, pp).

examples:
  megasora sample --config configs/demo.yaml '--sample.prompts=["a rabbit in a meadow"]' --sample.steps=50
"""

import argparse
import itertools
import json
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from megasora.build import build_engine, check_rollout, find_objective, node_of
from megasora.checkpoint.load import load, read_facts, resume_path
from megasora.cli import add_config_argument
from megasora.config import load_config
from megasora.device import pick_device
from megasora.encoders import open_encoders
from megasora.errors import CheckpointError, ConfigError, writing
from megasora.models.families import build_model, chunk_of
from megasora.models.first_stage import FirstStage
from megasora.models.packing import PackedRow
from megasora.observe.hardware import peak_memory
from megasora.observe.logs import log, start_logging
from megasora.observe.progress import Progress
from megasora.parallel.mesh import Processes, on_main, processes, rank, world_size
from megasora.parallel.plan import check_layout
from megasora.rendering import first_shape, make_prompts, render, write_sheet, write_video
from megasora.sampling import Generator, turns
from megasora.schema import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_argument(
        parser, "sample", "run", "data", "encode", "model", "objective", "flow", "gaussian", "precision", "parallel"
    )
    parser.add_argument("--json", action="store_true", help="print the files as one JSON object")


def run(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    start_logging(None, rank())
    begin = time.perf_counter()
    with writing(f"sample.output={config.sample.output or config.run.dir + '/samples'}"):
        files = sample(config)
    if args.json and rank() == 0:
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
    # A layout is for the processes that train; one process alone samples from any checkpoint.
    with processes(config.parallel.layout if world_size() > 1 else "dp1") as group, Progress("sample") as progress:
        check_layout(config.model, group.layout, node_of(config))
        check_rollout(config, group)
        stage, text = open_encoders(config.encode, config.data.latents_at, group.device)
        prompts = make_prompts(wanted, text)
        mine = turns(len(prompts), group.data_rank, group.layout.dp)
        ticks = itertools.count(1)
        generator = Generator(
            nn.Identity(), config.model, objective, config.objective, wanted, group.device,
            lambda: progress(next(ticks), predictions(config, stage) * len(mine), "predictions") if group.is_main else None,
            multiple=group.part(group.layout.cp)[1],
        )  # fmt: skip
        first_shape(generator, stage)  # refuses sizes before weights are read
        generator.predict, step = load_model(config, group)
        directory = Path(wanted.output) if wanted.output else default_directory(config, step)
        files = [directory / f"{i:02d}.mp4" for i in range(len(prompts))]
        previews, begin = {}, time.perf_counter()
        for i in mine:
            stretches = render(generator, stage, prompts[min(i, len(prompts) - 1)][1])
            if group.speaks and i < len(prompts):
                previews[i] = write_video(stretches, wanted, files[i])
            else:
                deque(stretches, maxlen=0)  # the others need this process's part
        previews = on_main(group, previews)
        if not group.is_main:
            return []
    log.info("%d videos of %d frames in %.1f s", len(files), wanted.frames, time.perf_counter() - begin)
    ordered = [previews[i] for i in range(len(prompts))]
    return [*files, write_sheet(ordered, [caption for caption, _ in prompts], directory)]


def default_directory(config: Config, step: int) -> Path:
    """A name of its own for each way to ask: what is asked for later replaces neither that nor the run's own samples."""
    asked = xxhash.xxh3_64_hexdigest(repr((config.sample, config.precision.precision)).encode())[:8]
    return Path(config.run.dir) / "samples" / f"step-{step:08d}-{asked}"


def predictions(config: Config, stage: FirstStage) -> int:
    """How often the model is asked for one video, about: Heun's steps ask twice."""
    wanted, chunk = config.sample, chunk_of(config.model)
    stretches = 1
    if chunk:
        stretches = math.ceil(wanted.frames / (stage.compression[0] * chunk * config.model.patch[0]))
    elif 0 < wanted.window < wanted.frames:
        stretches = math.ceil((wanted.frames - wanted.overlap) / (wanted.window - wanted.overlap))
    return stretches * wanted.steps * (2 if wanted.sampler == "heun" else 1)


def load_model(config: Config, group: Processes) -> tuple[Callable[..., Tensor], int]:
    """What predicts with the weights of sample.checkpoint, and the step that they are from. It computes in precision.precision;
    fp8 is for training."""
    root = Path(config.run.dir) / "checkpoints"
    named = config.sample.checkpoint
    path = resume_path(root, "auto" if named == "latest" else named, config.checkpoint.durable).path
    if path is None:
        raise CheckpointError(f"{root}: no checkpoint; train first, or give sample.checkpoint=PATH")
    step, prefix = int(read_facts(path)["step"]), f"{config.sample.weights}/"
    if group.world == 1:
        with torch.device("meta"):
            model = build_model(config.model)
        model.to_empty(device=group.device)
        load(path, {prefix + name: p.detach() for name, p in model.named_parameters()}, prefix=prefix, verified=True)
        return in_precision(model.eval(), config, group.device), step
    plain = replace(config.precision, fp8="none", fp8_gather=False)
    engine = build_engine(replace(config, precision=plain, optim=replace(config.optim, ema=0.0)), group, blank=True)
    weights = {name: tensor for name, tensor in engine.tensors().items() if name.startswith("model/")}
    load(
        path,
        {prefix + name.removeprefix("model/"): tensor for name, tensor in weights.items()},
        prefix=prefix,
        verified=True,
    )
    engine.loaded()
    return engine.predict, step


def in_precision(model: nn.Module, config: Config, device: torch.device) -> Callable[..., Tensor]:
    """The model as an engine's forward passes have it."""
    lower = config.precision.precision == "bf16"

    def predict(row: PackedRow, *options: Any) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=lower, cache_enabled=False):
            answer: Tensor = model(row, *options)
        return answer

    return predict
