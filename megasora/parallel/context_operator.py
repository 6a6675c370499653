"""Attention over a cut row as one operator, for blocks that are compiled: the exchange, the kernels or the ring, and the way back
are out of the graph's sight, and lengths are tensors on the host. What it computes is what `ContextAttention` does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from megasora.models.attention import Attention
from megasora.models.attention_operator import (
    AttentionOperator,
    packed_attention,
    packed_attention_backward,
    turn,
)
from megasora.models.flash import FLASH
from megasora.models.packing import Order, Segments, Windows, stretch
from megasora.parallel.context import Context, ContextAttention, Lengths, add_up, by_sample
from megasora.parallel.ring import ring_backward, ring_forward

SPARE = 2  # tokens that a part may have more than another: one of its text, one of its video


class ContextOperator(ContextAttention):
    """Stands where a model's attention was, for blocks that are compiled."""

    def __init__(self, attention: Attention, contexts: dict[int, Context]) -> None:
        super().__init__(attention, contexts)
        self.names = {  # by which the operator finds its groups
            parts: (context.ulysses.group_name, context.ring.group_name) for parts, context in contexts.items()
        }

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Segments | Order, keys: Segments | Windows | Order
    ) -> Tensor:
        """q, k, v [L/parts, N, K] of this part -> [L/parts, N, K]."""
        assert isinstance(self.attention, AttentionOperator)
        library = self.attention.kernels(q)
        if isinstance(keys, Segments):
            if len(keys.peers) <= 1:
                return self.attention(q, k, v, queries, keys)
            return context_attention(q, k, v, [keys.shares], "shares", library, *self.names[len(keys.peers)])[0]
        (groups,) = self.names.values()
        if isinstance(keys, Windows):
            assert isinstance(queries, Segments)
            return context_attention(q, k, v, [queries.spans, keys.spans], "windows", library, *groups)[0]
        spans, turns = keys.segments.spans, keys.turns
        where = [spans, spans] if turns is None else [spans, spans, *turns]
        return context_attention(q, k, v, where, "order", library, *groups)[0]


@dataclass(frozen=True)
class Exchange:
    """How tokens go for heads and back, and how the row lies in between. Lengths are of the parts of this Ulysses group."""

    mine: list[int]
    ulysses: dist.ProcessGroup
    ring: dist.ProcessGroup
    held: list[Lengths]  # tokens of each sample at each place of the ring; none: whole rows only
    spans: tuple[Tensor, Tensor]  # [2, S] each: who sees whom, where there is no ring
    arrange: Callable[[Tensor], Tensor]  # as attention wants it
    restore: Callable[[Tensor], Tensor]

    @property
    def rings(self) -> bool:
        return len(self.held) > 1

    def heads_away(self, x: Tensor) -> Tensor:
        """[L/U, X, N, K] -> [L, X, N/U, K]: this rank's heads of all of the group's tokens."""
        ranks, own, (_, X, N, K) = len(self.mine), self.mine[dist.get_rank(self.ulysses)], x.shape
        if ranks == 1:
            return x
        parts = x.unflatten(2, (ranks, N // ranks)).permute(2, 0, 1, 3, 4).flatten(0, 1).contiguous()
        found = x.new_empty(sum(self.mine), X, N // ranks, K)
        dist.all_to_all_single(found, parts, self.mine, [own] * ranks, group=self.ulysses)
        return found

    def heads_home(self, x: Tensor) -> Tensor:
        """[L, X, N/U, K] -> [L/U, X, N, K]: the inverse."""
        ranks, own, (_, X, N, K) = len(self.mine), self.mine[dist.get_rank(self.ulysses)], x.shape
        if ranks == 1:
            return x
        parts = x.new_empty(ranks * own, X, N, K)
        dist.all_to_all_single(parts, x.contiguous(), [own] * ranks, self.mine, group=self.ulysses)
        return parts.unflatten(0, (ranks, own)).permute(1, 2, 0, 3, 4).flatten(2, 3)


def exchange_of(where: list[Tensor], kind: str, ulysses: str, ring: str, device: torch.device) -> Exchange:
    """From what the operator is given: the `shares` [P, S] of each part in each sample; or, of whole rows, spans of queries and
    keys [2, S], and the boxes of an order and how they lie when turned."""
    groups = group_of(ulysses), group_of(ring)
    U, R, here = dist.get_world_size(groups[0]), dist.get_world_size(groups[1]), dist.get_rank(groups[1])
    if kind != "shares":
        assert R == 1, "windows and orders want the whole row: Ulysses only"
        total = int(where[0][1].sum())
        bounds = [stretch(total, part, U) for part in range(U)]
        mine = [end - begin for begin, end in bounds]
        arrange, restore = (turned(*where[2:]), turned(*where[:1:-1])) if where[2:] else (as_it_is, as_it_is)
        return Exchange(mine, *groups, [], (where[0], where[1]), arrange, restore)
    shares: list[Lengths] = [tuple(part) for part in where[0].tolist()]
    near = shares[here * U : (here + 1) * U]
    held = [add_up(tuple(shares[place * U : (place + 1) * U])) for place in range(R)]
    order = by_sample(tuple(near), device)
    arrange, restore = (as_it_is, as_it_is) if order is None else (chosen(order[0]), chosen(order[1]))
    spans = Segments(held[here], device).spans
    return Exchange([sum(part) for part in near], *groups, held, (spans, spans), arrange, restore)


def group_of(name: str) -> dist.ProcessGroup:
    return _resolve_process_group(name)  # type: ignore[arg-type]


def as_it_is(x: Tensor) -> Tensor:
    return x


def chosen(order: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x.index_select(0, order)


def turned(there: Tensor, back: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: turn(x, there, back)


@torch.library.custom_op("megasora::context_attention", mutates_args=())
def context_attention(
    q: Tensor, k: Tensor, v: Tensor, where: list[Tensor], kind: str, library: str, ulysses: str, ring: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [L/P, N, K] of this part -> out [L/P, N, K], and what the backward pass wants, as it lies after the exchange: q, k
    and v as one [L/R, 3, N/U, K], out [L/R, N/U, K] and the logarithms [L/R, N/U] fp32, with a few lines to spare."""
    exchange = exchange_of(where, kind, ulysses, ring, q.device)
    qkv = exchange.arrange(exchange.heads_away(torch.stack([q, k, v], dim=1)))
    given = qkv[:, 0], qkv[:, 1], qkv[:, 2]
    if exchange.rings:
        y, lse = ring_forward(*given, exchange.held, exchange.ring, FLASH[library])
    else:
        y, lse = packed_attention(*given, *exchange.spans, kind == "windows", library)
    out = exchange.heads_home(exchange.restore(y)[:, None])[:, 0]
    rows = len(exchange.mine) * (len(q) + SPARE)
    return out.contiguous(), padded(qkv, rows), padded(y, rows), padded(lse, rows)


@torch.library.custom_op("megasora::context_attention_backward", mutates_args=())
def context_attention_backward(
    grad: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, where: list[Tensor], kind: str, library: str, ulysses: str,
    ring: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v [L/P, N, K]."""
    exchange = exchange_of(where, kind, ulysses, ring, grad.device)
    grad = exchange.arrange(exchange.heads_away(grad.contiguous()[:, None])[:, 0])  # [L/R, N/U, K]
    qkv, y, lse = (x[: len(grad)] for x in (qkv, y, lse))
    given = grad, qkv[:, 0], qkv[:, 1], qkv[:, 2], y, lse
    if exchange.rings:
        found = ring_backward(*given, exchange.held, exchange.ring, FLASH[library])
    else:
        found = packed_attention_backward(*given, *exchange.spans, kind == "windows", library)
    home = exchange.heads_home(exchange.restore(torch.stack(found, dim=1)))  # [L/P, 3, N, K]
    dq, dk, dv = (part.contiguous() for part in home.unbind(1))
    return dq, dk, dv


def padded(x: Tensor, rows: int) -> Tensor:
    y = x.new_zeros(rows, *x.shape[1:])
    y[: len(x)] = x
    return y


@context_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, where: list[Tensor], kind: str, library: str, ulysses: str, ring: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ranks = dist.get_world_size(group_of(ulysses))
    rows, N, K = ranks * (q.shape[0] + SPARE), q.shape[1] // ranks, q.shape[2]
    kept = q.new_empty(rows, 3, N, K), q.new_empty(rows, N, K), q.new_empty(rows, N, dtype=torch.float32)
    return q.new_empty(q.shape), *kept


@context_attention_backward.register_fake
def _(grad: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape), grad.new_empty(grad.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.where, *ctx.how = inputs[3:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], *ctx.where)
    ctx.where = len(ctx.where)


def _differentiate(ctx: Any, grad: Tensor, *_kept: Tensor) -> tuple[Any, ...]:
    qkv, y, lse, *where = ctx.saved_tensors
    return *context_attention_backward(grad, qkv, y, lse, where, *ctx.how), [None] * ctx.where, None, None, None, None


context_attention.register_autograd(_differentiate, setup_context=_save)
