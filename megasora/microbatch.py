"""From latents to one packed row of the model: where data, diffusion and model meet.

Noise, timestep and dropped captions are functions of (seed, segment, position) alone, so a sample is trained alike on every
layout, and again when its step is replayed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_pipelines.buckets import Bucket
from data_pipelines.loader import Sample
from megasora.diffusion.flow import FlowConfig, draw_timestep, interpolate, velocity
from megasora.models.packing import PackedRow, Patch, pack, patch_grid, patchify
from megasora.seeding import generator, normal


@dataclass(frozen=True)
class MicroBatch:
    """A packed row, what the model should say of it, and each token's share of the loss."""

    row: PackedRow
    target: Tensor  # [L, P]
    weight: Tensor  # [L], zero for padding


@dataclass(frozen=True)
class Recipe:
    """How a segment turns latents into training pairs."""

    seed: int
    segment: int
    flow: FlowConfig
    shift: float
    drop_captions: float
    null_text: Tensor  # [M, E], the empty caption's embedding
    patch: Patch
    capacity: int
    global_batch: int
    device: torch.device


def build_microbatch(samples: Sequence[Sample], recipe: Recipe) -> MicroBatch:
    """Draws each sample's latent, noise and timestep and packs them. The loss of a token is weighted 1 / (tokens of its
    sample · samples of the global batch), so that the sum over all rows and ranks is the mean of the samples' means."""
    patches, grids, targets, weights, timesteps, texts = [], [], [], [], [], []
    for sample in samples:
        name = (recipe.seed, recipe.segment, sample.position)
        mean, logvar = sample.latent.mean.to(recipe.device), sample.latent.logvar.to(recipe.device)
        shape = tuple(mean.shape)
        data = mean + torch.exp(0.5 * logvar) * normal(shape, "posterior", *name, device=recipe.device)
        noise = normal(shape, "noise", *name, device=recipe.device)
        t = draw_timestep(normal((), "timestep", *name), recipe.flow, recipe.shift).to(recipe.device)
        dropped = torch.rand((), generator=generator("caption", *name)).item() < recipe.drop_captions
        patches.append(patchify(interpolate(data, noise, t), recipe.patch))
        targets.append(patchify(velocity(data, noise), recipe.patch))
        grids.append(patch_grid(shape[1:], recipe.patch, recipe.device))
        timesteps.append(t)
        texts.append(recipe.null_text if dropped else sample.latent.text.to(recipe.device))
        tokens = len(targets[-1])
        weights.append(torch.full((tokens,), 1.0 / (tokens * recipe.global_batch), device=recipe.device))
    row = pack(patches, grids, torch.stack(timesteps), texts, recipe.capacity)
    padding = recipe.capacity - sum(map(len, targets))
    target = nn.functional.pad(torch.cat(targets), (0, 0, 0, padding))
    return MicroBatch(row, target, nn.functional.pad(torch.cat(weights), (0, padding)))


def squared_error(model: nn.Module, batch: MicroBatch) -> Tensor:
    """This row's share of the loss: the weighted squared error of the prediction, in fp32."""
    error = (model(batch.row).float() - batch.target).square().mean(dim=-1)  # [L]
    return (error * batch.weight).sum()


def tokens_of(bucket: Bucket, compression: tuple[int, int, int], patch: Patch) -> int:
    """Patches of a bucket's latent."""
    pixels = (bucket.frames - 1, bucket.height, bucket.width)
    T, H, W = (size // step for size, step in zip(pixels, compression, strict=True))
    return (T + 1) // patch[0] * (H // patch[1]) * (W // patch[2])
