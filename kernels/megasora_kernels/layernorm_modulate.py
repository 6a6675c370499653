"""LayerNorm without affine, then the modulation of adaptive LayerNorm, over a packed row of samples.

    y = (x - mean(x)) / sqrt(var(x) + eps) · (1 + scale[sample]) + shift[sample]

This is adaLN of DiT (Peebles and Xie, 2023, section 3.2) where one row holds several samples, each with its own scale
and shift. Statistics and modulation are fp32 whatever the type of x.

Shapes: L tokens of the row, S samples, D model width; x [L, D], scale and shift [S, D] fp32, sample [L] non-decreasing.

Cost in bf16: forward 4·L·D bytes and 8·L·D FLOPs; backward 6·L·D bytes, and L·D/2 more for the partial sums, and
14·L·D FLOPs. It pays over torch.compile in the backward: there the gradients of `scale[sample]` and `shift[sample]` are
either atomic adds of every element, in no fixed order, or two fp32 [L, D] tensors (16·L·D more bytes) and a sort; here
they stay in registers, one partial sum leaves for 32 tokens, and the order of addition is fixed.

On an H100, bf16, L = 32,760, D = 1536: forward 0.15 ms, with backward 0.47 (1 sample) to 0.50 ms (128); torch 2.8 to 3.0 ms,
torch.compile 0.6 to 0.8 ms.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megasora_kernels.packed import check_row, jit, row_launch, rows, spread
from megasora_kernels.run_sums import sum_runs
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a plain CPU install: only the reference is used
    triton = None

FORWARD_TOKENS = 8  # per program: enough to keep a sample's scale and shift in L1, few enough to fill the GPU
BACKWARD_TOKENS = 32  # per program: the partial sums cost 16·D bytes each, written and read


def layernorm_modulate_reference(x: Tensor, scale: Tensor, shift: Tensor, sample: Tensor, eps: float = 1e-6) -> Tensor:
    """What the kernels compute, in plain torch: fp32 inside, or fp64 where x is fp64."""
    inner = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(inner), (x.shape[-1],), eps=eps)
    return torch.addcmul(spread(shift, sample), normed, spread(1 + scale, sample)).to(x.dtype)


@jit
def _forward_kernel(
    x: tl.tensor,  # [tokens, width]
    scale: tl.tensor,  # [samples, width], rows `scale_stride` apart
    shift: tl.tensor,  # [samples, width], rows `shift_stride` apart
    sample: tl.tensor,  # [tokens]
    y: tl.tensor,  # [tokens, width]
    mean: tl.tensor,  # [tokens]
    rstd: tl.tensor,  # [tokens]
    tokens: tl.tensor,
    width: tl.tensor,
    scale_stride: tl.tensor,
    shift_stride: tl.tensor,
    eps: tl.tensor,
    block_tokens: tl.constexpr,
    block_width: tl.constexpr,
) -> None:
    """One program: `block_tokens` tokens, one after the other, each in registers from its load to its store."""
    column = tl.arange(0, block_width)
    inside = column < width
    first = tl.program_id(0).to(tl.int64) * block_tokens
    for token in range(first, tl.minimum(first + block_tokens, tokens)):
        owner = tl.load(sample + token).to(tl.int64)
        value = tl.load(x + token * width + column, mask=inside, other=0.0).to(tl.float32)
        scales = tl.load(scale + owner * scale_stride + column, mask=inside, other=0.0)
        shifts = tl.load(shift + owner * shift_stride + column, mask=inside, other=0.0)
        center = tl.sum(value, 0) / width
        centered = tl.where(inside, value - center, 0.0)
        inverse = tl.rsqrt(tl.sum(centered * centered, 0) / width + eps)
        out = centered * inverse * (1.0 + scales) + shifts
        tl.store(y + token * width + column, out.to(y.dtype.element_ty), mask=inside)
        tl.store(mean + token, center)
        tl.store(rstd + token, inverse)


@jit
def _backward_kernel(
    dy: tl.tensor,  # [tokens, width]
    x: tl.tensor,  # [tokens, width]
    scale: tl.tensor,  # [samples, width], rows `scale_stride` apart
    sample: tl.tensor,  # [tokens]
    mean: tl.tensor,  # [tokens]
    rstd: tl.tensor,  # [tokens]
    dx: tl.tensor,  # [tokens, width]
    scale_parts: tl.tensor,  # [slots, width]
    shift_parts: tl.tensor,  # [slots, width]
    tokens: tl.tensor,
    width: tl.tensor,
    scale_stride: tl.tensor,
    block_tokens: tl.constexpr,
    block_width: tl.constexpr,
) -> None:
    """One program: dx of `block_tokens` tokens, and for each run of one sample in them its part of dscale and dshift
    (run_sums.py)."""
    column = tl.arange(0, block_width)
    inside = column < width
    block = tl.program_id(0).to(tl.int64)
    end = tl.minimum((block + 1) * block_tokens, tokens)
    dscale = tl.zeros([block_width], tl.float32)
    dshift = tl.zeros([block_width], tl.float32)
    for token in range(block * block_tokens, end):
        owner = tl.load(sample + token).to(tl.int64)
        value = tl.load(x + token * width + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + token * width + column, mask=inside, other=0.0).to(tl.float32)
        scales = tl.load(scale + owner * scale_stride + column, mask=inside, other=0.0)
        inverse = tl.load(rstd + token)
        normed = (value - tl.load(mean + token)) * inverse  # beyond the width only ever times 0

        through = grad * (1.0 + scales)  # the gradient of `normed`
        along_one = tl.sum(through, 0) / width
        along_normed = tl.sum(through * normed, 0) / width
        out = (through - along_one - normed * along_normed) * inverse
        tl.store(dx + token * width + column, out.to(dx.dtype.element_ty), mask=inside)

        dscale += grad * normed
        dshift += grad
        following = tl.load(sample + token + 1, mask=token + 1 < end, other=-1).to(tl.int64)
        if following != owner:  # the run ends here
            slot = block + owner
            tl.store(scale_parts + slot * width + column, dscale, mask=inside)
            tl.store(shift_parts + slot * width + column, dshift, mask=inside)
            dscale = tl.zeros([block_width], tl.float32)
            dshift = tl.zeros([block_width], tl.float32)


@torch.library.custom_op("megasora_kernels::layernorm_modulate", mutates_args=())
def _forward(x: Tensor, scale: Tensor, shift: Tensor, sample: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    tokens, width = x.shape
    x, scale, shift, sample = x.contiguous(), rows(scale), rows(shift), sample.contiguous()
    y = torch.empty_like(x)
    mean = x.new_empty(tokens, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    grid = (triton.cdiv(tokens, FORWARD_TOKENS),)
    _forward_kernel[grid](
        x,
        scale,
        shift,
        sample,
        y,
        mean,
        rstd,
        tokens,
        width,
        scale.stride(0),
        shift.stride(0),
        eps,
        block_tokens=FORWARD_TOKENS,
        **row_launch(width),
    )
    return y, mean, rstd


@torch.library.custom_op("megasora_kernels::layernorm_modulate_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, scale: Tensor, sample: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (tokens, width), samples = x.shape, scale.shape[0]
    dy, x, scale, sample = dy.contiguous(), x.contiguous(), rows(scale), sample.contiguous()
    dx = torch.empty_like(x)
    blocks = triton.cdiv(tokens, BACKWARD_TOKENS)
    scale_parts, shift_parts = scale.new_empty(2, blocks + samples, width)
    _backward_kernel[(blocks,)](
        dy,
        x,
        scale,
        sample,
        mean,
        rstd,
        dx,
        scale_parts,
        shift_parts,
        tokens,
        width,
        scale.stride(0),
        block_tokens=BACKWARD_TOKENS,
        **row_launch(width),
    )
    dscale, dshift = (sum_runs(parts, sample, samples, BACKWARD_TOKENS) for parts in (scale_parts, shift_parts))
    return dx, dscale, dshift


@_forward.register_fake
def _(x: Tensor, *_rest: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), mean, torch.empty_like(mean)


@_backward.register_fake
def _(_dy: Tensor, x: Tensor, scale: Tensor, *_rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, scale, _, sample, _ = inputs
    _, mean, rstd = output
    ctx.set_materialize_grads(False)  # else two launches for zero gradients of mean and rstd
    ctx.save_for_backward(x, scale, sample, mean, rstd)


def _differentiate(ctx: Any, dy: Tensor, *_statistics: None) -> tuple[Tensor, Tensor, Tensor, None, None]:
    dx, dscale, dshift = _backward(dy, *ctx.saved_tensors)
    return dx, dscale, dshift, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def layernorm_modulate_triton(x: Tensor, scale: Tensor, shift: Tensor, sample: Tensor, eps: float = 1e-6) -> Tensor:
    """The kernels, with autograd, torch.compile and fake tensors: on CUDA, or on CPU in Triton's interpreter."""
    if triton is None:
        raise ImportError("layernorm_modulate on CUDA needs triton: pip install triton")
    return _forward(x, scale, shift, sample, eps)[0]


def layernorm_modulate(x: Tensor, scale: Tensor, shift: Tensor, sample: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm of each token, then its sample's scale and shift: kernels on CUDA, the reference on CPU and for fp64.

    x [L, D] of any float type; scale and shift [S, D] fp32 (fp64 where x is), of any strides; sample [L] int32 or
    int64 in 0..S-1, non-decreasing: a sample's tokens lie side by side, and a sample may have none. Nothing checks the
    values of `sample` on the GPU, since that would wait for it. Returns [L, D] in the type of x.
    Raises ValueError where shapes or types do not fit, ImportError on CUDA without Triton.
    """
    check_row({"x": x}, {"scale": scale, "shift": shift}, sample)
    if x.is_cuda and x.dtype != torch.float64:
        return layernorm_modulate_triton(x, scale, shift, sample, eps)
    return layernorm_modulate_reference(x, scale, shift, sample, eps)
