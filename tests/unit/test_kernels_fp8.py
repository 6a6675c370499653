"""The kernels to and from fp8: bytes of the quantisers, the activation, the product, and what linear layers made of them
learn."""

from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from megasora_kernels import activation_fp8, fp8_gemm, fp8_linear, fp8_quantize
from megasora_kernels.fp8_quantize import Quantised, Scaling, dequantise
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.seeded import with_bug

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ACTIVATIONS = pytest.mark.parametrize("activation", ["gelu", "swiglu"])


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Of very different sizes from row to row and column to column, as activations are; some zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    for dim, size in enumerate(shape):
        where = [1] * len(shape)
        where[dim] = size
        x = x * torch.exp(2 * torch.randn(size, generator=generator)).view(where)
    x[0, : shape[1] // 2] = 0
    return x.bfloat16()


def same_bytes(a: Quantised, b: Quantised) -> bool:
    return torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8)) and torch.equal(a.scale, b.scale)


# References


def test_quantised_by_hand() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5, 896.0]])
    data, scale = fp8_quantize.quantise(x, "tensor")
    assert scale == 2.0
    assert data.float().tolist() == [[0.5, -1.0, 0.25, 448.0]]
    wide = torch.cat([x.expand(1, 4).repeat(1, 32), torch.zeros(1, 3)], 1)  # a whole group and a bit of zeros
    data, scale = fp8_quantize.quantise(wide, "row")
    assert data.shape == (1, 131)
    assert scale.tolist() == [[2.0, pytest.approx(1e-12 / 448)]]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("scaling", fp8_quantize.SCALINGS)
def test_quantised_is_near(scaling: Scaling, dtype: torch.dtype) -> None:
    """Half a step of the type: 2^-4 of a number of e4m3, 2^-3 of one of e5m2, or of the smallest normal one of its group."""
    x = draw(200, 300)
    quantised = fp8_quantize.quantise(x, scaling, dtype)
    back = dequantise(quantised, scaling)
    smallest = dequantise(
        Quantised(torch.full(x.shape, torch.finfo(dtype).smallest_normal).to(dtype), quantised.scale), scaling
    )
    bound = torch.maximum(x.float().abs(), smallest) * torch.finfo(dtype).eps / 2 * 1.001
    assert ((back - x.float()).abs() <= bound).all()


def test_scalings_are_torchaos() -> None:
    """Bytes of torchao's tensor-wise cast, and our "row" of one group a row against its row-wise one."""
    from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated

    x = draw(64, 128)
    scale = tensor_to_scale(x, E4M3)
    theirs = to_fp8_saturated(x.float() * scale, E4M3)
    ours = fp8_quantize.quantise(x, "tensor")
    assert torch.equal(ours.data.view(torch.uint8), theirs.view(torch.uint8))
    assert ours.scale * scale == pytest.approx(1)


@pytest.mark.parametrize(
    "change, message",
    [({"x": torch.zeros(3)}, "must be a matrix"), ({"x": torch.zeros(2, 0)}, "must be a matrix"),
     ({"scaling": "column"}, "tensor, row or tile"), ({"dtype": torch.float16}, "float8_e4m3fn")],
)  # fmt: skip
def test_what_cannot_be_quantised_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fp8_quantize.quantise(**({"x": torch.zeros(4, 4), "scaling": "row"} | change))


@ACTIVATIONS
def test_activation_is_torchs(activation: activation_fp8.Activation) -> None:
    h, bias = draw(40, 256).float(), draw(2, 256)[1].float()
    x = (h + bias).double().requires_grad_()
    a = F.gelu(x, approximate="tanh") if activation == "gelu" else F.silu(x[:, :128]) * x[:, 128:]
    of_a, turned = activation_fp8.activation_fp8(h, bias, activation)
    assert same_bytes(turned, fp8_quantize.quantise(activation_fp8.activate(h, bias, activation).T, "row"))
    step = of_a.scale.repeat_interleave(128, 1)[:, : a.shape[1]]
    assert ((dequantise(of_a, "row") - a).abs() <= a.abs() / 16 + step / 64).all()
    da = draw(*a.shape, seed=1).float()
    (dh,) = torch.autograd.grad(a, x, da.double())
    of_dh, _, dbias = activation_fp8.activation_fp8_backward(da, h, bias, activation)
    torch.testing.assert_close(dbias.double(), dh.sum(0), rtol=1e-4, atol=1e-2)
    assert F.cosine_similarity(dequantise(of_dh, "row").flatten().double(), dh.flatten(), 0) > 0.999


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        activation_fp8.activation_fp8(torch.zeros(4, 6), torch.zeros(5), "gelu")
    with pytest.raises(ValueError, match="gelu or swiglu"):
        activation_fp8.activation_fp8(torch.zeros(4, 6), torch.zeros(6), "relu")  # type: ignore[arg-type]
    for name, fits, width in (("gelu", 6, 3), ("swiglu", 3, 6)):
        with pytest.raises(ValueError, match=rf"da must be \[4, {fits}\], not \[4, {width}\]"):
            activation_fp8.activation_fp8_backward(torch.zeros(4, width), torch.zeros(4, 6), torch.zeros(6), name)
    a, b = (fp8_quantize.quantise(torch.ones(32, width), "row") for width in (32, 48))
    with pytest.raises(ValueError, match="K a multiple of 16"):
        fp8_gemm.fp8_gemm(a, b, torch.float32)
    with pytest.raises(ValueError, match="scales must be"):
        fp8_gemm.fp8_gemm(a, Quantised(a.data, a.scale[:2]), torch.float32)
    with pytest.raises(ValueError, match="multiples of 16"):
        fp8_linear.fp8_linear(torch.zeros(8, 16), torch.zeros(16, 16), None)


def gradients(function: Any, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in leaves]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


def test_linear_and_mlp_have_the_gradients_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    x, grad = 4 * normal(96, 64), normal(96, 48)
    linear = [x, normal(48, 64), normal(48)]
    found, expected = gradients(fp8_linear.fp8_linear, linear, grad), gradients(F.linear, linear, grad)
    assert [F.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.999 for a, b in zip(found, expected, strict=True)] == [
        True
    ] * 4
    assert torch.equal(found[3], expected[3])
    whole = [x, normal(160, 64), normal(160), normal(48, 160), normal(48)]
    found = gradients(lambda *given: fp8_linear.fp8_mlp(*given, "gelu"), whole, grad)
    cosines = [
        F.cosine_similarity(a.flatten(), b.flatten(), 0)
        for a, b in zip(found, gradients(mlp, whole, grad), strict=True)
    ]
    assert min(cosines) > 0.998


def test_fake_tensors_pass() -> None:
    with FakeTensorMode():
        x = torch.empty(40, 200, dtype=torch.bfloat16)
        both = fp8_quantize.quantise_both_triton(x, "row")
        assert [(tuple(q.data.shape), tuple(q.scale.shape)) for q in both] == [
            ((40, 200), (40, 2)),
            ((200, 40), (200, 1)),
        ]
        of_a, turned = activation_fp8.activation_fp8_triton(x, torch.empty(200), "swiglu")
        assert (of_a.data.shape, turned.data.shape) == ((40, 100), (100, 40))
        *_, dbias = activation_fp8.activation_fp8_backward_triton(torch.empty(40, 100), x, torch.empty(200), "swiglu")
        assert dbias.shape == (200,)
        a = Quantised(torch.empty(40, 128, dtype=E4M3), torch.empty(40, 1))
        assert fp8_gemm.fp8_gemm_triton(a, a, torch.bfloat16).shape == (40, 40)


# In the interpreter


def _equal_bytes(scaling: Scaling, dtype: torch.dtype, rows: int, columns: int) -> list[bool]:
    x = draw(rows, columns)
    found = [fp8_quantize.quantise_triton(x, scaling, dtype), *fp8_quantize.quantise_both_triton(x, scaling, dtype)]
    expected = fp8_quantize.quantise_both_reference(x, scaling, dtype)
    return [same_bytes(a, b) for a, b in zip(found, (expected[0], *expected), strict=True)]


@pytest.mark.parametrize("rows, columns", [(130, 200), (1, 1), (128, 256)])
@pytest.mark.parametrize("dtype", [E4M3, pytest.param(E5M2, marks=pytest.mark.long)])
@pytest.mark.parametrize("scaling", fp8_quantize.SCALINGS)
def test_quantisers_bytes_are_exact(
    interpreter: ProcessPoolExecutor, scaling: Scaling, dtype: torch.dtype, rows: int, columns: int
) -> None:
    assert interpreter.submit(_equal_bytes, scaling, dtype, rows, columns).result() == [True] * 3


def _activation_errors(activation: activation_fp8.Activation, rows: int, hidden: int) -> list[tuple[float, ...]]:
    """Of a, its transpose, dh, its transpose, dbias: the kernel's and the reference's distance from fp64, and its own size."""
    h, bias = draw(rows, hidden), draw(2, hidden, seed=1)[1].float()
    da = draw(rows, hidden if activation == "gelu" else hidden // 2, seed=2)
    x = (h.double() + bias.double()).requires_grad_()
    a = activation_fp8.activate(x, torch.zeros_like(bias).double(), activation)
    (dh,) = torch.autograd.grad(a, x, da.double())
    a = a.detach()
    results = []
    for forward, backward in (
        (activation_fp8.activation_fp8_triton, activation_fp8.activation_fp8_backward_triton),
        (activation_fp8.activation_fp8_reference, activation_fp8.activation_fp8_backward_reference),
    ):
        *of_dh, dbias = backward(da, h, bias, activation)
        back = [dequantise(q, "row").double() for q in (*forward(h, bias, activation), *of_dh)]
        pairs = zip([*back, dbias.double()], [a, a.T, dh, dh.T, dh.sum(0)], strict=True)
        results.append([(found - exact).norm().item() for found, exact in pairs])
    sizes = [exact.norm().item() for exact in (a, a.T, dh, dh.T, dh.abs().sum(0))]
    return list(zip(*results, sizes, strict=True))


@ACTIVATIONS
@pytest.mark.parametrize("rows, hidden", [(130, 296), pytest.param(1, 32, marks=pytest.mark.long)])
def test_activation_kernels_are_as_exact_as_torch(
    interpreter: ProcessPoolExecutor, activation: activation_fp8.Activation, rows: int, hidden: int
) -> None:
    for ours, torchs, size in interpreter.submit(_activation_errors, activation, rows, hidden).result():
        assert ours <= 1.02 * torchs + 2**-22 * size  # groups of one number are exact: there fp32's last bit is all


def _product_error(scaling: Scaling, M: int, N: int, K: int, module: Any = fp8_gemm) -> float:
    """Relative to the product of the dequantised matrices in fp64."""
    a, b = fp8_quantize.quantise(draw(M, K), "row"), fp8_quantize.quantise(draw(N, K, seed=1), scaling)
    exact = dequantise(a, "row").double() @ dequantise(b, scaling).double().T
    first = module._gemm_kernel.configs[:1]  # the interpreter cannot time
    with mock.patch.object(module._gemm_kernel, "configs", first):
        return ((module.fp8_gemm_triton(a, b, torch.float32) - exact).norm() / exact.norm()).item()


def _seeded_product_error() -> float:
    """The scales of the first block of 128 for all of them."""
    copy = with_bug(fp8_gemm, "row.to(tl.int64) * blocks + block, mask", "row.to(tl.int64) * blocks, mask")
    return _product_error("tile", 40, 24, 272, copy)


@pytest.mark.parametrize("scaling", ["tile", "row"])
@pytest.mark.parametrize("M, N, K", [(40, 24, 272), pytest.param(130, 200, 128, marks=pytest.mark.long)])
def test_product_is_exact(interpreter: ProcessPoolExecutor, scaling: Scaling, M: int, N: int, K: int) -> None:
    assert interpreter.submit(_product_error, scaling, M, N, K).result() < 1e-6


def _seeded_bytes() -> list[bool]:
    """Rounded by an approximate division, as Triton's own `/` is on a GPU: some scale must differ in its last bit."""
    copy = with_bug(fp8_quantize, "tl.div_rn(amax, largest)", "(amax * (1.0 / largest))")
    x = draw(130, 200)
    return [same_bytes(copy.quantise_triton(x, "row"), fp8_quantize.quantise_reference(x, "row"))]


def test_seeded_bugs_are_caught(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(_seeded_product_error).result() > 1e-2
    assert interpreter.submit(_seeded_bytes).result() == [False]
