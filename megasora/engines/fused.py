"""NVIDIA's fused optimizers, where they are installed: AdamW by apex or TransformerEngine, chosen by probing
(`optim.fused`). Never run: they need a GPU. Torch's own fused AdamW is the default.

The name `apex` on PyPI is another project (a toolkit for web services): what is imported must have NVIDIA's optimizers, or
it is refused.
"""

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megasora.errors import ConfigError
from megasora.parallel.zero import local

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
    module = {"torch": "torch.optim", "apex": "apex.optimizers", "te": "transformer_engine.pytorch.optimizers"}[name]
    if not is_installed(module):
        how = {"apex": "build it from github.com/NVIDIA/apex", "te": "pip install 'megasora[gpu]'"}[name]
        raise ConfigError(f"optim.fused={name}: {module} is not installed: {how}, or use torch")


def apex_adamw(groups: Groups, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    from apex.optimizers import FusedAdam

    return FusedAdam(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True, bias_correction=True)


def te_adamw(groups: Groups, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    from transformer_engine.pytorch.optimizers import FusedAdam

    return FusedAdam(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True, bias_correction=True)


LIBRARIES: dict[Fused, Callable[..., torch.optim.Optimizer]] = {"apex": apex_adamw, "te": te_adamw}


def adamw_state(parameter: Tensor) -> dict[str, Tensor]:
    """What torch's AdamW has of a parameter before its first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


class FusedAdamW(torch.optim.Optimizer):
    """A library's AdamW with torch's state: `step`, `exp_avg` and `exp_avg_sq` of every parameter, so that a run may change
    from one to the other. The library counts steps a group and knows no DTensor: it is given this rank's shares, and the count
    before every step.
    """

    def __init__(
        self,
        groups: Groups,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        library: Callable[..., torch.optim.Optimizer],
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        shares = [
            {
                "params": [nn.Parameter(local(p.detach())) for p in group["params"]],
                "weight_decay": group["weight_decay"],
            }
            for group in self.param_groups
        ]
        self.library = library(shares, lr=lr, betas=betas, eps=eps)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        steps = []
        for ours, theirs in zip(self.param_groups, self.library.param_groups, strict=True):
            theirs["lr"] = ours["lr"]
            for parameter, share in zip(ours["params"], theirs["params"], strict=True):
                share.grad = None if parameter.grad is None else local(parameter.grad)
                if share.grad is None:
                    continue
                if not self.state[parameter]:
                    self.state[parameter] = adamw_state(parameter)
                state = self.state[parameter]
                self.library.state[share] = {key: local(state[key]) for key in ("exp_avg", "exp_avg_sq")}
                theirs["step"] = int(state["step"])
                steps.append(state["step"])
        self.library.step()
        torch._foreach_add_(steps, 1)
        for group in self.library.param_groups:
            for share in group["params"]:
                share.grad = None
