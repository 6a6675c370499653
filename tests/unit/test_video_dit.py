"""The default family: published parameter counts and FLOPs, packing, conditioning, initial state."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from megasora_kernels.qknorm_rope import rotation_table

from megasora.models.flops import forward_macs, training_flops
from megasora.models.layers import rotary_angles, sincos_embedding
from megasora.models.packing import Item, PackedRow, in_patches, pack, patch_grid, patchify, unpatchify
from megasora.models.video_dit import PRESETS, QKNormAttention, VideoDiT, VideoDiTConfig
from tests.gradients import assert_same_gradients

SMALL = VideoDiTConfig(width=48, depth=2, heads=4, ffn=96, channels=4, text_width=24)


def count(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in VideoDiT(PRESETS[name]).parameters())


def test_published_parameter_count() -> None:
    assert count("Wan2.1-1.3B") == 1_418_996_800


def test_published_flops() -> None:
    # Wan2.1-14B at 32,760 tokens with 512 text tokens: 5,035 TFLOP a training sample.
    assert training_flops(PRESETS["Wan2.1-14B"], (21, 30, 52), 512) / 1e12 == pytest.approx(5035, rel=1e-3)


def test_closed_form_counts_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = small_model()
    row = make_row([(2, 4, 6)], [7])
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(row)
    assert counter.get_total_flops() == 2 * forward_macs(SMALL, (2, 2, 3), 7)


def small_model(noise: float = 0.1) -> VideoDiT:
    """Zero-initialised parameters get noise: else most of what is compared is zero."""
    torch.manual_seed(0)
    model = VideoDiT(SMALL)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return model


def make_item(shape: tuple[int, int, int], text: int, seed: int) -> Item:
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(4, *shape, generator=generator)
    patches = in_patches(shape, SMALL.patch)
    times = torch.full((patches[0],), 0.1 + 0.2 * seed)
    text_tokens = torch.randn(text, 24, generator=generator)
    return Item(patchify(latent, SMALL.patch), patches, times, text_tokens, torch.zeros(0))


def make_row(
    shapes: list[tuple[int, int, int]], texts: list[int], capacity: int | None = None, first: int = 0
) -> PackedRow:
    items = [make_item(s, m, first + i) for i, (s, m) in enumerate(zip(shapes, texts, strict=True))]
    return pack(items, capacity)


SHAPES, TEXTS = [(1, 4, 4), (3, 2, 6), (2, 4, 2)], [5, 1, 3]


def test_packed_equals_one_by_one_in_outputs_and_every_gradient() -> None:
    model = small_model()
    row = make_row(SHAPES, TEXTS, capacity=32)
    packed = model(row)
    target = torch.randn(packed.shape, generator=torch.Generator().manual_seed(9))
    used = sum(row.video.lengths[:-1])
    (packed[:used] * target[:used]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for i in range(len(SHAPES)):
        a, b = row.video.offsets[i : i + 2]
        alone = model(make_row(SHAPES[i : i + 1], TEXTS[i : i + 1], first=i))
        assert torch.allclose(alone, packed[a:b], rtol=1e-5, atol=1e-5)
        (alone * target[a:b]).sum().backward()
    assert_same_gradients(model, gradients)  # with QK-norm the biases of the keys have theirs, too


def test_samples_do_not_see_each_other() -> None:
    model = small_model()
    before = model(make_row(SHAPES, TEXTS))
    row = make_row(SHAPES, TEXTS)
    row.tokens[row.video.offsets[1] : row.video.offsets[2]] += 1.0
    after = model(row)
    a, b = row.video.offsets[1:3]
    assert torch.equal(before[:a], after[:a])
    assert torch.equal(before[b:], after[b:])
    assert not torch.allclose(before[a:b], after[a:b])


@pytest.mark.parametrize("what", ["timestep", "text", "grid"])
def test_every_condition_matters(what: str) -> None:
    model = small_model()
    row = make_row(SHAPES[:1], TEXTS[:1])
    before = model(row)
    if what == "grid":
        row.grid[:, 1] *= 2  # a shift of all positions would change nothing: RoPE is relative
    else:
        getattr(row, what)[...] += 0.3
    assert not torch.allclose(before, model(row), atol=1e-4)


def test_initial_state_is_adaln_zero() -> None:
    torch.manual_seed(0)
    model = VideoDiT(SMALL)
    model.init_weights()
    row = make_row(SHAPES, TEXTS)
    assert model(row).abs().max() == 0
    x = torch.randn(row.video.total, SMALL.width)
    assert torch.equal(model.blocks[0](x, model.setting(row)), x)


def test_patches_there_and_back() -> None:
    latent = torch.randn(4, 4, 6, 8)
    for patch in ((1, 2, 2), (2, 3, 4), (4, 1, 1)):
        tokens = patchify(latent, patch)
        assert torch.equal(unpatchify(tokens, (4, 6, 8), patch), latent)
    tokens, grid = patchify(latent, (1, 2, 2)), patch_grid((4, 3, 4), latent.device)
    t, h, w = grid[17].tolist()
    assert torch.equal(
        tokens[17], latent[:, t : t + 1, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2].permute(1, 2, 3, 0).flatten()
    )


def test_sincos_positions_tell_every_patch_apart() -> None:
    grid = patch_grid((3, 4, 5), torch.device("cpu"))
    embedding = sincos_embedding(grid, 50)
    assert embedding.shape == (60, 50)
    assert torch.pdist(embedding).min() > 0.1
    _, h, w = grid[17].tolist()
    # 8 frequencies an axis, the first of the rows.
    assert embedding[17, 8].item() == pytest.approx(math.sin(h), abs=1e-6)
    assert embedding[17, 24 + 16].item() == pytest.approx(math.cos(w), abs=1e-6)
    shifted = make_row([(1, 4, 4)], [5])
    shifted.grid[...] += 2
    model = small_model()
    assert torch.allclose(model(shifted), model(make_row([(1, 4, 4)], [5])), atol=1e-5)  # RoPE alone is relative


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="heads"):
        VideoDiTConfig(width=100, heads=3)
    with pytest.raises(ValueError, match="do not fit"):
        make_row(SHAPES, TEXTS, capacity=8)


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def attend(module: QKNormAttention, queries: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    q, k = rms(module.q(queries), module.norm_q.weight), rms(module.k(context), module.norm_k.weight)
    q, k, v = (x.unflatten(-1, (4, 12)).transpose(0, 1) for x in (q, k, module.v(context)))
    return module.out(((q @ k.mT / math.sqrt(12)).softmax(-1) @ v).transpose(0, 1).flatten(1))


def test_a_block_is_wans_formula() -> None:
    """Written out from Wan 2.1's WanAttentionBlock: e = (modulation + e).chunk(6), in the order shift, scale, gate."""
    model, row = small_model(), make_row([(2, 4, 4)], [5])
    block = model.blocks[0]
    x, text, e = torch.randn(row.video.total, 48), torch.randn(5, 48), torch.randn(1, 6, 48)
    norm = partial(torch.nn.functional.layer_norm, normalized_shape=(48,), eps=1e-6)
    m = [part[0] for part in (block.modulation + e).unbind(1)]
    y = norm(x) * (1 + m[1]) + m[0]
    expected = x + attend(block.self_attention, y, y) * m[2]
    y = norm(expected, weight=block.norm_cross.weight, bias=block.norm_cross.bias)
    expected = expected + attend(block.cross_attention, y, text)
    expected = expected + block.mlp(norm(expected) * (1 + m[4]) + m[3]) * m[5]
    setting = replace(
        model.setting(row), text=text, modulation=e, rotation=rotation_table(torch.zeros(row.video.total, 6))
    )
    found = block(x, setting)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_head_is_split_over_the_axes_as_wans() -> None:
    # Wan 2.1: of c // 2 complex numbers c - 2 · (c // 3) are time's, then rows, then columns: 22, 21, 21 of 64.
    for axis, (first, end) in enumerate(((0, 22), (22, 43), (43, 64))):
        turned = rotary_angles(torch.eye(3, dtype=torch.int64)[axis : axis + 1], 128)[0].nonzero().flatten()
        assert turned.tolist() == list(range(first, end))
