"""Rectified flow: straight paths from data (t = 0) to noise (t = 1), the model predicting the velocity (Liu et al. 2022).

Knows no model: tensors in, tensors out, of any shape. Timesteps are fp32 always.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Logit-normal timesteps (Esser et al. 2024, section 3.1): t = sigmoid(mean + std · z)."""

    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift_by_size: bool = False  # multiply the shift by `size_shift`
    shift_reference: tuple[int, int, int] = (1, 64, 64)  # latent frames, height and width for which that is 1

    def __post_init__(self) -> None:
        if not math.isfinite(self.logit_mean):
            raise ValueError(f"logit_mean={self.logit_mean}: a finite number is expected")
        if not 0 <= self.logit_std < math.inf:
            raise ValueError(f"logit_std={self.logit_std}: at least 0")
        if min(self.shift_reference) < 1:
            raise ValueError(f"shift_reference={list(self.shift_reference)}: at least 1 each")


def size_shift(shape: Sequence[int], config: FlowConfig) -> float:
    """How much a latent of (T, H, W) multiplies the shift: sqrt(H·W / reference) · sqrt(T / reference); 1 when off.

    A larger latent has more values that say the same, so noise must be stronger to hide it (Esser et al. 2024, section
    5.3.2; with frames as in Open-Sora 1.2, whose reference of one frame of 512x512 pixels is 1x64x64 behind an 8x VAE).
    """
    if not config.shift_by_size:
        return 1.0
    return math.sqrt(math.prod(shape) / math.prod(config.shift_reference))


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


@dataclass(frozen=True)
class Flow:
    """Rectified flow as an objective: see `megasora.diffusion.objective`."""

    config: FlowConfig
    outputs: ClassVar[int] = 1

    def draw(self, z: Tensor, shift: float) -> Tensor:
        """Standard normal z -> timestep of the same shape in (0, 1), fp32."""
        return draw_timestep(z, self.config, shift)

    def corrupt(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The point at time t of the path; t broadcasts against data."""
        return interpolate(data, noise, t)

    def loss(self, prediction: Tensor, data: Tensor, noise: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """[L, P] prediction of the velocity -> [L] mean squared error, fp32. Needs neither `noisy` nor `t`."""
        return (prediction.float() - velocity(data, noise)).square().mean(-1)
