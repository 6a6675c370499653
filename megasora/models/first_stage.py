"""What stands between pixels and the generator: our VAE, a published one, or nothing, all behind one small interface."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from megasora.errors import ConfigError
from megasora.models.published_vae import PUBLISHED, PublishedVAE
from megasora.models.vae import VideoVAE

PIXELS = "pixels"


class FirstStage(Protocol):
    """Videos [B, 3, 1 + t·k, H, W] in [-1, 1] to normalised latents [B, C, 1 + k, H/s, W/s] and back.

    Decoded videos may leave [-1, 1] a little. Raises ValueError for sizes that do not fit.
    """

    @property
    def latent_channels(self) -> int: ...

    @property
    def compression(self) -> tuple[int, int, int]:
        """Pixel frames, rows and columns of one latent position: (t, s, s)."""
        ...

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents."""
        ...

    def decode(self, latent: Tensor) -> Tensor: ...

    def encode_long(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """`encode`, a chunk of frames at a time."""
        ...

    def decode_long(self, latent: Tensor) -> Tensor: ...

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The latents of a video that arrives in chunks along T: 1 + t·k frames, then multiples of t."""
        ...

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The frames of a latent that arrives in chunks along T. They may come in other chunks."""
        ...

    def fingerprint(self) -> str:
        """Changes with anything that latents depend on."""
        ...


class PixelStage(nn.Module):
    """No compression: latents are the pixels, for diffusion in pixel space and for models that look at pixels."""

    latent_channels = 3
    compression = (1, 1, 1)

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        return video, torch.full_like(video, -30.0)

    def decode(self, latent: Tensor) -> Tensor:
        return latent

    encode_long, decode_long = encode, decode

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        yield from map(self.encode, chunks)

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        yield from chunks

    def fingerprint(self) -> str:
        return PIXELS


def open_first_stage(path: str, device: torch.device | str = "cpu") -> FirstStage:
    """The word `pixels`, or a directory: ours, or one of diffusers by the `_class_name` in its config.json. Raises ConfigError
    in the name of encode.vae."""
    if path == PIXELS:
        return PixelStage()
    directory = Path(path)
    try:
        kind = json.loads((directory / "config.json").read_text()).get("_class_name")
        if kind is None:
            return VideoVAE.load(directory).eval().to(device)
        if kind in PUBLISHED:
            return PublishedVAE(directory, kind).to(device)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise ConfigError(f"encode.vae={path}: no VAE here ({reason}); run `megasora train-vae` first") from None
    raise ConfigError(f"encode.vae={path}: a {kind}; known are {', '.join(PUBLISHED)}, our own, and the word {PIXELS}")
