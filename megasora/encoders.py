"""The frozen encoders that a set of latents was made with: opened by path, held to the fingerprints in its manifest."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from data_pipelines.batches.loader import Opener
from data_pipelines.buckets import Bucket, BucketConfig, buckets_of
from data_pipelines.encode.decode_ahead import Raw, decode_raw
from data_pipelines.encode.run import Encoders, encode_one
from data_pipelines.errors import DataError
from data_pipelines.samples.latents import (
    FORMAT,
    PREPROCESSING,
    Latent,
    check_buckets,
    check_source,
    describe_buckets,
    read_manifest,
)
from data_pipelines.shards.storage import open_storage
from megasora.errors import ConfigError
from megasora.models.first_stage import PIXELS, FirstStage, open_first_stage
from megasora.models.text import Text, TextEncoder, load_text_encoder
from megasora.models.vae import VideoVAE
from megasora.models.vae_tiling import TiledStage
from megasora.schema import EncodeConfig

NULL_TEXT = "null_text.safetensors"
SMALL = 1 << 14  # pixels of a picture


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


def make_manifest(
    vae: FirstStage, text: TextEncoder, config: EncodeConfig, buckets: list[BucketConfig]
) -> dict[str, Any]:
    """What latents depend on: if any of it changes, they are stale."""
    return {
        "format": FORMAT,
        "preprocessing": PREPROCESSING,
        "fps": config.fps,
        "buckets": describe_buckets(buckets),
        "vae": vae.fingerprint(),
        "text": text.fingerprint(),
        "text_files": mark_of(text_directory(config, Path(config.output))),
        "text_width": text.width,
        "pooled_width": text.pooled_width,
        "channels": vae.latent_channels,
        "compression": list(vae.compression),
        "dtype": config.latent_dtype,
        "tile": [config.tile, config.tile_overlap] if config.tile else [],
    }


def make_encoders(
    config: EncodeConfig, vae: FirstStage, text: TextEncoder, buckets: list[BucketConfig], device: torch.device
) -> Encoders:
    """Both, as shards are encoded with them. Raises ConfigError for a bucket that does not divide by the VAE's blocks."""
    for bucket in (bucket for one in buckets for bucket in buckets_of(one)):
        t, h, w = vae.compression
        if (bucket.frames - 1) % t or bucket.height % h or bucket.width % w:
            raise ConfigError(
                f"stages: bucket {bucket} does not divide by the VAE's {t}x{h}x{w} (frames: 1 + a multiple of {t})"
            )

    def encode_text(captions: list[str]) -> list[tuple[Tensor, Tensor]]:
        return [(encoded.tokens, encoded.pooled) for encoded in text.encode(captions)]

    return Encoders(
        video=partial(encode_pieces, vae, device),
        text=encode_text,
        temporal_compression=vae.compression[0],
        dtype=getattr(torch, config.latent_dtype),
        manifest=make_manifest(vae, text, config, buckets),
        fps=config.fps,
    )


def null_text_bytes(null: Text) -> bytes:
    """What NULL_TEXT holds."""
    return save({"null_text": null.tokens, "pooled": null.pooled})


def open_facts(latents: str | Path) -> LatentFacts:
    """Of a directory or an address. Raises DataError when it holds no latents, or `encode` is not through with it."""
    storage = open_storage(latents)
    manifest = read_manifest(storage)
    try:
        null = load(storage.read(NULL_TEXT))
        return LatentFacts(manifest, Text(null["null_text"], null["pooled"]))
    except (OSError, KeyError, SafetensorError) as error:
        raise DataError(f"{storage.address}/{NULL_TEXT}: {error}; run `megasora encode` again") from None


def check_latents(latents: str | Path, config: EncodeConfig, buckets: list[BucketConfig]) -> None:
    """Raises DataError, saying why, for latents that are not those of the config: of other buckets, of a source that has changed
    since, or of other encoders than encode.vae and encode.text.

    What is not at hand is not asked: a source that is gone, an encoder that is not on this machine. Of a published text
    encoder the names and sizes of its files count, since its weights take long to read.
    """
    storage = open_storage(latents)
    manifest = read_manifest(storage)
    check_buckets(storage.address, manifest, buckets)
    check_source(storage)
    vae, text = config.vae, text_directory(config, Path(latents))
    if (vae == PIXELS or Path(vae).exists()) and open_stage(config, torch.device("cpu")).fingerprint() != manifest[
        "vae"
    ]:
        raise DataError(f"{storage.address}: foreign latents: made with another VAE than encode.vae={vae}")
    if all(directory.exists() for directory in text_directories(text)) and mark_of(text) != manifest["text_files"]:
        raise DataError(f"{storage.address}: foreign latents: made with another text encoder than encode.text={text}")


def text_directories(spec: str) -> list[Path]:
    return [Path(part.strip()) for part in spec.split(",")]


def mark_of(spec: str) -> str:
    """Of the files of a text encoder: their names, their sizes, and what is in the small ones."""
    marked = xxhash.xxh3_64()
    for directory in text_directories(spec):
        for path in sorted(path for path in directory.iterdir() if path.is_file()):
            size = path.stat().st_size
            marked.update(f"{path.name} {size}".encode())
            marked.update(path.read_bytes() if size < 1 << 20 else b"")
    return marked.hexdigest()


def look_for_encoders(config: EncodeConfig, latents: str | None, purpose: str) -> None:
    """Raises ConfigError where the encoders that `open_encoders` would open are not there, without opening them."""
    text = text_directory(config, Path(latents or config.output))
    for key, directory in [("vae", config.vae), *(("text", part.strip()) for part in text.split(","))]:
        if directory != PIXELS and not (Path(directory) / "config.json").is_file():
            raise ConfigError(f"encode.{key}={directory}: no encoder here, and {purpose} makes samples with it")


def open_encoders(config: EncodeConfig, latents: str | None, device: torch.device) -> tuple[FirstStage, TextEncoder]:
    """Both encoders, to sample with. Raises DataError if they are not those that the latents were made with.

    None for latents: nothing was cached, the encoders of the config are those that training used.
    """
    if latents is None:
        return open_stage(config, device), open_text(config, Path(config.output), device)
    manifest = read_manifest(open_storage(latents))
    vae, text = open_stage(config, device), open_text(config, Path(latents), device)
    for name, encoder in (("vae", vae), ("text", text)):
        if encoder.fingerprint() != manifest[name]:
            raise DataError(f"encode.{name}: not the encoder that {latents} was made with (fingerprints differ)")
    return vae, text


@torch.no_grad()
def encode_pieces(
    vae: FirstStage, device: torch.device, pieces: Iterable[np.ndarray]
) -> Iterator[tuple[Tensor, Tensor]]:
    """uint8 [B, T, H, W, 3], piece after piece -> mean and log-variance [B, C, T', H', W'] on the host.

    On a CPU a clip gets the same bits alone as among others. There torch has another kernel for one small picture than for
    several, with other last bits; so a small clip that is alone goes twice.
    """
    pieces = iter(pieces)
    first = next(pieces)
    B, _, H, W, _ = first.shape
    copies = 2 if device.type == "cpu" and B == 1 and H * W < SMALL else 1
    chunks = (from_pixels(torch.from_numpy(piece).to(device)) for piece in chain([first], pieces))  # [B, 3, T, H, W]
    for mean, logvar in vae.encode_stream(chunk.expand(copies * B, -1, -1, -1, -1) for chunk in chunks):
        yield mean[:B].cpu(), logvar[:B].cpu()


def open_online(config: EncodeConfig, device: torch.device) -> tuple[LatentFacts, Opener]:
    """The encoders of `encode`, to be used on raw shards while training: the arithmetic of `encode`, in fp32 to the end.

    Raises ConfigError where there are none; the small text encoder is looked for in encode.output.
    """
    vae, text = open_stage(config, device), open_text(config, Path(config.output), device)
    encoders = make_encoders(config, vae, text, [], device)

    def finish(key: str, raw: Raw, bucket: Bucket, choice: float) -> Latent:
        return encode_one(encoders, raw, bucket, choice)

    return LatentFacts(encoders.manifest, text.encode([""])[0]), Opener(
        decode=partial(decode_raw, fps=config.fps), finish=finish, encoded=False, fps=config.fps
    )


def to_pixels(video: Tensor) -> Tensor:
    """[3, T, H, W] in [-1, 1] -> uint8 [T, H, W, 3]."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu()


def from_pixels(frames: Tensor) -> Tensor:
    """uint8 [..., T, H, W, 3] -> [..., 3, T, H, W] in [-1, 1]."""
    return frames.movedim(-1, -4).float() / 127.5 - 1
