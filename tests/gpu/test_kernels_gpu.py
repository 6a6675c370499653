"""The kernels on a GPU: as exact as torch there, the same bits every time, and part of a compiled graph."""

from typing import Any

import pytest
import torch
from megasora_kernels import gated as gated_kernel
from megasora_kernels import layernorm_modulate as kernel

from tests.unit.test_kernels import gradients, packed, packed_branch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels were not run"),
]

LENGTHS = (1, 4000, 0, 33, 128, 0, 2047, 1000)


KERNELS = pytest.mark.parametrize(
    "function, reference, draw",
    [
        (kernel.layernorm_modulate, kernel.layernorm_modulate_reference, packed),
        (gated_kernel.gated, gated_kernel.gated_reference, packed_branch),
    ],
    ids=["layernorm_modulate", "gated"],
)


@KERNELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("lengths", [(1,), LENGTHS], ids=["one", "ragged"])
@pytest.mark.parametrize("width", [72, 1152, 1536, 5120])
def test_kernels_are_as_exact_as_torch(
    function: Any, reference: Any, draw: Any, width: int, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs = [t.cuda() for t in draw(lengths, width, dtype)]
    exact = gradients(reference, [*(t.double() for t in inputs[:4]), inputs[4]])
    both = zip(gradients(function, inputs), gradients(reference, inputs), exact, strict=True)
    for number, (a, b, c) in enumerate(both):
        assert a.dtype == b.dtype
        ours_error, torchs_error = (a - c).norm().item(), (b - c).norm().item()
        assert ours_error <= 2 * torchs_error + 1e-30, f"{number}: error {ours_error:.3g}, torch's {torchs_error:.3g}"


@KERNELS
def test_same_bits_every_time(function: Any, reference: Any, draw: Any) -> None:
    inputs = [t.cuda() for t in draw(LENGTHS, 1152, torch.bfloat16)]
    first, second = (gradients(function, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@KERNELS
def test_compiled_graph_keeps_the_bits(function: Any, reference: Any, draw: Any) -> None:
    inputs = [t.cuda() for t in draw(LENGTHS, 1152, torch.bfloat16)]
    compiled = gradients(torch.compile(function, fullgraph=True), inputs)
    assert all(torch.equal(a, b) for a, b in zip(compiled, gradients(function, inputs), strict=True))
