"""Spatial tiles: the same as the whole away from cuts, no seam where they meet, memory of one tile."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megasora.encoders import open_stage
from megasora.errors import ConfigError
from megasora.models.first_stage import PixelStage
from megasora.models.vae import VAE_PRESETS, VAEConfig, VideoVAE
from megasora.models.vae_tiling import (
    Grid,
    Split,
    decode_tiled,
    decode_tiled_stream,
    encode_tiled,
    encode_tiled_stream,
    fades,
    latent_grid,
    tile_starts,
)
from megasora.schema import EncodeConfig
from megasora.vae_training import TrainVAEConfig, train_vae
from tests.unit.test_vae import build, noise, peak

TINY = VAEConfig(width=4, multipliers=(1, 2, 2))
REACH = 6  # latent positions that TINY's decoder sees to each side: 3 x 3 convolutions, counted in the test below


def smooth(frames: int, height: int, width: int) -> Tensor:
    """[1, 3, T, H, W]: slow waves, without a hard edge."""
    t, y, x = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.sin(x / 17 + y / (11 + 3 * c) + t / 5 + c) for c in range(3)])[None] * 0.8


def waves(step: int, batch: int, frames: int) -> Tensor:
    """Crops of 32 pixels to learn from: waves of random directions, colours and phases."""
    a, b, c = torch.rand(3, batch, 3, 1, 1, 1, generator=torch.Generator().manual_seed(step % 1_000_003))
    t, y, x = torch.meshgrid(torch.arange(frames), torch.arange(32), torch.arange(32), indexing="ij")
    return 0.8 * torch.sin((a - 0.5) / 3 * x + (b - 0.5) / 3 * y + t / 5 + 6 * c)


@pytest.fixture(scope="module")
def trained() -> VideoVAE:
    torch.manual_seed(0)
    vae = VideoVAE(TINY)
    config = TrainVAEConfig(steps=60, batch=1, frames=5, size=32, lr=4e-3, image_every=0, warmup=5, ema=0.9)
    assert train_vae(vae, waves, config, lambda step, metrics: None)["psnr_video"] > 30
    return vae


@pytest.mark.parametrize("size", range(1, 40))
def test_tiles_cover_an_axis_and_overlap(size: int) -> None:
    for tile, overlap in ((8, 2), (8, 0), (5, 4), (8, 7)):
        side = min(tile, size)
        starts = tile_starts(size, side, min(overlap, side - 1))
        assert starts[0] == 0
        assert starts[-1] + side == size
        assert all(0 < b - a <= side - min(overlap, side - 1) for a, b in pairwise(starts))


def test_two_tiles_fade_linearly_and_sum_to_one() -> None:
    first, second = fades([0, 6], 8)  # positions 6 and 7 are shared
    torch.testing.assert_close(first, torch.tensor([1, 1, 1, 1, 1, 1, 0.75, 0.25]))
    torch.testing.assert_close(second, torch.tensor([0.25, 0.75, 1, 1, 1, 1, 1, 1]))
    assert all(weight.eq(1).all() for weight in fades([0, 8], 8))


def test_tiles_cut_from_a_picture_join_to_it() -> None:
    picture = noise(1, 3, 2, 11, 23)
    grid = Grid(tuple(tile_starts(11, 8, 3)), tuple(tile_starts(23, 8, 5)), (8, 8))
    assert len(grid) == 2 * 6
    torch.testing.assert_close(grid.join([grid.cut(picture, i) for i in range(len(grid))]), picture)


@pytest.mark.parametrize("name", VAE_PRESETS)
def test_one_tile_is_the_whole(name: str) -> None:
    vae = build(dataclasses.replace(VAE_PRESETS[name], width=8))
    t, s, _ = vae.compression
    video = noise(1, 3, 1 + 3 * t, s, 2 * s)
    with torch.no_grad():
        moments = encode_tiled(vae, video, tile=(2 * s, 2 * s), overlap=s)
        assert all(torch.equal(a, b) for a, b in zip(moments, vae.encode_long(video), strict=True))
        assert torch.equal(decode_tiled(vae, moments[0], (s, 2 * s), 0), vae.decode_long(moments[0]))


def test_a_stream_in_tiles_is_the_video_in_tiles() -> None:
    vae, video = build(TINY), noise(1, 3, 13, 32, 40)
    with torch.no_grad():
        mean, logvar = encode_tiled(vae, video, (16, 24), 8)
        streamed = [*encode_tiled_stream(vae, video.split([5, 4, 4], dim=2), (16, 24), 8)]
        for i, expected in enumerate((mean, logvar)):
            torch.testing.assert_close(torch.cat([m[i] for m in streamed], dim=2), expected, rtol=0, atol=1e-5)
        pixels = torch.cat([*decode_tiled_stream(vae, mean.split([2, 1, 1], dim=2), (16, 24), 8)], dim=2)
        torch.testing.assert_close(pixels, decode_tiled(vae, mean, (16, 24), 8), rtol=0, atol=1e-5)


def test_any_first_stage_goes_in_tiles() -> None:
    video = noise(1, 3, 2, 10, 12)
    mean, _ = encode_tiled(PixelStage(), video, (4, 5), 2)
    torch.testing.assert_close(mean, video)
    torch.testing.assert_close(decode_tiled(PixelStage(), mean, (4, 5), 2), video)


def test_inside_a_tile_as_far_as_convolutions_reach_it_is_the_whole() -> None:
    vae = build(TINY)
    latent = noise(1, 16, 3, 2, 40)
    with torch.no_grad():
        changed = latent.clone()
        changed[..., 20] += 1
        touched = (vae.decode(changed) - vae.decode(latent)).abs().amax(dim=(0, 1, 2, 3)).nonzero()
        assert touched.min() >= 8 * (20 - REACH)
        assert touched.max() < 8 * (21 + REACH)
        whole = vae.decode(latent)
        # Tiles 0 to 23 and 16 to 39: 16 to 23 are shared.
        tiled = decode_tiled(vae, latent, tile=(8 * 24, 8 * 24), overlap=64)
        inside = (tiled - whole).abs().amax(dim=(0, 1, 2, 3)).view(40, 8).amax(1)
        assert inside[: 24 - REACH - 2].max() == inside[:16].max() < 1e-5  # until the second tile begins
        assert inside[24:].max() < 1e-5
        assert inside[16:24].max() > 1e-5  # there the cuts show, else nothing would be tested
        mean, _ = vae.encode(whole)
        again, _ = encode_tiled(vae, whole, tile=(8 * 24, 8 * 24), overlap=64)
        far = (again - mean).abs().amax(dim=(0, 1, 2, 3))
        assert max(far[:16].max(), far[24:].max()) < 1e-5


def test_no_seam_shows_on_smooth_pictures(trained: VideoVAE) -> None:
    video = smooth(5, 96, 128)
    with torch.no_grad():
        mean, _ = trained.encode(video)
        whole = trained.decode(mean)
        blended = decode_tiled(trained, mean, tile=(48, 64), overlap=24) - whole
        hard = decode_tiled(trained, mean, tile=(48, 64), overlap=0) - whole
        again, _ = encode_tiled(trained, video, tile=(48, 64), overlap=24)
    assert blended.abs().max() < 0.03  # of a range of 2, four grey levels of 255
    steps = [(difference[..., 1:] - difference[..., :-1]).abs().max() for difference in (blended, hard)]
    assert steps[0] < 0.5 * steps[1]  # a seam is a step in the difference: hard cuts have one
    assert (again - mean).abs().max() < 0.01 * mean.abs().max()


def test_memory_is_that_of_a_tile() -> None:
    vae = build(TINY)

    def whole(side: int, tile: int) -> int:
        """Bytes beyond the video itself: a tile on its way."""
        latent = noise(1, 16, 2, side, side)
        return peak(lambda: decode_tiled(vae, latent, (tile, tile), 8)) - 4 * 3 * 5 * (8 * side) ** 2

    def stream(frames: int) -> int:
        chunks = [noise(1, 16, 1, 8, 8) for _ in range(frames)]
        return peak(lambda: [None for _ in decode_tiled_stream(vae, chunks, (32, 32), 8)])

    assert whole(16, 32) < 1.5 * whole(8, 32)  # four times the picture
    assert whole(16, 128) > 3 * whole(8, 64)
    assert stream(3) == stream(9)


def test_tiles_are_shared_round_robin() -> None:
    shares = [Split(rank, 3).share(7) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 6], [2, 5, 6]]  # 6 is repeated, so that every rank sends equally much
    parts = [torch.stack([torch.tensor(float(i)) for i in share]) for share in shares]
    split = Split(0, 3, gather=lambda mine: parts)
    assert [tile.item() for tile in split.collect(list(parts[0]), 7)] == list(range(7))


def test_tiles_that_do_not_fit_are_errors() -> None:
    vae = build()
    for tile, overlap, message in (
        ((20, 16), 8, r"^tile=\[20, 16\]: multiples of 8"),
        ((0, 16), 8, r"^tile=\[0, 16\]"),
        ((16, 16), 4, "^overlap=4: a multiple of 8 pixels below 16"),
        ((16, 24), 16, "^overlap=16"),
    ):
        with pytest.raises(ValueError, match=message):
            latent_grid(vae.compression, (4, 4), tile, overlap)
    with pytest.raises(ValueError, match="5 frames of 20x16"):
        encode_tiled(vae, noise(1, 3, 5, 20, 16), (16, 16), 8)


def test_a_config_asks_for_tiles(tmp_path: Path) -> None:
    vae = build(TINY)
    vae.save(tmp_path)
    stage = open_stage(EncodeConfig(vae=str(tmp_path), tile=32, tile_overlap=8), torch.device("cpu"))
    video = noise(1, 3, 5, 48, 64)
    mean, _ = stage.encode_long(video)
    assert torch.equal(mean, encode_tiled(vae, video, (32, 32), 8)[0])
    assert not torch.equal(mean, vae.encode(video)[0])
    streamed = torch.cat(list(stage.decode_stream(mean.split(1, dim=2))), dim=2)
    torch.testing.assert_close(streamed, stage.decode_long(mean), rtol=0, atol=1e-5)
    assert stage.fingerprint() == vae.fingerprint()
    for config, line in (
        (EncodeConfig(vae=str(tmp_path), tile=30), r"encode\.tile=\[30, 30\]: multiples of 8"),
        (EncodeConfig(vae=str(tmp_path), tile=32, tile_overlap=40), r"encode\.tile_overlap=40: a multiple of 8"),
        (EncodeConfig(vae="pixels", tile=32), r"encode\.tile=32: tiles are for VAEs of"),
    ):
        with pytest.raises(ConfigError, match=line):
            open_stage(config, torch.device("cpu"))
