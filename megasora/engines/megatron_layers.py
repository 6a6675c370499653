"""The plan that DTensor layers are made from, realised with megatron-core's: Column- and RowParallelLinear, with its sequence
parallelism and its asynchronous all-reduce of gradients. Imported only where megatron-core is there.

Two rules for gradients, megatron-core's own. With sequence parallelism, of what is not split every rank has a part of a sum over
the tensor group. Without, every rank has all of it, but of what sees its rank's heads alone ("heads" in the plan).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from megasora.engines.fragments import Split
from megasora.models.layers import RMSNorm
from megasora.parallel.mesh import Processes
from megasora.parallel.tensor import SplitRMSNorm, Style


def lowered(product: Callable[..., Tensor], x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """megatron-core's product in the precision of the autocast around it. It knows autocast on CUDA alone, and would gather in
    the precision of what comes."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
        if options.get("bias") is not None:
            options["bias"] = options["bias"].to(dtype)
    with torch.autocast(kind, enabled=False):
        return product(input=x, weight=weight, **options)


class Column(ColumnParallelLinear):
    """[L/tp, D], or tokens that every rank has anyway -> [L, outputs/tp]."""

    # No extra state: a `None` in its place would be a tensor to DeepSpeed's converter.
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def _forward_impl(self, input: Tensor, weight: Tensor, *_: Any, **options: Any) -> Tensor:
        return lowered(super()._forward_impl, input, weight, **options)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)[0]
        return y


class Row(RowParallelLinear):
    """[L, inputs/tp] -> [L/tp, D], or all tokens without sequence parallelism."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def _forward_impl(self, input: Tensor, weight: Tensor, *_: Any, **options: Any) -> Tensor:
        return lowered(super()._forward_impl, input, weight, **options)

    def forward(self, x: Tensor) -> Tensor:
        y, bias = super().forward(x)  # the bias comes back: added there, it would make fp32 of bf16
        found: Tensor = y if bias is None else y + bias.type_as(y)
        return found


@dataclass
class Applied:
    """What of a model's parameters is split, and of which others each rank of the tensor group has a part of the gradient."""

    splits: dict[str, Split] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)


def apply_plan(model: nn.Module, plan: list[tuple[str, Style]], processes: Processes) -> Applied:
    """Replaces the layers that match the plan's patterns; the model is on the meta device."""
    mesh, sequence = processes.mesh["tp"], processes.layout.sequence_parallel
    part, parts = mesh.get_local_rank(), mesh.size()
    config = {
        kind: ModelParallelConfig(
            tensor_model_parallel_size=parts, sequence_parallel=kind, use_cpu_initialization=True,
            perform_initialization=False, params_dtype=torch.float32,
        )
        for kind in {sequence, False}
    }  # fmt: skip
    column, row = layer_classes()
    applied, of_heads = Applied(), set[str]()
    for name, module in list(model.named_modules()):
        style = next((style for pattern, style in plan if re.fullmatch(pattern, name)), None)
        if style is None:
            continue
        dim = {"row": 1}.get(style, 0)
        new: nn.Module
        if style == "heads":
            of_heads |= {f"{name}.{leaf}" for leaf, _ in module.named_parameters()}
            continue
        if style == "norm":
            assert isinstance(module, RMSNorm)
            new = SplitRMSNorm(module, mesh)
            new.weight = nn.Parameter(module.weight.new_empty(len(module.weight) // parts))
        else:
            assert isinstance(module, nn.Linear)
            sizes, bias = (module.in_features, module.out_features), module.bias is not None
            options: dict[str, Any] = {"bias": bias, "init_method": None, "skip_bias_add": style == "row"}
            with torch.device("meta"):
                if style == "row":
                    new = row(*sizes, config=config[sequence], input_is_parallel=True, **options)
                elif style == "column_whole" and sequence:  # its tokens are whole, and so is the rule for gradients
                    new = Column(*sizes, config=config[False], gather_output=False, disable_grad_reduce=True, **options)
                else:
                    new = column(*sizes, config=config[sequence], gather_output=False, **options)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new)
        split = [leaf for leaf, _ in new.named_parameters() if not (style == "row" and leaf == "bias")]
        applied.splits |= {f"{name}.{leaf}": Split(dim, part, parts) for leaf in split}
    others = {name for name, _ in model.named_parameters()} - applied.splits.keys()
    applied.partial = others if sequence else others & of_heads
    return applied


def layer_classes() -> tuple[Any, Any]:
    """TransformerEngine's variants where it is there (never run: they need a GPU), else megatron-core's own."""
    if find_spec("transformer_engine") is None:
        return Column, Row
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    class TEColumn(TEColumnParallelLinear):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x)[0]
            return y

    class TERow(TERowParallelLinear):
        def forward(self, x: Tensor) -> Tensor:
            y, bias = super().forward(x)
            found: Tensor = y if bias is None else y + bias.type_as(y)
            return found

    return TEColumn, TERow


def mark_splits(model: nn.Module, splits: dict[str, Split]) -> None:
    """Gives split parameters the attributes by which DeepSpeed and megatron-core know them."""
    for name, split in splits.items():
        parameter: Any = model.get_parameter(name)
        parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, split.dim, 1


def check_marks(model: nn.Module, whole: dict[str, torch.Size]) -> None:
    """Raises RuntimeError where a parameter that is split is not marked, or one that is whole is: DeepSpeed would count its
    gradient too seldom or too often in the norm, and clip by that, without a word. `whole`: the shapes before the split."""
    for name, parameter in model.named_parameters():
        split, marked = parameter.shape != whole[name], getattr(parameter, "tensor_model_parallel", False)
        if split != marked:
            raise RuntimeError(f"{name} is {'split' if split else 'whole'}, but tensor_model_parallel={marked}")
