"""What the kernels over a packed row share: how a row is launched, and what its inputs must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

try:
    import triton
except ImportError:  # a plain CPU install: only the references are used
    triton = None


def jit(kernel: Callable[..., Any]) -> Any:
    """Triton's, where there is Triton."""
    return kernel if triton is None else triton.jit(kernel)


def row_launch(width: int) -> dict[str, int]:
    """The block that holds one token in registers, and the warps that share it: 16 values a thread up to D = 8192."""
    block_width = triton.next_power_of_2(width)
    return {"block_width": block_width, "num_warps": min(max(block_width // 512, 1), 16)}


def rows(modulation: Tensor) -> Tensor:
    """As it is, where each row is contiguous: the six modulations of a block are views of one tensor."""
    return modulation if modulation.stride(1) == 1 else modulation.contiguous()


def spread(values: Tensor, sample: Tensor) -> Tensor:
    """[S, D] of samples -> [L, D] of their tokens, `sample` [L] non-decreasing.

    On a CPU by stretches, whose gradients are plain sums; those of an index are added element by element. Fake tensors have no
    numbers to count.
    """
    if sample.is_cuda:
        return values.index_select(0, sample)
    if torch.compiler.is_compiling():
        return _Spread.apply(values, sample)
    if len(values) == 1:
        return values.expand(len(sample), -1)
    if isinstance(sample, FakeTensor):
        return values.index_select(0, sample)
    return torch.cat([row.expand(n, -1) for row, n in zip(values, lengths_of(values, sample), strict=True)])


def lengths_of(values: Tensor, sample: Tensor) -> list[int]:
    """How many tokens each sample has."""
    lengths: list[int] = torch.bincount(sample, minlength=len(values)).tolist()
    return lengths


class _Spread(torch.autograd.Function):
    """`spread` on a CPU as torch.compile sees it: an index, which it fuses with what follows; the sums are an operator's, since
    the lengths are no part of a graph."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, sample: Tensor) -> Tensor:
        ctx.save_for_backward(values, sample)
        return values[sample]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, *ctx.saved_tensors), None


@torch.library.custom_op("megasora_kernels::spread_backward", mutates_args=())
def _gather(grad: Tensor, values: Tensor, sample: Tensor) -> Tensor:
    return torch.stack([part.sum(0) for part in grad.split(lengths_of(values, sample))])


@_gather.register_fake
def _(grad: Tensor, values: Tensor, _sample: Tensor) -> Tensor:
    return grad.new_empty(values.shape)


def check_row(tokens: dict[str, Tensor], modulations: dict[str, Tensor], sample: Tensor) -> None:
    """Raises ValueError unless all `tokens` are [L, D], all `modulations` [S, D] fp32 (fp64 where the first tokens are), and
    `sample` is [L] int32 or int64."""
    x, first = next(iter(tokens.values())), next(iter(modulations.values()))
    wanted = torch.promote_types(x.dtype, torch.float32)
    together = {**tokens, **modulations}
    fit = x.ndim == 2 and all(t.shape == x.shape for t in tokens.values())
    fit = fit and all(t.shape == first.shape for t in modulations.values())
    if not fit or any(t.ndim != 2 or t.shape[1] != x.shape[1] for t in modulations.values()):
        shapes = ", ".join(f"{name} {[*t.shape]}" for name, t in together.items())
        raise ValueError(f"{' and '.join(tokens)} [L, D], {' and '.join(modulations)} [S, D] do not fit: {shapes}")
    for name, t in modulations.items():
        if t.dtype != wanted:
            raise ValueError(f"{name} of {x.dtype} tokens must be {wanted}, not {t.dtype}")
    if sample.shape != x.shape[:1] or sample.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"sample must be int32 or int64 of shape {[*x.shape[:1]]}: {sample.dtype} {[*sample.shape]}")
