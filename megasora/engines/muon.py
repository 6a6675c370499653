"""Muon (Jordan et al. 2024): momentum whose matrices are orthogonalised, so that every direction moves as far.

torch.optim.Muon has the same rule; on a sharded matrix its every product becomes a collective. Here a matrix is gathered
once, orthogonalised whole by each rank, and each keeps its shard.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that Jordan found, steep at zero
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """For matrices only, sharded or whole. The update has AdamW's size (0.2 · sqrt of the longer side, Liu et al. 2025,
    section 2.2), so one learning rate serves both."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
                direction = gradient.lerp(momentum, group["momentum"])  # Nesterov's
                update = sharded_like(parameter, orthogonalise(whole(direction)))
                size = 0.2 * max(parameter.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * size)


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest matrix with singular values of about one (0.7 to 1.2), by Newton-Schulz. bf16 on GPUs, fp32 on a CPU."""
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
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
