"""The kernels without a GPU: reference, interpreter, compilation for sm_90a, fake tensors."""

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from megasora_kernels import gated as gated_kernel
from megasora_kernels import layernorm_modulate as kernel
from megasora_kernels import run_sums
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.triton_interpreter import interpreter_process

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def packed(lengths: tuple[int, ...], width: int, dtype: torch.dtype, index: torch.dtype = torch.int64) -> Inputs:
    """dy, x, scale, shift, sample. Scale and shift are strided views, as a block's six modulations are."""
    generator = torch.Generator().manual_seed(sum(lengths) + width)
    samples, tokens = len(lengths), sum(lengths)
    inner = torch.promote_types(dtype, torch.float32)
    x = (torch.randn(tokens, width, generator=generator, dtype=inner) * 3 + 1).to(dtype)
    dy = torch.randn(tokens, width, generator=generator, dtype=inner).to(dtype)
    modulation = torch.randn(samples, 3, width, generator=generator, dtype=inner)
    sample = torch.repeat_interleave(torch.arange(samples), torch.tensor(lengths)).to(index)
    return dy, x, modulation[:, 0], modulation[:, 1], sample


def packed_branch(lengths: tuple[int, ...], width: int, dtype: torch.dtype, index: torch.dtype = torch.int64) -> Inputs:
    """dout, x, y, gate, sample of a gated residual; the gate is a strided view too."""
    dout, x, gate, _, sample = packed(lengths, width, dtype, index)
    return dout, x, x.flip(0) - 1, gate, sample


def gradients(function: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What the function gives and the gradients of its arguments: y, dx, dscale, dshift, or out, dx, dy, dgate."""
    dy, *values, sample = inputs
    leaves = [t.detach().requires_grad_() for t in values]
    y = function(*leaves, sample)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


# The reference


def test_reference_is_the_formula() -> None:
    _, x, scale, shift, sample = packed((3, 0, 4, 1), 10, torch.float64)
    y = kernel.layernorm_modulate(x, scale, shift, sample, eps=1e-3)
    for token, s in enumerate([0, 0, 0, 2, 2, 2, 2, 3]):
        row = x[token].numpy()
        normed = (row - row.mean()) / np.sqrt(row.var() + 1e-3)
        np.testing.assert_allclose(y[token], normed * (1 + scale[s].numpy()) + shift[s].numpy(), rtol=1e-12, atol=1e-12)


def test_reference_gradients() -> None:
    _, x, scale, shift, sample = packed((3, 0, 2), 5, torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, scale, shift)]
    assert torch.autograd.gradcheck(partial(kernel.layernorm_modulate, sample=sample), leaves)


def test_gated_reference_is_the_formula() -> None:
    _, x, y, gate, sample = packed_branch((3, 0, 4, 1), 10, torch.float64)
    expected = x.numpy() + gate.numpy()[[0, 0, 0, 2, 2, 2, 2, 3]] * y.numpy()
    np.testing.assert_allclose(gated_kernel.gated(x, y, gate, sample), expected, rtol=1e-12, atol=1e-12)
    leaves = [t.clone().requires_grad_() for t in (x, y, gate)]
    assert torch.autograd.gradcheck(partial(gated_kernel.gated, sample=sample), leaves)


def test_low_precision_reference_is_fp32_inside() -> None:
    _, x, scale, shift, sample = packed((3, 4), 48, torch.bfloat16)
    y = kernel.layernorm_modulate(x, scale, shift, sample)
    exact = kernel.layernorm_modulate(x.double(), scale.double(), shift.double(), sample)
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()  # half a unit of the last place


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3, 4)}, "do not fit"),
        ({"shift": torch.zeros(3, 8)}, "do not fit"),
        ({"scale": torch.zeros(2, 8).bfloat16()}, r"must be torch\.float32"),
        ({"sample": torch.zeros(4, dtype=torch.int64)}, r"of shape \[5\]"),
        ({"sample": torch.zeros(5)}, "must be int32 or int64"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    _, x, scale, shift, sample = packed((2, 3), 8, torch.float32)
    with pytest.raises(ValueError, match=message):
        partial(kernel.layernorm_modulate, x=x, scale=scale, shift=shift, sample=sample)(**change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"y": torch.zeros(5, 4)}, "do not fit"),
        ({"gate": torch.zeros(2, 4)}, "do not fit"),
        ({"gate": torch.zeros(2, 8).bfloat16()}, r"must be torch\.float32"),
    ],
)
def test_a_gate_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    _, x, y, gate, sample = packed_branch((2, 3), 8, torch.float32)
    with pytest.raises(ValueError, match=message):
        gated_kernel.gated(**({"x": x, "y": y, "gate": gate, "sample": sample} | change))


def test_works_without_triton() -> None:
    code = """
import sys, torch
sys.modules["triton"] = None  # import triton raises ImportError
from megasora_kernels.gated import gated
assert (gated(torch.ones(3, 8), torch.ones(3, 8), torch.ones(1, 8), torch.zeros(3, dtype=torch.int64)) == 2).all()
from megasora_kernels.layernorm_modulate import layernorm_modulate, layernorm_modulate_triton
arguments = torch.randn(3, 8), torch.zeros(1, 8), torch.ones(1, 8), torch.zeros(3, dtype=torch.int64)
assert abs(layernorm_modulate(*arguments).mean() - 1) < 1e-5
try:
    layernorm_modulate_triton(*arguments)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install triton" in done.stdout


# Fake tensors


def test_fake_tensors_pass_through_the_kernels() -> None:
    with FakeTensorMode():
        x = torch.empty(40, 24, dtype=torch.bfloat16, requires_grad=True)
        scale, shift = torch.empty(3, 2, 24, requires_grad=True).unbind(1)
        y = kernel.layernorm_modulate_triton(x, scale, shift, torch.empty(40, dtype=torch.int64))
        grads = torch.autograd.grad(y, [x, scale, shift], torch.empty_like(y))
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    for grad, leaf in zip(grads, [x, scale, shift], strict=True):
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)


def test_fake_tensors_pass_through_the_gated_kernels() -> None:
    with FakeTensorMode():
        x, y = (torch.empty(40, 24, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        gate = torch.empty(3, 24, requires_grad=True)
        out = gated_kernel.gated_triton(x, y, gate, torch.empty(40, dtype=torch.int64))
        grads = torch.autograd.grad(out, [x, y, gate], torch.empty_like(out))
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    assert [(g.shape, g.dtype) for g in grads] == [(leaf.shape, leaf.dtype) for leaf in (x, y, gate)]


def test_cuda_tensors_take_the_kernels() -> None:
    triton_path = kernel.layernorm_modulate_triton
    with FakeTensorMode(), mock.patch.object(kernel, "layernorm_modulate_triton", wraps=triton_path) as called:
        x, scale = torch.empty(4, 8, device="cuda", dtype=torch.bfloat16), torch.empty(2, 8, device="cuda")
        y = kernel.layernorm_modulate(x, scale, scale, torch.empty(4, dtype=torch.int64, device="cuda"))
    called.assert_called_once()
    assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "cuda")


# In the interpreter


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with interpreter_process() as pool:
        yield pool


@triton.jit
def _canary_kernel(a, b, product, value, rounded, size: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    place = tl.arange(0, size)[:, None] * size + tl.arange(0, size)[None, :]
    tl.store(product + place, tl.dot(tl.load(a + place), tl.load(b + place)))
    tl.store(rounded + place, tl.load(value + place).to(tl.bfloat16))


def _canary() -> tuple[float, float]:
    """Worst error of a bf16 product, and of a cast of halves between two bf16 numbers, by the kernel above."""
    a, b = (torch.randint(-4, 5, (16, 16), generator=torch.Generator().manual_seed(s)).bfloat16() for s in (1, 2))
    product, value = torch.empty(16, 16), 1 + torch.arange(256.0).reshape(16, 16) / 256
    rounded = torch.empty(16, 16, dtype=torch.bfloat16)
    _canary_kernel[(1,)](a, b, product, value, rounded, size=16)
    wrong = (product - a.float() @ b.float()).abs().max(), (rounded - value.bfloat16()).abs().max()
    return wrong[0].item(), wrong[1].item()


def test_canary_the_interpreter_is_corrected(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(_canary).result() == (0.0, 0.0)


def test_canary_sees_an_uncorrected_interpreter() -> None:
    """Else the test above could not fail. Once Triton is right, the correction can go."""
    with interpreter_process(corrected=False) as pool:
        product, rounded = pool.submit(_canary).result()
    assert product > 0
    assert rounded > 0


@triton.jit
def _leave_kernel(source, target, size: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    tl.store(target + tl.arange(0, size), tl.load(source + tl.arange(0, size)))


@triton.jit
def _race_kernel(target) -> None:  # type: ignore[no-untyped-def]
    tl.store(target, tl.program_id(0))


def _memory_faults() -> tuple[str, str]:
    backing = torch.zeros(64)
    with pytest.raises(Exception) as leaving:  # noqa: PT011
        _leave_kernel[(1,)](backing[:30], torch.zeros(32), size=32)
    with pytest.raises(Exception) as racing:  # noqa: PT011
        _race_kernel[(2,)](torch.zeros(1, dtype=torch.int32))
    return str(leaving.value), str(racing.value)


def test_memory_check_sees_faults(interpreter: ProcessPoolExecutor) -> None:
    leaving, racing = interpreter.submit(_memory_faults).result()
    assert "load out of bounds at 2 of 32" in leaving
    assert "race: store in program (1, 0, 0) of what program (0, 0, 0) stored" in racing


def _errors(inputs: Inputs, block: int, name: str = "layernorm_modulate") -> list[tuple[float, float]]:
    """Of y, dx, dscale, dshift: the norm of the kernels' error, and of torch's in the same type, against fp64."""
    module = {"layernorm_modulate": kernel, "gated": gated_kernel}[name]
    kernels, reference = getattr(module, f"{name}_triton"), getattr(module, f"{name}_reference")
    with mock.patch.object(module, "BACKWARD_TOKENS", block), mock.patch.object(module, "FORWARD_TOKENS", block):
        ours = gradients(kernels, inputs)
    torchs = gradients(reference, inputs)
    exact = gradients(reference, [*(t.double() for t in inputs[:4]), inputs[4]])
    assert [t.dtype for t in ours] == [t.dtype for t in torchs]
    return [((a - c).norm().item(), (b - c).norm().item()) for a, b, c in zip(ours, torchs, exact, strict=True)]


TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
ROWS = pytest.mark.parametrize(
    "lengths, width, block",
    [
        ((1,), 40, 32),  # one token
        ((33, 5, 31, 1, 26), 72, 32),  # runs that begin, end and cross inside blocks
        ((0, 20, 0, 0, 12, 8, 0), 64, 32),  # empty samples, a block's end where a sample ends, a width of a power of 2
        ((70, 3), 33, 1),  # more slots than the second stage's tile
    ],
    ids=["one", "ragged", "empty", "slots"],
)


@TYPES
@ROWS
def test_kernels_are_as_exact_as_torch(
    interpreter: ProcessPoolExecutor, lengths: tuple[int, ...], width: int, block: int, dtype: torch.dtype
) -> None:
    index = torch.int32 if dtype == torch.float32 else torch.int64
    errors = interpreter.submit(_errors, packed(lengths, width, dtype, index), block).result()
    for name, (ours, torchs) in zip(["y", "dx", "dscale", "dshift"], errors, strict=True):
        assert ours <= 2 * torchs + 1e-30, f"{name}: error {ours:.3g}, torch's {torchs:.3g}"


@TYPES
@ROWS
def test_gated_kernels_are_as_exact_as_torch(
    interpreter: ProcessPoolExecutor, lengths: tuple[int, ...], width: int, block: int, dtype: torch.dtype
) -> None:
    index = torch.int32 if dtype == torch.float32 else torch.int64
    errors = interpreter.submit(_errors, packed_branch(lengths, width, dtype, index), block, "gated").result()
    for name, (ours, torchs) in zip(["out", "dx", "dy", "dgate"], errors, strict=True):
        assert ours <= 2 * torchs + 1e-30, f"{name}: error {ours:.3g}, torch's {torchs:.3g}"


def _gated_of_two_types() -> list[bool]:
    """fp32 x with a bf16 branch, as autocast gives them, and strides: whether out, dx, dy and dgate are near the fp32 ones."""
    dout, x, y, gate, sample = packed_branch((5, 0, 8), 20, torch.float32)
    mixed = (dout.T.contiguous().T, x, y.bfloat16().T.contiguous().T, gate.T.contiguous().T, sample)
    found = gradients(gated_kernel.gated_triton, mixed)
    expected = gradients(gated_kernel.gated_reference, (dout, x, y.bfloat16().float(), gate, sample))
    assert [t.dtype for t in found] == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    return [torch.allclose(a.float(), b, rtol=2**-8, atol=1e-5) for a, b in zip(found, expected, strict=True)]


def test_gated_kernels_take_two_types_and_any_strides(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(_gated_of_two_types).result() == [True] * 4


def _differences_by_strides() -> list[bool]:
    """Whether y, dx, dscale, dshift change a bit when no input is contiguous."""
    dy, x, scale, shift, sample = packed((5, 8), 20, torch.float32)
    dy = dy[:, :1].expand_as(dy)
    strided = (dy, x.T.contiguous().T, scale.T.contiguous().T, shift.T.contiguous().T, sample.repeat_interleave(2)[::2])
    assert not any(t.is_contiguous() for t in strided)
    dense = [t.contiguous() for t in strided]
    found, expected = (gradients(kernel.layernorm_modulate_triton, inputs) for inputs in (strided, dense))
    return [not torch.equal(a, b) for a, b in zip(found, expected, strict=True)]


def test_kernels_take_any_strides(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(_differences_by_strides).result() == [False] * 4


def _compiled_and_checked() -> list[bool]:
    """torch's own checks of the two operators (schema, autograd, fake tensors, AOT), then a whole compiled graph."""
    dy, x, scale, shift, sample = inputs = packed((5, 0, 8), 20, torch.bfloat16)
    leaves = [t.clone().requires_grad_() for t in (x, scale, shift)]
    operators = torch.ops.megasora_kernels
    torch.library.opcheck(operators.layernorm_modulate.default, (*leaves, sample, 1e-6))
    _, mean, rstd = operators.layernorm_modulate(x, scale, shift, sample, 1e-6)
    torch.library.opcheck(operators.layernorm_modulate_backward.default, (dy, x, scale, sample, mean, rstd))
    dout, x, branch, gate, sample = branches = packed_branch((5, 0, 8), 20, torch.bfloat16)
    leaves = [t.clone().requires_grad_() for t in (x, branch, gate)]
    torch.library.opcheck(operators.gated.default, (*leaves, sample))
    torch.library.opcheck(operators.gated_backward.default, (dout, branch, gate, sample))
    same = []
    for function, of in ((kernel.layernorm_modulate_triton, inputs), (gated_kernel.gated_triton, branches)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        found, expected = (gradients(f, of) for f in (compiled, function))
        same += [torch.equal(a, b) for a, b in zip(found, expected, strict=True)]
    return same


def test_kernels_pass_through_torch_compile(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(_compiled_and_checked).result() == [True] * 8


# Compiled for sm_90a


def compile_sm90(function: Any, types: dict[str, str], constants: dict[str, int], warps: int) -> Any:
    """Compiles without a GPU or driver; pointers and integers are multiples of 16, as they are in training."""
    names = function.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] in "*i"}
    source = ASTSource(function, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def resources(ptx: str, path: Path) -> tuple[int, int]:
    """Registers a thread and bytes spilled, as ptxas counts them."""
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    path.write_text(ptx)
    command = [str(ptxas), "-v", "--gpu-name", "sm_90a", "-o", str(path.with_suffix(".cubin")), str(path)]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    return int(re.findall(r"Used (\d+) registers", log)[0]), sum(map(int, spilled))


@pytest.mark.parametrize(
    "element, width, index, fixed",
    [
        ("bf16", 1152, "i64", {}),
        ("bf16", 1536, "i64", {}),
        ("bf16", 5120, "i64", {}),
        ("fp32", 5120, "i32", {}),
        (
            "bf16",
            1152,
            "i64",
            {"tokens": 1, "scale_stride": 1, "shift_stride": 1, "gate_stride": 1},
        ),  # Triton makes a 1 a constant
    ],
)
def test_kernels_compile_for_sm90a_without_spills(
    element: str, width: int, index: str, fixed: dict[str, int], tmp_path: Path
) -> None:
    types = dict.fromkeys(["dy", "x", "dx", "y", "out", "dout"], f"*{element}") | {"sample": f"*{index}", "eps": "fp32"}
    types |= dict.fromkeys(["scale", "shift", "gate", "mean", "rstd", "sums"], "*fp32")
    types |= dict.fromkeys(["scale_parts", "shift_parts", "parts"], "*fp32")
    types |= dict.fromkeys(["tokens", "width", "scale_stride", "shift_stride", "gate_stride"], "i32")
    row = run_sums.row_launch(width)
    warps = row.pop("num_warps")
    sums = {"sum_slots": run_sums.SUM_SLOTS, "sum_columns": run_sums.SUM_COLUMNS}
    for function, constants, function_warps in (
        (kernel._forward_kernel, {"block_tokens": kernel.FORWARD_TOKENS, **row}, warps),
        (kernel._backward_kernel, {"block_tokens": kernel.BACKWARD_TOKENS, **row}, warps),
        (gated_kernel._forward_kernel, {"block_tokens": gated_kernel.FORWARD_TOKENS, **row}, warps),
        (gated_kernel._backward_kernel, {"block_tokens": gated_kernel.BACKWARD_TOKENS, **row}, warps),
        (run_sums._sum_kernel, {"block_tokens": kernel.BACKWARD_TOKENS, **sums}, 4),
    ):
        ones = {n: v for n, v in fixed.items() if n in function.arg_names}
        compiled = compile_sm90(function, types, constants | ones, function_warps)
        ptx = compiled.asm["ptx"]
        registers, spilled = resources(ptx, tmp_path / "kernel.ptx")
        assert ".target sm_90a" in ptx
        assert spilled == 0
        assert registers <= 65536 // (32 * function_warps)
        assert re.search(r"ld\.global\S*\.v4", ptx), "no 16-byte loads"
        assert compiled.metadata.shared <= 48 * 1024
