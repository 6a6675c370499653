"""The kernels that have gradients, each with its reference and inputs: what the tests on a CPU, those on a GPU and
gpu_check share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from megasora_kernels import flash_varlen, gated, gated_layernorm, layernorm_modulate, qknorm_rope
from torch import Tensor

Lengths = tuple[int, ...]


class Inputs(NamedTuple):
    """Of one call: what has gradients, what has none, and the gradients of the results."""

    leaves: list[Tensor]
    fixed: list[Any]
    grads: list[Tensor]

    def to(self, target: Any) -> "Inputs":
        """On a device, or in fp64."""

        def move(value: Any) -> Any:
            moves = isinstance(value, Tensor) and (value.is_floating_point() or isinstance(target, str))
            return value.to(target) if moves else value

        return Inputs(*([move(value) for value in part] for part in self))


@dataclass(frozen=True)
class Case:
    """`kernels` and `reference` take leaves, then fixed. `draw(lengths, width, dtype)` gives inputs of a packed row."""

    name: str
    kernels: Callable[..., Any]
    reference: Callable[..., Any]
    draw: Callable[..., Inputs]


def row(lengths: Lengths, width: int, dtype: torch.dtype, count: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """`count` tensors [L, D], modulations [S, 3, D] and the sample of each token."""
    generator = torch.Generator().manual_seed(sum(lengths) + width)
    samples, tokens = len(lengths), sum(lengths)
    inner = torch.promote_types(dtype, torch.float32)
    tensors = [(torch.randn(tokens, width, generator=generator, dtype=inner) * 3 + 1).to(dtype) for _ in range(count)]
    modulation = torch.randn(samples, 3, width, generator=generator, dtype=inner)
    index = torch.int32 if dtype == torch.float32 else torch.int64
    sample = torch.repeat_interleave(torch.arange(samples), torch.tensor(lengths)).to(index)
    return tensors, modulation, sample


def draw_layernorm(lengths: Lengths, width: int, dtype: torch.dtype) -> Inputs:
    (x, dy), modulation, sample = row(lengths, width, dtype, 2)
    return Inputs([x, modulation[:, 0], modulation[:, 1]], [sample], [dy])


def draw_gated(lengths: Lengths, width: int, dtype: torch.dtype) -> Inputs:
    (x, y, dout), modulation, sample = row(lengths, width, dtype, 3)
    return Inputs([x, y, modulation[:, 0]], [sample], [dout])


def draw_gated_layernorm(lengths: Lengths, width: int, dtype: torch.dtype) -> Inputs:
    (x, y, dout, dnormed), modulation, sample = row(lengths, width, dtype, 4)
    return Inputs([x, y, *modulation.unbind(1)], [sample], [dout, dnormed])


def draw_added_layernorm(lengths: Lengths, width: int, dtype: torch.dtype) -> Inputs:
    (x, y, dout, dnormed), modulation, sample = row(lengths, width, dtype, 4)
    return Inputs([x, y, modulation[:, 0], modulation[:, 1]], [sample], [dout, dnormed])


def draw_rope(
    lengths: Lengths, width: int, dtype: torch.dtype, weights: str = "row", turned: bool = True, groups: int = 1,
    head_width: int = 0,
) -> Inputs:  # fmt: skip
    """Heads of 6 or 8 channels in narrow rows, of 64 to 128 in wide ones, unless a width is given."""
    (x, dy), modulation, _ = row(lengths, width, dtype, 2)
    K = head_width or rope_head(width)
    inner = modulation.dtype
    angles = torch.rand(len(x), K // 2, dtype=inner, generator=torch.Generator().manual_seed(1)) * 200 - 100
    weight = {"row": modulation[0, 0], "head": modulation[0, 0, :K], "none": None}[weights]
    dy = dy.view(len(x), -1, K)
    dy = dy.unflatten(1, (groups, -1)).transpose(0, 1) if groups > 1 else dy
    rotation = qknorm_rope.rotation_table(angles) if turned else None
    return Inputs([x] if weight is None else [x, weight], [rotation, K, 1e-6, groups], [dy])


def rope_head(width: int) -> int:
    return next(K for K in (128, 72, 64, 8, 6) if width % (2 * K) == 0)


def unnormed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, *rest: function(x, None, *rest)


def ungated(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, y, *rest: function(x, y, None, *rest)


def draw_attention(lengths: Lengths, width: int, dtype: torch.dtype) -> Inputs:
    """Queries and keys of different lengths a segment; the last segment has no keys."""
    (q, k, v, dout), _, _ = row(lengths, width, dtype, 4)
    K = rope_head(width)
    others = (*reversed(lengths[:-1]), 0) if len(lengths) > 1 else lengths
    keys = sum(others)
    cu_q, cu_k = (torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in (lengths, others))
    heads = [
        (t[:n] - 1).div(3).view(n, -1, K).contiguous() for t, n in ((q, len(q)), (k, keys), (v, keys), (dout, len(q)))
    ]
    return Inputs(heads[:3], [cu_q, cu_k, max(lengths), max(others)], heads[3:])


def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    return flash_varlen.flash_varlen(q, k, v, cu_q, cu_k, max_q, max_k)[0]


def attend_reference(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    return flash_varlen.flash_varlen_reference(q, k, v, cu_q, cu_k)[0]


ROPE, ROPE_TORCH = qknorm_rope.qknorm_rope_triton, qknorm_rope.qknorm_rope_reference
SUM, SUM_TORCH = gated_layernorm.gated_layernorm_triton, gated_layernorm.gated_layernorm_reference
CASES = [
    Case(
        "layernorm_modulate", layernorm_modulate.layernorm_modulate_triton,
        layernorm_modulate.layernorm_modulate_reference, draw_layernorm,
    ),
    Case("gated", gated.gated_triton, gated.gated_reference, draw_gated),
    Case("gated_layernorm", SUM, SUM_TORCH, draw_gated_layernorm),
    Case("added_layernorm", ungated(SUM), ungated(SUM_TORCH), draw_added_layernorm),
    Case("qknorm_rope", ROPE, ROPE_TORCH, draw_rope),
    Case("qknorm_rope_heads", ROPE, ROPE_TORCH, partial(draw_rope, weights="head")),
    Case("qknorm_rope_ulysses", ROPE, ROPE_TORCH, partial(draw_rope, groups=2)),
    Case("qknorm", ROPE, ROPE_TORCH, partial(draw_rope, turned=False)),
    Case("rope", unnormed(ROPE), unnormed(ROPE_TORCH), partial(draw_rope, weights="none")),
    Case("flash_varlen", attend, attend_reference, draw_attention),
]  # fmt: skip


def evaluate(function: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    """The results of the function and the gradients of its leaves."""
    leaves = [t.detach().requires_grad_() for t in inputs.leaves]
    found = function(*leaves, *inputs.fixed)
    results = (found,) if isinstance(found, Tensor) else found
    return [*(t.detach() for t in results), *torch.autograd.grad(results, leaves, inputs.grads)]


def errors(case: Case, inputs: Inputs) -> list[tuple[float, float, float]]:
    """Of every result and gradient: the norm of the kernels' error, of torch's in the same type, both against fp64, and its
    own."""
    ours, torchs = evaluate(case.kernels, inputs), evaluate(case.reference, inputs)
    exact = evaluate(case.reference, inputs.to(torch.float64))
    assert [(t.dtype, t.shape) for t in ours] == [(t.dtype, t.shape) for t in torchs]
    return [
        ((a - c).norm().item(), (b - c).norm().item(), c.norm().item())
        for a, b, c in zip(ours, torchs, exact, strict=True)
    ]


def excess(found: list[tuple[float, float, float]]) -> list[str]:
    """What is more than twice as far from fp64 as torch's low precision (beyond fp32's last bit), or not a number."""
    return [
        f"{i}: error {ours:.3g}, torch's {torchs:.3g} of {size:.3g}"
        for i, (ours, torchs, size) in enumerate(found)
        if not ours <= 2 * torchs + 2**-23 * size + 1e-30
    ]
