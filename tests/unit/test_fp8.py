"""FP8 training against bf16 with the same samples, noise and timesteps: gradients, losses, which layers,
TransformerEngine's recipes."""

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megasora.engines.torch_native import EngineConfig
from megasora.errors import ConfigError
from megasora.models.families import PRESETS, build_model
from megasora.models.flops import forward_macs
from megasora.models.packing import Item, pack
from megasora.models.video_dit import VideoDiTConfig
from megasora.parallel import fp8

CONFIG = VideoDiTConfig(width=64, depth=2, heads=2, ffn=128, channels=4, text_width=32)
RECIPES = pytest.mark.parametrize("recipe", ["tensor", "row", "block"])


def build(config: VideoDiTConfig = CONFIG) -> Any:
    """A model with nothing at zero: adaLN-zero would make most gradients vanish."""
    torch.manual_seed(0)
    model = build_model(config)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


def loss(model: nn.Module, step: int, samples: int = 4, part: tuple[int, int, int] = (0, 1, 1)) -> Tensor:
    """Rectified flow on smooth random videos of [4, 2, 8, 8], drawn from the step alone, in bf16 autocast.

    Of a `part` of the row (PackedRow.part) it is a part of the sum.
    """
    generator = torch.Generator().manual_seed(step)
    items, targets = [], []
    for _ in range(samples):
        text = torch.randn(16, 32, generator=generator)
        phase = text[:4, :3].softmax(-1) @ torch.tensor([[0.5, 1.0], [1.0, 0.5], [1.0, 1.0]])  # what the caption says
        y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        video = torch.stack([torch.sin(a * y + b * x) for a, b in phase.tolist()])  # [4, 8, 8]
        video = video[:, None].expand(4, 2, 8, 8)
        noise = torch.randn(video.shape, generator=generator)
        t = torch.rand((), generator=generator)
        noisy = (1 - t) * video + t * noise
        patches = noisy.unfold(2, 2, 2).unfold(3, 2, 2).permute(1, 2, 3, 4, 5, 0).reshape(32, 16)
        target = (noise - video).unfold(2, 2, 2).unfold(3, 2, 2).permute(1, 2, 3, 4, 5, 0).reshape(32, 16)
        items.append(Item(patches, (2, 4, 4), t.expand(2), text, torch.zeros(0)))
        targets.append(target)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = model(pack(items).part(*part) if part[1] > 1 else pack(items))
    target = torch.cat(targets)  # [L, P]
    mine = target.tensor_split(part[1])[part[0]]
    return (predicted.float() - mine).square().sum() / target.numel()


def gradients(recipe: fp8.FP8, model: Any = None) -> dict[str, Tensor]:
    model = model or build()
    fp8.to_fp8(model, recipe)
    loss(model, 0).backward()
    return {name: p.grad.flatten() for name, p in model.named_parameters()}


def cosines(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: F.cosine_similarity(found[name], expected[name], 0).item() for name in expected if name.endswith("weight")
    }


@RECIPES
def test_every_weights_gradient_points_where_bf16s_does(recipe: fp8.FP8) -> None:
    found = cosines(gradients(recipe), gradients("none"))
    assert len(found) > 30
    assert min(found.values()) >= 0.99, min(found.items(), key=lambda item: item[1])
    assert min(found.values()) < 1  # fp8 was used


class _Unscaled(torch.autograd.Function):
    """A linear layer whose incoming gradient is cast to e4m3 as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grads[0].float().clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)
        return grad @ weight, grad.T @ x


def unscaled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = fp8.working_type(x)
    y: Tensor = _Unscaled.apply(x.to(dtype), weight.to(dtype))
    return y if bias is None else y + bias.to(dtype)


def test_unscaled_gradients_are_caught() -> None:
    with mock.patch.object(fp8, "product_of", return_value=unscaled):
        found = cosines(gradients("tensor"), gradients("none"))
    assert min(found.values()) < 0.9


def train(recipe: fp8.FP8, steps: int = 300, product: Callable[..., Tensor] | None = None) -> float:
    """The mean loss of 16 batches that it did not see, after so many steps."""
    model = build()
    with mock.patch.object(fp8, "product_of", fp8.product_of if product is None else lambda _: product):
        fp8.to_fp8(model, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-4 * (1 - step / steps)  # ends at rest, not in the noise of its last steps
        loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return sum(loss(model, 10_000 + batch).item() for batch in range(16)) / 16


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_losses_after_300_steps() -> None:
    """Each recipe's within 0.3 % of bf16's; gradients that are not scaled go elsewhere."""
    bf16 = train("none")
    found = {recipe: train(recipe) / bf16 - 1 for recipe in ("tensor", "row", "block")}  # type: ignore[arg-type]
    print(bf16, found)
    assert max(map(abs, found.values())) < 0.003, found
    assert abs(train("tensor", product=unscaled) / bf16 - 1) > 0.003


# Which layers


def test_first_last_and_conditioning_layers_stay() -> None:
    for name in ("MegaSora-demo", "MegaSora-MMDiT-demo"):
        with torch.device("meta"):
            model = build_model(PRESETS[name])
        taken = dict(fp8.fp8_layers(model))
        kept = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - set(taken)
        assert all(n.startswith("blocks.") for n in taken)
        assert not any("modulation" in n or "norm" in n for n in taken)
        assert all("modulation" in n or not n.startswith("blocks.") for n in kept)
        assert any(n.endswith("mlp.0") for n in taken)


def test_the_share_in_fp8_is_counted() -> None:
    """Of the closed form without attention's products and what stays."""
    model, tokens, text = build(), 128, 64
    fp8.to_fp8(model, "tensor")
    D, ffn = CONFIG.width, CONFIG.ffn
    macs = 4 * forward_macs(CONFIG, (2, 4, 4), 16)
    share = fp8.fp8_share(model, partial(loss, model, 0), macs)
    assert share * macs == CONFIG.depth * (tokens * (6 * D * D + 2 * D * ffn) + text * 2 * D * D)
    assert fp8.mixed_peak(0.5, 2.0, 1.0) == pytest.approx(4 / 3)


def test_recipes_that_cannot_run_are_one_line() -> None:
    fp8.check_fp8("tensor", None)
    with pytest.raises(ConfigError, match="no fp8"):
        fp8.check_fp8("tensor", 80)
    with pytest.raises(ConfigError, match=r"transformer_engine\.pytorch is not installed"):
        fp8.check_fp8("delayed", 90)
    with (
        mock.patch.object(fp8, "lacks", return_value="torchao.float8"),
        pytest.raises(ConfigError, match="or use block"),
    ):
        fp8.check_fp8("row", 90)
    with pytest.raises(ConfigError, match=r"^parallel\.recompute=full: with precision\.fp8=te_block use none"):
        fp8.check_fp8("te_block", 90, "full")
    with pytest.raises(ConfigError, match="multiples of 16"):
        list(fp8.fp8_layers(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=r"fp8_gather=true: .* with precision\.fp8=tensor, not row"):
        EngineConfig(precision="bf16", fp8="row", fp8_gather=True)


@RECIPES
def test_recomputation_gives_the_same_bits(recipe: fp8.FP8) -> None:
    model = build()
    fp8.to_fp8(model, recipe)
    loss(model, 0).backward()
    first = [p.grad for p in model.parameters()]
    model.zero_grad()
    for block in model.blocks:
        block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
    loss(model, 0).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(first, model.parameters(), strict=True))


# TransformerEngine


class FakeMeta:
    def __init__(self) -> None:
        self.amax_history, self.scale = torch.zeros(16, 3), torch.ones(3)


def test_transformer_engines_layers_take_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that is as strict about rows as its `Linear` is."""

    class Strict(nn.Linear):
        def __init__(self, params_dtype: torch.dtype, **sizes: Any) -> None:
            super().__init__(dtype=params_dtype, **sizes)

        def forward(self, x: Tensor) -> Tensor:
            assert len(x) % 8 == 0
            return super().forward(x)

    library = ModuleType("transformer_engine.pytorch")
    library.Linear = Strict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", library)
    layer, x = nn.Linear(32, 48), torch.randn(13, 32)
    torch.testing.assert_close(fp8.te_linear(layer)(x), layer(x))


def test_delayed_scalings_state_is_named_and_live() -> None:
    """Of modules that carry it as TransformerEngine's do (its source is held to that in test_libraries.py)."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].fp8_meta = {"scaling_fwd": FakeMeta(), "scaling_bwd": FakeMeta(), "recipe": None}
    state = fp8.fp8_tensors(model)
    assert sorted(state) == sorted(
        f"fp8/1/{direction}/{kind}"
        for direction in ("scaling_fwd", "scaling_bwd")
        for kind in ("amax_history", "scale")
    )
    state["fp8/1/scaling_fwd/scale"].fill_(7)
    assert model[1].fp8_meta["scaling_fwd"].scale[0] == 7


@RECIPES
def test_any_number_of_tokens(recipe: fp8.FP8) -> None:
    """A caption of 13 tokens gives what it gives among 16, the others being zero; gradients too."""
    torch.manual_seed(0)
    weight, bias = torch.randn(32, 48, requires_grad=True), torch.randn(32, requires_grad=True)
    x = torch.randn(13, 48)
    found = []
    for given in (x, F.pad(x, (0, 0, 0, 3))):
        with torch.autocast("cpu", torch.bfloat16):
            y = fp8.product_of(recipe)(given, weight, bias)[:13]
        found.append((y, torch.autograd.grad(y.float().square().sum(), (weight, bias))))
    assert torch.equal(found[0][0], found[1][0])
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("tokens", [77, 48])
def test_block_products_compiled_for_a_cpu(tokens: int) -> None:
    """Inductor's own code for the references computed something else, or could not be made."""
    torch.manual_seed(0)
    x, grad = torch.randn(tokens, 192).bfloat16(), torch.randn(tokens, 320).bfloat16()
    leaves = [x, torch.randn(320, 192), torch.randn(320)]
    found = []
    for function in (fp8.product_of("block"), torch.compile(fp8.product_of("block"), fullgraph=True)):
        given = [t.clone().requires_grad_() for t in leaves]
        y = function(*given)
        found.append([y, *torch.autograd.grad(y, given, grad)])
    for plain, compiled in zip(*found, strict=True):
        assert (compiled - plain).float().norm() < 3e-3 * plain.float().norm()  # the bias is added before rounding
