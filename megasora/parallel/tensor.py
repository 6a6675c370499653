"""Tensor parallelism with sequence parallelism: the ranks of a group split the matrices of a block, and between them the tokens.

A column layer gathers the group's tokens and gives its share of the outputs; a row layer takes its share of the inputs and sums
over the group, each rank keeping its own tokens (Narayanan et al. 2021; Korthikanti et al. 2022, section 4.2). Whatever is not
split sees only its own tokens, so its gradients are parts of a sum over the group.

Without sequence parallelism every rank keeps all tokens. The ranks' losses then count a share each, and every collective has its
exact adjoint: so gradients of what is not split are parts of a sum all the same, whatever it has seen.
"""

import re
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from megasora_kernels.qknorm_rope import qknorm_rope
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from megasora.models.layers import RMSNorm

Style = Literal["column", "column_whole", "row", "norm", "heads"]
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # F.linear, or another that stands for it


class Gather:
    """[L/tp, D] -> [L, D], once for the `layers` that are given the same tensor, and let go after the last of them; backward sums
    and scatters."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.layers = mesh, 0
        self._held: tuple[Tensor, Tensor, int] | None = None  # what came, what it became, how many layers had it

    def __call__(self, x: Tensor) -> Tensor:
        if self._held is None or self._held[0] is not x:
            self._held = x, collectives.all_gather_single_autograd(x.contiguous(), 0, self.mesh.get_group()), 0
        _, whole, served = self._held
        self._held = (x, whole, served + 1) if served + 1 < self.layers else None
        return whole


class ColumnLinear(nn.Module):
    """A linear layer of which each rank has some outputs."""

    def __init__(self, whole: nn.Linear, mesh: DeviceMesh, gather: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gather = gather
        self.product: Product = F.linear
        self.weight = split(whole.weight, mesh, 0)
        self.bias = split(whole.bias, mesh, 0) if whole.bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """[L/tp, D], or whatever is gathered to [L, D] -> [L, outputs/tp]."""
        return self.product(self.gather(x), here(self.weight), None if self.bias is None else here(self.bias))


class RowLinear(nn.Module):
    """A linear layer of which each rank has some inputs."""

    def __init__(self, whole: nn.Linear, mesh: DeviceMesh, add_up: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.add_up = add_up
        self.product: Product = F.linear
        self.weight, self.bias = split(whole.weight, mesh, 1), whole.bias

    def forward(self, x: Tensor) -> Tensor:
        """[L, inputs/tp] -> what is left of [L, D] after adding up over the group: [L/tp, D], or all."""
        y = self.add_up(self.product(x, here(self.weight), None))
        return y if self.bias is None else y + self.bias.type_as(y)


class SplitRMSNorm(nn.Module):
    """RMS norm over a width of which each rank has its share."""

    def __init__(self, whole: RMSNorm, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh, self.eps, self.width = mesh, whole.eps, whole.weight.shape[0]
        self.weight = split(whole.weight, mesh, 0)

    def forward(self, x: Tensor) -> Tensor:
        """[L, D/tp] -> [L, D/tp]."""
        y = x.float()
        squares = y.square().sum(-1, keepdim=True)  # [L, 1]
        mean = AllReduce.apply(squares, self.mesh) / self.width  # [L, 1]
        return (y * torch.rsqrt(mean + self.eps) * here(self.weight).float()).type_as(x)

    def by_head(self, x: Tensor, head_width: int, rotation: Tensor | None) -> Tensor:
        """[L, D/tp] -> [L, N/tp, K], as of an RMSNorm."""
        return qknorm_rope(self(x), None, rotation, head_width)


class AllReduce(torch.autograd.Function):
    """The sum over the group, which every rank uses in its own way: so gradients are summed too."""

    @staticmethod
    def forward(ctx: object, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh  # type: ignore[attr-defined]
        return collectives.wait_tensor(collectives.all_reduce(x, "sum", mesh.get_group()))

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        mesh: DeviceMesh = ctx.mesh  # type: ignore[attr-defined]
        return collectives.wait_tensor(collectives.all_reduce(grads[0].contiguous(), "sum", mesh.get_group())), None


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[L/n, ...] -> [L, ...] of all n ranks, as much from each; outside autograd."""
    whole = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


def split(parameter: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(dim)], src_data_rank=None))


def here(parameter: Tensor) -> Tensor:
    """This rank's share, inside autograd."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def is_split(parameter: Tensor) -> bool:
    """Whether tensor parallelism has divided it."""
    names = parameter.device_mesh.mesh_dim_names if isinstance(parameter, DTensor) else None
    return names is not None and "tp" in names


def split_model(model: nn.Module, plan: list[tuple[str, Style]], mesh: DeviceMesh, sequence: bool = True) -> None:
    """Replaces the layers that match the plan's patterns; the first group of a pattern names those that share a gather. With
    `sequence`, tokens are split between the layers."""
    gathers: dict[str, Gather] = {}

    def add_up(y: Tensor) -> Tensor:
        if not sequence:
            return AllReduce.apply(y, mesh)
        return collectives.reduce_scatter_single_autograd(y.contiguous(), "sum", 0, mesh.get_group())

    for name, module in list(model.named_modules()):
        for pattern, style in plan:
            match = re.fullmatch(pattern, name)
            if match is None or style == "heads":  # whole, as everything that the plan does not name
                continue
            parent, _, last = name.rpartition(".")
            new: nn.Module
            if style == "norm":
                assert isinstance(module, RMSNorm)
                new = SplitRMSNorm(module, mesh)
            else:
                assert isinstance(module, nn.Linear)
                if style == "row":
                    new = RowLinear(module, mesh, add_up)
                else:
                    gather: Callable[[Tensor], Tensor] = as_it_is
                    if style == "column" and sequence:
                        gather = shared = gathers.setdefault(match[1], Gather(mesh))
                        shared.layers += 1
                    new = ColumnLinear(module, mesh, gather)
            setattr(model.get_submodule(parent), last, new)
            break


def as_it_is(x: Tensor) -> Tensor:
    """What all ranks have whole anyway, such as a caption."""
    return x
