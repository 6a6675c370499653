"""DiT in its four designs: published counts and FLOPs, packing, positions, conditions, initial state."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megasora.models.dit import (
    EPS,
    PRESETS,
    AdaLNBlock,
    CrossBlock,
    DiT,
    DiTConfig,
    DiTSetting,
    condition_tokens,
    forward_macs,
    position_embedding,
)
from megasora.models.families import parameter_count
from megasora.models.packing import Item, PackedRow, Segments, in_patches, pack, patch_grid, patchify
from tests.gradients import assert_same_gradients

DESIGNS = ["in_context", "cross_attention", "adaln", "adaln_zero"]
SMALL = DiTConfig(width=48, depth=2, heads=4, ffn=96, channels=4, classes=5, learn_sigma=True)


def count(config: DiTConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in DiT(config).parameters())


def test_published_parameter_counts() -> None:
    # DiT's own code counts its table of fixed positions, one for each of 16 x 16 patches; ours are computed.
    assert count(PRESETS["DiT-XL/2"]) + 16 * 16 * 1152 == parameter_count(PRESETS["DiT-XL/2"]) == 675_129_632
    # Table 1 and section 5 of the paper, in millions.
    for name, millions in (("DiT-S/2", 33), ("DiT-B/2", 130), ("DiT-L/2", 458), ("DiT-XL/2", 675)):
        assert round(count(PRESETS[name]) / 1e6) == millions
    assert set(PRESETS) == {f"DiT-{size}/{p}" for size in ("S", "B", "L", "XL") for p in (2, 4, 8)}


@pytest.mark.parametrize(
    "name, side, giga",
    [
        ("DiT-S/2", 16, 6.06),
        ("DiT-B/2", 16, 23.0),
        ("DiT-L/2", 16, 80.7),
        ("DiT-XL/2", 16, 118.6),
        ("DiT-XL/2", 32, 524.5),
    ],
)
def test_published_flops(name: str, side: int, giga: float) -> None:
    assert forward_macs(PRESETS[name], (1, side, side), 0) / 1e9 == pytest.approx(giga, rel=1e-3)


@pytest.mark.parametrize("design, giga", list(zip(DESIGNS, [119.4, 137.6, 118.6, 118.6], strict=True)))
def test_published_flops_of_the_designs(design: str, giga: float) -> None:
    config = replace(PRESETS["DiT-XL/2"], design=design)  # section 5, XL/2 at 256 x 256
    assert forward_macs(config, (1, 16, 16), 0) / 1e9 == pytest.approx(giga, rel=1e-3)


@pytest.mark.parametrize("design", DESIGNS)
def test_closed_form_counts_what_torch_counts(design: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, row = small_model(design), pack([make_item((2, 4, 6), 0, given=0)])
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(row)
    assert counter.get_total_flops() == 2 * forward_macs(model.config, (2, 2, 3), 0)


def small_model(design: str, **changes: int) -> DiT:
    """Zero-initialised parameters get noise: else most of what is compared is zero."""
    torch.manual_seed(0)
    model = DiT(replace(SMALL, design=design, **changes))
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def make_item(shape: tuple[int, int, int], seed: int, given: int = 1) -> Item:
    """`given` frames of a video are clean: two runs. The class is the seed, the third sample's none."""
    generator = torch.Generator().manual_seed(seed)
    patches = in_patches(shape, SMALL.patch)
    times = torch.full((patches[0],), 0.1 + 0.2 * seed)
    times[:given] *= patches[0] == 1
    tokens = patchify(torch.randn(4, *shape, generator=generator), SMALL.patch)
    return Item(tokens, patches, times, torch.zeros(0, 0), torch.zeros(0), label=seed if seed != 2 else -1)


SHAPES = [(1, 4, 4), (3, 2, 6), (2, 4, 2)]


def make_row(capacity: int | None = None) -> PackedRow:
    return pack([make_item(shape, i) for i, shape in enumerate(SHAPES)], capacity)


@pytest.mark.parametrize("design", DESIGNS)
def test_packed_equals_one_by_one_in_outputs_and_every_gradient(design: str) -> None:
    model = small_model(design)
    row = make_row(capacity=32)
    assert row.runs.lengths == (4, 3, 6, 2, 2, 15)
    packed = model(row)
    assert packed.shape == (32, 2 * 16)
    target = torch.randn(packed.shape, generator=torch.Generator().manual_seed(9))
    used = sum(row.video.lengths[:-1])
    (packed[:used] * target[:used]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for i, shape in enumerate(SHAPES):
        a, b = row.video.offsets[i : i + 2]
        alone = model(pack([make_item(shape, i)]))
        assert torch.allclose(alone, packed[a:b], rtol=1e-5, atol=1e-5)
        (alone * target[a:b]).sum().backward()
    assert_same_gradients(model, gradients, lambda name: name.endswith("k.bias"))


@pytest.mark.parametrize("design", DESIGNS)
def test_samples_do_not_see_each_other(design: str) -> None:
    model, row = small_model(design), make_row()
    before = model(row)
    a, b = row.video.offsets[1:3]
    row.tokens[a:b] += 1.0
    row.label[1] = 4
    row.timestep[row.run_sample == 1] += 0.1
    after = model(row)
    assert torch.equal(before[:a], after[:a])
    assert torch.equal(before[b:], after[b:])
    assert not torch.allclose(before[a:b], after[a:b])


@pytest.mark.parametrize("what", ["timestep", "label", "grid"])
@pytest.mark.parametrize("design", DESIGNS)
def test_every_condition_matters(design: str, what: str) -> None:
    model, row = small_model(design), pack([make_item((2, 4, 4), 1, given=0)])
    before = model(row)
    getattr(row, what)[...] += torch.tensor(0.3 if what == "timestep" else 1).type_as(getattr(row, what))
    assert not torch.allclose(before, model(row), atol=1e-4)


@pytest.mark.parametrize("design", DESIGNS)
def test_each_run_has_its_own_timestep(design: str) -> None:
    """The clean frame and the noisy one are told apart, in whichever order they come."""
    model, item = small_model(design), make_item((2, 4, 4), 1)
    outputs = [model(pack([replace(item, timesteps=torch.tensor(t))])) for t in ([0.0, 0.7], [0.7, 0.0], [0.7, 0.7])]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(outputs[i], outputs[j], atol=1e-4)


def test_condition_tokens_are_two_a_sample_and_one_more_for_each_further_run() -> None:
    row = make_row(capacity=24)
    time, label = torch.randn(len(row.runs.lengths), 48), torch.randn(len(row.shapes), 48)
    tokens, segments = condition_tokens(row, time, label)
    assert segments.lengths == (2, 3, 3, 2)
    assert torch.equal(tokens[:2], torch.stack([time[0], label[0]]))  # the paper's two, as they are
    assert torch.equal(tokens[2], time[1])
    assert not torch.allclose(tokens[3], time[2], atol=0.1)  # marked: it begins at frame 1
    assert torch.equal(tokens[4], label[1])


def test_no_class_is_the_last_row_of_the_table() -> None:
    model, row = small_model("adaln_zero"), pack([make_item((1, 4, 4), 2)])
    assert row.label.tolist() == [-1]
    before = model(row)
    with torch.no_grad():
        model.label_embed.weight[:-1] += 1.0
    assert torch.equal(model(row), before)
    with torch.no_grad():
        model.label_embed.weight[-1] += 1.0
    assert not torch.allclose(model(row), before, atol=1e-4)
    assert torch.isfinite(small_model("adaln_zero", classes=0)(make_row())).all()  # a label means nothing to it


def test_positions_of_a_picture_are_those_of_diffusers() -> None:
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    expected = get_2d_sincos_pos_embed(48, 16, base_size=16).float()  # [256, D], DiT's own formula in fp64
    square = patch_grid((1, 16, 16), torch.device("cpu"))
    torch.testing.assert_close(position_embedding(square, 48), expected, rtol=0, atol=1e-5)
    wide = patch_grid((1, 3, 11), torch.device("cpu"))  # a native shape: the same place, the same embedding
    found = position_embedding(wide, 48).view(3, 11, 48)
    torch.testing.assert_close(found, expected.view(16, 16, 48)[:3, :11], rtol=0, atol=1e-5)


def test_positions_tell_frames_apart_and_leave_the_first_alone() -> None:
    grid = patch_grid((4, 5, 6), torch.device("cpu"))
    embedding = position_embedding(grid, 64)
    picture = position_embedding(patch_grid((1, 5, 6), torch.device("cpu")), 64)
    assert torch.equal(embedding[:30], picture)
    assert torch.pdist(embedding).min() > 0.1


@pytest.mark.parametrize("design", DESIGNS)
def test_initial_state(design: str) -> None:
    torch.manual_seed(0)
    model, row = DiT(replace(SMALL, design=design)), make_row()
    model.init_weights()
    assert model(row).abs().max() == 0
    for name, parameter in model.named_parameters():
        zero = name.endswith("bias") or name.startswith("out.") or (design == "adaln_zero" and "modulation." in name)
        assert (parameter.abs().max() == 0) == zero, name
    if design == "adaln_zero":
        x = torch.randn(row.video.total, 48)
        assert torch.equal(model.blocks[0](x, model.setting(row)), x)


def test_adaln_is_adaln_zero_with_open_gates() -> None:
    """The block with gates is compared with diffusers' in test_interop_dit.py."""
    row, x = make_row(), torch.randn(17, 48)
    gated = small_model("adaln_zero").blocks[0]
    plain = AdaLNBlock(replace(SMALL, design="adaln"))
    weights = gated.state_dict()
    with torch.no_grad():
        for kind, value in (("weight", 0.0), ("bias", 1.0)):
            parts = weights[f"modulation.{kind}"].chunk(6)
            parts[2][...] = parts[5][...] = value
            weights[f"modulation.{kind}"] = torch.cat([parts[i] for i in (0, 1, 3, 4)])
    plain.load_state_dict(weights)
    setting = replace(small_model("adaln").setting(row), condition=torch.randn(len(row.runs.lengths), 48))
    results = [block(x, setting) for block in (plain, gated)]
    torch.testing.assert_close(*results)


def test_the_cross_attention_block_is_diffusers() -> None:
    from diffusers.models.attention import BasicTransformerBlock

    torch.manual_seed(0)
    theirs = BasicTransformerBlock(
        48, 4, 12, cross_attention_dim=48, activation_fn="gelu-approximate", attention_bias=True, norm_eps=EPS,
        ff_inner_dim=96, norm_elementwise_affine=True, norm_type="layer_norm",
    ).eval()  # fmt: skip
    theirs.norm2.eps = theirs.norm3.eps = EPS  # they pass the arguments in the wrong order
    ours = CrossBlock(replace(SMALL, design="cross_attention"))
    names = {"norm1": "norm1", "norm2": "norm_cross", "norm3": "norm2", "ff.net.0.proj": "mlp.0", "ff.net.2": "mlp.2"}
    for a, b in (("attn1", "attention"), ("attn2", "cross_attention")):
        names |= {f"{a}.to_q": f"{b}.q", f"{a}.to_k": f"{b}.k", f"{a}.to_v": f"{b}.v", f"{a}.to_out.0": f"{b}.out"}
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    weights = theirs.state_dict()
    ours.load_state_dict(
        {f"{b}.{kind}": weights[f"{a}.{kind}"] for a, b in names.items() for kind in ("weight", "bias")}
    )
    x, context = torch.randn(6, 48), torch.randn(2, 48)
    with torch.no_grad():
        expected = theirs(x[None], encoder_hidden_states=context[None])[0]
        queries, keys = (Segments((n,), x.device) for n in (6, 2))
        found = ours(x, DiTSetting(make_row(), small_model("adaln").attention, queries, context, keys))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("design", DESIGNS)
def test_bf16_keeps_conditions_in_fp32(design: str) -> None:
    """A block's weights may be bf16 (as under FSDP): its modulation is computed in fp32 all the same."""
    model, row = small_model(design), make_row(capacity=24)
    expected = model(row)
    model.blocks.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(row)
    assert (found - expected).norm() / expected.norm() < 0.03
    if model.config.adaptive:
        with torch.autocast("cpu", torch.bfloat16):
            parts: tuple[Tensor, ...] = model.blocks[0].modulation(torch.randn(3, 48))
        assert all(part.dtype == torch.float32 for part in parts)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": 5}, r"^heads=5: .*nearest is 4"),
        ({"width": 54, "heads": 2}, r"^width=54: .*nearest is 5[26]"),
        ({"text_width": 128}, r"^text_width=128"),
        ({"pooled_width": 8}, r"^pooled_width=8"),
        ({"ffn": 0}, r"^ffn=0"),
        ({"time_period": 1.0}, r"^time_period=1"),
        ({"patch": (1, 0, 2)}, r"^patch="),
    ],
)
def test_bad_configs_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)
