"""Linear layers and MLPs in block-scaled fp8, forward and backward: the quantisers, the activation and the products together.

    y = x·Wᵀ + b        dx = dy·W        dW = dyᵀ·x

All three products take e4m3 operands, x and dy with "row" scales, W with "tile" scales (DeepSeek-V3 2024, section 3.3);
what is kept for the backward is fp8 too. Everything is a call of a function beside this file, so it runs wherever those do.
Products and the gradient of the bias are summed in fp32.

Shapes: L tokens, a multiple of 16; x [L, D], W [N, D], b [N], y [L, N]; of an MLP W1 [H, D], W2 [N, F] (see activation_fp8.py).
"""

from __future__ import annotations

from typing import Any

import torch
from megasora_kernels.activation_fp8 import Activation, activation_fp8, activation_fp8_backward
from megasora_kernels.fp8_gemm import fp8_gemm
from megasora_kernels.fp8_quantize import Quantised, quantise_both
from torch import Tensor


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_x_turned = quantise_both(x, "row")
        of_weight, of_weight_turned = quantise_both(weight, "tile")
        y = fp8_gemm(of_x, of_weight, x.dtype)
        ctx.save_for_backward(*of_x_turned, *of_weight_turned)
        ctx.types = weight.dtype, bias
        return y if bias is None else y + bias.to(y.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, x_scale, weight, weight_scale = ctx.saved_tensors
        dtype, bias = ctx.types
        of_dy, of_dy_turned = quantise_both(grads[0], "row")
        dx = fp8_gemm(of_dy, Quantised(weight, weight_scale), grads[0].dtype)
        dweight = fp8_gemm(of_dy_turned, Quantised(x, x_scale), dtype)
        return dx, dweight, None if bias is None else grads[0].float().sum(0).to(bias.dtype)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, activation: Activation
    ) -> Tensor:
        of_x, of_x_turned = quantise_both(x, "row")
        of_weight1, of_weight1_turned = quantise_both(weight1, "tile")
        of_weight2, of_weight2_turned = quantise_both(weight2, "tile")
        h = fp8_gemm(of_x, of_weight1, x.dtype)  # [L, H]
        of_a, of_a_turned = activation_fp8(h, bias1, activation)
        ctx.save_for_backward(h, bias1, bias2, *of_x_turned, *of_weight1_turned, *of_weight2_turned, *of_a_turned)
        ctx.types = activation, weight1.dtype, weight2.dtype
        return fp8_gemm(of_a, of_weight2, x.dtype) + bias2.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, bias1, bias2, *quantised = ctx.saved_tensors
        x, weight1, weight2, a = (Quantised(*pair) for pair in zip(quantised[::2], quantised[1::2], strict=True))
        activation, dtype1, dtype2 = ctx.types
        dy = grads[0]
        of_dy, of_dy_turned = quantise_both(dy, "row")
        da = fp8_gemm(of_dy, weight2, dy.dtype)  # [L, F]
        of_dh, of_dh_turned, dbias1 = activation_fp8_backward(da, h, bias1, activation)
        dx = fp8_gemm(of_dh, weight1, dy.dtype)
        dweight1 = fp8_gemm(of_dh_turned, x, dtype1)
        dweight2 = fp8_gemm(of_dy_turned, a, dtype2)
        return dx, dweight1, dbias1.to(bias1.dtype), dweight2, dy.float().sum(0).to(bias2.dtype), None


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[L, D] -> [L, N] in the type of x, with autograd. Raises ValueError where L, D or N is no multiple of 16."""
    _check(x, weight)
    y: Tensor = _Linear.apply(x, weight, bias)
    return y


def fp8_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, activation: Activation
) -> Tensor:
    """[L, D] -> [L, N]: linear, activation, linear. Raises ValueError where L or a width is no multiple of 16."""
    _check(x, weight1, weight2)
    y: Tensor = _MLP.apply(x, weight1, bias1, weight2, bias2, activation)
    return y


def _check(x: Tensor, *weights: Tensor) -> None:
    if any(size % 16 for t in (x, *weights) for size in t.shape):
        raise ValueError(f"sizes must be multiples of 16: {[[*t.shape] for t in (x, *weights)]}")
