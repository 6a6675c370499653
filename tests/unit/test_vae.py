"""The video VAE: shapes, causality, streaming, its linear transform and normalisation."""

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megasora.models.vae import VAE_PRESETS, Cache, Fold, Spatial, Temporal, Unfold, VAEConfig, VideoVAE

SMALL = VAEConfig(width=8)
SMALL_PRESETS = {name: dataclasses.replace(config, width=8) for name, config in VAE_PRESETS.items()}


def build(config: VAEConfig = SMALL, seed: int = 0) -> VideoVAE:
    torch.manual_seed(seed)
    vae = VideoVAE(config)
    with torch.no_grad():  # the outputs begin at zero: noise, so that the network shows
        for parameter in (*vae.encoder.outputs.parameters(), *vae.decoder.outputs.parameters()):
            parameter += 0.1 * torch.randn_like(parameter)
    vae.latent_mean.uniform_(-1, 1)  # not the identity, so that normalisation shows
    vae.latent_std.uniform_(0.5, 2)
    return vae


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_shapes(frames: int) -> None:
    vae = build()
    assert vae.config.compression == (4, 8, 8)
    with torch.no_grad():
        mean, logvar = vae.encode(noise(2, 3, frames, 16, 24))
        assert mean.shape == logvar.shape == (2, 16, 1 + frames // 4, 2, 3)
        assert vae.decode(mean).shape == (2, 3, frames, 16, 24)


@pytest.mark.parametrize("name", VAE_PRESETS)
def test_presets_compress_by_their_names(name: str) -> None:
    vae = build(SMALL_PRESETS[name])
    assert "x".join(map(str, vae.compression)) == name
    t, s, _ = vae.compression
    with torch.no_grad():
        for frames in (1, 1 + 2 * t):
            video = noise(1, 3, frames, s, 2 * s)
            mean, logvar = vae.encode(video)
            assert mean.shape == logvar.shape == (1, vae.latent_channels, 1 + (frames - 1) // t, 1, 2)
            assert vae.decode(mean).shape == video.shape


def test_the_default_is_a_preset() -> None:
    assert VAE_PRESETS["4x8x8"] == VAEConfig()


def test_sizes_that_do_not_fit_are_errors() -> None:
    vae = build()
    for frames, height, width in [(4, 16, 16), (2, 16, 16), (5, 12, 16), (5, 16, 20)]:
        with pytest.raises(ValueError, match=f"{frames} frames of {height}x{width}"):
            vae.encode(noise(1, 3, frames, height, width))
    cache: Cache = {}
    vae.encode(noise(1, 3, 1, 16, 16), cache)
    with pytest.raises(ValueError, match="5 frames"):  # later chunks are multiples of 4
        vae.encode(noise(1, 3, 5, 16, 16), cache)
    with pytest.raises(ValueError, match="multipliers"):
        VAEConfig(multipliers=(1, 2))


def test_an_image_is_the_first_frame() -> None:
    vae, video = build(), noise(1, 3, 9, 16, 16)
    with torch.no_grad():
        image, whole = vae.encode(video[:, :, :1]), vae.encode(video)
        for one, many in zip(image, whole, strict=True):
            torch.testing.assert_close(one, many[:, :, :1], rtol=0, atol=1e-5)
        latent = noise(1, 16, 3, 2, 2)
        torch.testing.assert_close(vae.decode(latent[:, :, :1]), vae.decode(latent)[:, :, :1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1), (1, 4), (2, 3), (3, 1, 1), (4, 1), (5,)], ids=str)
@pytest.mark.parametrize("name", VAE_PRESETS)
def test_streaming_equals_the_whole(name: str, chunks: tuple[int, ...]) -> None:
    """Chunks of so many latent frames; the frames of the first one are 1 + t·(n - 1)."""
    vae = build(SMALL_PRESETS[name])
    t, s, _ = vae.compression
    video = noise(1, 3, 1 + 4 * t, s, 2 * s)
    frames = [t * n - (t - 1) * (i == 0) for i, n in enumerate(chunks)]
    with torch.no_grad():
        mean, logvar = vae.encode(video)
        streamed = list(vae.encode_stream(video.split(frames, dim=2)))
        torch.testing.assert_close(torch.cat([m for m, _ in streamed], dim=2), mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.cat([v for _, v in streamed], dim=2), logvar, rtol=0, atol=1e-5)
        pixels = torch.cat(list(vae.decode_stream(mean.split(chunks, dim=2))), dim=2)
        torch.testing.assert_close(pixels, vae.decode(mean), rtol=0, atol=1e-5)


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made under it held at one time, each storage counted once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.made: list[tuple[weakref.ref[Tensor], int, int]] = []  # the tensor, where its storage lies, bytes of it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made.append((weakref.ref(tensor), storage.data_ptr(), storage.nbytes()))
        self.made = [entry for entry in self.made if entry[0]() is not None]
        self.peak = max(self.peak, sum({place: size for _, place, size in self.made}.values()))
        return out


def peak(work: Callable[[], object]) -> int:
    with LiveBytes() as live, torch.no_grad():
        work()
    return live.peak


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_streaming_needs_constant_memory(direction: str) -> None:
    vae = build()

    def chunks(count: int) -> Iterator[Tensor]:
        for i in range(count):
            yield noise(1, 3, 4 if i else 1, 16, 16) if direction == "encode" else noise(1, 16, 1, 2, 2)

    def stream(count: int) -> None:
        for _ in vae.encode_stream(chunks(count)) if direction == "encode" else vae.decode_stream(chunks(count)):
            pass

    def whole() -> None:
        parts = torch.cat([*chunks(10)], dim=2)
        vae.encode(parts) if direction == "encode" else vae.decode(parts)

    assert peak(lambda: stream(5)) == peak(lambda: stream(25)) > 0
    assert peak(whole) > 2 * peak(lambda: stream(10))  # so the measure sees what grows


def test_latents_do_not_see_the_future() -> None:
    vae, video = build(), noise(1, 3, 17, 16, 16)
    other = video.clone()
    other[:, :, 9:] = noise(1, 3, 8, 16, 16, seed=2)  # latent frame 2 ends with pixel frame 8
    with torch.no_grad():
        a, b = vae.encode(video)[0], vae.encode(other)[0]
        assert torch.equal(a[:, :, :3], b[:, :, :3])
        assert not torch.equal(a[:, :, 3], b[:, :, 3])
        late = a.clone()
        late[:, :, 3:] += 1
        x, y = vae.decode(a), vae.decode(late)
        assert torch.equal(x[:, :, :9], y[:, :, :9])
        assert not torch.equal(x[:, :, 9], y[:, :, 9])


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_against_conv3d(stride: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, 6, 4)
    plain = x.permute(0, 4, 1, 2, 3)
    temporal, spatial = Temporal(4, 7, stride), Spatial(4, 7, stride)
    front = torch.cat([plain[:, :, :1]] * 2 + [plain], dim=2)
    weight = temporal.conv.weight[..., None]  # [out, in, 3, 1] -> [out, in, 3, 1, 1]
    expected = F.conv3d(front, weight, temporal.conv.bias, stride=(stride, 1, 1))
    torch.testing.assert_close(temporal(x, None).permute(0, 4, 1, 2, 3), expected, rtol=1e-5, atol=1e-5)
    expected = F.conv3d(
        plain, spatial.conv.weight[:, :, None], spatial.conv.bias, stride=(1, stride, stride), padding=(0, 1, 1)
    )
    torch.testing.assert_close(spatial(x).permute(0, 4, 1, 2, 3), expected, rtol=1e-5, atol=1e-5)


def test_fold_gathers_blocks_and_unfold_inverts_it() -> None:
    x = torch.arange(1 * 9 * 4 * 6 * 3, dtype=torch.float32).reshape(1, 9, 4, 6, 3)
    folded = Fold(4, 2)(x, None)
    assert folded.shape == (1, 3, 2, 3, 3 * 16)
    first = folded[0, 0, 1, 2].reshape(3, 4, 2, 2)  # channel, frame, row, column of one block
    later = folded[0, 2, 1, 2].reshape(3, 4, 2, 2)
    for channel in range(3):
        for frame in range(4):
            assert torch.equal(first[channel, frame], x[0, 0, 2:4, 4:6, channel])
            assert torch.equal(later[channel, frame], x[0, 5 + frame, 2:4, 4:6, channel])
    assert torch.equal(Unfold(4, 2)(folded, None), x)


def test_every_parameter_gets_a_gradient() -> None:
    vae = build()
    mean, logvar = vae.posterior(noise(1, 3, 9, 16, 16))
    (vae.reconstruct(mean + logvar.exp()).square().mean() + logvar.square().mean()).backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_normalised_latents() -> None:
    vae, video = build(), noise(1, 3, 5, 16, 16)
    with torch.no_grad():
        raw_mean, raw_logvar = vae.posterior(video)
        mean, logvar = vae.encode(video)
        m, s = vae.latent_mean.view(1, 16, 1, 1, 1), vae.latent_std.view(1, 16, 1, 1, 1)
        torch.testing.assert_close(mean * s + m, raw_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close((0.5 * logvar).exp() * s, (0.5 * raw_logvar).exp(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(vae.decode(mean), vae.reconstruct(raw_mean), rtol=0, atol=1e-5)


def test_save_and_load(tmp_path: Path) -> None:
    vae, video = build(), noise(1, 3, 5, 16, 16)
    vae.save(tmp_path / "vae")
    loaded = VideoVAE.load(tmp_path / "vae")
    assert loaded.config == vae.config
    assert loaded.fingerprint() == vae.fingerprint()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(loaded.encode(video), vae.encode(video), strict=True))
        next(loaded.decoder.parameters()).view(-1)[0] += 1e-3
    assert loaded.fingerprint() != vae.fingerprint()
    loaded = VideoVAE.load(tmp_path / "vae")
    loaded.latent_mean[3] += 1e-3  # the statistics are part of what latents mean
    assert loaded.fingerprint() != vae.fingerprint()
    with pytest.raises(OSError, match=r"config\.json"):
        VideoVAE.load(tmp_path / "none")


def test_linear_transform_is_the_principal_components() -> None:
    """Its error is the variance outside the leading components, by numpy's SVD of the same blocks."""
    vae = build()
    with torch.no_grad():
        for module in (vae.encoder.outputs, vae.decoder.outputs):  # only the linear path remains
            for parameter in module.parameters():
                parameter.zero_()
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((2 * 4 * 4, 40)) * np.geomspace(1, 0.01, 40)
    blocks = factors @ rng.standard_normal((40, 3 * 4 * 8 * 8)) * 0.1
    later = torch.from_numpy(blocks).float().reshape(2, 4, 4, 3, 4, 8, 8).permute(0, 3, 4, 1, 5, 2, 6)
    video = torch.cat([torch.zeros(2, 3, 1, 32, 32), later.reshape(2, 3, 4, 32, 32)], dim=2)
    vae.fit_linear([video])
    data = np.concatenate([np.zeros((32, 768)), blocks])  # the first frames' blocks are zero
    values = np.linalg.svd(data - data.mean(0), compute_uv=False)
    with torch.no_grad():
        mean, _ = vae.posterior(video)
        error = vae.encoder.fold_all((vae.reconstruct(mean) - video).permute(0, 2, 3, 4, 1), None)
    assert error.square().sum().item() == pytest.approx((values[16:] ** 2).sum(), rel=0.03)
    channels = mean.transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(16), rtol=0, atol=1e-3)
    half_whitened = torch.from_numpy((values[:16] / len(data) ** 0.5) ** 0.5).float()
    torch.testing.assert_close(channels.std(1, correction=0), half_whitened, rtol=0.03, atol=0)


def test_more_channels_than_blocks_leave_the_last_to_the_network() -> None:
    vae, video = build(), noise(1, 3, 5, 16, 16)  # 8 blocks, 16 channels
    vae.fit_linear([video])
    assert vae.encoder.linear.weight[:7].abs().sum(1).min() > 0
    for rest in (vae.encoder.linear.weight[8:], vae.encoder.linear.bias[8:], vae.decoder.linear.weight[:, 8:]):
        assert not rest.any()
    blocks = vae.encoder.fold_all(video.permute(0, 2, 3, 4, 1), None)
    restored = vae.decoder.linear(vae.encoder.linear(blocks))
    torch.testing.assert_close(restored, blocks, rtol=0, atol=1e-4)  # as many components as blocks lose nothing


def test_long_clips_go_in_chunks() -> None:
    vae, video = build(), noise(1, 3, 41, 16, 16)
    with torch.no_grad():
        mean, logvar = vae.encode(video)
        for frames in (4, 16, 64):
            chunked = vae.encode_long(video, frames)
            torch.testing.assert_close(chunked, (mean, logvar), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(vae.decode_long(mean, 3), vae.decode(mean), rtol=1e-5, atol=1e-5)
