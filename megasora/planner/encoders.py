"""Memory of the frozen encoders of data.latents=online, which every rank has beside its share of the model."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from data_pipelines.buckets import Bucket, buckets_of
from data_pipelines.encode.decode_ahead import bounds_of
from megasora.models.first_stage import PIXELS
from megasora.models.published_vae import PUBLISHED
from megasora.models.vae import VideoVAE
from megasora.planner.tape import FLOAT
from megasora.planner.watch import watching
from megasora.schema import Config

# Numbers in published text encoders, by the width of what they give: taken where encode.text is not on this machine.
KNOWN_TEXT = {4096: 5_680_910_336, 768: 123_060_480}  # UMT5-XXL's encoder (T5-XXL's has 4.76e9), CLIP-L's text model


def encoder_bytes(config: Config) -> float:
    """Bytes on each device: weights, and what the VAE has besides while it encodes a piece of the largest bucket. Zero where
    latents are cached."""
    if config.data.latents != "online":
        return 0.0
    text = FLOAT if config.encode.text_dtype == "float32" else 2
    return float(text * text_numbers(config) + vae_bytes(config))


def text_numbers(config: Config) -> int:
    directories = [Path(part.strip()) for part in config.encode.text.split(",") if part.strip()]
    widths = (config.model.text_width, config.model.pooled_width)
    found = [
        numbers_in(directory) or KNOWN_TEXT.get(width, 0) for directory, width in zip(directories, widths, strict=False)
    ]
    return sum(found)


def numbers_in(directory: Path) -> int:
    """Of all tensors in a directory's safetensors files; 0 where there are none."""
    count = 0
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            names: list[str] = [*weights.keys()]
            count += sum(torch.Size(weights.get_slice(name).get_shape()).numel() for name in names)
    return count


def vae_bytes(config: Config) -> int:
    """Weights and the most that lives at once of one piece: found by encoding it on fake tensors, whatever the VAE. One that is
    not on this machine is taken for our own as `vae` describes it."""
    if config.encode.vae == PIXELS:
        return 0
    with FakeTensorMode(), torch.no_grad():
        model, encode, step = open_fake(config)
        weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        bucket = largest(config)
        tile = config.encode.tile
        H, W = (min(side, tile) if tile else side for side in (bucket.height, bucket.width))
        pieces = (torch.empty(1, 3, end - begin, H, W) for begin, end in bounds_of(bucket.frames, step))
        with watching() as watch:
            for _ in encode(pieces):
                pass
    return weights + watch.peak()


def open_fake(config: Config) -> tuple[Any, Any, int]:
    """The VAE of encode.vae with weights of no values, its encoder of a stream, and the frames of a latent frame."""
    file = Path(config.encode.vae) / "config.json"
    raw = json.loads(file.read_text()) if file.exists() else {}
    kind = raw.get("_class_name")
    if kind not in PUBLISHED:
        vae = VideoVAE(config.vae).eval()
        return vae, vae.encode_stream, config.vae.compression[0]
    import diffusers

    model = getattr(diffusers, kind).from_config(raw).eval()
    facts, stream, _ = PUBLISHED[kind]

    def encode(chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        return stream(model, chunks)

    return model, encode, facts(model.config).compression[0]


def largest(config: Config) -> Bucket:
    every = [bucket for stage in config.stages for bucket in buckets_of(stage.buckets)]
    return max(every, key=lambda bucket: (bucket.height * bucket.width, bucket.frames))
