"""A library's attention as a ring of ranks uses it, held to fp64: what the tests on a CPU and those on a GPU share."""

from typing import Any

import torch
from torch import Tensor

from megasora.models.flash import Flash


def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("lnk,mnk->lnm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("lnm,mnk->lnk", scores.softmax(-1), v), scores.logsumexp(-1)


def one(kernel: Any, *tensors: Tensor) -> Any:
    """A kernel over several sequences, given one."""
    return [t[0] for t in kernel(*(t[None] for t in tensors))]


def errors_in_parts(
    flash: Flash, dtype: torch.dtype, device: torch.device, lengths: tuple[int, int, int] = (20, 12, 21), heads: int = 2,
    head_width: int = 16,
) -> list[float]:  # fmt: skip
    """Keys seen in two parts, merged by the logarithms, and the gradients of each part given the whole's: relative to fp64, of
    out, lse, dq, dk and dv. `lengths`: queries, keys of the first part, of the second."""
    queries, first, second = lengths
    generator = torch.Generator().manual_seed(0)
    shape, cuts = (heads, head_width), ((0, first), (first, first + second))
    q, k, v, grad = (
        torch.randn(n, *shape, generator=generator).to(device, dtype)
        for n in (queries, first + second, first + second, queries)
    )
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    expected, lse = plain(*exact)
    gradients = torch.autograd.grad(expected, exact, grad.double())
    parts = [one(flash.forward, q, k[a:b], v[a:b]) for a, b in cuts]
    total = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(part.float() * torch.exp(part_lse - total)[..., None] for part, part_lse in parts)
    known = out.to(dtype).contiguous(), total.contiguous()
    found = [one(flash.backward, grad, q, k[a:b], v[a:b], *known) for a, b in cuts]
    dq = found[0][0].float() + found[1][0].float()
    dk, dv = (torch.cat([found[0][i], found[1][i]]) for i in (1, 2))
    pairs = zip((out, total, dq, dk, dv), (expected, lse, *gradients), strict=True)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]
