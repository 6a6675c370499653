"""Other libraries' fused AdamW: the probes, and the state that it shares with torch's."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megasora.engines.fused import FusedAdamW, adamw_state, check_fused
from megasora.engines.optim import OptimConfig, build_optimizers
from megasora.errors import ConfigError


def test_a_missing_library_is_one_line() -> None:
    check_fused("torch")
    with pytest.raises(ConfigError, match=r"optim\.fused=apex: apex\.optimizers is not installed: build it from"):
        check_fused("apex")
    with pytest.raises(ConfigError, match=r"transformer_engine\.pytorch\.optimizers is not installed"):
        check_fused("te")


def test_the_other_apex_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's apex has a package of that name, without optimizers."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="is not NVIDIA's"):
        check_fused("apex")
    sys.modules.pop("apex", None)


class CountedByGroup(torch.optim.AdamW):
    """Torch's AdamW as apex and TransformerEngine keep it: no step in a parameter's state, a count in the group."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            steps = torch.tensor(float(group.get("step", 0)))
            group["step"] = int(steps) + 1
            for share in group["params"]:
                if share.grad is not None:
                    assert set(self.state[share]) == {"exp_avg", "exp_avg_sq"}
                    self.state[share]["step"] = steps.clone()
        super().step()


def steps(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], count: int) -> list[Tensor]:
    torch.manual_seed(count)
    for _ in range(count):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    return [w.detach().clone() for w in weights]


def test_a_librarys_adamw_and_torchs_go_on_from_each_other() -> None:
    """Every update, every moment and every count, with a change of the rate and of the library in the middle."""
    given = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    found = []
    for kinds in (("torch", "torch"), ("library", "library"), ("torch", "library"), ("library", "torch")):
        weights = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 3)]
        state: dict[int, Any] = {}
        for attempt, kind in enumerate(kinds):
            groups = [{"params": [w], "weight_decay": 0.1 * i} for i, w in enumerate(weights)]
            optimizer = (
                FusedAdamW(groups, **given, library=CountedByGroup)
                if kind == "library"
                else torch.optim.AdamW(groups, **given, fused=True)
            )
            for i, weight in enumerate(weights):
                optimizer.state[weight] = state.get(i) or adamw_state(weight)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (attempt + 1)
            steps(optimizer, weights, 3 + attempt)
            state = {i: optimizer.state[w] for i, w in enumerate(weights)}
        moments = [state[i][key] for i in state for key in ("step", "exp_avg", "exp_avg_sq")]
        found.append([*[w.detach() for w in weights], *moments])
    assert found[0][2].item() == 7
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_asked_for_it_is_built_or_refused() -> None:
    weights = {"a": nn.Parameter(torch.ones(2, 2))}
    assert isinstance(build_optimizers(weights, OptimConfig())[0], torch.optim.AdamW)
    with pytest.raises(ConfigError, match=r"optim\.fused=te"):
        build_optimizers(weights, OptimConfig(fused="te"))
    with pytest.raises(ValueError, match="name=sgd has none"):
        OptimConfig(name="sgd", fused="te")
