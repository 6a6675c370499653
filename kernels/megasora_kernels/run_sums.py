"""The second stage of a gradient that is summed over each sample's tokens; the kernels beside this one share it.

Their first stage leaves a partial sum for each run of one sample in a block of `block_tokens` tokens. The run of sample s in
block b goes to slot b + s: from one run of the row to the next either grows and neither falls, so no two runs share a slot.
The order of addition is fixed: the same bits every time.
"""

from __future__ import annotations

from megasora_kernels.packed import jit
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a plain CPU install: only the references are used
    triton = None

SUM_SLOTS, SUM_COLUMNS = 64, 32  # tile: 128 bytes of a row, many rows in flight


@jit
def _first_token(sample: tl.tensor, tokens: tl.tensor, owner: tl.tensor) -> tl.tensor:
    """The first token whose sample is `owner` or a later one, by bisection."""
    low = tl.zeros([], tl.int32)
    high = low + tokens
    while low < high:
        middle = (low + high) // 2
        if tl.load(sample + middle) < owner:
            low = middle + 1
        else:
            high = middle
    return low


@jit
def _sum_kernel(
    parts: tl.tensor,  # [slots, width]
    sample: tl.tensor,  # [tokens]
    sums: tl.tensor,  # [samples, width]
    tokens: tl.tensor,
    width: tl.tensor,
    block_tokens: tl.constexpr,
    sum_slots: tl.constexpr,
    sum_columns: tl.constexpr,
) -> None:
    """One program: `sum_columns` columns of one sample's sum over its slots."""
    owner = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * sum_columns + tl.arange(0, sum_columns)

    first_token = _first_token(sample, tokens, owner)
    end_token = _first_token(sample, tokens, owner + 1)
    first = first_token // block_tokens + owner
    end = tl.where(first_token < end_token, (end_token - 1) // block_tokens + owner + 1, first)  # an empty one has none

    total = tl.zeros([sum_slots, sum_columns], tl.float32)
    for start in range(first, end, sum_slots):
        slot = start + tl.arange(0, sum_slots)
        inside = (slot < end)[:, None] & (column < width)[None, :]
        total += tl.load(parts + slot[:, None] * width + column[None, :], mask=inside, other=0.0)
    tl.store(sums + owner * width + column, tl.sum(total, 0), mask=column < width)


def sum_runs(parts: Tensor, sample: Tensor, samples: int, block_tokens: int) -> Tensor:
    """parts [slots, D] fp32 as described above, `sample` [L] contiguous -> [S, D]."""
    width = parts.shape[1]
    sums = parts.new_empty(samples, width)
    _sum_kernel[(samples, triton.cdiv(width, SUM_COLUMNS))](
        parts,
        sample,
        sums,
        len(sample),
        width,
        block_tokens=block_tokens,
        sum_slots=SUM_SLOTS,
        sum_columns=SUM_COLUMNS,
    )
    return sums
