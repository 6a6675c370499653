"""The kernels on a GPU: as exact as torch there, the same bits every time, and part of a compiled graph."""

import pytest
import torch
from megasora_kernels import layernorm_modulate as kernel

from tests.unit.test_kernels import gradients, packed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels were not run"),
]

LENGTHS = (1, 4000, 0, 33, 128, 0, 2047, 1000)


def on_gpu(lengths: tuple[int, ...], width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [t.cuda() for t in packed(lengths, width, dtype)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("lengths", [(1,), LENGTHS], ids=["one", "ragged"])
@pytest.mark.parametrize("width", [72, 1152, 1536, 5120])
def test_kernels_are_as_exact_as_torch(width: int, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = on_gpu(lengths, width, dtype)
    ours = gradients(kernel.layernorm_modulate, inputs)
    torchs = gradients(kernel.layernorm_modulate_reference, inputs)
    exact = gradients(kernel.layernorm_modulate_reference, [*(t.double() for t in inputs[:4]), inputs[4]])
    for name, a, b, c in zip(["y", "dx", "dscale", "dshift"], ours, torchs, exact, strict=True):
        assert a.dtype == b.dtype
        ours_error, torchs_error = (a - c).norm().item(), (b - c).norm().item()
        assert ours_error <= 2 * torchs_error + 1e-30, f"{name}: error {ours_error:.3g}, torch's {torchs_error:.3g}"


def test_same_bits_every_time() -> None:
    inputs = on_gpu(LENGTHS, 1152, torch.bfloat16)
    first, second = (gradients(kernel.layernorm_modulate, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_compiled_graph_keeps_the_bits() -> None:
    inputs = on_gpu(LENGTHS, 1152, torch.bfloat16)
    compiled = gradients(torch.compile(kernel.layernorm_modulate, fullgraph=True), inputs)
    assert all(torch.equal(a, b) for a, b in zip(compiled, gradients(kernel.layernorm_modulate, inputs), strict=True))
