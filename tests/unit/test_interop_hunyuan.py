"""MMDiT against diffusers' HunyuanVideo and Flux with the same random weights."""

from dataclasses import replace

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from megasora.models.interop import hunyuan
from megasora.models.interop.names import export_weights, import_weights
from megasora.models.mmdit import MMDiT, MMDiTConfig
from megasora.models.packing import Item, PackedRow, in_patches, pack, patchify, unpatchify

HUNYUAN = MMDiTConfig(
    width=48, depth=2, single_depth=3, heads=3, ffn=96, channels=4, text_width=24, pooled_width=20,
    axes=(4, 6, 6), theta=256.0, text="refiner",
)  # fmt: skip
FLUX = replace(HUNYUAN, ffn=192, theta=10_000.0, text="linear")


def noisy(model: nn.Module) -> nn.Module:
    """Every parameter random: nothing that a wrong name could hide behind stays zero or one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def imported(config: MMDiTConfig, theirs: nn.Module) -> MMDiT:
    """Our model with their weights, after a way there and back that changes no bit."""
    ours, table = MMDiT(config), hunyuan.weight_map(config)
    ours.load_state_dict(import_weights(theirs.state_dict(), table, 0))
    exported, original = export_weights(ours.state_dict(), table, 0), theirs.state_dict()
    assert exported.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(exported[name], tensor), name
    return ours


def row_of(
    latents: Tensor, times: Tensor, texts: list[Tensor], pooled: Tensor, guidance: Tensor | None = None
) -> PackedRow:
    """Latents [S, C, T, H, W] at times [S, T], with scales of guidance [S]."""
    shape = in_patches(latents.shape[2:], HUNYUAN.patch)
    scales = [1.0] * len(latents) if guidance is None else guidance.tolist()
    each = zip(latents, times, texts, pooled, scales, strict=True)
    return pack([Item(patchify(x, HUNYUAN.patch), shape, *told, guidance=scale) for x, *told, scale in each])


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 1e-2, "nothing to compare"
    assert (ours - theirs).norm() / theirs.norm() <= 1e-5


def case() -> tuple[Tensor, list[Tensor], Tensor]:
    """Two latents of one shape, captions of different lengths, pooled texts."""
    torch.manual_seed(1)
    return torch.randn(2, 4, 3, 6, 8), [torch.randn(7, 24), torch.randn(3, 24)], torch.randn(2, 20)


def as_batch(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Padded with what must not be seen, and the mask of what may."""
    batch, mask = 9.0 * torch.ones(2, 9, 24), torch.zeros(2, 9)
    for i, text in enumerate(texts):
        batch[i, : len(text)], mask[i, : len(text)] = text, 1
    return batch, mask


def of_row(tokens: Tensor, latents: Tensor) -> Tensor:
    """[L, P] of a row -> [S, C, T, H, W]."""
    return torch.stack([unpatchify(x, latents.shape[2:], HUNYUAN.patch) for x in tokens.chunk(len(latents))])


@pytest.mark.parametrize("guided", [False, True])
def test_hunyuan_video(guided: bool) -> None:
    from diffusers import HunyuanVideoTransformer3DModel

    config = replace(HUNYUAN, guidance_embed=guided)
    theirs = noisy(HunyuanVideoTransformer3DModel(**hunyuan.to_diffusers(config)))
    ours = imported(config, theirs)
    latents, texts, pooled = case()
    t, guidance = torch.tensor([0.371, 0.914]), torch.tensor([6.0, 1.0]) if guided else None
    with torch.no_grad():
        batch, mask = as_batch(texts)
        scale = None if guidance is None else 1000 * guidance
        expected = theirs(latents, 1000 * t, batch, mask, pooled, scale).sample
        found = of_row(ours(row_of(latents, t[:, None].expand(-1, 3), texts, pooled, guidance)), latents)
    assert_close(found, expected)


def test_a_given_first_frame_is_hunyuan_video_i2v() -> None:
    """`token_replace`: the first frame at timestep 0. Only their last norm takes the sample's timestep for every token."""
    from diffusers import HunyuanVideoTransformer3DModel

    arguments = hunyuan.to_diffusers(HUNYUAN) | {"image_condition_type": "token_replace"}
    theirs = noisy(HunyuanVideoTransformer3DModel(**arguments))
    ours = imported(HUNYUAN, theirs)
    latents, texts, pooled = case()
    t = torch.tensor([0.371, 0.914])
    times = t[:, None] * torch.tensor([0.0, 1.0, 1.0])
    with torch.no_grad():
        batch, mask = as_batch(texts)
        expected = theirs(latents, 1000 * t, batch, mask, pooled).sample
        found = of_row(ours(row_of(latents, times, texts, pooled)), latents)
    assert_close(found[:, :, 1:], expected[:, :, 1:])
    assert not torch.allclose(found[:, :, :1], expected[:, :, :1], atol=1e-2)


@pytest.mark.parametrize("guided", [False, True])
def test_flux(guided: bool) -> None:
    """One sample at a time, since they know no mask. Their positions are given, so a video is no different from an image."""
    from diffusers import FluxTransformer2DModel

    config = replace(FLUX, guidance_embed=guided)
    theirs = noisy(FluxTransformer2DModel(**hunyuan.to_diffusers(config)))
    ours = imported(config, theirs)
    latents, texts, pooled = case()
    t, guidance = torch.tensor([0.371, 0.914]), torch.tensor([3.5, 1.0]) if guided else None
    row = row_of(latents, t[:, None].expand(-1, 3), texts, pooled, guidance)
    grid, parts = row.grid[: row.video.lengths[0]], {"ph": 2, "pw": 2}
    with torch.no_grad():
        found = of_row(ours(row), latents)
        for i, text in enumerate(texts):
            tokens = rearrange(latents[i], "C T (H ph) (W pw) -> (T H W) (C ph pw)", **parts)
            scale = None if guidance is None else guidance[i : i + 1]
            ids = torch.zeros(len(text), 3)
            sample = theirs(tokens[None], text[None], pooled[i : i + 1], t[i : i + 1], grid, ids, scale).sample[0]
            expected = rearrange(sample, "(T H W) (C ph pw) -> C T (H ph) (W pw)", T=3, H=3, **parts)
            assert_close(found[i], expected)
