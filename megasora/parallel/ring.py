"""Ring attention over packed rows: keys and values travel round the ring while each rank attends to what it has.

Of every pair (stretch of queries, stretch of keys) a flash kernel gives the output and the logarithm of its sum; two such results
merge exactly. Backward runs the kernels again with the final sums, and gradients of keys and values travel home.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megasora.models.flash import Flash

Lengths = tuple[int, ...]


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, held: list[Lengths], group: dist.ProcessGroup, flash: Flash
) -> Tensor:
    """q, k, v [L, N, K] of this place of the ring, sample by sample -> [L, N, K], by the kernels of `flash`.

    held[place] are the tokens of each sample that each place holds, all of one sequence.
    """
    y: Tensor = _Ring.apply(q, k, v, held, group, flash)
    return y


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, held: list[Lengths], group: dist.ProcessGroup, flash: Flash
    ) -> Tensor:
        y, lse = ring_forward(q, k, v, held, group, flash)
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.ring = held, group, flash
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *ring_backward(grads[0], *ctx.saved_tensors, *ctx.ring), None, None, None


def ring_forward(
    q: Tensor, k: Tensor, v: Tensor, held: list[Lengths], group: dist.ProcessGroup, flash: Flash
) -> tuple[Tensor, Tensor]:
    """What attention gives, [L, N, K], and the logarithms of its sums, [L, N] fp32."""
    places, here = len(held), dist.get_rank(group)
    kv = torch.stack([k, v])  # [2, M, N, K]
    out = torch.zeros_like(q, dtype=torch.float32)  # [L, N, K]
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)  # [L, N]
    for hop in range(places):
        owner = (here - hop) % places
        arriving = pass_on(kv, sum(held[(owner - 1) % places]), group) if hop < places - 1 else None
        for a, b, c, d in pairs(held[here], held[owner]):
            part, part_lse = flash.forward(q[None, a:b], kv[:1, c:d], kv[1:, c:d])
            merge(out[a:b], lse[a:b], part[0], part_lse[0])
        if arriving is not None:
            kv = arriving()
    return out.to(q.dtype), lse


def ring_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, held: list[Lengths],
    group: dist.ProcessGroup, flash: Flash,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, given what `ring_forward` gave."""
    grad = grad.contiguous()
    places, here = len(held), dist.get_rank(group)
    kv = torch.stack([k, v])
    dq = torch.zeros_like(q, dtype=torch.float32)
    own = torch.zeros_like(kv, dtype=torch.float32)  # of the keys that are at home
    travelling: Callable[[], Tensor] | None = None
    for hop in range(places):
        owner = (here - hop) % places
        length = sum(held[(owner - 1) % places])
        arriving = pass_on(kv, length, group) if hop < places - 1 else None
        dkv = torch.zeros_like(kv, dtype=torch.float32) if hop else own
        for a, b, c, d in pairs(held[here], held[owner]):
            known = grad[None, a:b], q[None, a:b], kv[:1, c:d], kv[1:, c:d], y[None, a:b], lse[None, a:b]
            gq, gk, gv = flash.backward(*known)
            dq[a:b] += gq[0]
            dkv[0, c:d] += gk[0]
            dkv[1, c:d] += gv[0]
        if travelling is not None:
            dkv += travelling()  # what the places before found for these keys, which came meanwhile
        if hop:
            travelling = pass_on(dkv, length, group)  # with its keys, and at last to whose they are
        if arriving is not None:
            kv = arriving()
    if travelling is not None:
        own += travelling()
    return dq.to(q.dtype), own[0].to(k.dtype), own[1].to(v.dtype)


def pairs(queries: Lengths, keys: Lengths) -> list[tuple[int, int, int, int]]:
    """First and end of the queries and of the keys of each sample that has both."""
    q, k = (list(accumulate(lengths, initial=0)) for lengths in (queries, keys))
    spans = zip(q[:-1], q[1:], k[:-1], k[1:], strict=True)
    return [(a, b, c, d) for a, b, c, d in spans if a < b and c < d]


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Adds what other keys gave to out [L, N, K] and lse [L, N], in place."""
    total = torch.logaddexp(lse, part_lse)
    out.mul_(torch.exp(lse - total)[..., None]).add_(part * torch.exp(part_lse - total)[..., None])
    lse.copy_(total)


def pass_on(x: Tensor, length: int, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Sends x [2, M, N, K] to the next place; the function waits for that of the place before, with `length` tokens."""
    places, here = dist.get_world_size(group), dist.get_rank(group)
    x = x.contiguous()
    received = x.new_empty(x.shape[0], length, *x.shape[2:])
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x, group=group, group_peer=(here + 1) % places),
            dist.P2POp(dist.irecv, received, group=group, group_peer=(here - 1) % places),
        ]
    )

    def wait() -> Tensor:
        for work in works:
            work.wait()
        return received

    return wait
