"""ZeRO (Rajbhandari et al. 2020): how parameters, gradients and the optimizer's state lie on the ranks that see different tokens.

zero0 replicates all. zero1 shards what the optimizer owns: gradients are reduce-scattered, each rank updates its rows of every
parameter, and gathers the others'. zero2 and zero3 are FSDP2, which shards parameters and gradients too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

BUCKET = 32 * 2**20  # numbers that travel together: 128 MiB in fp32


def shard_model(model: nn.Module, root: nn.Module, mesh: DeviceMesh, keep: bool, lower: bool) -> None:
    """FSDP2 around each block of the model and around the rest of `root`, which is what will be called.

    `keep` (zero2) leaves a block's weights gathered from its first forward pass of a step to its last backward pass; zero3 lets
    them go, and gathers the next block's while one computes. `lower` hands blocks bf16 weights; gradients are reduced in fp32 in
    any case.
    """
    policy = MixedPrecisionPolicy()
    if lower:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = list(model.get_submodule("blocks").children())
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep)
    fully_shard(root, mesh=mesh, reshard_after_forward=not keep)
    if not keep:
        for block, following in pairwise(blocks):
            block.set_modules_to_forward_prefetch([following])  # type: ignore[operator]


@dataclass(frozen=True)
class Rows:
    """Which rows of a parameter are whose: `size` each, the last ranks having fewer or none, as DTensor's Shard(0) has it."""

    total: int
    size: int
    index: int

    def of(self, tensor: Tensor, index: int | None = None) -> Tensor:
        """A rank's rows, by default this one's: a view."""
        begin = min(self.total, self.size * (self.index if index is None else index))
        return tensor[begin : min(self.total, begin + self.size)]


class OptimizerShards:
    """ZeRO-1 over the ranks of a mesh. `owned` are this rank's rows of each parameter, sharing its memory."""

    def __init__(self, parameters: dict[str, nn.Parameter], mesh: DeviceMesh) -> None:
        self.parameters, self.mesh = parameters, mesh
        ranks, index = mesh.size(), mesh.get_local_rank()
        self.rows = {
            name: Rows(len(local(p)), -(-len(local(p)) // ranks), index) for name, p in parameters.items()
        }  # fmt: skip
        self.owned = {
            name: nn.Parameter(self._as_dtensor(p, self.rows[name].of(local(p)))) for name, p in parameters.items()
        }

    def _as_dtensor(self, parameter: Tensor, rows: Tensor) -> DTensor:
        mesh, placements = self.mesh, list[Placement]([Shard(0)])
        if isinstance(parameter, DTensor):  # split over the tensor group first
            tensor, (placement,) = parameter.device_mesh, parameter.placements
            mesh = DeviceMesh._concatenate([mesh, tensor])
            inner = placement.is_shard(0)
            placements = [_StridedShard(0, split_factor=tensor.size()) if inner else Shard(0), placement]
        return DTensor.from_local(
            rows, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )

    @torch.no_grad()
    def reduce(self) -> None:
        """Sums each row's gradient where it is owned. The other rows of `grad` are left as they were: parts of a sum."""
        group, ranks = self.mesh.get_group(), self.mesh.size()
        for names in buckets({name: p for name, p in self.parameters.items() if p.grad is not None}):
            gradients = [local(self.parameters[name].grad) for name in names]
            parts = [[self._padded(name, g, i) for name, g in zip(names, gradients, strict=True)] for i in range(ranks)]
            flat = torch.cat([piece for part in parts for piece in part])
            summed = flat.new_empty(len(flat) // ranks)
            dist.reduce_scatter_tensor(summed, flat, group=group)
            pieces = summed.split([len(piece) for piece in parts[0]])
            for name, gradient, piece in zip(names, gradients, pieces, strict=True):
                mine = self.rows[name].of(gradient)
                mine.copy_(piece[: mine.numel()].view_as(mine))
                self.owned[name].grad = self._as_dtensor(self.parameters[name], mine)

    @torch.no_grad()
    def gather(self) -> None:
        """Brings the rows that others have updated."""
        group, ranks = self.mesh.get_group(), self.mesh.size()
        for names in buckets(self.parameters):
            whole = [local(self.parameters[name]) for name in names]
            mine = [
                self._padded(name, tensor, self.rows[name].index) for name, tensor in zip(names, whole, strict=True)
            ]
            flat = torch.cat(mine)
            found = flat.new_empty(ranks * len(flat))
            dist.all_gather_into_tensor(found, flat, group=group)
            for index, part in enumerate(found.chunk(ranks)):
                for name, tensor, piece in zip(names, whole, part.split([len(m) for m in mine]), strict=True):
                    rows = self.rows[name].of(tensor, index)
                    rows.copy_(piece[: rows.numel()].view_as(rows))

    def _padded(self, name: str, tensor: Tensor, index: int) -> Tensor:
        """A rank's rows, flat, as many numbers for every rank."""
        rows = self.rows[name]
        flat = rows.of(tensor, index).flatten()
        missing = rows.size * tensor[:1].numel() - len(flat)
        return nn.functional.pad(flat, (0, missing)) if missing else flat  # without a copy where nothing is missing


def buckets(parameters: dict[str, nn.Parameter]) -> Iterator[list[str]]:
    """Names of parameters that travel together, of one type, `BUCKET` numbers at most (or a single larger one)."""
    names, numbers = list[str](), 0
    for name, parameter in parameters.items():
        size = local(parameter).numel()
        if names and numbers + size > BUCKET:
            yield names
            names, numbers = [], 0
        names.append(name)
        numbers += size
    if names:
        yield names


def all_reduce_together(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sums tensors over a group, in place, some as one."""
    while tensors:
        count, numbers = 1, tensors[0].numel()
        while count < len(tensors) and numbers + tensors[count].numel() <= BUCKET:
            numbers += tensors[count].numel()
            count += 1
        some, tensors = tensors[:count], tensors[count:]
        flat = torch.cat([tensor.flatten() for tensor in some])
        dist.all_reduce(flat, group=group)
        pieces = flat.split([t.numel() for t in some])
        torch._foreach_copy_(list(some), [piece.view_as(t) for piece, t in zip(pieces, some, strict=True)])


def local(tensor: Tensor | None) -> Tensor:
    """This rank's part of a tensor that may be sharded; shares its memory, outside autograd."""
    assert tensor is not None
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
