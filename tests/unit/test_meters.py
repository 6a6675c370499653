"""The FLOPs that MFU is made of, against a count of the engine's own step: benchmarks/meters.py."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megasora.config import load_config
from megasora.observe import hardware

FILE = Path(__file__).parents[2] / "benchmarks" / "meters.py"


@pytest.fixture(scope="module")
def meters() -> ModuleType:
    spec = importlib.util.spec_from_file_location("meters_benchmark", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALL = ["--model.width=128", "--model.ffn=512", "--model.heads=4", "--model.depth=6", "--data.global_batch=2"]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 NVL", 7.0),  # what it measures
        ("NVIDIA H200 NVL", 7.0),
        ("NVIDIA GH200 480GB", 7.0),
        ("NVIDIA GB200", 7.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 7.0),
    ],
)
def test_only_a_device_that_is_known_exactly_has_a_peak_of_the_table(
    name: str, peak: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "on_gpu", lambda device: True)
    monkeypatch.setattr(hardware, "gemm_peak", lambda device, precision: 7.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert hardware.device_peak(torch.device("cpu"), "bf16") == peak


def test_a_step_has_the_flops_that_are_stated(meters: ModuleType) -> None:
    """But for the gradients of the data, which nobody needs."""
    config = load_config(meters.CONFIG, [*meters.ONE_SHAPE, *SMALL])
    found = meters.flops(config)
    assert 1.0 <= found["ratio"] < 1.03
    again = replace(config, parallel=replace(config.parallel, recompute="full"))
    # What is done twice is no progress.
    assert meters.flops(again)["ratio"] == pytest.approx(3 / 4 * found["ratio"], rel=0.04)
