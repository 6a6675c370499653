"""Matrix product of two block-scaled fp8 matrices: a readable fallback where no library offers one.

    y[m, n] = sum over blocks k of 128: a_scale[m, k] · b_scale[n or n's tile, k] · sum over the block: a[m, j] · b[n, j]

as in DeepSeek-V3 (2024, section 3.3): sm_90's tensor cores sum fp8 products with some 14 bits, so each block's sum leaves
them and is added, scaled, in fp32 (the promotion).

Shapes: a [M, K] with "row" scales [M, ceil(K/128)], b [N, K] with "tile" [ceil(N/128), ceil(K/128)] or "row" scales
[N, ceil(K/128)] (fp8_quantize.py), K a multiple of 16: rows of fp8 must begin at multiples of 16 bytes for TMA. y [M, N].

Cost: 2·M·N·K FLOPs, M·K + N·K + 2·M·N bytes at best. torch._scaled_mm has no blocks of 128 on every GPU, and torch.compile makes
none. Libraries (DeepGEMM, cuBLAS 12.9) are faster. On an H100, 8192³: right,
at 61 % (tile) and 42 % (row) of torch's tensor-wise product.
"""

from __future__ import annotations

from typing import Any

import torch
from megasora_kernels.fp8_quantize import GROUP, Quantised, dequantise
from megasora_kernels.packed import jit
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a plain CPU install: only the reference is used
    triton = None


TILES = ((128, 8, 3), (128, 8, 4), (64, 4, 4))  # rows, warps, stages


def fp8_gemm_reference(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    """What the kernel computes, in plain torch: the products of the dequantised matrices in fp32."""
    right = dequantise(b, "row" if len(b.scale) == len(b.data) else "tile")
    return (dequantise(a, "row") @ right.T).to(dtype)


@torch.library.custom_op("megasora_kernels::fp8_gemm_reference", mutates_args=())
def _in_torch(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The same as one operator for torch.compile: torch 2.13's inductor makes code for CPUs that computes something else."""
    return fp8_gemm_reference(Quantised(a, a_scale), Quantised(b, b_scale), dtype)


@_in_torch.register_fake
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


def _set_block(arguments: dict[str, Any]) -> None:
    """The descriptor's block follows the tile."""
    arguments["a"].block_shape = [arguments["block_rows"], GROUP]


def _autotuned(kernel: Any) -> Any:
    """The tiles that the first call at new sizes tries. One of 256 x 128 would spill: it has two sums."""
    if triton is None:
        return kernel
    configs = [
        triton.Config({"block_rows": rows}, num_warps=warps, num_stages=stages, pre_hook=_set_block)
        for rows, warps, stages in TILES
    ]
    return triton.autotune(configs, key=["M", "N", "K", "b_rows"])(kernel)


@_autotuned
@jit
def _gemm_kernel(
    a: tl.tensor_descriptor,  # [M, K] fp8, blocks [128, 128]
    b: tl.tensor_descriptor,  # [N, K] fp8
    a_scale: tl.tensor,  # [M, blocks of K]
    b_scale: tl.tensor,  # [N or blocks of N, blocks of K]
    y: tl.tensor,  # [M, N]
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    b_rows: tl.constexpr,  # whether every row of b has scales of its own
    block_rows: tl.constexpr,
) -> None:
    """One program: `block_rows` x 128 of y."""
    first_row, first_column = tl.program_id(0) * block_rows, tl.program_id(1) * 128
    row, column = first_row + tl.arange(0, block_rows), first_column + tl.arange(0, 128)
    blocks = tl.cdiv(K, 128)
    total = tl.zeros([block_rows, 128], tl.float32)
    for block in range(blocks):
        left = a.load([first_row, block * 128])  # zeros outside
        right = b.load([first_column, block * 128])
        part = tl.dot(left, right.T)  # from zero: no more than 128 products are summed in the tensor cores
        factor = tl.load(a_scale + row.to(tl.int64) * blocks + block, mask=row < M, other=0.0)
        if b_rows:
            other = tl.load(b_scale + column.to(tl.int64) * blocks + block, mask=column < N, other=0.0)
            total += part * (factor[:, None] * other[None, :])
        else:
            total += part * (factor * tl.load(b_scale + tl.program_id(1).to(tl.int64) * blocks + block))[:, None]
    inside = (row < M)[:, None] & (column < N)[None, :]
    tl.store(y + row.to(tl.int64)[:, None] * N + column[None, :], total.to(y.dtype.element_ty), mask=inside)


@torch.library.custom_op("megasora_kernels::fp8_gemm", mutates_args=())
def _gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    a, b = a.contiguous(), b.contiguous()
    (M, K), N = a.shape, len(b)
    y = a.new_empty(M, N, dtype=dtype)

    def grid(config: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(M, config["block_rows"]), triton.cdiv(N, GROUP)

    left, right = (TensorDescriptor.from_tensor(t, [GROUP, GROUP]) for t in (a, b))
    rows = len(b_scale) == N
    _gemm_kernel[grid](left, right, a_scale.contiguous(), b_scale.contiguous(), y, M, N, K, b_rows=rows)
    return y


@_gemm.register_fake
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


def fp8_gemm_triton(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    """The kernel, on CUDA or on CPU in Triton's interpreter."""
    if triton is None:
        raise ImportError("fp8_gemm on CUDA needs triton: pip install triton")
    return _gemm(*a, *b, dtype)


def fp8_gemm(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    """a [M, K] and b [N, K] as described above -> a·bᵀ [M, N] of `dtype`: the kernel on CUDA, the reference on CPU. No gradient:
    fp8_linear.py has it. Raises ValueError where shapes do not fit, ImportError on CUDA without Triton."""
    (M, K), (N, other) = a.data.shape, b.data.shape
    across, tiles = -(-K // GROUP), -(-N // GROUP)
    if other != K or K % 16:
        raise ValueError(f"a [M, K] and b [N, K] do not fit, K a multiple of 16: {[M, K]}, {[N, other]}")
    if a.scale.shape != (M, across) or b.scale.shape not in ((N, across), (tiles, across)):
        shapes = f"{[*a.scale.shape]}, {[*b.scale.shape]}"
        raise ValueError(f"scales must be {[M, across]} of a, {[N, across]} or {[tiles, across]} of b: {shapes}")
    if a.data.is_cuda:
        return fp8_gemm_triton(a, b, dtype)
    return _in_torch(*a, *b, dtype) if torch.compiler.is_compiling() else fp8_gemm_reference(a, b, dtype)
