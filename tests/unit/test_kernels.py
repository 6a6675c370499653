"""The kernels over packed rows without a GPU: references, inputs, fake tensors, and what they compute in the interpreter.

What they compile to is in test_kernels_compiled.py, those to fp8 in test_kernels_fp8.py.
"""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from megasora_kernels import gated, gated_layernorm, layernorm_modulate, qknorm_rope
from megasora_kernels.cases import (
    CASES,
    Case,
    Inputs,
    draw_gated,
    draw_gated_layernorm,
    draw_layernorm,
    draw_rope,
    errors,
    evaluate,
    excess,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from tests.seeded import with_bug
from tests.triton_interpreter import interpreter_process

ALL = pytest.mark.parametrize("case", range(len(CASES)), ids=[case.name for case in CASES])

# The references


def test_layernorm_is_the_formula() -> None:
    (x, scale, shift), (sample,), _ = draw_layernorm((3, 0, 4, 1), 10, torch.float64)
    y = layernorm_modulate.layernorm_modulate(x, scale, shift, sample, eps=1e-3)
    for token, s in enumerate([0, 0, 0, 2, 2, 2, 2, 3]):
        row = x[token].numpy()
        normed = (row - row.mean()) / np.sqrt(row.var() + 1e-3)
        np.testing.assert_allclose(y[token], normed * (1 + scale[s].numpy()) + shift[s].numpy(), rtol=1e-12, atol=1e-12)


def test_gated_is_the_formula() -> None:
    (x, y, gate), (sample,), _ = draw_gated((3, 0, 4, 1), 10, torch.float64)
    expected = x.numpy() + gate.numpy()[[0, 0, 0, 2, 2, 2, 2, 3]] * y.numpy()
    np.testing.assert_allclose(gated.gated(x, y, gate, sample), expected, rtol=1e-12, atol=1e-12)


def test_gated_layernorm_is_one_after_the_other() -> None:
    (x, y, gate, scale, shift), (sample,), _ = draw_gated_layernorm((3, 0, 4, 1), 10, torch.float64)
    out, normed = gated_layernorm.gated_layernorm(x, y, gate, scale, shift, sample, 1e-3)
    assert torch.equal(out, gated.gated(x, y, gate, sample))
    assert torch.equal(normed, layernorm_modulate.layernorm_modulate(out, scale, shift, sample, 1e-3))
    out, _ = gated_layernorm.gated_layernorm(x, y, None, scale, shift, sample)
    assert torch.equal(out, x + y)


def rope_by_hand(x: Tensor, weight: Tensor | None, angles: Tensor, K: int, per_head: bool, eps: float) -> np.ndarray:
    out = np.empty((len(x), x.shape[1] // K, K))
    for token in range(len(x)):
        row = x[token].numpy().reshape(-1, K)
        if weight is not None:
            mean = (row**2).mean(1, keepdims=True) if per_head else (row**2).mean()
            row = row / np.sqrt(mean + eps) * weight.numpy().reshape(-1, K)
        turned = (row[:, 0::2] + 1j * row[:, 1::2]) * np.exp(1j * angles[token].numpy())
        out[token, :, 0::2], out[token, :, 1::2] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("weights", ["row", "head", "none"])
def test_qknorm_rope_is_the_formula(weights: str) -> None:
    leaves, (rotation, K, _, _), _ = draw_rope((3, 4), 24, torch.float64, weights)
    x, weight = leaves[0], leaves[1] if len(leaves) > 1 else None
    y = qknorm_rope.qknorm_rope(x, weight, rotation, K, 1e-3)
    angles = torch.atan2(rotation[..., 1], rotation[..., 0])
    np.testing.assert_allclose(y, rope_by_hand(x, weight, angles, K, weights == "head", 1e-3), rtol=1e-12, atol=1e-12)
    groups = qknorm_rope.qknorm_rope(x, weight, rotation, K, 1e-3, groups=2)
    assert torch.equal(torch.cat(groups.unbind(0), 1), y)


@pytest.mark.long
def test_compiled_on_a_cpu_it_turns_in_real_numbers() -> None:
    inputs = draw_rope((3, 4), 48, torch.float32)
    function = torch.compile(qknorm_rope.qknorm_rope, fullgraph=True)
    for a, b in zip(evaluate(function, inputs), evaluate(qknorm_rope.qknorm_rope, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@ALL
def test_gradients_of_the_references(case: int) -> None:
    leaves, fixed, _ = CASES[case].draw((3, 0, 2) if "flash" not in CASES[case].name else (3, 2), 12, torch.float64)
    function = CASES[case].reference
    assert torch.autograd.gradcheck(
        lambda *given: function(*given, *fixed), [t.clone().requires_grad_() for t in leaves]
    )


def test_a_wrong_gradient_fails_gradcheck() -> None:
    """Else the test above could not fail."""
    copy = with_bug(layernorm_modulate, "F.layer_norm(x.to(inner)", "F.layer_norm(x.detach().to(inner)")
    (x, scale, shift), (sample,), _ = draw_layernorm((3, 2), 6, torch.float64)
    with pytest.raises(Exception, match=r"Jacobian mismatch|expected to be zero"):
        torch.autograd.gradcheck(
            lambda t: copy.layernorm_modulate_reference(t, scale, shift, sample), x.requires_grad_()
        )


def test_low_precision_reference_is_fp32_inside() -> None:
    (x, scale, shift), (sample,), _ = draw_layernorm((3, 4), 48, torch.bfloat16)
    y = layernorm_modulate.layernorm_modulate(x, scale, shift, sample)
    exact = layernorm_modulate.layernorm_modulate(x.double(), scale.double(), shift.double(), sample)
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()  # half a unit of the last place


# Inputs that do not fit


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
    (x, scale, shift), (sample,), _ = draw_layernorm((2, 3), 8, torch.float32)
    with pytest.raises(ValueError, match=message):
        partial(layernorm_modulate.layernorm_modulate, x=x, scale=scale, shift=shift, sample=sample)(**change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"y": torch.zeros(5, 4)}, "do not fit"),
        ({"gate": torch.zeros(2, 4)}, "do not fit"),
        ({"gate": torch.zeros(2, 8).bfloat16()}, r"must be torch\.float32"),
    ],
)
def test_a_gate_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    (x, y, gate, scale, shift), (sample,), _ = draw_gated_layernorm((2, 3), 8, torch.float32)
    with pytest.raises(ValueError, match=message):
        gated.gated(**({"x": x, "y": y, "gate": gate, "sample": sample} | change))
    known = {"x": x, "y": y, "gate": gate, "scale": scale, "shift": shift, "sample": sample}
    with pytest.raises(ValueError, match=message):
        gated_layernorm.gated_layernorm(**(known | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"head_width": 7}, "not 1 groups of heads of 7"),
        ({"groups": 3}, "not 3 groups of heads of 6"),
        ({"weight": torch.zeros(5)}, r"shape \[24\] or \[6\], not \[5\]"),
        ({"rotation": torch.zeros(5, 4, 2)}, r"of shape \[5, 3, 2\]"),
        ({"rotation": torch.zeros(5, 3, 2).bfloat16()}, r"must be torch\.float32"),
    ],
)
def test_a_rotation_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    known = {"x": torch.zeros(5, 24), "weight": None, "rotation": torch.zeros(5, 3, 2), "head_width": 6}
    with pytest.raises(ValueError, match=message):
        qknorm_rope.qknorm_rope(**(known | change))


def test_works_without_triton() -> None:
    code = """
import sys, torch
sys.modules["triton"] = None  # import triton raises ImportError
from megasora_kernels.gated import gated
assert (gated(torch.ones(3, 8), torch.ones(3, 8), torch.ones(1, 8), torch.zeros(3, dtype=torch.int64)) == 2).all()
from megasora_kernels.qknorm_rope import qknorm_rope
assert qknorm_rope(torch.ones(3, 8), torch.ones(8), None, 4).shape == (3, 2, 4)
import megasora_kernels.gated_layernorm, megasora_kernels.fp8_linear, megasora_kernels.flash_varlen
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


@ALL
def test_fake_tensors_pass_through_the_kernels(case: int) -> None:
    real = CASES[case].draw((20, 0, 20), 24, torch.bfloat16)
    expected = evaluate(CASES[case].reference, real)
    with FakeTensorMode() as mode:
        fake = Inputs(*tree_map_only(Tensor, mode.from_tensor, list(real)))
        found = evaluate(CASES[case].kernels, fake)
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected]


def test_fp8_passes_as_a_fake_tensor() -> None:
    (x, y, gate, scale, shift), (sample,), _ = draw_gated_layernorm((3, 2), 16, torch.bfloat16)
    with FakeTensorMode() as mode:
        given = [mode.from_tensor(t) for t in (x, y, gate, scale, shift, sample)]
        found = gated_layernorm.gated_layernorm_triton(*given, 1e-6, mode.from_tensor(torch.ones(())))
    shapes = [(tuple(t.shape), t.dtype) for t in found]
    assert shapes == [((5, 16), torch.bfloat16)] * 2 + [((5, 16), torch.float8_e4m3fn), ((), torch.float32)]


@pytest.mark.parametrize("gated", [True, False])
def test_a_residual_keeps_y_for_its_gate_alone(gated: bool) -> None:
    (x, y, *modulations), (sample,), _ = draw_gated_layernorm((3, 2), 16, torch.bfloat16)
    leaves = x, y.half(), *modulations
    kept: list[torch.dtype] = []
    with (
        FakeTensorMode() as mode,
        torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.dtype), t)[1], lambda t: t),
    ):
        x, y, gate, scale, shift = (mode.from_tensor(t).requires_grad_() for t in leaves)
        out, normed = gated_layernorm.gated_layernorm_triton(
            x, y, gate if gated else None, scale, shift, mode.from_tensor(sample)
        )
        dx, dy = torch.autograd.grad([out, normed], [x, y], [out, normed])
    assert kept.count(torch.float16) == gated
    assert (dx.dtype, dy.dtype) == (torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    "module, name, draw",
    [
        (layernorm_modulate, "layernorm_modulate", draw_layernorm),
        (gated, "gated", draw_gated),
        (gated_layernorm, "gated_layernorm", draw_gated_layernorm),
        (qknorm_rope, "qknorm_rope", draw_rope),
    ],
)
def test_cuda_tensors_take_the_kernels(module: ModuleType, name: str, draw: Callable[..., Inputs]) -> None:
    kernels = getattr(module, f"{name}_triton")
    leaves, fixed, _ = draw((2, 3), 24, torch.bfloat16)
    with FakeTensorMode(), mock.patch.object(module, f"{name}_triton", wraps=kernels) as called:
        moved = tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"), [*leaves, *fixed])
        found = getattr(module, name)(*moved)
    called.assert_called_once()
    first = found if isinstance(found, Tensor) else found[0]
    assert (first.shape[0], first.dtype, first.device.type) == (5, torch.bfloat16, "cuda")


# In the interpreter


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


# Small blocks, so that short rows have many of them.
BLOCKS = {"FORWARD_TOKENS": 4, "BACKWARD_TOKENS": 4}


def _small(stack: ExitStack, block: int) -> None:
    for module in (layernorm_modulate, gated, gated_layernorm, qknorm_rope):
        for name in BLOCKS:
            stack.enter_context(mock.patch.object(module, name, block))


def _excess(case: int | Case, lengths: tuple[int, ...], width: int, dtype: torch.dtype, block: int) -> list[str]:
    found = CASES[case] if isinstance(case, int) else case
    with ExitStack() as stack:
        _small(stack, block)
        return excess(errors(found, found.draw(lengths, width, dtype)))


ROWS = pytest.mark.parametrize(
    "lengths, width, block",
    [
        ((1,), 48, 32),  # one token
        ((5, 1, 4, 0, 2), 72, 4),  # runs that begin, end and cross inside blocks, an empty sample
        # a block's end where a sample ends, a width of a power of 2
        pytest.param((0, 4, 0, 0, 3, 5, 0), 64, 4, marks=pytest.mark.long),
    ],
    ids=["one", "ragged", "empty"],
)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.long)], ids=["bf16", "fp32"]
)
@ROWS
@ALL
def test_kernels_are_as_exact_as_torch(
    interpreter: ProcessPoolExecutor, case: int, lengths: tuple[int, ...], width: int, block: int, dtype: torch.dtype
) -> None:
    if CASES[case].name == "flash_varlen" and dtype == torch.float32:
        dtype = torch.float16
    assert interpreter.submit(_excess, case, lengths, width, dtype, block).result() == []


def test_second_stage_takes_more_slots_than_its_tile(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(_excess, 1, (70, 3), 32, torch.float32, 1).result() == []


def _gated_of_two_types() -> list[bool]:
    """fp32 x with a bf16 branch, as autocast gives them, and strides: whether out, dx, dy and dgate are near the fp32 ones."""
    (x, y, gate), (sample,), (dout,) = draw_gated((5, 0, 8), 20, torch.float32)
    y = y.bfloat16()
    mixed = Inputs(
        [x, y.T.contiguous().T, gate.T.contiguous().T], [sample.repeat_interleave(2)[::2]], [dout.T.contiguous().T]
    )
    found = evaluate(gated.gated_triton, mixed)
    expected = evaluate(gated.gated_reference, Inputs([x, y.float(), gate], [sample], [dout]))
    assert [t.dtype for t in found] == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    return [torch.allclose(a.float(), b, rtol=2**-8, atol=1e-5) for a, b in zip(found, expected, strict=True)]


def test_gated_kernels_take_two_types_and_any_strides(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(_gated_of_two_types).result() == [True] * 4


def strided(t: Tensor) -> Tensor:
    """The same values, not contiguous."""
    return t.T.contiguous().T if t.ndim == 2 else t.repeat_interleave(2, -1)[..., ::2]


def _differences_by_strides(case: int) -> list[bool]:
    """Whether a result or gradient changes a bit when no input is contiguous."""
    inputs = CASES[case].draw((3, 0, 4), 24, torch.float32)
    other = Inputs(*tree_map_only(Tensor, strided, list(inputs)))
    found, expected = (evaluate(CASES[case].kernels, given) for given in (other, inputs))
    return [not torch.equal(a, b) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("case", [0, 2, 4, 6], ids=lambda case: CASES[case].name)
def test_kernels_take_any_strides(interpreter: ProcessPoolExecutor, case: int) -> None:
    found = interpreter.submit(_differences_by_strides, case).result()
    assert found == [False] * len(found)


def _fp8_against_reference(rows: tuple[int, ...]) -> tuple[float, float, bool]:
    """Share of equal bytes, error of the largest value, whether out and normed are those without fp8."""
    (x, y, gate, scale, shift), (sample,), _ = draw_gated_layernorm(rows, 72, torch.float32)
    factor = torch.tensor(150.0)  # some values saturate
    found = gated_layernorm.gated_layernorm_triton(x, y, gate, scale, shift, sample, 1e-6, factor)
    expected = gated_layernorm.gated_layernorm_reference(x, y, gate, scale, shift, sample, 1e-6, factor)
    plain = gated_layernorm.gated_layernorm_triton(x, y, gate, scale, shift, sample, 1e-6)
    assert expected[2].float().abs().max() == 448
    same = (found[2].view(torch.uint8) == expected[2].view(torch.uint8)).float().mean().item()
    return same, (found[3] / expected[3] - 1).abs().item(), all(map(torch.equal, found[:2], plain))


def test_fp8_of_the_norm(interpreter: ProcessPoolExecutor) -> None:
    """Where fp32 sums in another order end on the other side of a rounding, a byte may differ."""
    same, amax, plain = interpreter.submit(_fp8_against_reference, (9, 0, 4)).result()
    assert same > 0.999
    assert amax < 1e-6
    assert plain


def _recomputed(case: int) -> bool:
    """Whether results and gradients are the same where the backward pass computes the forward one again."""
    inputs = CASES[case].draw((5, 1, 4), 48, torch.float32 if case < 9 else torch.bfloat16)
    again = partial(checkpoint, CASES[case].kernels, use_reentrant=False)
    pairs = zip(evaluate(again, inputs), evaluate(CASES[case].kernels, inputs), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@ALL
def test_kernels_are_recomputed(interpreter: ProcessPoolExecutor, case: int) -> None:
    assert interpreter.submit(_recomputed, case).result()


def _compiled_and_checked(case: int) -> list[bool]:
    """torch's own checks of the operators (schema, autograd, fake tensors, AOT), then a whole compiled graph."""
    inputs = CASES[case].draw((3, 0, 4), 24, torch.bfloat16)
    compiled = torch.compile(CASES[case].kernels, fullgraph=True, backend="aot_eager")
    found, expected = (evaluate(f, inputs) for f in (compiled, CASES[case].kernels))
    return [torch.equal(a, b) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("case", [pytest.param(i, marks=() if i == 2 else pytest.mark.long) for i in range(len(CASES))])
def test_kernels_pass_through_torch_compile(interpreter: ProcessPoolExecutor, case: int) -> None:
    found = interpreter.submit(_compiled_and_checked, case).result()
    assert found == [True] * len(found)


def _opcheck() -> list[dict[str, str]]:
    """What torch's own checks of the operators say, by check: schema, autograd, fake tensors, AOT."""
    operators = torch.ops.megasora_kernels
    (x, y, gate, scale, shift), (sample,), (dout, dnormed) = draw_gated_layernorm((3, 0, 4), 24, torch.bfloat16)
    a, b, c, d, e = (t.clone().requires_grad_() for t in (x, y, gate, scale, shift))
    found: list[dict[str, str]] = []

    def check(*case: Any, **only: Any) -> None:
        found.append(torch.library.opcheck(*case, **only, raise_exception=False))

    check(operators.layernorm_modulate.default, (a, d, e, sample, 1e-6))
    _, mean, rstd = operators.layernorm_modulate(x, scale, shift, sample, 1e-6)
    check(operators.layernorm_modulate_backward.default, (dout, x, scale, sample, mean, rstd))
    check(operators.gated.default, (a, b, c, sample))
    check(operators.gated_backward.default, (dout, y, gate, sample))
    static = ("test_schema", "test_autograd_registration", "test_faketensor")  # AOT's check adds up results, fp8 too
    check(operators.gated_layernorm.default, (a, b, c, d, e, sample, 1e-6, None), test_utils=static)
    check(operators.gated_layernorm_backward.default, (dout, dnormed, x, y, gate, scale, sample, mean, rstd))
    leaves, (rotation, K, eps, groups), (dy,) = draw_rope((3, 4), 24, torch.bfloat16)
    weighted = [t.clone().requires_grad_() for t in leaves]
    check(operators.qknorm_rope.default, (*weighted, rotation, K, eps, groups))
    check(operators.qknorm_rope_backward.default, (dy, *leaves, rotation, K, eps, groups))
    return found


@pytest.mark.long
def test_operators_pass_opcheck(interpreter: ProcessPoolExecutor) -> None:
    found = interpreter.submit(_opcheck).result()
    assert [set(said.values()) for said in found] == 8 * [{"SUCCESS"}], found


# Bugs that must be caught


def _with_stride_bug() -> list[str]:
    """Rows taken to lie side by side, given a part of wider ones."""
    copy = with_bug(qknorm_rope, "token * x_stride", "token * heads * head_width")
    (x, weight), fixed, grads = draw_rope((3, 2), 48, torch.float32)
    inputs = Inputs([torch.cat([x, x], 1)[:, :48], weight], fixed, grads)
    case = Case("seeded", copy.qknorm_rope_triton, copy.qknorm_rope_reference, draw_rope)
    with mock.patch("torch.Tensor.requires_grad_", lambda t: t):  # leaves keep their strides
        return (
            []
            if torch.equal(case.kernels(*inputs.leaves, *fixed), case.reference(*inputs.leaves, *fixed))
            else ["wrong"]
        )


def _with_mask_bug() -> str:
    copy = with_bug(gated, "tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)",
                    "tl.store(out + place, total.to(out.dtype.element_ty))")  # fmt: skip
    inputs = draw_gated((3, 2), 24, torch.float32)
    with pytest.raises(Exception) as found:  # noqa: PT011
        copy.gated_triton(*inputs.leaves, *inputs.fixed)
    return str(found.value)


def _with_race_bug() -> str:
    copy = with_bug(gated_layernorm, "slot = (block + owner) * width", "slot = owner * width")
    copy.BACKWARD_TOKENS = 4
    with pytest.raises(Exception) as found:  # noqa: PT011
        evaluate(copy.gated_layernorm_triton, draw_gated_layernorm((9, 2), 24, torch.float32))
    return str(found.value)


def _with_precision_bug() -> list[str]:
    copy = with_bug(
        layernorm_modulate, "* (1.0 + scales) + shifts", "* (1.0 + scales).to(tl.bfloat16).to(tl.float32) + shifts"
    )
    case = Case("seeded", copy.layernorm_modulate_triton, copy.layernorm_modulate_reference, draw_layernorm)
    return _excess(case, (3, 2), 24, torch.float32, 4)


def test_seeded_bugs_are_caught(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(_with_stride_bug).result() == ["wrong"]
    assert "store out of bounds" in interpreter.submit(_with_mask_bug).result()
    assert "race: store" in interpreter.submit(_with_race_bug).result()
    assert any(found.startswith("0:") for found in interpreter.submit(_with_precision_bug).result())
