"""From prompts to pictures: noise, the sampler, guidance, the VAE's decoder, an mp4 and a contact sheet."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data_pipelines.video import contact_sheet, encode_mp4
from megasora.config import SampleConfig
from megasora.diffusion.flow import euler, guide
from megasora.encoders import to_pixels
from megasora.errors import ConfigError
from megasora.models.packing import Patch, pack, patch_grid, patchify, unpatchify
from megasora.models.vae import VideoVAE
from megasora.seeding import normal


def latent_shape(
    config: SampleConfig, channels: int, compression: tuple[int, int, int], patch: Patch
) -> tuple[int, int, int, int]:
    """(C, T, H, W) of the latent of the wanted video. Raises ConfigError when the VAE and the patches cannot make it."""
    sizes: list[int] = []
    for key, pixels, step in (
        ("frames", config.frames - 1, compression[0]),
        ("height", config.height, compression[1] * patch[1]),
        ("width", config.width, compression[2] * patch[2]),
    ):
        if pixels < 0 or pixels % step:
            one = 1 if key == "frames" else 0
            nearest = max(step * (1 - one), round(pixels / step) * step) + one
            raise ConfigError(f"sample.{key}={pixels + one}: nearest that the model can make is {nearest}")
        sizes.append(pixels // compression[len(sizes)])
    return channels, sizes[0] + 1, sizes[1], sizes[2]


@torch.no_grad()
def generate(
    model: nn.Module,
    patch: Patch,
    shape: tuple[int, int, int, int],
    text: Tensor,
    negative: Tensor,
    config: SampleConfig,
    seed: int,
    device: torch.device,
    progress: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """One latent [C, T, H, W] for the embeddings `text` [M, E], guided away from `negative`. A function of the seed.

    Both passes of guidance lie side by side in one packed row.
    """
    noise = normal(shape, "sample", seed, device=device)
    grid = patch_grid(shape[1:], patch, device)
    texts = [text.to(device)] if config.guidance == 1 else [text.to(device), negative.to(device)]

    steps = itertools.count(1)

    def predict(x: list[Tensor], t: float) -> list[Tensor]:
        progress(next(steps))
        tokens = patchify(x[0], patch)
        copies = len(texts)
        row = pack([tokens] * copies, [grid] * copies, torch.full((copies,), t, device=device), texts)
        parts = model(row).float().chunk(copies)
        velocity = parts[0] if copies == 1 else guide(parts[0], parts[1], config.guidance)
        return [unpatchify(velocity, shape[1:], patch)]

    return euler(predict, [noise], config.steps, config.shift)[0]


@torch.no_grad()
def decode_latent(vae: VideoVAE, latent: Tensor) -> np.ndarray:
    """[C, T, H, W] -> uint8 [T', H', W', 3]."""
    return to_pixels(vae.decode_long(latent[None].cpu())[0]).numpy()


def write_samples(videos: list[np.ndarray], prompts: list[str], directory: Path, fps: float) -> list[Path]:
    """An mp4 for each video (one-frame ones too) and contact-sheet.png; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for i, video in enumerate(videos):
        files.append(directory / f"{i:02d}.mp4")
        encode_mp4(video, fps, files[-1])
    sheet = directory / "contact-sheet.png"
    contact_sheet(videos, prompts, sheet)
    return [*files, sheet]
