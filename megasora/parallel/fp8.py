"""Matrix products in fp8. Which layers, by which recipe, and what of it a checkpoint must hold.

`tensor` and `row` scale by the tensor or row at hand (torchao: current scaling; Micikevicius et al. 2022), `block` by
groups of 128 (DeepSeek-V3 2024) through the kernels beside this package. `delayed` (scales from the largest values of the
steps before) and `te_block` are TransformerEngine's. On a CPU all but those run, emulated: the same rounding, none of the
speed. Of them `tensor` and `block` have run on a GPU, a few steps.

In higher precision stay what enters and leaves the model, modulations and timesteps, norms, and attention itself: only
linear layers of blocks are taken, whose sizes are multiples of 16. The master weights, their gradients' reduction and the
optimizer are untouched.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megasora_kernels.fp8_linear import fp8_linear
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from megasora.errors import ConfigError
from megasora.models.flash import lacks
from megasora.models.layers import Modulation
from megasora.parallel.tensor import ColumnLinear, Product, RowLinear

FP8 = Literal["none", "tensor", "row", "block", "delayed", "te_block"]
TORCHAO = {"tensor": "tensorwise", "row": "rowwise"}  # its names
TE = ("delayed", "te_block")
AMAX_HISTORY = 16  # steps
MULTIPLE = 16  # of both sizes of a weight, and of the tokens (`in_sixteens`)


class Fp8Linear(nn.Linear):
    """A linear layer whose product is by another function."""

    product: Product

    @classmethod
    def of(cls, layer: nn.Linear, product: Product) -> "Fp8Linear":
        with torch.device("meta"):
            new = cls(layer.in_features, layer.out_features, bias=False)
        new.weight, new.bias, new.product = layer.weight, layer.bias, product
        return new

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)


def check_fp8(recipe: FP8, cuda_capability: int | None, recompute: str = "none") -> None:
    """Raises ConfigError where the recipe cannot run on this machine's device (compute capability, tens and ones; None: a
    CPU), or not with that parallel.recompute."""
    if recipe in TE and recompute != "none":  # what is computed again would be outside `fp8_context`
        raise ConfigError(
            f"parallel.recompute={recompute}: with precision.fp8={recipe} use none, or fp8=tensor or block"
        )
    if recipe in TORCHAO and lacks("torchao.float8"):
        raise ConfigError(
            f"precision.fp8={recipe}: torchao is not installed: pip install 'megasora[fp8]', or use block"
        )
    if recipe in TE and lacks("transformer_engine.pytorch"):
        nearest = "tensor" if recipe == "delayed" else "block"
        raise ConfigError(
            f"precision.fp8={recipe}: transformer_engine.pytorch is not installed: pip install 'megasora[gpu]', or use {nearest}"
        )
    if recipe != "none" and cuda_capability is not None and cuda_capability < 89:
        raise ConfigError(
            f"precision.fp8={recipe}: this GPU has no fp8 (compute capability {cuda_capability / 10}): use none"
        )


def fp8_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear | ColumnLinear | RowLinear]]:
    """The layers that are taken, by name. Raises ConfigError when there is none."""
    found = False
    for name, module in list(model.named_modules()):
        if not re.search(r"(^|\.)blocks\.\d+\.", name) or isinstance(module, Modulation):
            continue
        if isinstance(module, nn.Linear | ColumnLinear | RowLinear) and not any(
            n % MULTIPLE for n in module.weight.shape
        ):
            found = True
            yield name, module
    if not found:
        raise ConfigError(f"precision.fp8: no layer of the blocks has sizes that are multiples of {MULTIPLE}")


def to_fp8(model: nn.Module, recipe: FP8, gather_on: torch.device | None = None) -> None:
    """Turns the products of the model's blocks, in place; before the weights are sharded and after they are split.

    With `gather_on` FSDP2 gathers the weights as fp8 (tensor only), half the bytes of bf16, on that device: the model may still
    be on meta.
    """
    if recipe == "none":
        return
    layers = list(fp8_layers(model))
    if recipe in TE:
        for name, layer in layers:
            replace_layer(model, name, te_linear(layer))
        return
    product = product_of(recipe)
    for name, layer in layers:
        if isinstance(layer, ColumnLinear | RowLinear):
            layer.product = product
            continue
        new = Fp8Linear.of(layer, product)
        if gather_on is not None:
            new.weight = gathered_as_fp8(new.weight, gather_on)
        replace_layer(model, name, new)


def replace_layer(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


def working_type(x: Tensor) -> torch.dtype:
    """What F.linear would compute in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def torchao_product(recipe: FP8) -> Product:
    """By torchao's own function, which Float8Linear calls too; that class asks for autocast on CUDA only."""
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    # Made here: torch.compile would cut its graphs where they are made.
    for_cpus, for_gpus = (torchao_config(recipe, emulate) for emulate in (True, False))

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        config, products = for_cpus if x.device.type == "cpu" else for_gpus
        dtype = working_type(x)
        with torch.autocast(x.device.type, enabled=False):
            w = weight if type(weight).__name__ == "Float8TrainingTensor" else weight.to(dtype)
            y: Tensor = matmul_with_hp_or_float8_args.apply(x.to(dtype), w.t(), products, config)
            return y if bias is None else y + bias.to(dtype)

    return product


def torchao_config(recipe: FP8, emulate: bool) -> tuple[Any, Any]:
    """torchao's config of a recipe and of its three products."""
    from torchao.float8.config import Float8LinearConfig
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    config = replace(Float8LinearConfig.from_recipe_name(TORCHAO[recipe]), emulate=emulate)
    gemms = (config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight)
    products = LinearMMConfig(*(ScaledMMConfig(emulate, gemm.use_fast_accum, False, False) for gemm in gemms))
    return config, products


def block_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By our kernels."""
    dtype = working_type(x)
    with torch.autocast(x.device.type, enabled=False):
        return fp8_linear(x.to(dtype), weight, bias)


def in_sixteens(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Takes any number of tokens: captions come as they are, and fp8 products want multiples. Rows of zeros change no scale."""

    def padded(x: Tensor, *rest: Tensor | None) -> Tensor:
        tokens = x.shape[0]
        if statically_known_true(tokens % MULTIPLE == 0):
            return product(x, *rest)
        # A graph for any number of words always pads, by nothing too.
        return product(F.pad(x, (0, 0, 0, -tokens % MULTIPLE)), *rest)[:tokens]

    return padded


def product_of(recipe: FP8) -> Product:
    """The function of (x [L, D], weight [N, D], bias [N] or None) -> [L, N] for any L."""
    return in_sixteens(block_product if recipe == "block" else torchao_product(recipe))


def gathered_as_fp8(weight: Tensor, device: torch.device) -> nn.Parameter:
    """The weight as a tensor that FSDP2 gathers in fp8, scaled by the largest value over all shards."""
    from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

    _, products = torchao_config("tensor", emulate=device.type == "cpu")
    return nn.Parameter(WeightWithDynamicFloat8CastTensor(weight.detach(), products, torch.float8_e4m3fn))


# TransformerEngine


def te_recipe(recipe: FP8) -> Any:
    """TransformerEngine's recipe: its defaults, but a shorter history."""
    from transformer_engine.common.recipe import DelayedScaling, Float8BlockScaling, Format

    if recipe == "delayed":
        return DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=AMAX_HISTORY, amax_compute_algo="max")
    return Float8BlockScaling()


def te_linear(layer: nn.Module) -> nn.Module:
    """TransformerEngine's layer with the same parameters."""
    from transformer_engine.pytorch import Linear

    if not isinstance(layer, nn.Linear):
        raise ConfigError(
            "precision.fp8: TransformerEngine's recipes do not go with split layers here: use tensor, row or block"
        )
    new = Linear(
        in_features=layer.in_features, out_features=layer.out_features, bias=layer.bias is not None,
        params_dtype=layer.weight.dtype, device="meta",
    )  # fmt: skip
    new.weight = layer.weight
    if layer.bias is not None:
        new.bias = layer.bias
    new.forward = in_sixteens(new.forward)
    return new


def fp8_context(recipe: FP8) -> AbstractContextManager[Any]:
    """What forward passes run in."""
    if recipe not in TE:
        return nullcontext()
    from transformer_engine.pytorch import autocast

    return autocast(enabled=True, recipe=te_recipe(recipe))


def fp8_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint must hold beside the weights, by name: delayed scaling's histories and scales. Views of the live
    state, which begins with the first forward pass: a run that resumes loads none and begins its histories anew."""
    found = {}
    for name, module in model.named_modules():
        meta: dict[str, Any] = getattr(module, "fp8_meta", {})  # TransformerEngine's modules have one
        for direction in ("scaling_fwd", "scaling_bwd"):
            for kind in ("amax_history", "scale"):
                if direction in meta and hasattr(meta[direction], kind):
                    found[f"fp8/{name}/{direction}/{kind}"] = getattr(meta[direction], kind)
    return found


# How fast it could be


def fp8_share(model: nn.Module, forward: Callable[[], Any], macs: float) -> float:
    """The share of a forward pass's multiply-adds that is in fp8: counted while `forward` runs, over the closed form `macs`."""
    counted = 0

    def count(module: Any, given: tuple[Any, ...], result: Tensor) -> None:
        nonlocal counted
        counted += result[..., 0].numel() * module.get_parameter("weight").numel()

    handles = [layer.register_forward_hook(count) for _, layer in fp8_layers(model)]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return counted / macs


def mixed_peak(share: float, fp8_peak: float, peak: float) -> float:
    """FLOP/s at best of a step of which `share` is in fp8: MFU is over this, the fp8 part over its own peak."""
    return 1 / (share / fp8_peak + (1 - share) / peak)
