"""Muon (Jordan et al. 2024): momentum whose matrices are orthogonalised, so that every direction moves as far.

torch.optim.Muon has the same rule; on a sharded matrix its every product becomes a collective. Here the ranks that hold the
same matrices share the work: a matrix is gathered once, orthogonalised whole by one of them and handed round, and each keeps
its shard.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megasora.parallel.zero import local

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that Jordan found, steep at zero
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """For matrices only, sharded or whole. The update has AdamW's size (0.2 · sqrt of the longer side, Liu et al. 2025,
    section 2.2), so one learning rate serves both.

    group: the ranks that hold the same matrices, or shards of them, in the same order; none: this process alone.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        lr: float,
        momentum: float,
        weight_decay: float,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.group = group
        self.squares: dict[Tensor, Tensor] = {}  # of what the last step added to this rank's share of each parameter

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        ranks = 1 if self.group is None else self.group.size()
        for group in self.param_groups:
            # So that those of a round cost alike.
            costly_first = sorted(group["params"], key=lambda p: -p.numel() * min(p.shape))
            for begin in range(0, len(costly_first), ranks):
                parameters = costly_first[begin : begin + ranks]
                for parameter, update in zip(parameters, self._updates(parameters, group["momentum"]), strict=True):
                    size, decay = 0.2 * max(parameter.shape) ** 0.5 * group["lr"], group["lr"] * group["weight_decay"]
                    weights, mine = local(parameter), local(sharded_like(parameter, update))
                    self.squares[parameter] = torch.add(decay * weights, mine, alpha=size).square().sum()
                    weights.mul_(1 - decay).add_(mine, alpha=-size)

    def _updates(self, parameters: list[nn.Parameter], momentum: float) -> Iterator[Tensor]:
        """The orthogonalised directions of as many matrices as there are ranks, each the work of one of them."""
        here = 0 if self.group is None else self.group.rank()
        mine = None
        for number, parameter in enumerate(parameters):
            direction = whole(self._direction(parameter, momentum))
            mine = direction if number == here else mine
        mine = None if mine is None else orthogonalise(mine).contiguous()
        for number, parameter in enumerate(parameters):
            update = mine if number == here else local(parameter).new_empty(parameter.shape)
            assert update is not None
            if self.group is not None:
                dist.broadcast(update, group=self.group, group_src=number)
            yield update

    def _direction(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov's momentum, sharded as the parameter."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum)


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest matrix with singular values of about one (0.7 to 1.2), by Newton-Schulz. bf16 on GPUs, fp32 on a CPU."""
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a·x + (b·gram + c·gram²)·x
    return (x.T if tall else x).to(matrix.dtype)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def nth_chunk(value: Tensor, number: int, parts: int, dim: int) -> Tensor:
    """What `value.chunk(parts, dim)[number]` is, empty where there are fewer; without the thousands of others."""
    size = -(-value.shape[dim] // parts)
    begin = min(number * size, value.shape[dim])
    return value.narrow(dim, begin, min(size, value.shape[dim] - begin))


def sharded_like(parameter: Tensor, value: Tensor) -> Tensor:
    """This rank's share of a whole value, as the parameter is sharded: over the tensor group first, as it was."""
    if not isinstance(parameter, DTensor):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    names, place = mesh.mesh_dim_names or (), list(mesh.get_coordinate() or ())
    shape, stride = value.shape, value.stride()
    for axis in sorted(range(mesh.ndim), key=lambda axis: names[axis : axis + 1] != ("tp",)):
        if placements[axis].is_replicate():
            continue
        dim: int = placements[axis].dim  # type: ignore[attr-defined]
        value = nth_chunk(value, place[axis], mesh.size(axis), dim)
    return DTensor.from_local(value.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride)
