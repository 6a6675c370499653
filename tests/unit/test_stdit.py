"""STDiT: Open-Sora's parameter count and formula, packing, given frames, factorised attention, FLOPs, initial state."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from megasora.models.interop import stdit as interop
from megasora.models.packing import Item, Shape, pack
from megasora.models.stdit import PRESETS, STDiT, STDiTConfig, forward_macs, space_order, time_order
from tests.gradients import assert_same_gradients

SMALL = STDiTConfig(width=48, depth=2, heads=4, ffn=96, channels=4, learn_sigma=True, text_width=24, base_size=4)
LATTE = replace(SMALL, qk_norm=False, time_position="sincos", time_text=False, fps_condition=False, area_scale=False)
BOTH = pytest.mark.parametrize("config", [SMALL, LATTE], ids=["stdit3", "latte"])


def test_published_parameter_count() -> None:
    with torch.device("meta"):
        model = STDiT(PRESETS["STDiT3-XL/2"])
    assert sum(p.numel() for p in model.parameters()) == 1_207_643_936


def small_model(config: STDiTConfig = SMALL, noise: float = 0.1) -> STDiT:
    """Zero-initialised parameters get noise: else most of what is compared is zero."""
    torch.manual_seed(0)
    model = STDiT(config)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return model


def make_item(shape: Shape, text: int, seed: int, given: int = 0) -> Item:
    """A sample of `shape` patches whose first `given` frames are data."""
    generator = torch.Generator().manual_seed(seed)
    timesteps = torch.full((shape[0],), 0.1 + 0.2 * seed)
    timesteps[:given] = 0
    return Item(
        torch.randn(math.prod(shape), 16, generator=generator),
        shape,
        timesteps,
        torch.randn(text, 24, generator=generator),
        torch.zeros(0),
        fps=8.0 * (1 + seed),
    )


def make_items() -> list[Item]:
    """Mixed shapes, two neighbours of one shape, an image, and a video that continues a given frame."""
    return [
        make_item((3, 1, 3), 5, 0, given=1),
        make_item((2, 2, 1), 3, 1),
        make_item((2, 2, 1), 4, 2),
        make_item((1, 2, 2), 1, 3),
    ]


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@BOTH
def test_packed_equals_one_by_one_in_outputs_and_every_gradient(config: STDiTConfig) -> None:
    model, items = small_model(config), make_items()
    row = pack(items, capacity=28)
    packed = model(row)
    target = torch.randn(packed.shape, generator=torch.Generator().manual_seed(9))
    used = sum(row.video.lengths[:-1])
    assert used < row.video.total, "no padding"
    (packed[:used] * target[:used]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for i, item in enumerate(items):
        a, b = row.video.offsets[i : i + 2]
        alone = model(pack([item]))
        assert distance(alone, packed[a:b]) <= 1e-5
        (alone * target[a:b]).sum().backward()
    assert_same_gradients(
        model, gradients, lambda name: name.endswith("k.bias") and not (config.qk_norm and "self_attention" in name)
    )


def test_samples_do_not_see_each_other() -> None:
    model, items = small_model(), make_items()
    before, row = model(pack(items)), pack(items)
    a, b = row.video.offsets[1:3]
    row.tokens[a:b] += 1.0
    after = model(row)
    assert torch.equal(before[:a], after[:a])
    assert torch.equal(before[b:], after[b:])
    assert not torch.allclose(before[a:b], after[a:b])


@pytest.mark.parametrize("what", ["timestep", "text", "fps", "grid"])
def test_every_condition_matters(what: str) -> None:
    model, item = small_model(), make_item((2, 2, 3), 5, 0)
    row = pack([item])
    before = model(row)
    if what == "grid":
        row.grid[:, 0] *= 2  # frames further apart
    else:
        getattr(row, what)[...] += 0.3
    assert not torch.allclose(before, model(row), atol=1e-4)


def test_time_is_relative_with_rope() -> None:
    model, item = small_model(), make_item((3, 2, 2), 5, 0)
    assert distance(model(pack([item])), model(pack([replace(item, first_frame=7)]))) <= 1e-5


def test_a_given_first_frame_has_its_own_timestep() -> None:
    """In a block without attention, the given frame is as in a clean video, and the others are as in a noisy one."""
    model = small_model(replace(SMALL, depth=1))
    for block in (model.blocks[0].space, model.blocks[0].time):
        block.self_attention.out.weight.data.zero_()
    noisy = make_item((3, 2, 2), 5, 1)
    clean = replace(noisy, timesteps=torch.zeros(3))
    mixed = pack([replace(noisy, timesteps=torch.tensor([0.0, 0.3, 0.3]))])
    assert mixed.runs.lengths == (4, 8)
    found = model(mixed)
    assert distance(found[:4], model(pack([clean]))[:4]) <= 1e-5
    assert distance(found[4:], model(pack([noisy]))[4:]) <= 1e-5
    assert distance(found[:4], model(pack([noisy]))[:4]) > 1e-2


@pytest.mark.parametrize("kind", ["space", "time"])
def test_attention_is_factorised(kind: str) -> None:
    """A token reaches its own frame in a spatial block, its own place in a temporal one, and nothing else."""
    model, row = small_model(), pack([make_item((3, 2, 2), 5, 0), make_item((2, 3, 1), 5, 1)])
    order = space_order(row) if kind == "space" else time_order(row)
    block = getattr(model.blocks[0], kind)
    x, text = torch.randn(row.video.total, 48), torch.randn(10, 48)
    setting = replace(model.setting(row), text=text, modulation=torch.randn(2, 6, 48))
    apply = partial(block, setting=setting, rotation=None, order=order)
    frame, place = row.grid[:, 0], row.grid[:, 1:]
    for token in range(row.video.total):
        changed = x.clone()
        changed[token] += torch.randn(48)
        reached = (apply(changed) != apply(x)).any(dim=1)
        same = frame == frame[token] if kind == "space" else (place == place[token]).all(dim=1)
        assert torch.equal(reached, same & (row.video.index == row.video.index[token])), token


def test_orders_there_and_back() -> None:
    row = pack(make_items(), capacity=28)
    x = torch.arange(row.video.total)
    order = time_order(row)
    assert torch.equal(order.leave(order.enter(x)), x)
    assert order.enter(x)[:9].tolist() == [0, 3, 6, 1, 4, 7, 2, 5, 8]  # three frames of three places
    assert order.segments.lengths[:5] == (3, 3, 3, 2, 2)
    assert order.boxes == ((1, 3, 3), (2, 2, 2), (1, 1, 4), (1, 1, 7))
    assert space_order(row).enter(x) is x


def sincos(position: Tensor, width: int) -> Tensor:
    frequency = 10_000.0 ** -(torch.arange(0, width, 2).float() / width)
    angle = torch.outer(position, frequency)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def turn(x: Tensor) -> Tensor:
    """x [..., T, K] turned by its place on the axis T: neighbouring channels are the parts of a complex number."""
    T, K = x.shape[-2:]
    angle = torch.outer(torch.arange(T).float(), 10_000.0 ** -(torch.arange(0, K, 2).float() / K))
    return torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.exp(1j * angle)
    ).flatten(-2)


def open_sora(
    weights: dict[str, Tensor], video: Tensor, text: Tensor, times: tuple[float, float], fps: float
) -> Tensor:
    """STDiT3 of Open-Sora 1.2 written out for one video [C, T, H, W] on its own weights: -> [2·C, T, H, W].

    `times` are that of the first frame and that of the others, 0 to 1000.
    """
    D, N = 48, 4

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def embed(name: str, value: Tensor) -> Tensor:
        angle = torch.outer(value, torch.exp(-math.log(10_000) * torch.arange(128) / 128))
        return linear(f"{name}.mlp.2", F.silu(linear(f"{name}.mlp.0", torch.cat([angle.cos(), angle.sin()], dim=1))))

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[name]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT / math.sqrt(D // N)).softmax(-1) @ v).transpose(-2, -3).flatten(-2)

    x = F.conv3d(video[None], weights["x_embedder.proj.weight"], weights["x_embedder.proj.bias"], stride=(1, 2, 2))[0]
    _, T, H, W = x.shape
    side = math.sqrt(H * W)
    scale = 16 * side / 64  # pixels over those of the base: 16 to a patch, 4 patches to the base
    rows, columns = (torch.arange(n) / scale * round(side) / n for n in (H, W))
    plane = torch.cat([sincos(columns.repeat(H), D // 2), sincos(rows.repeat_interleave(W), D // 2)], dim=1)
    x = rearrange(x, "D T H W -> T (H W) D") + plane
    t = embed("t_embedder", torch.tensor([times[0]] + [times[1]] * (T - 1))) + embed(
        "fps_embedder", torch.tensor([fps])
    )
    y = linear("y_embedder.y_proj.fc2", F.gelu(linear("y_embedder.y_proj.fc1", text), approximate="tanh"))
    modulation = linear("t_block.1", F.silu(t)).unflatten(1, (6, D))  # [T, 6, D]
    norm = partial(F.layer_norm, normalized_shape=(D,), eps=1e-6)
    heads = partial(rearrange, pattern="... L (parts N K) -> parts ... N L K", N=N)
    for name in [f"{kind}_blocks.{i}" for i in range(2) for kind in ("spatial", "temporal")]:
        e = (weights[f"{name}.scale_shift_table"] + modulation)[:, :, None].unbind(1)  # six [T, 1, D]
        z = norm(x) * (1 + e[1]) + e[0]
        z = z.transpose(0, 1) if "temporal" in name else z
        q, k, v = heads(linear(f"{name}.attn.qkv", z), parts=3)
        q, k = rms(q, f"{name}.attn.q_norm.weight"), rms(k, f"{name}.attn.k_norm.weight")
        q, k = (turn(q), turn(k)) if "temporal" in name else (q, k)
        z = linear(f"{name}.attn.proj", attend(q, k, v))
        x = x + e[2] * (z.transpose(0, 1) if "temporal" in name else z)
        k, v = heads(linear(f"{name}.cross_attn.kv_linear", y), parts=2)
        q = heads(linear(f"{name}.cross_attn.q_linear", x.flatten(0, 1)), parts=1)[0]
        x = x + linear(f"{name}.cross_attn.proj", attend(q, k, v)).view_as(x)
        z = linear(f"{name}.mlp.fc1", norm(x) * (1 + e[4]) + e[3])
        x = x + e[5] * linear(f"{name}.mlp.fc2", F.gelu(z, approximate="tanh"))
    shift, scale = (weights["final_layer.scale_shift_table"] + t[:, None])[:, :, None].unbind(1)
    x = linear("final_layer.linear", norm(x) * (1 + scale) + shift)
    return rearrange(x, "T (H W) (p q C) -> C T (H p) (W q)", H=H, W=W, p=2, q=2)


@pytest.mark.parametrize("shape", [(3, 2, 5), (1, 2, 2)], ids=["video", "image"])
def test_the_model_is_open_soras_formula(shape: Shape) -> None:
    model, item = small_model(), make_item(shape, 5, 1, given=1)
    null = torch.randn(300, 24)
    theirs = interop.to_open_sora(model.state_dict(), SMALL, null)
    assert theirs["spatial_blocks.1.attn.qkv.weight"].shape == (144, 48)
    T, H, W = shape
    video = rearrange(item.patches, "(T H W) (p q C) -> C T (H p) (W q)", T=T, H=H, W=W, p=2, q=2)
    with torch.no_grad():
        expected = open_sora(theirs, video, item.text, (0.0, 300.0), 16.0)
        found = model(pack([item]))
    expected = rearrange(expected, "(part C) T (H p) (W q) -> (T H W) (part p q C)", part=2, p=2, q=2)
    assert expected.std() > 1e-2, "nothing to compare"
    assert distance(found, expected) <= 1e-5
    ours, caption = interop.from_open_sora(theirs, SMALL)
    assert torch.equal(caption, null)
    assert ours.keys() == model.state_dict().keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())


@BOTH
def test_closed_form_counts_what_torch_counts(config: STDiTConfig) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, row = small_model(config), pack([make_item((3, 2, 2), 7, 0)])
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(row)
    assert counter.get_total_flops() == 2 * forward_macs(config, (3, 2, 2), 7)


def test_frames_do_not_see_each_other_at_first() -> None:
    """Temporal blocks start as the identity, and the frame rate without effect."""
    model, item = small_model(noise=0.0), make_item((3, 2, 2), 5, 0)
    row = pack([item])
    before = model(row)
    changed = item.patches.clone()
    changed[8:] += 1.0  # the last frame
    after = model(pack([replace(item, patches=changed)]))
    assert torch.equal(before[:8], after[:8])
    assert not torch.allclose(before[8:], after[8:], atol=1e-2)
    assert torch.equal(before, model(pack([replace(item, fps=120.0)])))
    assert before.std() > 1e-2, "Open-Sora's head starts at Xavier, not at zero"


def test_initial_statistics_are_open_soras() -> None:
    weights = small_model(replace(SMALL, width=192, ffn=768), noise=0.0).state_dict()
    assert weights["blocks.0.space.modulation"].std().item() == pytest.approx(192**-0.5, rel=0.1)
    assert weights["head.modulation"].std().item() == pytest.approx(192**-0.5, rel=0.1)
    assert weights["fps_embed.0.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    bound = 16**-0.5  # torch's own convolution of 16 values: uniform, the bias too
    for name in ("patch_embed.weight", "patch_embed.bias"):
        assert 0.9 * bound < weights[name].abs().max() <= bound, name
    bound = (6 / (192 + 768)) ** 0.5  # Xavier
    assert 0.99 * bound < weights["blocks.1.space.mlp.0.weight"].abs().max() <= bound
    zero = {name for name, tensor in weights.items() if name.endswith("weight") and not tensor.any()}
    parts = ("self_attention.out", "cross_attention.out", "mlp.2")
    assert zero == {"fps_embed.2.weight"} | {f"blocks.{i}.time.{part}.weight" for i in range(2) for part in parts}


@pytest.mark.parametrize(
    "change",
    [{"ffn": 0}, {"text_width": 0}, {"base_size": 0}, {"width": 50, "heads": 5}, {"width": 60, "heads": 4}],
)
def test_bad_numbers_are_refused_by_name(change: dict[str, int]) -> None:
    name = "heads" if change.get("width") == 60 else next(iter(change))
    with pytest.raises(ValueError, match=f"^{name}={change[name]}: [^\n]*$"):
        replace(SMALL, **change)
