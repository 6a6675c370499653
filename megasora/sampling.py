"""From noise to latents: conditions, guidance, given frames, and the two ways to videos longer than what a model was trained on.

Everything is a function of the seed. Memory does not grow with the length of a video: `rollout` goes on chunk by chunk with the
keys and values of the last chunks (Diffusion Forcing, MAGI-1), and `extend` window by window.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megasora.diffusion.flow import Flow, size_shift
from megasora.diffusion.objective import Objective
from megasora.diffusion.samplers import SAMPLERS, Sampler, guidance_at, guide
from megasora.errors import ConfigError
from megasora.models.base import Cache
from megasora.models.families import AnyModelConfig, chunk_of, hears_guidance, window_of
from megasora.models.packing import Item, PackedRow, Patch, in_patches, pack, patchify, unpatchify
from megasora.models.text import Text
from megasora.schema import SampleConfig
from megasora.seeding import normal

LatentShape = tuple[int, int, int, int]  # C, T, H, W


@dataclass(frozen=True)
class Prompt:
    """What one video is to show, and what it is guided away from; `label` is a class, -1 for none."""

    text: Text
    negative: Text
    seed: int
    label: int = -1


@dataclass(frozen=True)
class Given:
    """Frames that are known: `mask` [T] says which of `latent` [C, T, H, W]. Counted in latent frames."""

    latent: Tensor
    mask: Tensor

    def part(self, begin: int, end: int) -> "Given":
        return Given(self.latent[:, begin:end], self.mask[begin:end])


class Generator:
    """A model together with how it is sampled from. `predict` is the model, or stands for one that is spread over processes and
    takes rows of a `multiple` of tokens."""

    def __init__(
        self,
        predict: Callable[..., Tensor],
        config: AnyModelConfig,
        objective: Objective,
        objective_name: str,
        settings: SampleConfig,
        device: torch.device,
        progress: Callable[[], None] = lambda: None,
        multiple: int = 1,
    ) -> None:
        self.predict, self.config, self.objective, self.settings = predict, config, objective, settings
        self.multiple = multiple
        samplers = SAMPLERS[objective_name]
        self.sampler: Sampler = samplers[settings.sampler or next(iter(samplers))]
        self.device, self.progress = device, progress

    @torch.no_grad()
    def generate(self, shape: LatentShape, prompt: Prompt, given: Given | None = None) -> Tensor:
        """One latent [C, T, H, W], in one piece. Both passes of guidance lie side by side in one packed row."""
        return self._sample(shape, prompt, given, self._shift(shape))

    @torch.no_grad()
    def rollout(self, shape: LatentShape, prompt: Prompt, given: Given | None = None) -> Iterator[Tensor]:
        """The latent of a chunk-causal model, chunk after chunk [C, t, H, W]: the keys and values of what is finished are kept,
        as far back as the model's window sees."""
        C, T, H, W = shape
        pt, _, _ = self.config.patch
        chunk = chunk_of(self.config) * pt
        conditions = self._conditions(prompt)
        caches = [Cache() for _ in conditions]
        for number, begin in enumerate(range(0, T, chunk)):
            end = min(begin + chunk, T)
            known = given.part(begin, end) if given is not None else None
            if known is not None and bool(known.mask.all()):
                latent = known.latent.to(self.device)
            else:
                part = (C, end - begin, H, W)
                latent = self._sample(part, prompt, known, self._shift(shape), (number,), begin // pt, caches)
            self._predict(latent, torch.zeros((end - begin) // pt), conditions, begin // pt, caches, remember=True)
            self._forget(caches, latent)
            yield latent

    @torch.no_grad()
    def extend(
        self,
        shape: LatentShape,
        frames: int,
        prompt: Prompt,
        given: Given | None,
        decode: Callable[[Tensor], Tensor],
        encode: Callable[[Tensor], Tensor],
    ) -> Iterator[Tensor]:
        """Pixels [3, t, H, W] of a video of `frames`, window after window, for models that attend in full.

        `shape` is a window's latent. Each window begins with the last settings.overlap frames of the one before, encoded anew,
        because a causal VAE's first latent frame is unlike the others. `given` holds for the first window.
        """
        made = 0
        for number in itertools.count():
            latent = self._sample(shape, prompt, given, self._shift(shape), (number,) if number else ())
            pixels = decode(latent)  # [3, T', H', W']
            fresh = pixels[:, self.settings.overlap if number else 0 :][:, : frames - made]
            made += fresh.shape[1]
            yield fresh
            if made == frames:
                return
            tail = encode(pixels[:, -self.settings.overlap :])  # [C, O, H, W]
            given = leading(tail, shape)

    def _sample(
        self,
        shape: LatentShape,
        prompt: Prompt,
        given: Given | None,
        shift: float,
        name: tuple[int, ...] = (),
        first_frame: int = 0,
        caches: list[Cache] | None = None,
    ) -> Tensor:
        noise = normal(shape, "sample", prompt.seed, *name, device=self.device)
        conditions = self._conditions(prompt)
        frames = in_patches(shape[1:], self.config.patch)[0]
        kept = torch.zeros(shape[1], dtype=torch.bool) if given is None else given.mask
        kept_frames = kept.view(frames, -1).all(1)  # [T] in patches
        where = kept.to(self.device).view(1, -1, 1, 1)
        clean = None if given is None else given.latent.to(self.device)
        interval = self.settings.guidance_interval

        def predict(x: list[Tensor], t: float) -> list[tuple[Tensor, Tensor | None]]:
            self.progress()
            latent = x[0] if clean is None else torch.where(where, clean, x[0])
            timesteps = torch.full((frames,), t).masked_fill(kept_frames, 0.0)
            scale = guidance_at(t, self.settings.guidance, interval)
            asked = conditions if scale != 1 else conditions[:1]
            answers = self._predict(latent, timesteps, asked, first_frame, caches, remember=False, guidance=scale)
            mean, variance = answers[0]
            return [(mean if len(asked) == 1 else guide(mean, answers[1][0], scale), variance)]

        def noise_of(step: int, i: int, like: Tensor) -> Tensor:
            return normal(tuple(like.shape), "ancestral", prompt.seed, *name, step, i, device=self.device)

        latent = self.sampler(self.objective, predict, [noise], self.settings.steps, shift, noise_of)[0]
        return latent if clean is None else torch.where(where, clean, latent)

    def _shift(self, shape: LatentShape) -> float:
        """Of the timesteps of a whole video, as its size moves them in training (Open-Sora 1.2)."""
        by_size = size_shift(shape[1:], self.objective.config) if isinstance(self.objective, Flow) else 1.0
        return self.settings.shift * by_size

    def _conditions(self, prompt: Prompt) -> list[tuple[Text, int]]:
        """What the model is told: the prompt, and, where guidance is by a second pass, what to be guided away from."""
        told = [(prompt.text, prompt.label)]
        alone = self.settings.guidance == 1 or hears_guidance(self.config)
        return told if alone else [*told, (prompt.negative, -1)]

    def _predict(
        self,
        latent: Tensor,
        timesteps: Tensor,
        conditions: Sequence[tuple[Text, int]],
        first_frame: int,
        caches: list[Cache] | None,
        remember: bool,
        guidance: float = 1.0,
    ) -> list[tuple[Tensor, Tensor | None]]:
        """The model's word on [C, T, H, W] under each condition. Cached keys are added to only if it is to `remember`. Models
        that hear the `guidance` answer with it; of others it is for the caller."""
        patch, shape = self.config.patch, tuple(latent.shape[1:])
        tokens = patchify(latent, patch)
        fps = self.settings.fps if self.settings.frames > 1 else 0.0
        items = [
            Item(tokens, in_patches(shape, patch), timesteps, text.tokens.to(self.device), text.pooled.to(self.device),
                 fps=fps, label=label, first_frame=first_frame, guidance=guidance)
            for text, label in conditions
        ]  # fmt: skip
        if caches is None:
            answer = self.predict(self._pack(items)).float()[: len(items) * len(tokens)]
            answers = list(answer.chunk(len(items)))
        else:
            answers = []
            for item, cache in zip(items, caches, strict=False):
                row = self._pack([item])
                answers.append(self.predict(row, cache if remember else Cache(cache)).float()[: len(tokens)])
                if remember and (padding := row.video.total - len(tokens)):
                    cache.update({layer: (k[:-padding], v[:-padding]) for layer, (k, v) in cache.items()})
        return [split_variance(answer, self.objective.outputs, shape, patch) for answer in answers]

    def _pack(self, items: Sequence[Item]) -> PackedRow:
        tokens = sum(len(item.patches) for item in items)
        return pack(items, -(-tokens // self.multiple) * self.multiple)

    def _forget(self, caches: list[Cache], latent: Tensor) -> None:
        """Drops what lies further back than the model's window."""
        kept_frames = window_of(self.config)
        if kept_frames:
            _, H, W = in_patches(latent.shape[1:], self.config.patch)
            kept = kept_frames * H * W
            for cache in caches:
                for layer, (k, v) in cache.items():
                    cache[layer] = k[-kept:].clone(), v[-kept:].clone()


def turns(count: int, index: int, ranks: int) -> list[int]:
    """Which of `count` videos a rank makes, one after the other; beyond them where none is left, for ranks that gather weights
    together must make as many as each other."""
    return list(range(index, -(-count // ranks) * ranks, ranks))


def split_variance(answer: Tensor, outputs: int, shape: Sequence[int], patch: Patch) -> tuple[Tensor, Tensor | None]:
    """[L, outputs·P] -> the prediction [C, T, H, W] and, with a learned variance, its values."""
    parts = [unpatchify(part, shape, patch) for part in answer.chunk(outputs, dim=-1)]
    return parts[0], parts[1] if outputs == 2 else None


def leading(latent: Tensor, shape: LatentShape) -> Given:
    """The first frames [C, t, H, W] of a latent of `shape` as given ones."""
    whole, mask = latent.new_zeros(shape), torch.zeros(shape[1], dtype=torch.bool)
    whole[:, : latent.shape[1]] = latent
    mask[: latent.shape[1]] = True
    return Given(whole, mask)


def latent_shape(
    config: SampleConfig, length: str, channels: int, compression: tuple[int, int, int], patch: Patch
) -> LatentShape:
    """(C, T, H, W) of the latent of `length` (frames, window or overlap). Raises ConfigError when the VAE and the patches cannot
    make it."""
    t, h, w = compression
    frames = {"frames": config.frames, "window": config.window, "overlap": config.overlap}[length]
    sizes: list[int] = []
    for key, pixels, step in (("height", config.height, h * patch[1]), ("width", config.width, w * patch[2])):
        if pixels % step:
            nearest = max(step, round(pixels / step) * step)
            raise ConfigError(f"sample.{key}={pixels}: nearest that the model can make is {nearest}")
        sizes.append(pixels // (h if key == "height" else w))
    T = 1 + (frames - 1) // t
    if (frames - 1) % t or T % patch[0]:
        step = t * patch[0]
        good = [n for n in range(1, frames + 2 * step) if (n - 1) % t == 0 and (1 + (n - 1) // t) % patch[0] == 0]
        nearest = min(good, key=lambda n: abs(n - frames))
        raise ConfigError(f"sample.{length}={frames}: nearest that the model can make is {nearest}")
    return channels, T, sizes[0], sizes[1]
