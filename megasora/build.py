"""What a config asks for, built: the engine, a stage's loader and recipe, the run directory, and the check that they fit."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from data_pipelines.buckets import buckets_of
from megasora.config import flatten, to_dict
from megasora.device import pick_device
from megasora.diffusion.objective import Objective, build_objective
from megasora.encoders import LatentFacts
from megasora.engines.deepspeed_config import check_engine as check_deepspeed
from megasora.engines.torch_native import Engine, TorchNative
from megasora.errors import ConfigError
from megasora.microbatch import Recipe, tokens_of
from megasora.models.attention import compute_capability, find_attention
from megasora.models.base import Model
from megasora.models.families import build_model, chunk_of
from megasora.observe.boards import TensorBoard, WeightsAndBiases
from megasora.observe.logs import start_logging
from megasora.observe.metrics import Journal
from megasora.observe.tally import Tally
from megasora.parallel.fp8 import check_fp8
from megasora.parallel.layout import Layout, check_share
from megasora.parallel.mesh import Processes, processes_of_a_node
from megasora.parallel.plan import PLANS, check_layout, refusal
from megasora.schema import Config, Stage
from megasora.seeding import fold

# Sections of the config that are TensorBoard's hyper-parameters: it shows the first keys of the alphabet, unless told otherwise.
LEARNING = ("engine", "flow", "gaussian", "model", "objective", "optim", "parallel", "precision", "stages")


def check_fit(config: Config, group: Processes, latents: LatentFacts) -> None:
    """Raises ConfigError, naming the key and the nearest value that works, when model, data and layout do not fit together."""
    find_attention(config.model.attention)
    check_layout(config.model, group.layout, node_of(config))
    check_engine(config, group.layout)
    check_fp8(config.precision.fp8, compute_capability(), config.parallel.recompute)
    if config.precision.fp8_gather and (group.layout.zero < 2 or group.layout.tp > 1):
        raise ConfigError(f"precision.fp8_gather=true: goes with zero2 or zero3 and without tp, not {group.layout}")
    if config.model.channels != latents.channels:
        raise ConfigError(f"model.channels={config.model.channels}: the latents have {latents.channels}")
    for key, found in (("text_width", latents.null.tokens.shape[1]), ("pooled_width", len(latents.null.pooled))):
        wanted = {"text_width": config.model.text_width, "pooled_width": config.model.pooled_width}[key]
        if wanted not in (0, found):
            raise ConfigError(f"model.{key}={wanted}: the text encoder of these latents gives {found}")
    check_share(config.data.global_batch, group.layout)
    capacity = config.data.capacity
    t, h, w = latents.compression
    for bucket in (bucket for stage in config.stages for bucket in buckets_of(stage.buckets)):
        sizes = (1 + (bucket.frames - 1) // t, bucket.height // h, bucket.width // w)
        if (bucket.frames - 1) % t or bucket.height % h or bucket.width % w:
            raise ConfigError(
                f"stages: bucket {bucket} does not divide by the VAE's {t}x{h}x{w} (frames: 1 + a multiple of {t})"
            )
        if any(size % step for size, step in zip(sizes, config.model.patch, strict=True)):
            raise ConfigError(
                f"model.patch={list(config.model.patch)}: does not divide the {sizes} latent of bucket {bucket}"
            )
    unit = group.layout.row_unit
    largest = max(
        tokens_of(bucket, latents.compression, config.model.patch)
        for stage in config.stages
        for bucket in buckets_of(stage.buckets)
    )
    if capacity % unit or capacity < largest:
        nearest = -(-max(capacity, largest) // unit) * unit
        raise ConfigError(
            f"data.capacity={capacity}: a multiple of {unit} that holds the largest bucket, {largest} tokens; "
            f"nearest is {nearest}"
        )
    if capacity % config.data.row_multiple or config.data.row_multiple % unit:
        raise ConfigError(
            f"data.row_multiple={config.data.row_multiple}: a multiple of {unit} that divides data.capacity={capacity}; "
            f"nearest is {unit}"
        )


def node_of(config: Config) -> int | None:
    """How many processes the groups that must stay within a node have there; None where they need not."""
    return None if config.parallel.across_nodes else processes_of_a_node()


def check_engine(config: Config, layout: Layout) -> None:
    """Raises ConfigError for what the engine that the config asks for does not do, or where it is not installed."""
    if config.engine == "deepspeed":
        check_deepspeed(
            config.deepspeed, config.optim, config.precision, config.parallel, layout, pick_device(),
            config.data.global_batch,
        )  # fmt: skip


def check_rollout(config: Config, group: Processes) -> None:
    """Raises ConfigError, with the nearest layout that works, where the videos of a layout's model cannot be made."""
    if group.layout.pp > 1 and chunk_of(config.model):
        raise refusal(group.layout, "a chunk-causal model makes videos (eval.every) without stages", pp=1)


def open_run_directory(config: Config, group: Processes) -> Path:
    """Creates run.dir and starts the logs. Raises ConfigError when it cannot be."""
    run = Path(config.run.dir)
    dist.barrier()  # nobody creates before everybody has looked
    try:
        run.mkdir(parents=True, exist_ok=True)
        start_logging(run, group.rank)
    except OSError as error:
        raise ConfigError(f"run.dir={run}: {error.strerror}") from None
    return run


def build_engine(
    config: Config, group: Processes, blank: bool = False, build: Callable[[], Model[Any]] | None = None
) -> Engine:
    """The model on the layout of the group, its weights drawn from the run's seed; `blank`: left for a checkpoint to fill.
    `build` makes another model than the config's."""
    if config.run.determinism == "bitwise":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or torch refuses matrix products on a GPU
        torch.use_deterministic_algorithms(True)
    build = build or partial(build_model, config.model)
    plan = PLANS.get(config.model.family, [])
    seed = None if blank else fold(config.run.seed, "weights")
    if config.engine == "torch_native":
        return TorchNative(build, seed, group, config.parallel, config.precision, config.optim, plan)
    from megasora.engines.deepspeed_zero import DeepSpeedZero  # the library takes seconds to import

    return DeepSpeedZero(
        build, seed, group, config.parallel, config.precision, config.optim, plan, config.deepspeed,
        config.data.global_batch,
    )  # fmt: skip


def find_objective(config: Config) -> Objective | None:
    """What the model learns; None for a classifier."""
    return None if config.objective == "classify" else build_objective(config.objective, config.flow, config.gaussian)


def build_recipe(config: Config, group: Processes, latents: LatentFacts, stage: Stage, segment: int) -> Recipe:
    """How the stage's samples become training pairs."""
    return Recipe(
        seed=config.run.seed,
        segment=segment,
        objective=find_objective(config),
        flow=config.flow,
        shift=stage.shift,
        tasks=stage.tasks,
        drop_captions=stage.drop_captions,
        null=latents.null,
        patch=config.model.patch,
        chunk=chunk_of(config.model),
        global_batch=config.data.global_batch,
        device=group.device,
    )


def build_tally(config: Config, device: torch.device) -> Tally | None:
    """Of the buckets of all stages, where there is a board to show it on."""
    if not config.observe.tensorboard and config.observe.wandb == "off":
        return None
    return Tally([str(bucket) for stage in config.stages for bucket in buckets_of(stage.buckets)], device)


def open_boards(journal: Journal, config: Config) -> None:
    """Those that the config asks for; they show the config, too."""
    observe, plain = config.observe, to_dict(config)
    if observe.tensorboard:
        told = flatten({section: plain[section] for section in LEARNING})
        told["data.global_batch"] = config.data.global_batch
        text = yaml.safe_dump(plain, sort_keys=False)
        journal.open_board(lambda: TensorBoard(journal.run, told, text))
    if observe.wandb != "off":
        mode = observe.wandb
        journal.open_board(lambda: WeightsAndBiases(journal.run, mode, observe.wandb_project, flatten(plain)))
