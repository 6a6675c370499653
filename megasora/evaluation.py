"""What a run shows of itself on the way: the loss of fixed samples at fixed timesteps, and videos of fixed prompts.

Both are of the averaged weights, and nothing in them is drawn anew: two evaluations differ by the weights alone.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megasora.build import build_recipe, check_rollout, find_objective
from megasora.encoders import look_for_encoders, open_encoders
from megasora.engines.torch_native import Engine
from megasora.errors import ConfigError
from megasora.microbatch import MicroBatch, build_microbatch
from megasora.observe.boards import check_wandb
from megasora.observe.logs import log
from megasora.observe.scores import clip_score, fvd
from megasora.parallel.mesh import Processes, on_main
from megasora.rendering import make_prompts, render
from megasora.sampling import Generator, turns
from megasora.schema import Config, EvalConfig, SampleConfig, Stage
from megasora.seeding import fold
from megasora.training_data import TrainingData, build_loader, data_at, open_data


def check_evaluation(config: Config, group: Processes) -> None:
    """Raises ConfigError, before the first step, for what a run would end on when it comes to show itself."""
    check_wandb(config.observe.wandb)
    for key, path in (
        ("clip", config.eval.clip),
        ("fvd", config.eval.fvd),
        ("fvd_reference", config.eval.fvd_reference),
    ):
        if path and not Path(path).exists():
            raise ConfigError(f"eval.{key}={path}: no such file or directory")
    if config.eval.every:
        check_rollout(config, group)
        if find_objective(config) is not None and prompted(config):
            look_for_encoders(config.encode, config.data.latents_at, f"eval.every={config.eval.every}")


def prompted(config: Config) -> SampleConfig | None:
    """The settings of `sample` with the prompts of eval, if there are any."""
    settings = replace(config.sample, prompts=config.eval.prompts or config.sample.prompts)
    return settings if settings.prompts or settings.labels else None


def evaluation_loss(
    config: Config, group: Processes, engine: Engine, data: TrainingData, stage: Stage
) -> dict[str, float]:
    """The loss of eval.samples samples at each quantile of the timesteps, by quantile and by bucket. All ranks call it.

    Keys: `loss`, `loss_q0.50`, `loss_17x80x144`. Raises ConfigError when the held-out latents are of other encoders.
    """
    if config.eval.path:
        held_out = open_data(data_at(config, config.eval.path), group.device)
        if held_out.facts.manifest != data.facts.manifest:
            raise ConfigError(f"eval.path={config.eval.path}: made by other encoders than data.path={config.data.path}")
        data = held_out
    # The ranks that share rows see the same ones here, also where training gives each of them its own.
    group = replace(group, layout=replace(group.layout, dynamic=False))
    ranks = group.layout.dp
    samples = -(-config.eval.samples // ranks) * ranks
    local = replace(config, data=replace(config.data, global_batch=samples, prefetch=1))
    loader = build_loader(local, group, data, stage, segment=-1, obey={})
    with closing(loader.batches(0)) as batches:
        batch = next(batches)
    recipe = build_recipe(local, group, data.facts, replace(stage, tasks={"text": 1.0}, drop_captions=0.0), segment=-1)
    recipe = replace(recipe, seed=fold(config.run.seed, "evaluation"))
    objective = find_objective(config)
    found: list[tuple[str, str, float]] = []
    with engine.averaged(), torch.no_grad():
        for quantile in config.eval.quantiles if objective else (None,):
            for row, length in zip(batch.rows, batch.lengths, strict=True):
                micro = build_microbatch(row, replace(recipe, quantile=quantile), length)
                losses = sample_losses(engine.predict, micro, objective)
                names = [str(sample.bucket) for sample in row]
                at = "" if quantile is None else f"q{quantile:.2f}"
                found += [(at, name, value) for name, value in zip(names, losses.tolist(), strict=False)]
    everyone: list[Any] = [None] * group.world
    dist.all_gather_object(everyone, found)
    return averages([line for lines in everyone for line in lines])


def sample_losses(model: Callable[..., Tensor], batch: MicroBatch, objective: Any) -> Tensor:
    """[S]: each sample's mean loss."""
    row = batch.row
    if objective is None:
        return nn.functional.cross_entropy(model(row).float(), row.label, ignore_index=-1, reduction="none")  # [S]
    t = row.timestep[row.runs.index][:, None]  # [L, 1]
    loss = objective.loss(model(row), batch.data, batch.noise, row.tokens, t)  # [L]
    sums = loss.new_zeros(len(row.video.lengths)).index_add(0, row.video.index, loss)
    return sums / sums.new_tensor(row.video.lengths)


def averages(found: list[tuple[str, str, float]]) -> dict[str, float]:
    """Means over all, over each quantile and over each bucket."""
    groups: dict[str, list[float]] = {}
    for quantile, bucket, value in found:
        for key in ("loss", f"loss_{quantile}" if quantile else "loss", f"loss_{bucket}"):
            groups.setdefault(key, []).append(value)
    return {key: float(np.mean(values)) for key, values in sorted(groups.items())}


def evaluation_videos(config: Config, group: Processes, engine: Engine) -> list[tuple[str, np.ndarray]]:
    """(caption, uint8 [T, H, W, 3]) of the prompts of eval, by the settings of `sample`, on the main process. All ranks call it,
    and divide the prompts."""
    objective = find_objective(config)
    settings = prompted(config)
    if objective is None or settings is None:
        return []
    stage, text = open_encoders(config.encode, config.data.latents_at, group.device)
    generator = Generator(
        engine.predict,
        config.model,
        objective,
        config.objective,
        settings,
        group.device,
        multiple=group.part(group.layout.cp)[1],
    )
    prompts, mine = make_prompts(settings, text), {}
    log.info("making %d sample videos", len(prompts))
    with engine.averaged():
        for i in turns(len(prompts), group.data_rank, group.layout.dp):
            caption, prompt = prompts[min(i, len(prompts) - 1)]
            video = np.concatenate(list(render(generator, stage, prompt)))
            if group.speaks and i < len(prompts):
                mine[i] = caption, video
    videos = on_main(group, mine)
    return [videos[i] for i in sorted(videos)]


def score_videos(config: EvalConfig, videos: list[tuple[str, np.ndarray]]) -> dict[str, float]:
    """By the local models that the config names; FVD needs two videos or more."""
    scores = {}
    clips = [video for _, video in videos]
    if config.clip:
        scores["clip"] = clip_score(config.clip, clips, [caption for caption, _ in videos])
    if config.fvd and len(clips) > 1:
        scores["fvd"] = fvd(config.fvd, config.fvd_reference, clips)
    return scores
