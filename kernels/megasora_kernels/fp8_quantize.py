"""Quantisers to fp8: one scale for a tensor, for 128 neighbours of a row, or for a tile of 128 x 128.

    scale = max(amax, 1e-12) / largest        data = saturate(x · (largest / max(amax, 1e-12)))        x ≈ data · scale

with amax over the group and `largest` the type's largest number (448 for e4m3, 57344 for e5m2). "tensor" is Micikevicius et al.
2022, "row" (activations, gradients) and "tile" (weights) are DeepSeek-V3's (2024, section 3.3). In fp32, both divisions rounded
correctly, so every byte is that of the reference.

Shapes: x [M, N]; data [M, N] fp8; scale fp32: [], [M, ceil(N/128)] or [ceil(M/128), ceil(N/128)]. `both` gives x's and that of
x transposed, which the gradient of a weight needs: for "row" its groups go along M, so its bytes are others.

Cost in bf16, of M·N elements: 3 bytes read and written, 4 with the transposed copy, and 2 more for "tensor", which reads
twice. Over torch.compile it pays for the copy: without it the transposed one reads everything again, in strides. On an
H100 byte for byte the reference, at 68 % of that bound (tensor), 45 % (row), 66 % (tile).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from megasora_kernels.packed import jit
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a plain CPU install: only the reference is used
    triton = None

Scaling = Literal["tensor", "row", "tile"]
SCALINGS: tuple[Scaling, ...] = ("tensor", "row", "tile")
GROUP = 128
TINY = 1e-12
AMAX_BLOCK = 8192  # elements a program


class Quantised(NamedTuple):
    """What stands for x = data · scale; `scale` fits data's groups."""

    data: Tensor
    scale: Tensor


def dequantise(quantised: Quantised, scaling: Scaling) -> Tensor:
    """[M, N] fp32: what the quantised tensor stands for."""
    data, scale = quantised.data.float(), quantised.scale
    if scaling == "tensor":
        return data * scale
    scale = scale.repeat_interleave(GROUP, 1)[:, : data.shape[1]]
    if scaling == "tile":
        scale = scale.repeat_interleave(GROUP, 0)[: data.shape[0]]
    return data * scale


def quantise_reference(x: Tensor, scaling: Scaling, dtype: torch.dtype = torch.float8_e4m3fn) -> Quantised:
    """What the kernels compute, in plain torch."""
    M, N = x.shape
    largest = torch.finfo(dtype).max
    rows = {"tensor": M, "row": 1, "tile": GROUP}[scaling]
    columns = N if scaling == "tensor" else GROUP
    padded = F.pad(x.float(), (0, -N % columns, 0, -M % rows))
    groups = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # [groups, rows, groups, columns]
    amax = groups.abs().amax((1, 3), keepdim=True).clamp(min=TINY)
    # A tensor: dividing by a number multiplies by its reciprocal on a GPU, rounded twice.
    most = torch.full_like(amax, largest)
    factor = most / amax
    data = (groups * factor).clamp(-largest, largest).to(dtype)
    scale = (amax / most).squeeze((1, 3))
    return Quantised(
        data.flatten(2).flatten(0, 1)[:M, :N].contiguous(), scale.reshape(()) if scaling == "tensor" else scale
    )


def quantise_both_reference(
    x: Tensor, scaling: Scaling, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Quantised, Quantised]:
    return quantise_reference(x, scaling, dtype), quantise_reference(x.T, scaling, dtype)


@torch.library.custom_op("megasora_kernels::quantise_both_reference", mutates_args=())
def _both_in_torch(x: Tensor, scaling: str, dtype: torch.dtype) -> list[Tensor]:
    """The same as one operator for torch.compile: torch 2.13's inductor fails at code for CPUs that does both."""
    return [t.contiguous() for result in quantise_both_reference(x, scaling, dtype) for t in result]  # type: ignore[arg-type]


@_both_in_torch.register_fake
def _(x: Tensor, scaling: str, dtype: torch.dtype) -> list[Tensor]:
    return empty_results(x, x.shape[0], x.shape[1], scaling, dtype, True)


@jit
def _amax_kernel(x: tl.tensor, parts: tl.tensor, size: tl.tensor, block: tl.constexpr) -> None:
    """One program: the largest of `block` neighbours."""
    program = tl.program_id(0).to(tl.int64)
    place = program * block + tl.arange(0, block)
    value = tl.load(x + place, mask=place < size, other=0.0).to(tl.float32)
    tl.store(parts + program, tl.max(tl.abs(value), 0))


@jit
def store_fp8(
    value: tl.tensor,  # [128, 128] fp32, zero where it is not `inside`
    amax: tl.tensor,  # [128, 1], [1, 128] or [1, 1]
    data: tl.tensor,
    stride: tl.tensor,  # of data's rows
    row: tl.tensor,  # [128]
    column: tl.tensor,  # [128]
    inside: tl.tensor,  # [128, 128]
    largest: tl.constexpr,
    turn: tl.constexpr,
) -> None:
    """Stores the tile, or its transpose at (column, row), scaled so that `amax` becomes the largest fp8 number."""
    quantised = (value * tl.div_rn(largest, amax)).to(data.dtype.element_ty)  # the cast saturates
    if turn:
        tl.store(data + column[:, None] * stride + row[None, :], tl.trans(quantised), mask=tl.trans(inside))
    else:
        tl.store(data + row[:, None] * stride + column[None, :], quantised, mask=inside)


@jit
def quantise_tile(
    value: tl.tensor,  # [128, 128] fp32, zero outside of the matrix
    tensor_amax: tl.tensor,  # []
    data: tl.tensor,
    scale: tl.tensor,
    turned: tl.tensor,  # [columns, rows]: the transposed copy
    turned_scale: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    scaling: tl.constexpr,
    largest: tl.constexpr,
    tiny: tl.constexpr,
    both: tl.constexpr,
) -> None:
    """What every kernel that writes fp8 ends with: tile (program 0, program 1) and its scales."""
    group: tl.constexpr = 128
    block_row, block_column = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, column = block_row * group + tl.arange(0, group), block_column * group + tl.arange(0, group)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    across, down = tl.cdiv(columns, group), tl.cdiv(rows, group)  # scales in a row of each
    if scaling == "row":
        amax = tl.maximum(tl.max(tl.abs(value), 1), tiny)
        tl.store(scale + row * across + block_column, tl.div_rn(amax, largest), mask=row < rows)
        store_fp8(value, amax[:, None], data, columns, row, column, inside, largest, False)
        if both:
            amax = tl.maximum(tl.max(tl.abs(value), 0), tiny)
            tl.store(turned_scale + column * down + block_row, tl.div_rn(amax, largest), mask=column < columns)
            store_fp8(value, amax[None, :], turned, rows, row, column, inside, largest, True)
    else:
        if scaling == "tile":
            amax = tl.maximum(tl.max(tl.max(tl.abs(value), 1), 0), tiny)
            tl.store(scale + block_row * across + block_column, tl.div_rn(amax, largest))
            if both:
                tl.store(turned_scale + block_column * down + block_row, tl.div_rn(amax, largest))
        else:
            amax = tl.maximum(tl.load(tensor_amax), tiny)
        store_fp8(value, amax, data, columns, row, column, inside, largest, False)
        if both:
            store_fp8(value, amax, turned, rows, row, column, inside, largest, True)


@jit
def _quantise_kernel(
    x: tl.tensor,  # [rows, columns]
    tensor_amax: tl.tensor,
    data: tl.tensor,
    scale: tl.tensor,
    turned: tl.tensor,
    turned_scale: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    scaling: tl.constexpr,
    largest: tl.constexpr,
    tiny: tl.constexpr,
    both: tl.constexpr,
) -> None:
    """One program: a tile of 128 x 128."""
    row = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    column = tl.program_id(1).to(tl.int64) * 128 + tl.arange(0, 128)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(x + row[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
    quantise_tile(
        value, tensor_amax, data, scale, turned, turned_scale, rows, columns, scaling, largest, tiny, both
    )  # fmt: skip


def empty_results(x: Tensor, M: int, N: int, scaling: str, dtype: torch.dtype, both: bool) -> list[Tensor]:
    """data, scale, and those of the transposed copy (empty without `both`), on x's device."""
    across, down = -(-N // GROUP), -(-M // GROUP)
    shapes = {"tensor": ((), ()), "row": ((M, across), (N, down)), "tile": ((down, across), (across, down))}[scaling]
    data = x.new_empty(M, N, dtype=dtype)
    scale = x.new_empty(shapes[0], dtype=torch.float32)
    if not both:
        return [data, scale, data.new_empty(0, M), scale.new_empty(0)]
    return [data, scale, x.new_empty(N, M, dtype=dtype), x.new_empty(shapes[1], dtype=torch.float32)]


@torch.library.custom_op("megasora_kernels::quantise", mutates_args=())
def _quantise(x: Tensor, scaling: str, dtype: torch.dtype, both: bool) -> list[Tensor]:
    x = x.contiguous()
    M, N = x.shape
    largest = torch.finfo(dtype).max
    results = empty_results(x, M, N, scaling, dtype, both)
    data, scale, turned, turned_scale = results
    amax = scale
    if scaling == "tensor":
        parts = scale.new_empty(triton.cdiv(x.numel(), AMAX_BLOCK))
        _amax_kernel[(len(parts),)](x, parts, x.numel(), block=AMAX_BLOCK, num_warps=8)
        amax = parts.amax()
        results[1] = amax.clamp(min=TINY) / torch.full_like(amax, largest)  # as in the reference
        results[3] = results[1].clone() if both else turned_scale
    grid = (triton.cdiv(M, GROUP), triton.cdiv(N, GROUP))
    _quantise_kernel[grid](
        x, amax, data, scale, turned, turned_scale, M, N,
        scaling=scaling, largest=largest, tiny=TINY, both=both, num_warps=8,
    )  # fmt: skip
    return results


@_quantise.register_fake
def _(x: Tensor, scaling: str, dtype: torch.dtype, both: bool) -> list[Tensor]:
    return empty_results(x, x.shape[0], x.shape[1], scaling, dtype, both)


def quantise_triton(x: Tensor, scaling: Scaling, dtype: torch.dtype = torch.float8_e4m3fn) -> Quantised:
    """The kernels, on CUDA or on CPU in Triton's interpreter."""
    return Quantised(*_with_triton(x, scaling, dtype, False)[:2])


def quantise_both_triton(
    x: Tensor, scaling: Scaling, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Quantised, Quantised]:
    data, scale, turned, turned_scale = _with_triton(x, scaling, dtype, True)
    return Quantised(data, scale), Quantised(turned, turned_scale)


def _with_triton(x: Tensor, scaling: Scaling, dtype: torch.dtype, both: bool) -> list[Tensor]:
    if triton is None:
        raise ImportError("quantise on CUDA needs triton: pip install triton")
    return _quantise(x, scaling, dtype, both)


def quantise(x: Tensor, scaling: Scaling, dtype: torch.dtype = torch.float8_e4m3fn) -> Quantised:
    """x [M, N] of any float type -> its fp8: kernels on CUDA, the reference on CPU. No gradient goes through.

    Raises ValueError for other shapes, types or scalings, ImportError on CUDA without Triton.
    """
    _check(x, scaling, dtype)
    return quantise_triton(x, scaling, dtype) if x.is_cuda else quantise_reference(x, scaling, dtype)


def quantise_both(x: Tensor, scaling: Scaling, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Quantised, Quantised]:
    """The same of x [M, N] and of its transpose [N, M], read once."""
    _check(x, scaling, dtype)
    if x.is_cuda:
        return quantise_both_triton(x, scaling, dtype)
    if torch.compiler.is_compiling():
        data, scale, turned, turned_scale = _both_in_torch(x, scaling, dtype)
        return Quantised(data, scale), Quantised(turned, turned_scale)
    return quantise_both_reference(x, scaling, dtype)


def _check(x: Tensor, scaling: str, dtype: torch.dtype) -> None:
    if x.ndim != 2 or not x.is_floating_point() or 0 in x.shape:
        raise ValueError(f"x must be a matrix of floats, not {x.dtype} {[*x.shape]}")
    if scaling not in SCALINGS or dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise ValueError(f"scaling={scaling} to {dtype}: tensor, row or tile to float8_e4m3fn or float8_e5m2")
