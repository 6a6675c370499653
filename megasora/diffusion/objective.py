"""What the models learn, by name: one interface for rectified flow and for the discrete Gaussian diffusion."""

from typing import Literal, Protocol

from torch import Tensor

from megasora.diffusion.flow import Flow, FlowConfig
from megasora.diffusion.gaussian import Gaussian, GaussianConfig


class Objective(Protocol):
    """Draws timesteps, corrupts data and judges predictions. Timesteps are fp32 in [0, 1]: 0 is data, 1 is noise."""

    @property
    def outputs(self) -> int:
        """How many values the model must give for each value of its input: 2 with a learned variance, else 1."""

    def draw(self, z: Tensor, shift: float) -> Tensor:
        """Standard normal z -> timestep of the same shape, fp32, moved towards noise by `shift`."""

    def corrupt(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Data with as much noise as time t has; t broadcasts against data."""

    def loss(self, prediction: Tensor, data: Tensor, noise: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """[L] fp32: the mean over P of the elementwise loss.

        prediction [L, outputs·P], the variance's values after the mean's; data, noise and noisy [L, P]; t [L, 1].
        """


def build_objective(name: Literal["flow", "gaussian"], flow: FlowConfig, gaussian: GaussianConfig) -> Flow | Gaussian:
    """The objective of that name, made from the config of the same name."""
    return Flow(flow) if name == "flow" else Gaussian(gaussian)
