"""Flash attention over packed sequences, forward and backward: a readable fallback where no library is installed.

    out = softmax(q·kᵀ / sqrt(K)) · v    within each segment;    lse = the logarithm of the softmax's sum

FlashAttention-2 (Dao 2023): the scores stay in registers, the backward makes them again from `lse`. A query tile sees the
keys of its own segment only. Gradients of keys and of queries are two kernels without atomic adds: the same bits every
time.

Shapes: L query tokens, M key tokens, N heads, K head width up to 128, S segments; q [L, N, K], k and v [M, N, K] of bf16 or fp16,
cu_q and cu_k [S + 1] int32, out [L, N, K], lse [L, N] fp32. A segment without keys gives zeros and lse of -inf.

Cost: forward 4·N·K FLOPs a pair of query and key, backward 14. torch.compile makes no such loop; FlashAttention 3 and cuDNN are
faster. On an H100: right; 32,760 tokens, K = 128: forward 0.7 of the speed of torch's flash attention, with backward 0.35.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megasora_kernels.packed import jit
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a plain CPU install: only the reference is used
    triton = None

LOG2E = math.log2(math.e)
# Channels up to: (queries, keys, warps, stages) of a program.
FORWARD_TILES = {64: (128, 128, 8, 2), 128: (128, 64, 8, 3)}
BACKWARD_TILES = {64: (64, 64, 4, 2), 128: (64, 64, 8, 2)}


def flash_varlen_reference(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernels compute, in plain torch."""
    outputs, sums = [], []
    bounds = zip(cu_q.tolist()[:-1], cu_q.tolist()[1:], cu_k.tolist()[:-1], cu_k.tolist()[1:], strict=True)
    for a, b, c, d in bounds:
        scores = torch.einsum("lnk,mnk->nlm", q[a:b], k[c:d]) / math.sqrt(q.shape[-1])  # [N, L, M]
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse[..., None]) if d > c else scores
        outputs.append(torch.einsum("nlm,mnk->lnk", weights, v[c:d]))
        sums.append(lse.T)
    return torch.cat(outputs), torch.cat(sums).to(torch.promote_types(q.dtype, torch.float32))


@jit
def _tile(
    pointer: tl.tensor, first: tl.tensor, place: tl.tensor, length: tl.tensor, heads: tl.constexpr,
    head_width: tl.constexpr, block_channels: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Rows `place` of one segment and head, [len(place), channels]; zeros where there is nothing."""
    channel = tl.arange(0, block_channels)
    offset = (first + place).to(tl.int64)[:, None] * (heads * head_width) + tl.program_id(1) * head_width
    inside = (place < length)[:, None] & (channel < head_width)[None, :]
    return tl.load(pointer + offset + channel[None, :], mask=inside, other=0.0)


@jit
def _store(
    pointer: tl.tensor, value: tl.tensor, first: tl.tensor, place: tl.tensor, length: tl.tensor, heads: tl.constexpr,
    head_width: tl.constexpr, block_channels: tl.constexpr,
) -> None:  # fmt: skip
    channel = tl.arange(0, block_channels)
    offset = (first + place).to(tl.int64)[:, None] * (heads * head_width) + tl.program_id(1) * head_width
    inside = (place < length)[:, None] & (channel < head_width)[None, :]
    tl.store(pointer + offset + channel[None, :], value.to(pointer.dtype.element_ty), mask=inside)


@jit
def _forward_kernel(
    q: tl.tensor,  # [L, heads, head_width]
    k: tl.tensor,  # [M, heads, head_width]
    v: tl.tensor,  # [M, heads, head_width]
    cu_q: tl.tensor,  # [segments + 1]
    cu_k: tl.tensor,  # [segments + 1]
    out: tl.tensor,  # [L, heads, head_width]
    lse: tl.tensor,  # [L, heads]
    scale: tl.constexpr,  # log2(e) / sqrt(head_width)
    heads: tl.constexpr,
    head_width: tl.constexpr,
    block_q: tl.constexpr,
    block_k: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    """One program: `block_q` queries of one head and segment over all its keys."""
    segment = tl.program_id(2)
    first_q, first_k = tl.load(cu_q + segment), tl.load(cu_k + segment)
    length, width = tl.load(cu_q + segment + 1) - first_q, tl.load(cu_k + segment + 1) - first_k
    if tl.program_id(0) * block_q < length:
        place = tl.program_id(0) * block_q + tl.arange(0, block_q)
        queries = _tile(q, first_q, place, length, heads, head_width, block_channels)
        largest = tl.full([block_q], float("-inf"), tl.float32)
        total = tl.zeros([block_q], tl.float32)
        result = tl.zeros([block_q, block_channels], tl.float32)
        for start in range(0, width, block_k):
            other = start + tl.arange(0, block_k)
            keys = _tile(k, first_k, other, width, heads, head_width, block_channels)
            values = _tile(v, first_k, other, width, heads, head_width, block_channels)
            score = tl.where((other < width)[None, :], tl.dot(queries, keys.T) * scale, float("-inf"))
            new = tl.maximum(largest, tl.max(score, 1))
            weight = tl.exp2(score - new[:, None])
            decay = tl.exp2(largest - new)
            total = total * decay + tl.sum(weight, 1)
            result = tl.dot(weight.to(values.dtype), values, result * decay[:, None])
            largest = new
        result = tl.where((total > 0)[:, None], result / total[:, None], 0.0)
        _store(out, result, first_q, place, length, heads, head_width, block_channels)
        sums = (largest + tl.log2(total)) * 0.6931471805599453
        at = (first_q + place).to(tl.int64) * heads + tl.program_id(1)
        tl.store(lse + at, tl.where(total > 0, sums, float("-inf")), mask=place < length)


@jit
def _keys_kernel(
    dout: tl.tensor,  # [L, heads, head_width]
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    lse: tl.tensor,  # [L, heads]
    delta: tl.tensor,  # [L, heads]: dout · out
    cu_q: tl.tensor,
    cu_k: tl.tensor,
    dk: tl.tensor,  # [M, heads, head_width]
    dv: tl.tensor,  # [M, heads, head_width]
    scale: tl.constexpr,
    heads: tl.constexpr,
    head_width: tl.constexpr,
    block_q: tl.constexpr,
    block_k: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    """One program: the gradients of `block_k` keys and values of one head and segment, over all its queries."""
    segment = tl.program_id(2)
    first_q, first_k = tl.load(cu_q + segment), tl.load(cu_k + segment)
    length, width = tl.load(cu_q + segment + 1) - first_q, tl.load(cu_k + segment + 1) - first_k
    if tl.program_id(0) * block_k < width:
        place = tl.program_id(0) * block_k + tl.arange(0, block_k)
        keys = _tile(k, first_k, place, width, heads, head_width, block_channels)
        values = _tile(v, first_k, place, width, heads, head_width, block_channels)
        of_keys = tl.zeros([block_k, block_channels], tl.float32)
        of_values = tl.zeros([block_k, block_channels], tl.float32)
        for start in range(0, length, block_q):
            other = start + tl.arange(0, block_q)
            queries = _tile(q, first_q, other, length, heads, head_width, block_channels)
            grad = _tile(dout, first_q, other, length, heads, head_width, block_channels)
            at = (first_q + other).to(tl.int64) * heads + tl.program_id(1)
            sums = tl.load(lse + at, mask=other < length, other=float("inf")) * 1.4426950408889634
            # [keys, queries], zero beyond the queries.
            weight = tl.exp2(tl.dot(keys, queries.T) * scale - sums[None, :])
            of_values = tl.dot(weight.to(grad.dtype), grad, of_values)
            along = tl.load(delta + at, mask=other < length, other=0.0)
            of_score = weight * (tl.dot(values, grad.T) - along[None, :])
            of_keys = tl.dot(of_score.to(queries.dtype), queries, of_keys)
        of_keys *= scale * 0.6931471805599453
        _store(dk, of_keys, first_k, place, width, heads, head_width, block_channels)
        _store(dv, of_values, first_k, place, width, heads, head_width, block_channels)


@jit
def _queries_kernel(
    dout: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    cu_q: tl.tensor,
    cu_k: tl.tensor,
    dq: tl.tensor,  # [L, heads, head_width]
    scale: tl.constexpr,
    heads: tl.constexpr,
    head_width: tl.constexpr,
    block_q: tl.constexpr,
    block_k: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    """One program: the gradients of `block_q` queries of one head and segment, over all its keys."""
    segment = tl.program_id(2)
    first_q, first_k = tl.load(cu_q + segment), tl.load(cu_k + segment)
    length, width = tl.load(cu_q + segment + 1) - first_q, tl.load(cu_k + segment + 1) - first_k
    if tl.program_id(0) * block_q < length:
        place = tl.program_id(0) * block_q + tl.arange(0, block_q)
        queries = _tile(q, first_q, place, length, heads, head_width, block_channels)
        grad = _tile(dout, first_q, place, length, heads, head_width, block_channels)
        at = (first_q + place).to(tl.int64) * heads + tl.program_id(1)
        sums = tl.load(lse + at, mask=place < length, other=float("inf")) * 1.4426950408889634
        along = tl.load(delta + at, mask=place < length, other=0.0)
        result = tl.zeros([block_q, block_channels], tl.float32)
        for start in range(0, width, block_k):
            other = start + tl.arange(0, block_k)
            keys = _tile(k, first_k, other, width, heads, head_width, block_channels)
            values = _tile(v, first_k, other, width, heads, head_width, block_channels)
            weight = tl.exp2(tl.dot(queries, keys.T) * scale - sums[:, None])
            of_score = weight * (tl.dot(grad, values.T) - along[:, None])
            of_score = tl.where((other < width)[None, :], of_score, 0.0)
            result = tl.dot(of_score.to(keys.dtype), keys, result)
        result *= scale * 0.6931471805599453
        _store(dq, result, first_q, place, length, heads, head_width, block_channels)


def _launch(q: Tensor, tiles: dict[int, tuple[int, int, int, int]]) -> dict[str, Any]:
    """What all launches share: constants, warps and stages for the width of the heads."""
    _, heads, head_width = q.shape
    block_channels = max(16, triton.next_power_of_2(head_width))
    block_q, block_k, warps, stages = tiles[max(64, block_channels)]
    return {
        "scale": LOG2E / math.sqrt(head_width), "heads": heads, "head_width": head_width, "block_q": block_q,
        "block_k": block_k, "block_channels": block_channels, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


@torch.library.custom_op("megasora_kernels::flash_varlen", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> tuple[Tensor, Tensor]:
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    launch = _launch(q, FORWARD_TILES)
    grid = (triton.cdiv(max_q, launch["block_q"]), q.shape[1], len(cu_q) - 1)
    _forward_kernel[grid](q, k, v, cu_q, cu_k, out, lse, **launch)
    return out, lse


@torch.library.custom_op("megasora_kernels::flash_varlen_backward", mutates_args=())
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    max_q: int, max_k: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dout, q, k, v, lse = (t.contiguous() for t in (dout, q, k, v, lse))
    delta = (dout.float() * out.float()).sum(-1)  # [L, N]
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    launch = _launch(q, BACKWARD_TILES)
    known = (dout, q, k, v, lse, delta, cu_q, cu_k)
    segments = len(cu_q) - 1
    _keys_kernel[(triton.cdiv(max_k, launch["block_k"]), q.shape[1], segments)](*known, dk, dv, **launch)
    _queries_kernel[(triton.cdiv(max_q, launch["block_q"]), q.shape[1], segments)](*known, dq, **launch)
    return dq, dk, dv


@_forward.register_fake
def _(q: Tensor, *_rest: Tensor | int) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@_backward.register_fake
def _(_dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_rest: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, *ctx.longest = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)


def _differentiate(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(dout, *ctx.saved_tensors, *ctx.longest), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def flash_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> tuple[Tensor, Tensor]:
    """out and lse as above, with autograd of out; max_q and max_k are the longest segments. On CUDA, or on CPU in Triton's
    interpreter: elsewhere torch has better. Raises ValueError where shapes or types do not fit, ImportError without Triton."""
    _check(q, k, v, cu_q, cu_k)
    return _forward(q, k, v, cu_q, cu_k, max_q, max_k)


def flash_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    max_q: int, max_k: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v given out and lse, which may be those over more keys than these: what a ring of ranks needs."""
    _check(q, k, v, cu_q, cu_k)
    return _backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> None:
    if triton is None:
        raise ImportError("flash_varlen needs triton: pip install triton")
    if q.ndim != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:] or q.shape[2] > 128:
        raise ValueError(
            f"q [L, N, K], k and v [M, N, K], K <= 128, do not fit: {[*map(list, (q.shape, k.shape, v.shape))]}"
        )
    if q.dtype not in (torch.bfloat16, torch.float16) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k and v must be all bfloat16 or all float16, not {q.dtype}, {k.dtype}, {v.dtype}")
    if cu_q.shape != cu_k.shape or cu_q.dtype != torch.int32 or cu_k.dtype != torch.int32:
        raise ValueError(
            f"cu_q and cu_k [S + 1] must be int32: {cu_q.dtype} {[*cu_q.shape]}, {cu_k.dtype} {[*cu_k.shape]}"
        )
