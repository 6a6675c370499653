"""A causal 3-D video VAE: latent diffusion's first stage (Rombach et al. 2022), causal in time as in MAGVIT-v2.

The first frame stands alone, so an image is a video of one frame, and latent frame i depends on pixel frames 0 to t·i only.
Every layer looks back through an explicit cache, so a video of any length streams through in chunks, in constant memory, with
the same result as in one piece. Norms are over channels: statistics over time would see the future.

A linear transform of whole blocks (t x s x s pixels), fitted by PCA, runs beside the network, which learns what it misses.
Inside, tensors are [B, T, H, W, C]: on a CPU the convolutions are fastest so.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import xxhash
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Cache = dict[nn.Module, Tensor]  # what each layer remembers of the frames before


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """`patch` pixels a side enter as channels; each level then strides by (time, space). 4 x 8 x 8 by default."""

    width: int = 32
    multipliers: tuple[int, ...] = (2, 4, 4)  # channels of each resolution, in units of width
    strides: tuple[tuple[int, int], ...] = ((2, 2), (2, 1))
    patch: int = 4
    blocks: int = 1  # residual blocks of each resolution
    latent_channels: int = 16

    def __post_init__(self) -> None:
        if len(self.multipliers) != len(self.strides) + 1:
            raise ValueError(f"multipliers: {len(self.strides) + 1} resolutions, {len(self.multipliers)} given")

    @property
    def compression(self) -> tuple[int, int, int]:
        """Pixel frames, rows and columns of one latent position."""
        t = math.prod(time for time, _ in self.strides)
        s = self.patch * math.prod(space for _, space in self.strides)
        return t, s, s


# Channels of the larger blocks as in Wan 2.2 (4 x 16 x 16, 48) and LTX-Video (8 x 32 x 32, 128; for long HD).
VAE_PRESETS: dict[str, VAEConfig] = {
    "4x8x8": VAEConfig(),
    "4x16x16": VAEConfig(strides=((2, 2), (2, 2)), latent_channels=48),
    "8x32x32": VAEConfig(multipliers=(2, 4, 4, 4), strides=((2, 2), (2, 2), (2, 2)), latent_channels=128),
}


class RMSNorm(nn.RMSNorm):
    """Over the channels of each position."""


class Spatial(nn.Module):
    """A 3 x 3 convolution of each frame."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # By flatten and permute: a batch of one then has the strides of one among many, so the same kernel and the same bits.
        y = self.conv(x.flatten(0, 1).permute(0, 3, 1, 2))  # [B·T, C, H, W]
        return y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])  # [B, T, H, W, C]


class Temporal(nn.Module):
    """A causal convolution over three frames. Before the first frame there is the first frame again."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, (3, 1), (stride, 1))
        self.stride = stride

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        _, _, H, W, _ = x.shape
        before = x[:, :1].expand(-1, 2, -1, -1, -1) if cache is None or self not in cache else cache[self]
        padded = torch.cat([before, x], dim=1)
        y = self.conv(padded.flatten(2, 3).permute(0, 3, 1, 2))  # [B, C, T, H·W]
        y = y.permute(0, 2, 3, 1).unflatten(2, (H, W))  # [B, T, H, W, C]
        if cache is not None:
            cache[self] = padded[:, y.shape[1] * self.stride :]  # where the next window begins
        return y


class Block(nn.Module):
    """Residual: norm, convolution in space, convolution in time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.spatial, self.temporal = RMSNorm(width, eps=1e-6), Spatial(width, width), Temporal(width, width)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        return x + self.temporal(F.silu(self.spatial(self.norm(x))), cache)


class Down(nn.Module):
    """Strides by (time, space)."""

    def __init__(self, inputs: int, outputs: int, time: int, space: int) -> None:
        super().__init__()
        self.spatial, self.temporal = Spatial(inputs, outputs, space), Temporal(outputs, outputs, time)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        return self.temporal(self.spatial(x), cache)


class Up(nn.Module):
    """The reverse: each position becomes time x space x space ones; the first frame stays one."""

    def __init__(self, inputs: int, outputs: int, time: int, space: int) -> None:
        super().__init__()
        self.temporal = Temporal(inputs, inputs)
        self.spatial = Spatial(inputs, outputs * time * space**2)
        self.unfold = Unfold(time, space)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        return self.unfold(self.spatial(self.temporal(x, cache)), cache)


class Fold(nn.Module):
    """[B, 1 + t·k, s·H, s·W, C] -> [B, 1 + k, H, W, C·t·s·s]; the first frame fills its block alone."""

    def __init__(self, time: int, space: int) -> None:
        super().__init__()
        self.time, self.space = time, space

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        if cache is None or self not in cache:
            x = torch.cat([x[:, :1].expand(-1, self.time - 1, -1, -1, -1), x], dim=1)
        if cache is not None:
            cache[self] = x[:, :0]  # only that there was a first frame
        return rearrange(x, "B (T t) (H h) (W w) C -> B T H W (C t h w)", t=self.time, h=self.space, w=self.space)


class Unfold(Fold):
    """The inverse of `Fold`."""

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        y = rearrange(x, "B T H W (C t h w) -> B (T t) (H h) (W w) C", t=self.time, h=self.space, w=self.space)
        if cache is None or self not in cache:
            y = y[:, self.time - 1 :]
        if cache is not None:
            cache[self] = x[:, :0]
        return y


class Encoder(nn.Module):
    """[B, T, H, W, 3] -> [B, T', H', W', 2·latent_channels]: mean and log-variance."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        self.fold = Fold(1, config.patch)
        self.inputs = Spatial(3 * config.patch**2, widths[0])
        layers: list[nn.Module] = [Block(widths[0]) for _ in range(config.blocks)]
        for (time, space), inputs, outputs in zip(config.strides, widths[:-1], widths[1:], strict=True):
            layers += [Down(inputs, outputs, time, space), *(Block(outputs) for _ in range(config.blocks))]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(widths[-1], eps=1e-6)
        self.outputs = nn.Linear(widths[-1], 2 * config.latent_channels)
        self.fold_all = Fold(config.compression[0], config.compression[1])
        self.linear = nn.Linear(3 * math.prod(config.compression), config.latent_channels)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        y = self.inputs(self.fold(x, cache))
        for layer in self.layers:
            y = layer(y, cache)
        y = self.outputs(F.silu(self.norm(y)))
        return y + F.pad(self.linear(self.fold_all(x, cache)), (0, self.linear.out_features))


class Decoder(nn.Module):
    """[B, T', H', W', latent_channels] -> [B, T, H, W, 3]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in reversed(config.multipliers)]
        self.inputs = Spatial(config.latent_channels, widths[0])
        layers: list[nn.Module] = [Block(widths[0]) for _ in range(config.blocks)]
        for (time, space), inputs, outputs in zip(reversed(config.strides), widths[:-1], widths[1:], strict=True):
            layers += [Up(inputs, outputs, time, space), *(Block(outputs) for _ in range(config.blocks))]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(widths[-1], eps=1e-6)
        self.outputs = Spatial(widths[-1], 3 * config.patch**2)
        self.unfold = Unfold(1, config.patch)
        self.linear = nn.Linear(config.latent_channels, 3 * math.prod(config.compression))
        self.unfold_all = Unfold(config.compression[0], config.compression[1])

    def forward(self, z: Tensor, cache: Cache | None) -> Tensor:
        y = self.inputs(z)
        for layer in self.layers:
            y = layer(y, cache)
        y = self.unfold(self.outputs(F.silu(self.norm(y))), cache)
        return y + self.unfold_all(self.linear(z), cache)


def chunks_of(x: Tensor, first: int, following: int) -> Iterator[Tensor]:
    """Slices along T: `first` frames, then `following` at a time."""
    yield x[:, :, :first]
    for begin in range(first, x.shape[2], following):
        yield x[:, :, begin : begin + following]


def check_size(video: Tensor, compression: tuple[int, int, int], first: bool = True) -> None:
    """Raises ValueError unless [B, 3, T, H, W] is whole blocks; the `first` chunk of a stream has a frame alone before them."""
    t, s, _ = compression
    _, _, T, H, W = video.shape
    if (T - first) % t or H % s or W % s:
        raise ValueError(f"{T} frames of {H}x{W}: wanted are {'1 + ' * first}a multiple of {t}, of multiples of {s}")


def digest(header: str, state: dict[str, Tensor]) -> str:
    """A fingerprint of weights and of what says how to use them."""
    hashed = xxhash.xxh3_64(header.encode())
    for name, tensor in sorted(state.items()):
        hashed.update(name.encode())
        hashed.update(tensor.contiguous().cpu().numpy().data)
    return hashed.hexdigest()


class VideoVAE(nn.Module):
    """Videos [B, 3, 1 + t·k, H, W] in [-1, 1] to latents [B, C, 1 + k, H/s, W/s] and back.

    `encode` and `decode` speak normalised latents, by the statistics that training left: each channel has mean 0, and all
    channels together variance 1 (one scale, as in latent diffusion: a channel that matters more to the picture stays larger).
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self._begin_quietly()
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def compression(self) -> tuple[int, int, int]:
        return self.config.compression

    @torch.no_grad()
    def _begin_quietly(self) -> None:
        """At first the network adds nothing to the linear transform, and the posterior is narrow."""
        for parameter in (*self.encoder.outputs.parameters(), *self.decoder.outputs.parameters()):
            parameter.zero_()
        self.encoder.outputs.bias[self.config.latent_channels :] = -6.0

    def posterior(self, video: Tensor, cache: Cache | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance as training sees them, before normalisation. Raises ValueError for sizes that do not fit."""
        check_size(video, self.config.compression, first=not cache)
        moments = self.encoder(rearrange(video, "B C T H W -> B T H W C"), cache)
        mean, logvar = rearrange(moments, "B T H W C -> B C T H W").chunk(2, dim=1)
        return mean, logvar.clamp(-20.0, 10.0)

    def reconstruct(self, latent: Tensor, cache: Cache | None = None) -> Tensor:
        """The decoder on latents that are not normalised."""
        return rearrange(self.decoder(rearrange(latent, "B C T H W -> B T H W C"), cache), "B T H W C -> B C T H W")

    def encode(self, video: Tensor, cache: Cache | None = None) -> tuple[Tensor, Tensor]:
        """Normalised mean and log-variance. With a `cache` (an empty dict at first) the next chunk of a stream: 1 + t·k frames,
        then multiples of t."""
        mean, logvar = self.posterior(video, cache)
        m, s = (v.view(-1, 1, 1, 1) for v in (self.latent_mean, self.latent_std))
        return (mean - m) / s, logvar - 2 * s.log()

    def decode(self, latent: Tensor, cache: Cache | None = None) -> Tensor:
        """Normalised latents -> video; with a `cache`, the next chunk of a stream."""
        m, s = (v.view(-1, 1, 1, 1) for v in (self.latent_mean, self.latent_std))
        return self.reconstruct(latent * s + m, cache)

    def encode_long(self, video: Tensor, frames: int = 16) -> tuple[Tensor, Tensor]:
        """`encode` in chunks of so many frames (a multiple of t), for clips of any length."""
        moments = [*self.encode_stream(chunks_of(video, 1 + frames, frames))]
        return torch.cat([mean for mean, _ in moments], dim=2), torch.cat([logvar for _, logvar in moments], dim=2)

    def decode_long(self, latent: Tensor, frames: int = 4) -> Tensor:
        """`decode` in chunks of so many latent frames."""
        return torch.cat([*self.decode_stream(chunks_of(latent, 1 + frames, frames))], dim=2)

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The latents of a video that arrives in chunks along T, in constant memory, equal to the whole."""
        cache: Cache = {}
        for chunk in chunks:
            yield self.encode(chunk, cache)

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The pixels of a latent that arrives in chunks along T."""
        cache: Cache = {}
        for chunk in chunks:
            yield self.decode(chunk, cache)

    @torch.no_grad()
    def fit_linear(self, videos: Iterable[Tensor]) -> None:
        """Sets the linear transform to the leading principal components of the videos' blocks.

        They are whitened by half (the square root of their deviation): a diffusion model then cares most for what the eye
        sees most, and still for the rest. Fewer blocks than channels leave the last channels to the network.
        """
        fold = self.encoder.fold_all
        blocks = torch.cat([fold(rearrange(v, "B C T H W -> B T H W C"), None).flatten(0, 3) for v in videos])
        generator_state = torch.get_rng_state()
        torch.manual_seed(0)  # pca_lowrank draws a random start
        mean = blocks.mean(0)
        rank = min(self.config.latent_channels, *blocks.shape)
        _, sizes, axes = torch.pca_lowrank(blocks, rank, niter=4)
        torch.set_rng_state(generator_state)
        deviation = (sizes / len(blocks) ** 0.5).clamp(min=1e-4).sqrt()
        for parameter in (*self.encoder.linear.parameters(), self.decoder.linear.weight):
            parameter.zero_()
        self.encoder.linear.weight[:rank] = (axes / deviation).T
        self.encoder.linear.bias[:rank] = -(mean @ axes) / deviation
        self.decoder.linear.weight[:, :rank] = axes * deviation
        self.decoder.linear.bias.copy_(mean)

    def save(self, directory: Path) -> None:
        """Writes config.json and model.safetensors."""
        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(asdict(self.config), indent=1))

    @classmethod
    def load(cls, directory: Path) -> "VideoVAE":
        """Raises OSError when there is none."""
        raw = json.loads((directory / "config.json").read_text())
        raw["strides"] = tuple(tuple(stride) for stride in raw["strides"])
        vae = cls(VAEConfig(**{**raw, "multipliers": tuple(raw["multipliers"])}))
        vae.load_state_dict(load_file(directory / "model.safetensors"))
        return vae

    def fingerprint(self) -> str:
        """Changes with any weight or the shape: cached latents are tied to it."""
        return digest(repr(self.config), self.state_dict())
