"""Gradients of all of a model's parameters, compared with others."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def assert_same_gradients(
    model: nn.Module, gradients: dict[str, Tensor], nothing: Callable[[str], bool] = lambda name: False
) -> None:
    """Each within 1e-5 of its norm; one much smaller than is usual is held to the usual size.

    `nothing`: whose gradient is zero but for rounding, as that of a bias of the keys, which moves every score of a query alike,
    where the keys are not normed.
    """
    usual = torch.stack([g.norm() for g in gradients.values()]).norm() / len(gradients) ** 0.5
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if nothing(name):
            assert max(parameter.grad.norm(), gradients[name].norm()) <= 1e-6 * usual, name
        else:
            error = (parameter.grad - gradients[name]).norm() / max(parameter.grad.norm(), 1e-3 * usual)
            assert error <= 1e-5, f"{name}: {error}"
