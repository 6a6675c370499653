"""Published video VAEs through diffusers, from a local directory (extra [encoders]); nothing is downloaded.

Each kind says how its latents are normalised, and how it goes through a stream of any length: what diffusers does with a whole
video, chunk by chunk.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megasora.errors import ConfigError
from megasora.models.vae import check_size, digest

Model = Any  # one of diffusers' autoencoders
Stream = Callable[[Model, Iterable[Tensor]], Iterator[Tensor]]


def regroup(chunks: Iterable[Tensor], first: int, following: int) -> Iterator[Tensor]:
    """Chunks along T of any lengths -> `first` frames, then `following` at a time; the last may be fewer."""
    kept: Tensor | None = None
    wanted = first
    for chunk in chunks:
        kept = chunk if kept is None else torch.cat([kept, chunk], dim=2)
        while kept.shape[2] >= wanted:
            yield kept[:, :, :wanted]
            kept, wanted = kept[:, :, wanted:], following
    if kept is not None and kept.shape[2]:
        yield kept


def wan_encode(model: Model, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """A frame alone, then four at a time, each convolution remembering the frames before."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    cache: list[Any] = [None] * len([*model.encoder.modules()])  # more than there are convolutions
    for group in regroup(chunks, 1, 4):
        x = patchify(group, patch_size=model.config.patch_size) if model.config.patch_size else group
        yield model.quant_conv(model.encoder(x, feat_cache=cache, feat_idx=[0]))


def wan_decode(model: Model, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """One latent frame at a time."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    cache: list[Any] = [None] * len([*model.decoder.modules()])
    for number, frame in enumerate(regroup(chunks, 1, 1)):
        z = model.post_quant_conv(frame)
        video = model.decoder(z, feat_cache=cache, feat_idx=[0], first_chunk=number == 0)
        video = unpatchify(video, patch_size=model.config.patch_size) if model.config.patch_size else video
        yield video.clamp(-1, 1)


def cogvideox_encode(model: Model, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Nine frames, then eight at a time, or four at the end."""
    step, cache = model.num_sample_frames_batch_size, None
    for group in regroup(chunks, 1 + step, step):
        moments, cache = model.encoder(group, conv_cache=cache)
        yield moments if model.quant_conv is None else model.quant_conv(moments)


def cogvideox_decode(model: Model, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Three latent frames, then pairs, as it was trained; a last one without its pair is decoded twice and kept once."""
    step, cache = model.num_latent_frames_batch_size, None
    for number, group in enumerate(regroup(chunks, 1 + step, step)):
        lacking = group.shape[2] % 2 == (0 if number == 0 else 1)
        z = torch.cat([group, group[:, :, -1:]], dim=2) if lacking else group
        z = z if model.post_quant_conv is None else model.post_quant_conv(z)
        video, cache = model.decoder(z, conv_cache=cache)
        yield video[:, :, : -model.config.temporal_compression_ratio] if lacking else video


def hunyuan_encode(model: Model, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """The whole: diffusers blends spans of 16 frames, so only the convolutions' memory is bounded."""
    yield model.encode(torch.cat([*chunks], dim=2)).latent_dist.parameters


def hunyuan_decode(model: Model, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """The whole, likewise."""
    yield model.decode(torch.cat([*chunks], dim=2)).sample


@dataclass(frozen=True)
class Facts:
    """What a published config says: latents are normalised as (z - mean) / std, a number for each channel."""

    mean: list[float]
    std: list[float]
    compression: tuple[int, int, int]


def wan_facts(config: dict[str, Any]) -> Facts:
    t, s = config["scale_factor_temporal"], config["scale_factor_spatial"]
    return Facts(list(config["latents_mean"]), list(config["latents_std"]), (t, s, s))


def cogvideox_facts(config: dict[str, Any]) -> Facts:
    s, C = 2 ** (len(config["block_out_channels"]) - 1), config["latent_channels"]
    return Facts([0.0] * C, [1 / config["scaling_factor"]] * C, (config["temporal_compression_ratio"], s, s))


def hunyuan_facts(config: dict[str, Any]) -> Facts:
    t, s, C = config["temporal_compression_ratio"], config["spatial_compression_ratio"], config["latent_channels"]
    return Facts([0.0] * C, [1 / config["scaling_factor"]] * C, (t, s, s))


PUBLISHED: dict[str, tuple[Callable[[dict[str, Any]], Facts], Stream, Stream]] = {  # by the class of diffusers
    "AutoencoderKLWan": (wan_facts, wan_encode, wan_decode),
    "AutoencoderKLCogVideoX": (cogvideox_facts, cogvideox_encode, cogvideox_decode),
    "AutoencoderKLHunyuanVideo": (hunyuan_facts, hunyuan_encode, hunyuan_decode),
}


class PublishedVAE(nn.Module):
    """One of them as a `FirstStage`, frozen, in fp32.

    Only Wan's is causal to the last bit. The norms of the others look over the frames of a chunk, so the first latents of a
    clip are close to those of its first frames alone, not equal.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, directory: Path, kind: str) -> None:
        super().__init__()
        try:
            import diffusers
        except ImportError:
            raise ConfigError(f"encode.vae: {kind} needs diffusers: pip install 'megasora[encoders]'") from None
        load = getattr(diffusers, kind).from_pretrained
        given = load(directory, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32)
        self.model = given.eval().requires_grad_(False)
        read, self._encode, self._decode = PUBLISHED[kind]
        facts = read(self.model.config)
        self.compression, self.latent_channels = facts.compression, len(facts.mean)
        self.register_buffer("mean", torch.tensor(facts.mean).view(-1, 1, 1, 1))
        self.register_buffer("std", torch.tensor(facts.std).view(-1, 1, 1, 1))

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        check_size(video, self.compression)
        moments = [*self.encode_stream([video])]
        return torch.cat([mean for mean, _ in moments], dim=2), torch.cat([logvar for _, logvar in moments], dim=2)

    def decode(self, latent: Tensor) -> Tensor:
        return torch.cat([*self.decode_stream([latent])], dim=2)

    encode_long, decode_long = encode, decode

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for moments in self._encode(self.model, chunks):
            mean, logvar = moments.chunk(2, dim=1)  # [B, C, T, H, W] each
            yield (mean - self.mean) / self.std, logvar.clamp(-30, 20) - 2 * self.std.log()

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        yield from self._decode(self.model, (latent * self.std + self.mean for latent in chunks))

    def fingerprint(self) -> str:
        config = {key: value for key, value in self.model.config.items() if not key.startswith("_")}  # not its path
        return digest(json.dumps([type(self.model).__name__, config], sort_keys=True), self.model.state_dict())
