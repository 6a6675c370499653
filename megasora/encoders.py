"""The frozen encoders that a set of latents was made with: opened by path, held to the fingerprints in its manifest."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipelines.errors import DataError
from data_pipelines.latent_shards import read_manifest
from megasora.config import EncodeConfig
from megasora.errors import ConfigError
from megasora.models.text import TextEncoder, load_text_encoder
from megasora.models.vae import VideoVAE

NULL_TEXT = "null_text.safetensors"


def open_vae(config: EncodeConfig) -> VideoVAE:
    """The VAE of encode.vae. Raises ConfigError when there is none."""
    try:
        return VideoVAE.load(Path(config.vae)).eval()
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"encode.vae={config.vae}: no VAE here ({error}); run `megasora train-vae` first") from None


def text_directory(config: EncodeConfig, latents: Path) -> Path:
    """Where the text encoder lies: encode.text, or beside the latents, where `encode` makes the small one."""
    return Path(config.text) if config.text else latents / "text"


@dataclass(frozen=True)
class LatentFacts:
    """What training needs to know of the encoders without opening them."""

    manifest: dict[str, Any]
    null_text: Tensor  # [M, E]: the empty caption

    @property
    def channels(self) -> int:
        return int(self.manifest["channels"])

    @property
    def compression(self) -> tuple[int, int, int]:
        """Pixels per latent frame, row and column; the first frame stands alone."""
        t, h, w = self.manifest["compression"]
        return t, h, w


def make_manifest(vae: VideoVAE, text: TextEncoder, dtype: str) -> dict[str, Any]:
    """What latents depend on: if any of it changes, they are stale."""
    return {
        "format": 1,
        "vae": vae.fingerprint(),
        "text": text.fingerprint(),
        "text_width": text.width,
        "channels": vae.config.latent_channels,
        "compression": list(vae.config.compression),
        "dtype": dtype,
    }


def save_null_text(latents: Path, null_text: Tensor) -> None:
    hidden = latents / f".{NULL_TEXT}.{os.getpid()}"
    save_file({"null_text": null_text}, hidden)
    hidden.replace(latents / NULL_TEXT)


def open_facts(latents: Path) -> LatentFacts:
    """Raises DataError when the directory holds no latents."""
    manifest = read_manifest(latents)
    try:
        return LatentFacts(manifest, load_file(latents / NULL_TEXT)["null_text"])
    except OSError as error:
        raise DataError(f"{latents / NULL_TEXT}: {error}; run `megasora encode` again") from None


def open_encoders(config: EncodeConfig, latents: Path) -> tuple[VideoVAE, TextEncoder]:
    """Both encoders, to sample with. Raises DataError if they are not those that the latents were made with."""
    manifest = read_manifest(latents)
    vae, text = open_vae(config), load_text_encoder(text_directory(config, latents))
    for name, encoder in (("vae", vae), ("text", text)):
        if encoder.fingerprint() != manifest[name]:
            raise DataError(f"encode.{name}: not the encoder that {latents} was made with (fingerprints differ)")
    return vae, text


def to_pixels(video: Tensor) -> Tensor:
    """[3, T, H, W] in [-1, 1] -> uint8 [T, H, W, 3]."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu()


def from_pixels(frames: Tensor) -> Tensor:
    """uint8 [T, H, W, 3] -> [3, T, H, W] in [-1, 1]."""
    return frames.permute(3, 0, 1, 2).float() / 127.5 - 1
