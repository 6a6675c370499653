"""A gated residual, and of the sum LayerNorm with each sample's scale and shift: from one branch of a block to the next.

    out = x + gate[sample] · y        (out = x + y without a gate)
    normed = (out - mean(out)) / sqrt(var(out) + eps) · (1 + scale[sample]) + shift[sample]

adaLN-zero of DiT (Peebles and Xie, 2023, section 3.2), where the end of one branch and the beginning of the next are neighbours.
Statistics and modulation are fp32 whatever the types of x and y. The norm sees the sum before it is rounded.

With an `fp8_scale` there are two results more: normed · fp8_scale in e4m3, saturating, for the matrix product that follows,
and the largest |normed|, from which the next step's scale is made (delayed scaling; Micikevicius et al. 2022, section 3).

Shapes: L tokens of the row, S samples, D model width; x, y, out, normed [L, D], gate, scale, shift [S, D] fp32, sample [L]
non-decreasing.

Cost in bf16: forward 8·L·D bytes (9 with fp8) and 10·L·D FLOPs, backward 12·L·D bytes and 3/4·L·D for the partial sums
(run_sums.py), 18·L·D FLOPs. gated.py and layernorm_modulate.py one after the other move 10 and 18 with autograd's addition, and
quantising apart 3 to 5 more. Over torch.compile it pays in the backward, as in layernorm_modulate.py. On an H100: right,
both ways at 58 % of that bound (77 % without a gate).
"""

from __future__ import annotations

from typing import Any

import torch
from megasora_kernels.gated import gated_reference
from megasora_kernels.layernorm_modulate import layernorm_modulate_reference
from megasora_kernels.packed import check_row, jit, row_launch, rows
from megasora_kernels.run_sums import sum_runs
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a plain CPU install: only the reference is used
    triton = None

FORWARD_TOKENS = 8  # per program, as in layernorm_modulate
BACKWARD_TOKENS = 32
E4M3_MAX = 448.0

Results = tuple[Tensor, ...]  # out, normed, and with an fp8_scale: normed in e4m3, and its largest value


def gated_layernorm_reference(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, sample: Tensor,
    eps: float = 1e-6, fp8_scale: Tensor | None = None,
) -> Results:  # fmt: skip
    """What the kernels compute, in plain torch, which rounds the sum before it is normed."""
    out = x + y.type_as(x) if gate is None else gated_reference(x, y, gate, sample)
    normed = layernorm_modulate_reference(out, scale, shift, sample, eps)
    if fp8_scale is None:
        return out, normed
    exact = layernorm_modulate_reference(out.detach().float(), scale.detach(), shift.detach(), sample, eps)
    quantised = (exact * fp8_scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return out, normed, quantised, exact.abs().amax()


@jit
def _forward_kernel(
    x: tl.tensor,  # [tokens, width]
    y: tl.tensor,  # [tokens, width]
    gate: tl.tensor,  # [samples, width], rows `gate_stride` apart
    scale: tl.tensor,  # [samples, width], rows `scale_stride` apart
    shift: tl.tensor,  # [samples, width], rows `shift_stride` apart
    sample: tl.tensor,  # [tokens]
    fp8_scale: tl.tensor,  # []
    out: tl.tensor,  # [tokens, width]
    normed: tl.tensor,  # [tokens, width]
    fp8: tl.tensor,  # [tokens, width]
    amax_parts: tl.tensor,  # [programs]
    mean: tl.tensor,  # [tokens]
    rstd: tl.tensor,  # [tokens]
    tokens: tl.tensor,
    width: tl.tensor,
    gate_stride: tl.tensor,
    scale_stride: tl.tensor,
    shift_stride: tl.tensor,
    eps: tl.tensor,
    has_gate: tl.constexpr,
    to_fp8: tl.constexpr,
    block_tokens: tl.constexpr,
    block_width: tl.constexpr,
) -> None:
    """One program: `block_tokens` tokens, one after the other, each in registers from its load to its stores."""
    column = tl.arange(0, block_width)
    inside = column < width
    block = tl.program_id(0).to(tl.int64)
    if to_fp8:
        factor = tl.load(fp8_scale)
        largest = tl.zeros([block_width], tl.float32)
    for token in range(block * block_tokens, tl.minimum((block + 1) * block_tokens, tokens)):
        owner = tl.load(sample + token).to(tl.int64)
        place = token * width + column
        total = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
        if has_gate:
            total *= tl.load(gate + owner * gate_stride + column, mask=inside, other=0.0)
        total += tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)
        center = tl.sum(total, 0) / width
        centered = tl.where(inside, total - center, 0.0)
        inverse = tl.rsqrt(tl.sum(centered * centered, 0) / width + eps)
        scales = tl.load(scale + owner * scale_stride + column, mask=inside, other=0.0)
        shifts = tl.load(shift + owner * shift_stride + column, mask=inside, other=0.0)
        value = centered * inverse * (1.0 + scales) + shifts
        tl.store(normed + place, value.to(normed.dtype.element_ty), mask=inside)
        tl.store(mean + token, center)
        tl.store(rstd + token, inverse)
        if to_fp8:  # the cast saturates
            tl.store(fp8 + place, (value * factor).to(fp8.dtype.element_ty), mask=inside)
            largest = tl.maximum(largest, tl.abs(value))
    if to_fp8:
        tl.store(amax_parts + block, tl.max(largest, 0))


@jit
def _backward_kernel(
    dout: tl.tensor,  # [tokens, width]
    dnormed: tl.tensor,  # [tokens, width]
    out: tl.tensor,  # [tokens, width]
    y: tl.tensor,  # [tokens, width]
    gate: tl.tensor,  # [samples, width], rows `gate_stride` apart
    scale: tl.tensor,  # [samples, width], rows `scale_stride` apart
    sample: tl.tensor,  # [tokens]
    mean: tl.tensor,  # [tokens]
    rstd: tl.tensor,  # [tokens]
    dx: tl.tensor,  # [tokens, width]
    dy: tl.tensor,  # [tokens, width]
    gate_parts: tl.tensor,  # [slots, width]
    scale_parts: tl.tensor,  # [slots, width]
    shift_parts: tl.tensor,  # [slots, width]
    tokens: tl.tensor,
    width: tl.tensor,
    gate_stride: tl.tensor,
    scale_stride: tl.tensor,
    has_gate: tl.constexpr,
    block_tokens: tl.constexpr,
    block_width: tl.constexpr,
) -> None:
    """One program: dx and dy of `block_tokens` tokens, and for each run of one sample in them its parts of dgate, dscale and
    dshift (run_sums.py)."""
    column = tl.arange(0, block_width)
    inside = column < width
    block = tl.program_id(0).to(tl.int64)
    end = tl.minimum((block + 1) * block_tokens, tokens)
    dgate = tl.zeros([block_width], tl.float32)
    dscale = tl.zeros([block_width], tl.float32)
    dshift = tl.zeros([block_width], tl.float32)
    for token in range(block * block_tokens, end):
        owner = tl.load(sample + token).to(tl.int64)
        place = token * width + column
        grad = tl.load(dnormed + place, mask=inside, other=0.0).to(tl.float32)
        scales = tl.load(scale + owner * scale_stride + column, mask=inside, other=0.0)
        inverse = tl.load(rstd + token)
        value = (tl.load(out + place, mask=inside, other=0.0).to(tl.float32) - tl.load(mean + token)) * inverse
        dscale += grad * value
        dshift += grad

        through = grad * (1.0 + scales)  # zero beyond the width
        along_one = tl.sum(through, 0) / width
        along_value = tl.sum(through * value, 0) / width
        total = (through - along_one - value * along_value) * inverse
        total += tl.load(dout + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + place, total.to(dx.dtype.element_ty), mask=inside)
        if has_gate:
            dgate += total * tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
            total *= tl.load(gate + owner * gate_stride + column, mask=inside, other=0.0)
            tl.store(dy + place, total.to(dy.dtype.element_ty), mask=inside)

        following = tl.load(sample + token + 1, mask=token + 1 < end, other=-1).to(tl.int64)
        if following != owner:  # the run ends here
            slot = (block + owner) * width + column
            if has_gate:
                tl.store(gate_parts + slot, dgate, mask=inside)
            tl.store(scale_parts + slot, dscale, mask=inside)
            tl.store(shift_parts + slot, dshift, mask=inside)
            dgate = tl.zeros([block_width], tl.float32)
            dscale = tl.zeros([block_width], tl.float32)
            dshift = tl.zeros([block_width], tl.float32)


@torch.library.custom_op("megasora_kernels::gated_layernorm", mutates_args=())
def _forward(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, sample: Tensor, eps: float,
    fp8_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out, normed, fp8, amax, mean, rstd; fp8 and amax are empty without an fp8_scale."""
    tokens, width = x.shape
    x, y, scale, shift, sample = x.contiguous(), y.contiguous(), rows(scale), rows(shift), sample.contiguous()
    gates = scale if gate is None else rows(gate)  # stands in where there is none
    programs = triton.cdiv(tokens, FORWARD_TOKENS)
    out, normed = torch.empty_like(x), torch.empty_like(x)
    fp8 = x.new_empty(0 if fp8_scale is None else tokens, width, dtype=torch.float8_e4m3fn)
    parts = x.new_empty(0 if fp8_scale is None else programs, dtype=torch.float32)
    mean = x.new_empty(tokens, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    _forward_kernel[(programs,)](
        x, y, gates, scale, shift, sample, scale if fp8_scale is None else fp8_scale, out, normed, fp8, parts, mean, rstd,
        tokens, width, gates.stride(0), scale.stride(0), shift.stride(0), eps,
        has_gate=gate is not None, to_fp8=fp8_scale is not None, block_tokens=FORWARD_TOKENS, **row_launch(width),
    )  # fmt: skip
    return out, normed, fp8, parts.amax() if len(parts) else parts, mean, rstd


@torch.library.custom_op("megasora_kernels::gated_layernorm_backward", mutates_args=())
def _backward(
    dout: Tensor, dnormed: Tensor, out: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, sample: Tensor,
    mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dy, dgate, dscale, dshift; without a gate y is not needed, and dy and dgate are empty: dy is dx."""
    (tokens, width), samples = out.shape, scale.shape[0]
    dout, dnormed, out = dout.contiguous(), dnormed.contiguous(), out.contiguous()
    y = out if gate is None or y is None else y.contiguous()  # stands in where there is none
    scale, sample = rows(scale), sample.contiguous()
    gates = scale if gate is None else rows(gate)
    dx = torch.empty_like(out)
    dy = torch.empty_like(y) if gate is not None else y.new_empty(0, width)
    blocks = triton.cdiv(tokens, BACKWARD_TOKENS)
    kinds = 3 if gate is not None else 2
    parts = scale.new_empty(kinds, blocks + samples, width)
    _backward_kernel[(blocks,)](
        dout, dnormed, out, y, gates, scale, sample, mean, rstd, dx, dy, parts[-1], parts[0], parts[1],
        tokens, width, gates.stride(0), scale.stride(0),
        has_gate=gate is not None, block_tokens=BACKWARD_TOKENS, **row_launch(width),
    )  # fmt: skip
    dscale, dshift, *dgate = (sum_runs(part, sample, samples, BACKWARD_TOKENS) for part in parts)
    return dx, dy, dgate[0] if dgate else scale.new_empty(0, width), dscale, dshift


@_forward.register_fake
def _(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, sample: Tensor, eps: float,
    fp8_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, width = x.shape
    fp8 = x.new_empty(0 if fp8_scale is None else tokens, width, dtype=torch.float8_e4m3fn)
    amax = x.new_empty((0,) if fp8_scale is None else (), dtype=torch.float32)
    mean = x.new_empty(tokens, dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), fp8, amax, mean, torch.empty_like(mean)


@_backward.register_fake
def _(
    dout: Tensor, dnormed: Tensor, out: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, *_rest: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dy = out.new_empty(0, out.shape[1]) if gate is None or y is None else y.new_empty(y.shape)
    dgate = scale.new_empty(0 if gate is None else scale.shape[0], scale.shape[1])
    return out.new_empty(out.shape), dy, dgate, scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _x, y, gate, scale, _shift, sample, _eps, _fp8_scale = inputs
    out, _normed, fp8, amax, mean, rstd = output
    ctx.mark_non_differentiable(fp8, amax, mean, rstd)
    ctx.y_dtype = y.dtype
    ctx.save_for_backward(out, None if gate is None else y, gate, scale, sample, mean, rstd)


def _differentiate(ctx: Any, dout: Tensor, dnormed: Tensor, *_statistics: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: recomputation hands each out a single time
    _out, _y, gate, *_rest = saved
    dx, dy, dgate, dscale, dshift = _backward(dout, dnormed, *saved)
    if gate is None:
        return dx, dx.to(ctx.y_dtype), None, dscale, dshift, None, None, None
    return dx, dy, dgate, dscale, dshift, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def gated_layernorm_triton(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, sample: Tensor,
    eps: float = 1e-6, fp8_scale: Tensor | None = None,
) -> Results:  # fmt: skip
    """The kernels, with autograd, torch.compile and fake tensors: on CUDA, or on CPU in Triton's interpreter."""
    if triton is None:
        raise ImportError("gated_layernorm on CUDA needs triton: pip install triton")
    results = _forward(x, y, gate, scale, shift, sample, eps, fp8_scale)
    return results[:2] if fp8_scale is None else results[:4]


def gated_layernorm(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, sample: Tensor,
    eps: float = 1e-6, fp8_scale: Tensor | None = None,
) -> Results:  # fmt: skip
    """(out, normed), both in the type of x: kernels on CUDA, the reference on CPU and for fp64.

    x and y [L, D] of any float types; gate (None: 1), scale and shift [S, D] fp32 (fp64 where x is), of any strides; sample [L]
    int32 or int64 in 0..S-1, non-decreasing. With fp8_scale, a scalar tensor on the same device, also normed · fp8_scale in e4m3
    and max |normed|, which carry no gradient. Raises ValueError where shapes or types do not fit, ImportError on CUDA without
    Triton.
    """
    modulations = {"scale": scale, "shift": shift} | ({} if gate is None else {"gate": gate})
    check_row({"x": x, "y": y}, modulations, sample)
    if x.is_cuda and x.dtype != torch.float64:
        return gated_layernorm_triton(x, y, gate, scale, shift, sample, eps, fp8_scale)
    return gated_layernorm_reference(x, y, gate, scale, shift, sample, eps, fp8_scale)
