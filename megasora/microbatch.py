"""From latents to one packed row of the model: where data, diffusion and model meet.

Noise, timestep, task and dropped captions are functions of (seed, segment, position) alone, so a sample is trained alike on
every layout, and again when its step is replayed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.batches.loader import Sample, StepBatch
from data_pipelines.buckets import Bucket
from megasora.diffusion.conditioning import draw_mask
from megasora.diffusion.flow import FlowConfig, size_shift
from megasora.diffusion.objective import Objective
from megasora.models.packing import Item, PackedRow, Patch, Shape, in_patches, on_device, pack, patchify, stretch
from megasora.models.text import Text
from megasora.observe.tally import Tally
from megasora.seeding import generator, normal


@dataclass(frozen=True)
class MicroBatch:
    """A packed row, what it was made of, and each token's share of the loss (of a classifier: each sample's)."""

    row: PackedRow
    data: Tensor  # [L, P]
    noise: Tensor  # [L, P]
    weight: Tensor  # [L], or [S] of a classifier; zero for padding and for given frames
    width: int = 0  # how many of the context-parallel ranks share it; 0: all
    groups: Tensor | None = None  # [L] or [S] int32, of a tally; None where nobody keeps one

    def part(self, index: int, parts: int, shared: int) -> "MicroBatch":
        """One of so many equal stretches of its tokens; attention layers see `shared` neighbouring ones."""
        begin, end = stretch(self.row.video.total, index, parts)
        return replace(
            self, row=self.row.part(index, parts, shared), data=self.data[begin:end], noise=self.noise[begin:end],
            weight=self.weight[begin:end], groups=None if self.groups is None else self.groups[begin:end],
        )  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How a segment turns latents into training pairs. `objective` None: a classifier, which sees clean samples."""

    seed: int
    segment: int
    objective: Objective | None
    flow: FlowConfig
    shift: float
    tasks: dict[str, float]
    drop_captions: float
    null: Text  # the empty caption
    patch: Patch
    chunk: int  # frames of patches that share a timestep; 0: the whole sample
    global_batch: int
    device: torch.device
    quantile: float | None = None  # every timestep at this quantile of the distribution, not drawn


def build_rows(batch: StepBatch, recipe: Recipe, tally: Tally | None = None) -> list[MicroBatch]:
    """This rank's micro-batches of a step, with the groups of a tally."""
    rows = zip(batch.rows, batch.lengths, batch.widths, strict=True)
    return [replace(build_microbatch(row, recipe, length, tally), width=width) for row, length, width in rows]


def build_microbatch(samples: Sequence[Sample], recipe: Recipe, length: int, tally: Tally | None = None) -> MicroBatch:
    """Draws each sample's latent, noise, timesteps and task and packs them into a row of `length` tokens. The loss of a token is
    weighted 1 / (learned tokens of its sample · samples of the global batch), so that the sum over all rows and ranks is the
    mean of the samples' means."""
    items, data, noise, weights, groups = [], [], [], [], []
    for sample in samples:
        name = (recipe.seed, recipe.segment, sample.position)
        latent = sample.latent
        mean, logvar, tokens, pooled = (
            on_device(tensor, recipe.device).float()  # as it was stored: `to` would convert it on the host
            for tensor in (latent.mean, latent.logvar, latent.text, latent.pooled)
        )
        clean = mean + torch.exp(0.5 * logvar) * normal(tuple(mean.shape), "posterior", *name, device=recipe.device)
        shape = in_patches(clean.shape[1:], recipe.patch)
        timesteps, given, places = draw_frames(shape, clean.shape[1:], recipe, name)
        blur = normal(tuple(mean.shape), "noise", *name, device=recipe.device)
        noisy = clean
        if recipe.objective is not None:
            t = on_device(timesteps, recipe.device).repeat_interleave(recipe.patch[0]).view(-1, 1, 1)  # [T, 1, 1]
            kept = on_device(given, recipe.device).repeat_interleave(recipe.patch[0]).view(-1, 1, 1)
            noisy = torch.where(kept, clean, recipe.objective.corrupt(clean, blur, t))
        dropped = drops_caption(recipe, name)
        text = recipe.null if dropped else Text(tokens, pooled)
        items.append(
            Item(
                patchify(noisy, recipe.patch),
                shape,
                timesteps,
                on_device(text.tokens, recipe.device),
                on_device(text.pooled, recipe.device),
                fps=latent.fps,
                label=-1 if dropped else latent.label,
            )
        )
        data.append(patchify(clean, recipe.patch))
        noise.append(patchify(blur, recipe.patch))
        learned = (~given).repeat_interleave(shape[1] * shape[2])  # [L]
        weights.append(on_device(learned / (learned.sum() * recipe.global_batch), recipe.device))
        if tally is not None:
            of_frames = tally.groups(str(sample.bucket), places)
            each = of_frames[:1] if recipe.objective is None else of_frames.repeat_interleave(shape[1] * shape[2])
            groups.append(on_device(each, recipe.device))
    row = pack(items, length)
    padding = length - sum(map(len, data))
    if recipe.objective is None:
        weight = torch.full((len(samples),), 1.0 / recipe.global_batch, device=recipe.device)
        weight = F.pad(weight, (0, bool(padding)))
    else:
        weight = F.pad(torch.cat(weights), (0, padding))
    whole, blur = (F.pad(torch.cat(parts), (0, 0, 0, padding)) for parts in (data, noise))
    group = F.pad(torch.cat(groups), (0, len(weight) - sum(map(len, groups)))) if groups else None
    return MicroBatch(row, whole, blur, weight, groups=group)


def drops_caption(recipe: Recipe, name: tuple[int, int, int]) -> bool:
    """Whether a sample is trained on the empty caption, or without its class; never of a classifier, which learns the class."""
    drawn = torch.rand((), generator=generator("caption", *name)).item()
    return recipe.objective is not None and drawn < recipe.drop_captions


def draw_frames(
    shape: Shape, latent: Sequence[int], recipe: Recipe, name: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a sample of (T, H, W) patches, on the CPU: [T] fp32 timesteps, [T] bool, which frames are given, and [T] fp32, at which
    quantile of their distribution the timesteps of the others lie."""
    T = shape[0]
    if recipe.objective is None:
        return torch.zeros(T), torch.zeros(T, dtype=torch.bool), torch.zeros(T)
    chunks = math.ceil(T / recipe.chunk) if recipe.chunk else 1
    shift = recipe.shift * size_shift(latent, recipe.flow)
    z = normal((chunks,), "timestep", *name)
    if recipe.quantile is not None:
        z = torch.special.ndtri(torch.full((chunks,), recipe.quantile))
    drawn = recipe.objective.draw(z, shift)
    timesteps, places = (of.repeat_interleave(recipe.chunk or T)[:T] for of in (drawn, torch.special.ndtr(z)))
    task, choice = torch.rand(2, generator=generator("task", *name)).tolist()
    given = torch.tensor(draw_mask(recipe.tasks, T, (task, choice)))
    return timesteps.masked_fill(given, 0.0), given, places


def training_loss(recipe: Recipe, tally: Tally | None = None) -> Callable[[Callable[..., Tensor], MicroBatch], Tensor]:
    """(model, batch) -> the row's share of the loss, fp32. A tally takes down what each token's is, where the batch has groups.

    Of a classifier it is the cross-entropy of the samples' classes, to which a sample without one adds nothing.
    """
    objective = recipe.objective

    def share_of_loss(model: Callable[..., Tensor], batch: MicroBatch) -> Tensor:
        row = batch.row
        if objective is None:
            loss = F.cross_entropy(model(row).float(), row.label, ignore_index=-1, reduction="none")  # [S]
        else:
            t = row.timestep[row.runs.index][:, None]  # [L, 1]
            loss = objective.loss(model(row), batch.data, batch.noise, row.tokens, t)  # [L]
        if tally is not None and batch.groups is not None:
            tally.add(batch.groups, loss, batch.weight)
        return (loss * batch.weight).sum()

    return share_of_loss


def patches_of(bucket: Bucket, compression: tuple[int, int, int], patch: Patch) -> Shape:
    """(T, H, W) of a bucket's latent, in patches."""
    pixels = (bucket.frames - 1, bucket.height, bucket.width)
    T, H, W = (size // step for size, step in zip(pixels, compression, strict=True))
    return (T + 1) // patch[0], H // patch[1], W // patch[2]


def tokens_of(bucket: Bucket, compression: tuple[int, int, int], patch: Patch) -> int:
    """Patches of a bucket's latent."""
    return math.prod(patches_of(bucket, compression, patch))
