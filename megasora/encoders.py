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
from megasora.errors import ConfigError
from megasora.models.first_stage import FirstStage, open_first_stage
from megasora.models.text import Text, TextEncoder, load_text_encoder
from megasora.models.vae import VideoVAE
from megasora.models.vae_tiling import TiledStage
from megasora.schema import EncodeConfig

NULL_TEXT = "null_text.safetensors"


def text_directory(config: EncodeConfig, latents: Path) -> str:
    """Where the text encoder lies: encode.text, or beside the latents, where `encode` makes the small one."""
    return config.text or str(latents / "text")


@dataclass(frozen=True)
class LatentFacts:
    """What training needs to know of the encoders without opening them."""

    manifest: dict[str, Any]
    null: Text  # the empty caption

    @property
    def channels(self) -> int:
        return int(self.manifest["channels"])

    @property
    def compression(self) -> tuple[int, int, int]:
        """Pixels per latent frame, row and column; the first frame stands alone."""
        t, h, w = self.manifest["compression"]
        return t, h, w


def open_stage(config: EncodeConfig, device: torch.device) -> FirstStage:
    """The first stage of encode.vae, in tiles if encode.tile says so. Raises ConfigError."""
    stage = open_first_stage(config.vae, device)
    if not config.tile:
        return stage
    if not isinstance(stage, VideoVAE):
        raise ConfigError(f"encode.tile={config.tile}: tiles are for VAEs of `megasora train-vae`; 0 for others")
    try:
        return TiledStage(stage, config.tile, config.tile_overlap)
    except ValueError as error:
        raise ConfigError(f"encode.{'tile_' * str(error).startswith('overlap')}{error}") from None


def open_text(config: EncodeConfig, latents: Path, device: torch.device) -> TextEncoder:
    """The text encoder of encode.text, or the small one beside the latents."""
    return load_text_encoder(text_directory(config, latents), device, getattr(torch, config.text_dtype))


def make_manifest(vae: FirstStage, text: TextEncoder, config: EncodeConfig) -> dict[str, Any]:
    """What latents depend on: if any of it changes, they are stale."""
    return {
        "format": 2,
        "vae": vae.fingerprint(),
        "text": text.fingerprint(),
        "text_width": text.width,
        "pooled_width": text.pooled_width,
        "channels": vae.latent_channels,
        "compression": list(vae.compression),
        "dtype": config.latent_dtype,
        "tile": [config.tile, config.tile_overlap] if config.tile else [],
    }


def save_null_text(latents: Path, null: Text) -> None:
    hidden = latents / f".{NULL_TEXT}.{os.getpid()}"
    save_file({"null_text": null.tokens, "pooled": null.pooled}, hidden)
    hidden.replace(latents / NULL_TEXT)


def open_facts(latents: Path) -> LatentFacts:
    """Raises DataError when the directory holds no latents."""
    manifest = read_manifest(latents)
    try:
        null = load_file(latents / NULL_TEXT)
        return LatentFacts(manifest, Text(null["null_text"], null["pooled"]))
    except (OSError, KeyError) as error:
        raise DataError(f"{latents / NULL_TEXT}: {error}; run `megasora encode` again") from None


def open_encoders(config: EncodeConfig, latents: Path, device: torch.device) -> tuple[FirstStage, TextEncoder]:
    """Both encoders, to sample with. Raises DataError if they are not those that the latents were made with."""
    manifest = read_manifest(latents)
    vae, text = open_stage(config, device), open_text(config, latents, device)
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
