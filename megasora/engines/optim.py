"""Optimizers and the learning rate: AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megasora.engines.fused import LIBRARIES, Fused, FusedAdamW, check_fused
from megasora.engines.muon import Muon
from megasora.parallel.zero import local


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """`lr` is the peak; a stage may have its own. Each stage warms up linearly and then follows the schedule. `sgd`, plain
    descent, is there to compare updates by: Adam hides a wrong scale."""

    name: Literal["adamw", "muon", "sgd"] = "adamw"
    fused: Fused = "torch"  # whose AdamW kernels: torch's own, apex's or TransformerEngine's (te), if installed
    lr: float = 1e-4  # the peak; a stage may have its own
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.95  # Muon's
    clip: float = 1.0  # global gradient norm; 0 does not clip
    warmup: int = 100  # steps, in every stage
    schedule: Literal["cosine", "constant"] = "cosine"
    final_lr: float = 0.1  # share of the peak that the cosine ends at
    ema: float = 0.999  # decay of the averaged weights; 0 keeps none

    def __post_init__(self) -> None:
        if self.name == "sgd" and self.fused != "torch":
            raise ValueError(f"fused={self.fused}: is of AdamW, name={self.name} has none")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr}: a positive number is expected")
        for name in ("warmup", "clip", "weight_decay", "final_lr"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: at least 0")
        for name, value in (
            ("betas.0", self.betas[0]),
            ("betas.1", self.betas[1]),
            ("momentum", self.momentum),
            ("ema", self.ema),
        ):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value}: from 0 to below 1")


def learning_rate(config: OptimConfig, peak: float, step: int, steps: int) -> float:
    """The rate of update `step` (from 0) of a stage of `steps` updates."""
    if step < config.warmup:
        return peak * (step + 1) / config.warmup
    if config.schedule == "constant":
        return peak
    progress = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    return peak * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2)


def mesh_of(parameter: Tensor) -> object:
    return parameter.device_mesh if isinstance(parameter, DTensor) else None


def build_optimizers(
    parameters: dict[str, nn.Parameter], config: OptimConfig, peers: dist.ProcessGroup | None = None
) -> list[torch.optim.Optimizer]:
    """Optimizers that together own every parameter once. Biases and norms do not decay; Muon takes the blocks' matrices, and
    shares its work among the `peers` that own the same."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in parameters.items():
        hidden = config.name == "muon" and parameter.ndim == 2 and ".weight" in name and "blocks." in name
        (matrices if hidden else others).append(parameter)
    groups = []
    for kind in dict.fromkeys(mesh_of(p) for p in others):  # an update goes over tensors of one mesh at a time
        here = [p for p in others if mesh_of(p) == kind]
        groups.append({"params": [p for p in here if p.ndim > 1], "weight_decay": config.weight_decay})
        groups.append({"params": [p for p in here if p.ndim <= 1], "weight_decay": 0.0})
    if config.name == "sgd":
        return [torch.optim.SGD(groups, lr=config.lr)]
    check_fused(config.fused)
    adamw: torch.optim.Optimizer
    if config.fused == "torch":
        adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    else:
        adamw = FusedAdamW(groups, config.lr, config.betas, config.eps, LIBRARIES[config.fused])
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if matrices:
        optimizers.append(Muon(matrices, config.lr, config.momentum, config.weight_decay, peers))
    return optimizers


def last_square(
    optimizer: torch.optim.Optimizer, parameter: Tensor, lr: float, decay: float, config: OptimConfig
) -> Tensor | None:
    """The sum of squares of what the last step added to this rank's share of a parameter: Muon's own, of AdamW from the state
    that it left. None where there was no step, and of SGD."""
    if isinstance(optimizer, Muon):
        return optimizer.squares.get(parameter)
    state, weights = optimizer.state.get(parameter, {}), local(parameter)
    if "exp_avg_sq" not in state:
        return None
    (b1, b2), step = config.betas, state["step"]
    size = (local(state["exp_avg_sq"]) / (1 - b2**step)).sqrt_().add_(config.eps)
    update = (local(state["exp_avg"]) / (1 - b1**step)).div_(size)
    # w' = (1 - lr·decay)·w - lr·u; the w before is gone, so it is put in terms of w'.
    return update.add_(weights, alpha=decay).mul_(lr / (lr * decay - 1)).square_().sum()
