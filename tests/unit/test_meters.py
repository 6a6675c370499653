"""The FLOPs that MFU is made of, against a count of the engine's own step: benchmarks/meters.py."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from megasora.config import load_config

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


def test_a_step_has_the_flops_that_are_stated(meters: ModuleType) -> None:
    """But for the gradients of the data, which nobody needs."""
    config = load_config(meters.CONFIG, [*meters.ONE_SHAPE, *SMALL])
    found = meters.flops(config)
    assert 1.0 <= found["ratio"] < 1.03
    again = replace(config, parallel=replace(config.parallel, recompute="full"))
    assert meters.flops(again)["ratio"] == pytest.approx(
        3 / 4 * found["ratio"], rel=0.04
    )  # what is done twice is no progress
