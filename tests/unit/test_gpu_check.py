"""The checks that gpu_check does on a GPU, in Triton's interpreter: they run, find nothing, and find a seeded bug."""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
from megasora_kernels import fp8_gemm, fp8_quantize

from tests.seeded import with_bug
from tests.unit.test_kernels import _small

SCRIPT = Path(__file__).parents[2] / "kernels/gpu_check.py"
SHAPE = ("cpu", (5, 1, 2), 48)


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec
    assert spec.loader
    sys.modules["gpu_check"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _names() -> list[str]:
    return list(script().checks(*SHAPE))


def _wrong(names: tuple[str, ...]) -> dict[str, list[str]]:
    gpu_check = script()
    with ExitStack() as stack:
        _small(stack, 4)
        stack.enter_context(mock.patch.object(fp8_gemm._gemm_kernel, "configs", fp8_gemm._gemm_kernel.configs[:1]))
        return {
            name: gpu_check.check(name, run).wrong for name, run in gpu_check.checks(*SHAPE).items() if name in names
        }


def _wrong_quantiser() -> list[str]:
    gpu_check = script()
    copy = with_bug(fp8_quantize, "quantised = (value * ", "quantised = (value * 1.01 * ")
    with mock.patch.object(fp8_quantize, "quantise_both_triton", copy.quantise_both_triton):
        return gpu_check.check("quantise row", gpu_check.checks(*SHAPE)["quantise row"]).wrong


QUICK = ("gated", "quantise row", "fp8_gemm tile")


def test_nothing_is_wrong(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(_wrong, QUICK).result() == {name: [] for name in QUICK}


@pytest.mark.long
def test_nothing_at_all_is_wrong(interpreter: ProcessPoolExecutor) -> None:
    names = tuple(interpreter.submit(_names).result())
    assert len(names) == 17
    assert interpreter.submit(_wrong, names).result() == {name: [] for name in names}


def test_a_seeded_bug_is_found(interpreter: ProcessPoolExecutor) -> None:
    assert "data differs" in interpreter.submit(_wrong_quantiser).result()


def test_without_a_gpu_it_says_so() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (2, "gpu_check: no CUDA device\n")
