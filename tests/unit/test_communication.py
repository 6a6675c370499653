"""What a rank sends in a step, counted, against the least that its layout asks for: benchmarks/communication.py, held to 5 %."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch.distributed.fsdp import FSDPModule

from megasora.config import load_config
from megasora.parallel.layout import parse_layout
from megasora.planner.job import Job, Row

FILE = Path(__file__).parents[2] / "benchmarks" / "communication.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("communication_benchmark", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(benchmark: ModuleType, layout: str) -> dict[str, Any]:
    config = load_config(benchmark.CONFIG, ["--model.depth=2"])
    row = Row((((2, 8, 8), 32),), 128)
    job = Job(model=config.model, layout=parse_layout(layout), row=row, rows=2, precision="fp32", optim=config.optim)
    found: dict[str, Any] = benchmark.measure(config, job)
    return found


@pytest.mark.parametrize(
    ("layout", "calls"),
    [
        ("dp4,zero2", {"all_gather": 1, "reduce_scatter": 1}),
        ("dp1,cp2x2,zero3", {"all_to_all": 4, "send": 3, "all_gather": 2, "reduce_scatter": 1}),
        ("pp2,tp2", {"all_gather": 6, "reduce_scatter": 6, "all_reduce": 8}),
    ],
)
def test_nothing_is_sent_that_need_not_be(benchmark: ModuleType, layout: str, calls: dict[str, int]) -> None:
    found = measure(benchmark, layout)
    assert found["ratio"] == pytest.approx(1, abs=0.05)
    assert (found["calls"], found["calls_a_block"]) == (found["calls_planned"], calls)


def test_weights_that_are_gathered_again_are_seen(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FSDPModule, "set_reshard_after_backward", lambda *_: None)
    assert measure(benchmark, "dp4,zero2")["ratio"] > 1.1


@pytest.mark.long
@pytest.mark.timeout(600)
def test_every_layout_of_the_report(tmp_path: Path) -> None:
    """DDP among them, in processes of its own."""
    report = tmp_path / "report.json"
    subprocess.run([sys.executable, str(FILE), "--json", str(report)], check=True, capture_output=True, timeout=580)
    lines = json.loads(report.read_text())["layouts"]
    assert {line["processes"] for line in lines} == {"gloo", "fake"}
    assert max(line["ratio"] for line in lines) < 1.05
    assert min(line["ratio"] for line in lines) > 0.95
