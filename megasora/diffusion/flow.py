"""Rectified flow: straight paths from data (t = 0) to noise (t = 1), the model predicting the velocity (Liu et al. 2022).

Knows no model: tensors in, tensors out, of any shape. Timesteps are fp32 always.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Logit-normal timesteps (Esser et al. 2024, section 3.1): t = sigmoid(mean + std · z)."""

    logit_mean: float = 0.0
    logit_std: float = 1.0


def shift_timestep(t: Tensor, shift: float) -> Tensor:
    """Moves t towards noise for larger latents: s·t / (1 + (s - 1)·t) (Esser et al. 2024, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def draw_timestep(z: Tensor, config: FlowConfig, shift: float) -> Tensor:
    """Standard normal z -> timestep of the same shape in (0, 1)."""
    return shift_timestep(torch.sigmoid(config.logit_mean + config.logit_std * z.float()), shift)


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point at time t of the path: (1 - t)·data + t·noise."""
    return (1 - t) * data + t * noise


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """What the model learns, d/dt of the path: noise - data."""
    return noise - data


def euler(
    predict: Callable[[list[Tensor], float], list[Tensor]], noise: list[Tensor], steps: int, shift: float
) -> list[Tensor]:
    """Integrates the velocity from t = 1 to 0 in `steps` Euler steps, on a grid bent by `shift`.

    `predict(x, t)` gives the velocity of every tensor of the list `x` (samples of any shape) at time t.
    """
    times = shift_timestep(torch.linspace(1, 0, steps + 1, dtype=torch.float32), shift).tolist()
    x = noise
    for t, following in pairwise(times):
        x = [a + (following - t) * v for a, v in zip(x, predict(x, t), strict=True)]
    return x


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): unconditional + scale · (conditional - unconditional)."""
    return unconditional + scale * (conditional - unconditional)
