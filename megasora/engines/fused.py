"""NVIDIA's fused optimizers, where they are installed: AdamW by apex or TransformerEngine, chosen by probing. Never run:
they need a GPU.

The name `apex` on PyPI is another project (a toolkit for web services): what is imported must have NVIDIA's optimizers, or
it is refused.
"""

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

from megasora.errors import ConfigError

Fused = Literal["torch", "apex", "te"]  # of optim.fused
Groups = Iterable[dict[str, Any]]


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent
        return False


def check_fused(name: Fused) -> None:
    """Raises ConfigError where the library is missing, or another one has its name."""
    if name == "apex" and is_installed("apex") and not is_installed("apex.optimizers"):
        raise ConfigError(
            "optim.fused=apex: the installed apex is not NVIDIA's (PyPI has another of that name): build it from "
            "github.com/NVIDIA/apex, or use torch"
        )
    module = {"torch": "torch", "apex": "apex.optimizers", "te": "transformer_engine.pytorch.optimizers"}[name]
    if not is_installed(module):
        how = {"apex": "build it from github.com/NVIDIA/apex", "te": "pip install 'megasora[gpu]'"}[name]
        raise ConfigError(f"optim.fused={name}: {module} is not installed: {how}, or use torch")


def torch_adamw(groups: Groups, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def apex_adamw(groups: Groups, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    from apex.optimizers import FusedAdam

    return FusedAdam(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True, bias_correction=True)


def te_adamw(groups: Groups, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    from transformer_engine.pytorch.optimizers import FusedAdam

    return FusedAdam(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True, bias_correction=True)


ADAMW: dict[Fused, Callable[..., torch.optim.Optimizer]] = {"torch": torch_adamw, "apex": apex_adamw, "te": te_adamw}
