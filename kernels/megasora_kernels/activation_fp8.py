"""The activation between the two layers of an MLP, straight to fp8: bias and GELU, or bias and SwiGLU, quantised twice.

    a = gelu(h + bias)    or    a = silu(g + bias_g) · (u + bias_u), [g, u] = h

`gelu` is the tanh approximation (Hendrycks and Gimpel 2016), SwiGLU is Shazeer's (2020). Forward gives the fp8 of a, for the
product with the second weight, and of its transpose, for that weight's gradient; backward gives the same two of the
gradient of h, and the gradient of the bias. Nothing but h and bias is kept.

Shapes: L tokens, F hidden width; h [L, H] with H = F (gelu) or 2·F (swiglu), bias [H], da [L, F]. Scales go over 128
neighbours of a row ("row" of fp8_quantize.py): a tile of 128 x 128 in registers has whole groups both ways.

Cost in bf16, GELU: forward 4·L·F bytes (2 read, 1 + 1 written) where torch.compile's fused activation moves 4 and two
quantisers 6 more; backward 6·L·F against 12. About 20 FLOPs an element each. On an
H100: right; forward at 33 % of that bound (SwiGLU 44 %), backward at 33 %: room is left.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from megasora_kernels.fp8_quantize import (
    GROUP,
    TINY,
    Quantised,
    empty_results,
    quantise_both_reference,
    quantise_tile,
)
from megasora_kernels.packed import jit
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a plain CPU install: only the reference is used
    triton = None

Activation = Literal["gelu", "swiglu"]
E4M3, E4M3_MAX = torch.float8_e4m3fn, 448.0
Both = tuple[Quantised, Quantised]


def activate(h: Tensor, bias: Tensor, activation: Activation) -> Tensor:
    """[L, H] -> [L, F] in plain torch, in fp32 or fp64."""
    x = h.to(torch.promote_types(h.dtype, torch.float32))
    x = x + bias.to(x.dtype)
    if activation == "gelu":
        return F.gelu(x, approximate="tanh")
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def activation_fp8_reference(h: Tensor, bias: Tensor, activation: Activation) -> Both:
    """What the forward kernel computes, in plain torch."""
    return quantise_both_reference(activate(h, bias, activation), "row")


def activation_fp8_backward_reference(
    da: Tensor, h: Tensor, bias: Tensor, activation: Activation
) -> tuple[Quantised, Quantised, Tensor]:
    """What the backward kernel computes, in plain torch."""
    with torch.enable_grad():
        x = (h.to(torch.promote_types(h.dtype, torch.float32)) + bias).detach().requires_grad_()
        a = activate(x, torch.zeros_like(bias), activation)
    (dh,) = torch.autograd.grad(a, x, da.to(a.dtype))
    return *quantise_both_reference(dh, "row"), dh.sum(0)


@jit
def _activate(x: tl.tensor, up: tl.tensor, swiglu: tl.constexpr) -> tl.tensor:
    if swiglu:
        return x * tl.sigmoid(x) * up
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh(u)) / 2 = sigmoid(2u)


@jit
def _load(
    h: tl.tensor,
    bias: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    inside: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
) -> tl.tensor:
    """A tile of h plus bias, in fp32."""
    value = tl.load(h + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    return value + tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]


@jit
def _forward_kernel(
    h: tl.tensor,  # [rows, columns] or, for swiglu, [rows, 2 · columns]
    bias: tl.tensor,
    data: tl.tensor,  # [rows, columns] fp8
    scale: tl.tensor,
    turned: tl.tensor,  # [columns, rows] fp8
    turned_scale: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,  # of h
    swiglu: tl.constexpr,
    largest: tl.constexpr,
    tiny: tl.constexpr,
) -> None:
    """One program: a tile of 128 x 128."""
    row = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    column = tl.program_id(1).to(tl.int64) * 128 + tl.arange(0, 128)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = _load(h, bias, row, column, inside, columns, stride)
    up = _load(h + columns, bias + columns, row, column, inside, columns, stride) if swiglu else x
    value = tl.where(inside, _activate(x, up, swiglu), 0.0)
    quantise_tile(value, scale, data, scale, turned, turned_scale, rows, columns, "row", largest, tiny, True)


@jit
def _backward_kernel(
    da: tl.tensor,  # [rows, half]: of the activation's output
    h: tl.tensor,  # [rows, columns]
    bias: tl.tensor,
    data: tl.tensor,  # [rows, columns] fp8 of the gradient of h
    scale: tl.tensor,
    turned: tl.tensor,  # [columns, rows] fp8
    turned_scale: tl.tensor,
    parts: tl.tensor,  # [blocks of rows, columns] of the bias's gradient
    rows: tl.tensor,
    columns: tl.tensor,
    half: tl.tensor,  # columns of da: all, or those of one half of h
    swiglu: tl.constexpr,
    largest: tl.constexpr,
    tiny: tl.constexpr,
) -> None:
    """One program: a tile of 128 x 128 of the gradient of h. For swiglu one may lie across both halves."""
    row = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    column = tl.program_id(1).to(tl.int64) * 128 + tl.arange(0, 128)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if swiglu:
        second = (column >= half)[None, :]  # the half that is multiplied
        of_a = tl.where(column >= half, column - half, column)
        gate = _load(h, bias, row, of_a, inside, half, columns)
        up = _load(h + half, bias + half, row, of_a, inside, half, columns)
        sigmoid = tl.sigmoid(gate)
        slope = tl.where(second, gate * sigmoid, up * sigmoid * (1.0 + gate * tl.sigmoid(-gate)))
    else:
        of_a = column
        x = _load(h, bias, row, column, inside, columns, columns)
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        sigmoid = tl.sigmoid(inner)
        slope = sigmoid + x * sigmoid * tl.sigmoid(-inner) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    grad = tl.load(da + row[:, None] * half + of_a[None, :], mask=inside, other=0.0).to(tl.float32)
    value = tl.where(inside, grad * slope, 0.0)
    tl.store(parts + tl.program_id(0) * columns + column, tl.sum(value, 0), mask=column < columns)
    quantise_tile(value, scale, data, scale, turned, turned_scale, rows, columns, "row", largest, tiny, True)


@torch.library.custom_op("megasora_kernels::activation_fp8", mutates_args=())
def _forward(h: Tensor, bias: Tensor, activation: str) -> list[Tensor]:
    h, bias = h.contiguous(), bias.contiguous()
    M, N = h.shape[0], h.shape[1] // (2 if activation == "swiglu" else 1)
    results = empty_results(h, M, N, "row", E4M3, True)
    _forward_kernel[(triton.cdiv(M, GROUP), triton.cdiv(N, GROUP))](
        h, bias, *results, M, N, h.shape[1],
        swiglu=activation == "swiglu", largest=E4M3_MAX, tiny=TINY, num_warps=8,
    )  # fmt: skip
    return results


@torch.library.custom_op("megasora_kernels::activation_fp8_backward", mutates_args=())
def _backward(da: Tensor, h: Tensor, bias: Tensor, activation: str) -> list[Tensor]:
    da, h, bias = da.contiguous(), h.contiguous(), bias.contiguous()
    M, N = h.shape
    results = empty_results(h, M, N, "row", E4M3, True)
    parts = h.new_empty(triton.cdiv(M, GROUP), N, dtype=torch.float32)
    _backward_kernel[(len(parts), triton.cdiv(N, GROUP))](
        da, h, bias, *results, parts, M, N, da.shape[1],
        swiglu=activation == "swiglu", largest=E4M3_MAX, tiny=TINY, num_warps=8,
    )  # fmt: skip
    return [*results, parts.sum(0)]


@_forward.register_fake
def _(h: Tensor, bias: Tensor, activation: str) -> list[Tensor]:
    return empty_results(h, h.shape[0], h.shape[1] // (2 if activation == "swiglu" else 1), "row", E4M3, True)


@_backward.register_fake
def _(da: Tensor, h: Tensor, bias: Tensor, activation: str) -> list[Tensor]:
    return [*empty_results(h, h.shape[0], h.shape[1], "row", E4M3, True), h.new_empty(h.shape[1], dtype=torch.float32)]


def activation_fp8_triton(h: Tensor, bias: Tensor, activation: Activation) -> Both:
    """The forward kernel, on CUDA or on CPU in Triton's interpreter."""
    if triton is None:
        raise ImportError("activation_fp8 on CUDA needs triton: pip install triton")
    data, scale, turned, turned_scale = _forward(h, bias, activation)
    return Quantised(data, scale), Quantised(turned, turned_scale)


def activation_fp8_backward_triton(
    da: Tensor, h: Tensor, bias: Tensor, activation: Activation
) -> tuple[Quantised, Quantised, Tensor]:
    """The backward kernel, likewise."""
    data, scale, turned, turned_scale, dbias = _backward(da, h, bias, activation)
    return Quantised(data, scale), Quantised(turned, turned_scale), dbias


def activation_fp8(h: Tensor, bias: Tensor, activation: Activation) -> Both:
    """h [L, H] and bias [H] -> the fp8 of the activation [L, F] and of its transpose: kernels on CUDA, else the reference.

    Torch carries no gradient through fp8: fp8_linear.py joins this, its backward below and the products into one function
    that has one. Raises ValueError where shapes do not fit, ImportError on CUDA without Triton.
    """
    _check(h, bias, activation)
    function = activation_fp8_triton if h.is_cuda else activation_fp8_reference
    return function(h, bias, activation)


def activation_fp8_backward(
    da: Tensor, h: Tensor, bias: Tensor, activation: Activation
) -> tuple[Quantised, Quantised, Tensor]:
    """da [L, F] -> the fp8 of the gradient of h, of its transpose, and the gradient of bias [H] fp32. Raises as the forward."""
    _check(h, bias, activation)
    width = h.shape[1] // (2 if activation == "swiglu" else 1)
    if da.shape != (h.shape[0], width):
        raise ValueError(f"da must be {[h.shape[0], width]}, not {[*da.shape]}")
    function = activation_fp8_backward_triton if h.is_cuda else activation_fp8_backward_reference
    return function(da, h, bias, activation)


def _check(h: Tensor, bias: Tensor, activation: str) -> None:
    if activation not in ("gelu", "swiglu"):
        raise ValueError(f"activation={activation}: gelu or swiglu")
    if h.ndim != 2 or bias.shape != h.shape[1:] or (activation == "swiglu" and h.shape[1] % 2):
        raise ValueError(f"h [L, H] and bias [H] do not fit: {[*h.shape]}, {[*bias.shape]}")
