"""Context parallelism: the tokens of a row are spread over ranks, and attention is where they meet.

Ulysses (Jacobs et al. 2023) exchanges tokens for heads, so each of its ranks sees a longer stretch with fewer heads; a ring
(Liu et al. 2023) passes keys and values on, and each rank merges what it finds. Both at once: U ranks of a Ulysses group hold
neighbouring stretches, R such groups form the rings. Everything is exact, and lengths come from the host.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor

from megasora.models.attention import Attention, flash_of
from megasora.models.packing import Order, Segments, Windows, on_device, stretch
from megasora.parallel.ring import ring_attention

Lengths = tuple[int, ...]


@dataclass(frozen=True)
class Context:
    """This rank's place among the parts of a row: part = ring place · ulysses degree + ulysses place."""

    ulysses: dist.ProcessGroup
    ring: dist.ProcessGroup
    degrees: tuple[int, int]  # Ulysses, ring

    @property
    def parts(self) -> int:
        return self.degrees[0] * self.degrees[1]


class ContextAttention:
    """Stands where a model's attention function was. Rows that were not cut go to that function as before."""

    def __init__(self, attention: Attention, contexts: dict[int, Context]) -> None:
        """`contexts` by the number of ranks that share a row."""
        self.attention, self.contexts = attention, contexts

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Segments | Order, keys: Segments | Windows | Order
    ) -> Tensor:
        """q, k, v [L/parts, N, K] of this part -> [L/parts, N, K]."""
        if isinstance(keys, Segments) and len(keys.peers) <= 1:
            return self.attention(q, k, v, queries, keys)  # a whole row, or whole captions
        total = queries.segments.total if isinstance(queries, Order) else queries.total
        if not isinstance(keys, Segments) and len(q) == total:
            return self.attention(q, k, v, queries, keys)
        if isinstance(keys, Segments):
            context = self.contexts[len(keys.peers)]
            lengths = [sum(part) for part in keys.peers]
        else:
            (context,) = self.contexts.values()  # where rows may differ in width, no family with orders is let in
            bounds = [stretch(total, part, context.parts) for part in range(context.parts)]
            lengths = [end - begin for begin, end in bounds]
        ulysses, ring = context.degrees
        here = dist.get_rank(context.ring)
        mine = lengths[here * ulysses : (here + 1) * ulysses]
        qkv = heads_apart(torch.stack([q, k, v], dim=1), mine, context.ulysses)  # [L/R, 3, N/U, K]
        if isinstance(keys, Segments):
            y = self._among(qkv, keys, here, context)
        else:
            assert ring == 1, "windows and orders want the whole row: Ulysses only"
            q, k, v = qkv.unbind(1)
            y = self.attention(q, k, v, queries, keys)  # [L, N/U, K]
        return tokens_apart(y, mine, context.ulysses)  # [L/parts, N, K]

    def _among(self, qkv: Tensor, keys: Segments, here: int, context: Context) -> Tensor:
        """[L/R, 3, N/U, K] -> [L/R, N/U, K]: each sample's tokens side by side, then attention or a ring of it."""
        ulysses, ring = context.degrees
        order = by_sample(keys.peers[here * ulysses : (here + 1) * ulysses], qkv.device)
        if order is not None:
            qkv = qkv.index_select(0, order[0])
        held = [add_up(keys.peers[place * ulysses : (place + 1) * ulysses]) for place in range(ring)]
        q, k, v = qkv.unbind(1)
        if ring == 1:
            whole = Segments(held[0], qkv.device)
            y = self.attention(q, k, v, whole, whole)
        else:
            y = ring_attention(q, k, v, held, context.ring, flash_of(self.attention, q))
        return y if order is None else y.index_select(0, order[1])


def heads_apart(x: Tensor, lengths: list[int], group: dist.ProcessGroup) -> Tensor:
    """[L/U, X, N, K] -> [L, X, N/U, K]: a rank gives away all heads but its own and gets the tokens of all ranks."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return x
    L, _, N, _ = x.shape
    parts = x.unflatten(2, (ranks, N // ranks)).permute(2, 0, 1, 3, 4).flatten(0, 1)  # [U · L/U, X, N/U, K]
    return collectives.all_to_all_single_autograd(parts.contiguous(), lengths, [L] * ranks, group)


def tokens_apart(x: Tensor, lengths: list[int], group: dist.ProcessGroup) -> Tensor:
    """[L, N/U, K] -> [L/U, N, K]: the inverse of `heads_apart`."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return x
    own = lengths[dist.get_rank(group)]
    parts = collectives.all_to_all_single_autograd(x.contiguous(), [own] * ranks, lengths, group)  # [U · L/U, N/U, K]
    return parts.unflatten(0, (ranks, own)).permute(1, 0, 2, 3).flatten(1, 2)


@lru_cache(maxsize=64)
def by_sample(parts: tuple[Lengths, ...], device: torch.device) -> tuple[Tensor, Tensor] | None:
    """The order that puts each sample's tokens side by side when the parts come one after the other, and its inverse; None where
    they lie so already."""
    if len(parts[0]) == 1:
        return None
    lengths = torch.tensor(parts)  # [parts, S]
    owners = torch.arange(lengths.shape[1]).repeat(len(parts)).repeat_interleave(lengths.flatten())  # [L]
    if bool((owners.diff() >= 0).all()):
        return None
    order = owners.argsort(stable=True)
    return on_device(order, device), on_device(order.argsort(), device)


def add_up(parts: tuple[Lengths, ...]) -> Lengths:
    """Tokens of each sample over some parts."""
    return tuple(map(sum, zip(*parts, strict=True)))
