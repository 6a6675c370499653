"""The fused optimizers' probes."""

import sys
from pathlib import Path

import pytest

from megasora.engines.fused import ADAMW, check_fused
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


def test_torchs_is_adamw() -> None:
    import torch

    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = ADAMW["torch"]([{"params": [weight], "weight_decay": 0.1}], 1e-3, (0.9, 0.95), 1e-8)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["fused"]
