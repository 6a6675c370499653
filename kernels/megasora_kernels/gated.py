"""A residual with a gate of its own for each sample, over a packed row: what adaptive LayerNorm-zero ends a branch with.

    out = x + gate[sample] · y

This is adaLN-zero of DiT (Peebles and Xie, 2023, section 3.2) where one row holds several samples. The gate is fp32 whatever
the types of x and y, and so is the sum.

Shapes: L tokens of the row, S samples, D model width; x and y [L, D], gate [S, D] fp32, sample [L] non-decreasing.

Cost in bf16: forward 6·L·D bytes, backward 6·L·D and L·D/4 for the partial sums. In torch the gates are spread to an fp32
[L, D] tensor, which autograd keeps, and the gate's gradient is atomic adds of every element, in no fixed order.

On an H100, bf16, L = 32,760, D = 1536, 1 to 128 samples: forward 0.15 ms, with backward 0.30 to 0.34 ms; torch 0.5 and 1.5 to
1.7 ms.
"""

from __future__ import annotations

from typing import Any

import torch
from megasora_kernels.packed import check_row, jit, row_launch, rows, spread
from megasora_kernels.run_sums import sum_runs
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a plain CPU install: only the reference is used
    triton = None

FORWARD_TOKENS = 8  # per program, as in layernorm_modulate
BACKWARD_TOKENS = 32


def gated_reference(x: Tensor, y: Tensor, gate: Tensor, sample: Tensor) -> Tensor:
    """What the kernels compute, in plain torch, which rounds once more where x is not fp32."""
    gates = spread(gate, sample)
    return torch.addcmul(x, gates, y) if x.dtype == y.dtype == gates.dtype else x + (gates * y).type_as(x)


@jit
def _forward_kernel(
    x: tl.tensor,  # [tokens, width]
    y: tl.tensor,  # [tokens, width]
    gate: tl.tensor,  # [samples, width], rows `gate_stride` apart
    sample: tl.tensor,  # [tokens]
    out: tl.tensor,  # [tokens, width]
    tokens: tl.tensor,
    width: tl.tensor,
    gate_stride: tl.tensor,
    block_tokens: tl.constexpr,
    block_width: tl.constexpr,
) -> None:
    """One program: `block_tokens` tokens, one after the other."""
    column = tl.arange(0, block_width)
    inside = column < width
    first = tl.program_id(0).to(tl.int64) * block_tokens
    for token in range(first, tl.minimum(first + block_tokens, tokens)):
        owner = tl.load(sample + token).to(tl.int64)
        place = token * width + column
        gates = tl.load(gate + owner * gate_stride + column, mask=inside, other=0.0)
        branch = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
        total = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) + gates * branch
        tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    dout: tl.tensor,  # [tokens, width]
    y: tl.tensor,  # [tokens, width]
    gate: tl.tensor,  # [samples, width], rows `gate_stride` apart
    sample: tl.tensor,  # [tokens]
    dy: tl.tensor,  # [tokens, width]
    parts: tl.tensor,  # [slots, width]
    tokens: tl.tensor,
    width: tl.tensor,
    gate_stride: tl.tensor,
    block_tokens: tl.constexpr,
    block_width: tl.constexpr,
) -> None:
    """One program: dy of `block_tokens` tokens, and for each run of one sample in them its part of dgate (run_sums.py)."""
    column = tl.arange(0, block_width)
    inside = column < width
    block = tl.program_id(0).to(tl.int64)
    end = tl.minimum((block + 1) * block_tokens, tokens)
    dgate = tl.zeros([block_width], tl.float32)
    for token in range(block * block_tokens, end):
        owner = tl.load(sample + token).to(tl.int64)
        place = token * width + column
        gates = tl.load(gate + owner * gate_stride + column, mask=inside, other=0.0)
        grad = tl.load(dout + place, mask=inside, other=0.0).to(tl.float32)
        dgate += grad * tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(dy + place, (grad * gates).to(dy.dtype.element_ty), mask=inside)
        following = tl.load(sample + token + 1, mask=token + 1 < end, other=-1).to(tl.int64)
        if following != owner:  # the run ends here
            tl.store(parts + (block + owner) * width + column, dgate, mask=inside)
            dgate = tl.zeros([block_width], tl.float32)


@torch.library.custom_op("megasora_kernels::gated", mutates_args=())
def _forward(x: Tensor, y: Tensor, gate: Tensor, sample: Tensor) -> Tensor:
    tokens, width = x.shape
    x, y, gate, sample = x.contiguous(), y.contiguous(), rows(gate), sample.contiguous()
    out = torch.empty_like(x)
    _forward_kernel[(triton.cdiv(tokens, FORWARD_TOKENS),)](
        x, y, gate, sample, out, tokens, width, gate.stride(0), block_tokens=FORWARD_TOKENS, **row_launch(width)
    )
    return out


@torch.library.custom_op("megasora_kernels::gated_backward", mutates_args=())
def _backward(dout: Tensor, y: Tensor, gate: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    (tokens, width), samples = y.shape, gate.shape[0]
    dout, y, gate, sample = dout.contiguous(), y.contiguous(), rows(gate), sample.contiguous()
    dy = torch.empty_like(y)
    blocks = triton.cdiv(tokens, BACKWARD_TOKENS)
    parts = gate.new_empty(blocks + samples, width)
    _backward_kernel[(blocks,)](
        dout, y, gate, sample, dy, parts, tokens, width, gate.stride(0),
        block_tokens=BACKWARD_TOKENS, **row_launch(width),
    )  # fmt: skip
    return dy, sum_runs(parts, sample, samples, BACKWARD_TOKENS)


@_forward.register_fake
def _(x: Tensor, *_rest: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_backward.register_fake
def _(_dout: Tensor, y: Tensor, gate: Tensor, _sample: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
    _x, y, gate, sample = inputs
    ctx.save_for_backward(y, gate, sample)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    dy, dgate = _backward(dout, *ctx.saved_tensors)
    return dout, dy, dgate, None


_forward.register_autograd(_differentiate, setup_context=_save)


def gated_triton(x: Tensor, y: Tensor, gate: Tensor, sample: Tensor) -> Tensor:
    """The kernels, with autograd, torch.compile and fake tensors: on CUDA, or on CPU in Triton's interpreter."""
    if triton is None:
        raise ImportError("gated on CUDA needs triton: pip install triton")
    return _forward(x, y, gate, sample)


def gated(x: Tensor, y: Tensor, gate: Tensor, sample: Tensor) -> Tensor:
    """x + gate[sample] · y in the type of x: kernels on CUDA, the reference on CPU and for fp64.

    x and y [L, D] of any float types; gate [S, D] fp32 (fp64 where x is), of any strides; sample [L] int32 or int64 in 0..S-1,
    non-decreasing. Nothing checks the values of `sample` on the GPU, since that would wait for it.
    Raises ValueError where shapes or types do not fit, ImportError on CUDA without Triton.
    """
    check_row({"x": x, "y": y}, {"gate": gate}, sample)
    if x.is_cuda and x.dtype != torch.float64:
        return gated_triton(x, y, gate, sample)
    return gated_reference(x, y, gate, sample)
