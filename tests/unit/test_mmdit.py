"""MMDiT: published parameter counts, FLOPs, packing, conditioning, initial state."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megasora.models.joint import join
from megasora.models.mmdit import PRESETS, MMDiT, MMDiTConfig, forward_macs, text_timestep
from megasora.models.packing import Item, PackedRow, Shape, pack
from tests.gradients import assert_same_gradients

SMALL = MMDiTConfig(
    width=48, depth=2, single_depth=2, heads=4, ffn=96, channels=4, text_width=24, pooled_width=20, axes=(4, 4, 4)
)
REFINED = replace(SMALL, text="refiner", guidance_embed=True)
SHAPES: list[Shape] = [(1, 2, 2), (3, 1, 3), (2, 2, 1)]
TEXTS = [5, 1, 3]


@pytest.mark.parametrize(("name", "published"), [("Open-Sora-2.0", 11_891_178_560), ("HunyuanVideo", 12_810_782_784)])
def test_published_parameter_count(name: str, published: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in MMDiT(PRESETS[name]).parameters()) == published


def small_model(config: MMDiTConfig = SMALL) -> MMDiT:
    """Zero-initialised parameters get noise: else most of what is compared is zero."""
    torch.manual_seed(0)
    model = MMDiT(config)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def make_item(i: int, given: bool = True) -> Item:
    """Sample i at its own timestep, its first frame given where it has others."""
    shape, generator = SHAPES[i], torch.Generator().manual_seed(i)
    T, H, W = shape
    timesteps = torch.full((T,), 0.2 + 0.3 * i)
    if given and T > 1:
        timesteps[0] = 0.0
    patches = torch.randn(T * H * W, SMALL.patch_values, generator=generator)
    text, pooled = torch.randn(TEXTS[i], 24, generator=generator), torch.randn(20, generator=generator)
    return Item(patches, shape, timesteps, text, pooled)


def make_row(which: list[int], capacity: int | None = None) -> PackedRow:
    return pack([make_item(i) for i in which], capacity)


@pytest.mark.parametrize("config", [SMALL, REFINED])
def test_closed_form_counts_what_torch_counts(config: MMDiTConfig) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, row = small_model(config), pack([make_item(2, given=False)])
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(row)
    assert counter.get_total_flops() == 2 * forward_macs(config, SHAPES[2], TEXTS[2])


@pytest.mark.parametrize("config", [SMALL, REFINED])
def test_packed_equals_one_by_one_in_outputs_and_every_gradient(config: MMDiTConfig) -> None:
    model = small_model(config)
    row = make_row([0, 1, 2], capacity=20)
    packed = model(row)
    target = torch.randn(packed.shape, generator=torch.Generator().manual_seed(9))
    used = sum(row.video.lengths[:-1])
    (packed[:used] * target[:used]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for i in range(3):
        a, b = row.video.offsets[i : i + 2]
        alone = model(make_row([i]))
        assert torch.allclose(alone, packed[a:b], rtol=1e-5, atol=1e-5)
        (alone * target[a:b]).sum().backward()
    assert_same_gradients(
        model, gradients, lambda name: name.startswith("text_embed.blocks") and name.endswith("k.bias")
    )


@pytest.mark.parametrize("what", ["patches", "timesteps", "text", "pooled"])
@pytest.mark.parametrize("config", [SMALL, REFINED])
def test_everything_of_a_sample_matters_to_it_and_nothing_to_the_others(config: MMDiTConfig, what: str) -> None:
    model = small_model(config)
    items = [make_item(i) for i in range(3)]
    before = model(pack(items, 20))
    items[1] = replace(items[1], **{what: getattr(items[1], what) + 0.1})
    after = model(pack(items, 20))
    a, b = pack(items).video.offsets[1:3]
    assert torch.equal(before[:a], after[:a])
    assert torch.equal(before[b:], after[b:])
    assert (before[a:b] - after[a:b]).abs().amax(dim=1).min() > 1e-4


def test_places_matter_on_every_axis() -> None:
    model = small_model()
    row = make_row([1])
    for axis in (0, 2):  # the sample is one patch high
        grid = row.grid.clone()
        grid[:, axis] *= 2
        assert not torch.allclose(model(row), model(replace(row, grid=grid)), atol=1e-4)


def test_guidance_is_an_input_only_where_the_model_takes_it() -> None:
    row, n = make_row([0, 1]), make_row([0]).video.total
    assert row.guidance.tolist() == [1.0, 1.0]
    other = replace(row, guidance=torch.tensor([1.0, 6.0]))
    model = small_model(REFINED)
    before, after = model(row), model(other)
    assert torch.equal(before[:n], after[:n])
    assert not torch.allclose(before[n:], after[n:], atol=1e-3)
    assert torch.equal(small_model()(row), small_model()(other))


def test_text_sees_the_largest_timestep_of_its_sample() -> None:
    row = make_row([0, 1, 2], capacity=20)
    assert row.timestep.tolist() == pytest.approx([0.2, 0.0, 0.5, 0.0, 0.8, 0.0])
    assert text_timestep(row).tolist() == pytest.approx([0.2, 0.5, 0.8, 0.0])


def test_the_joint_sequence_is_text_then_video_sample_by_sample() -> None:
    row = pack([make_item(1), make_item(2)], capacity=15)  # 9 patches in runs of 3 and 6; 4 in runs of 2 and 2; padding
    joint = join(row)
    assert joint.samples.lengths == (1 + 9, 3 + 4, 0 + 2)
    expected = [0, *range(4, 13), 1, 2, 3, *range(13, 17), 17, 18]  # of [4 text tokens; 15 patches]
    assert joint.order is not None
    assert joint.order.tolist() == expected
    # Numbers of [3 texts; 5 runs].
    assert joint.owner.tolist() == [0] + 3 * [1] + 3 * [3] + 6 * [4] + 2 * [5] + 2 * [6] + 2 * [7]
    x = torch.randn(19, 2)
    assert torch.equal(joint.enter(x), x[expected])
    assert torch.equal(joint.leave(joint.enter(x)), x)
    assert torch.equal(torch.cat(joint.part(joint.meet(x[:4], x[4:]))), x)
    assert join(pack([make_item(1)], capacity=12)).order is None  # one sample, and padding that has no text


def test_parts_that_are_attended_together_have_as_much_text_each() -> None:
    # 6 text tokens, 5 of them of the first sample; 4, 9 and 3 patches.
    row = pack([make_item(0), make_item(1)], capacity=16)
    parts = [row.part(index, 4, shared=2) for index in range(4)]
    assert [part.own_text for part in parts] == [(0, 2), (2, 3), (3, 5), (5, 6)]
    assert [part.attended.own_text for part in parts] == [(0, 3), (0, 3), (3, 6), (3, 6)]
    first, last = join(parts[0]), join(parts[3])
    assert (first.text, last.text, first.pieces) == (2, 2, 2)
    # Each part is [two text tokens; four patches]. The second text token of parts 1 and 3 is padding.
    assert first.order is not None
    assert first.order.tolist() == [0, 1, 6, 2, 3, 4, 5, 8, 9, 10, 11]
    assert first.samples.lengths == (3 + 4, 4, 0)
    assert first.samples.peers == (first.samples.lengths, (2, 1 + 5, 3))
    assert last.order is not None
    assert last.order.tolist() == [0, 1, 6, 2, 3, 4, 5, 8, 9, 10, 11]
    assert last.owner.tolist() == [1, 2, 5, 6, 6, 6]  # text of the second sample, padding; its last patch, padding
    found = last.leave(torch.arange(1, 12))
    assert found.tolist() == [1, 2, 4, 5, 6, 7, 3, 0, 8, 9, 10, 11]


def test_initial_state_is_adaln_zero() -> None:
    torch.manual_seed(0)
    model = MMDiT(REFINED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights()
    row = make_row([0, 1, 2])
    assert model(row).abs().max() == 0
    setting = model.setting(row)
    x = torch.randn(setting.joint.samples.total, 48)
    for block in model.blocks:
        assert torch.equal(block(x, setting), x)


def test_bfloat16_autocast_keeps_conditions_in_fp32() -> None:
    model, row = small_model(REFINED), make_row([0, 1, 2])
    seen = []
    for module in (model.time_embed, model.pooled_embed, model.text_embed.mean_embed, model.blocks[0].video.modulation):
        module.register_forward_hook(lambda _module, _inputs, output: seen.extend(output))
    exact = model(row)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found = model(row)
        assert {tensor.dtype for tensor in seen} == {torch.float32}
        assert found.dtype == torch.bfloat16
        assert (found.float() - exact).norm() < 0.05 * exact.norm()
        model.blocks.bfloat16()  # as sharding hands out the blocks' weights


@pytest.mark.parametrize(
    ("field", "numbers"),
    [
        ("axes", {"axes": (4, 4, 2)}),
        ("axes", {"axes": (3, 5, 4)}),
        ("axes", {"axes": (12, 0, 0)}),
        ("heads", {"heads": 16}),
        ("heads", {"heads": 12}),
        ("heads", {"heads": 5}),
        ("single_depth", {"single_depth": 0}),
        ("ffn", {"ffn": 0}),
        ("ffn", {"ffn": 98}),
        ("text_width", {"text_width": 0}),
        ("pooled_width", {"pooled_width": 0}),
        ("theta", {"theta": 0.5}),
        ("refiner_depth", {"refiner_depth": 0}),
    ],
)
def test_bad_numbers_are_refused_by_their_name(field: str, numbers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{field}=\S.*: ") as refused:
        replace(SMALL, **numbers)
    assert "\n" not in str(refused.value)


def test_the_axes_that_an_error_proposes_are_valid() -> None:
    for heads in (1, 2, 3, 4, 6, 8):
        with pytest.raises(ValueError, match=r"^axes=") as refused:
            replace(SMALL, heads=heads, axes=(1, 1, 1))
        time, row, column = map(int, str(refused.value).split("[")[-1].rstrip("]").split(","))
        replace(SMALL, heads=heads, axes=(time, row, column))
    with pytest.raises(ValueError, match=r"such as \[16, 56, 56\]"):
        replace(PRESETS["HunyuanVideo"], axes=(16, 56, 58))
