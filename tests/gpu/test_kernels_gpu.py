"""The kernels on a GPU: as exact as torch there, the same bits every time, and part of a compiled graph."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megasora_kernels.cases import CASES, Case, errors, evaluate, excess

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels were not run"),
]

LENGTHS = (1, 4000, 0, 33, 128, 0, 2047, 1000)
KERNELS = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@KERNELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("lengths", [(1,), LENGTHS], ids=["one", "ragged"])
@pytest.mark.parametrize("width", [144, 1152, 1536, 5120])
def test_kernels_are_as_exact_as_torch(case: Case, width: int, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    if case.name == "flash_varlen" and (dtype == torch.float32 or width > 1536):
        pytest.skip("attention takes 16 bits, and its fp64 scores must fit the GPU")
    assert excess(errors(case, case.draw(lengths, width, dtype).to("cuda"))) == []


@KERNELS
def test_same_bits_every_time(case: Case) -> None:
    inputs = case.draw(LENGTHS, 1152, torch.bfloat16).to("cuda")
    first, second = (evaluate(case.kernels, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@KERNELS
def test_compiled_graph_keeps_the_bits(case: Case) -> None:
    inputs = case.draw(LENGTHS, 1152, torch.bfloat16).to("cuda")
    compiled = evaluate(torch.compile(case.kernels, fullgraph=True), inputs)
    assert all(torch.equal(a, b) for a, b in zip(compiled, evaluate(case.kernels, inputs), strict=True))


def test_gpu_check_finds_nothing_wrong() -> None:
    script = Path(__file__).parents[2] / "kernels/gpu_check.py"
    done = subprocess.run([sys.executable, str(script), "--small"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
