"""Attention over packed rows: each segment's queries see its own keys only. Context parallelism replaces this one seam."""

import importlib.util
from collections.abc import Callable
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from megasora.errors import ConfigError
from megasora.models.packing import Order, Segments, Windows

Attention = Callable[[Tensor, Tensor, Tensor, Segments | Order, Segments | Windows | Order], Tensor]


def ordered(attend: Callable[[Tensor, Tensor, Tensor, Segments, Segments | Windows], Tensor]) -> Attention:
    """An attention over segments -> one that knows `Order`s too: it puts the tokens there and back."""

    def attention(
        q: Tensor, k: Tensor, v: Tensor, queries: Segments | Order, keys: Segments | Windows | Order
    ) -> Tensor:
        if not isinstance(queries, Order):
            assert not isinstance(keys, Order)
            return attend(q, k, v, queries, keys)
        q, k, v = (queries.enter(x) for x in (q, k, v))  # [L, N, K] each
        return queries.leave(attend(q, k, v, queries.segments, queries.segments))  # [L, N, K]

    return attention


@ordered
def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments | Windows) -> Tensor:
    """q [L, N, K], k and v [M, N, K] -> [L, N, K], by torch's flash attention; neighbouring segments of one size in one call.

    A segment without keys (padding in cross-attention) gets zeros. Vaswani et al. 2017, eq. 1.
    """
    outputs = []
    attended = list(zip(queries.starts, queries.lengths, keys.starts, keys.lengths, strict=True))
    # Windows overlap, so they go one by one.
    same: Callable[[tuple[int, int, int, int]], tuple[int, ...]] = (
        (lambda size: size) if isinstance(keys, Windows) else (lambda size: (size[1], size[3]))
    )
    for _, group in groupby(attended, same):
        members = list(group)
        (a, length, b, width), n = members[0], len(members)
        if length == 0:
            continue
        part_q = q[a : a + n * length]
        if width == 0:
            outputs.append(torch.zeros_like(part_q))
            continue
        parts = (part_q, k[b : b + n * width], v[b : b + n * width])
        batch = (x.unflatten(0, (n, -1)).transpose(1, 2) for x in parts)  # torch wants [S, N, L, K]
        y = F.scaled_dot_product_attention(next(batch), next(batch), next(batch))
        outputs.append(y.transpose(1, 2).flatten(0, 1))
    if not any(length and width for _, length, _, width in attended):
        return (
            q * 0 + (k.sum() + v.sum()) * 0
        )  # nothing was seen, but every weight is of the graph: wrappers count on it
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


@ordered
def flash_attention(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments | Windows) -> Tensor:
    """The same by flash-attn 2's variable-length kernel (Dao 2023). Never run: needs a GPU and the extra [gpu]."""
    from flash_attn import flash_attn_varlen_func

    if isinstance(keys, Windows):  # the kernel wants every segment's keys side by side
        stretches = [torch.arange(a, a + n, device=k.device) for a, n in zip(keys.starts, keys.lengths, strict=True)]
        places = torch.cat(stretches)
        k, v, keys = k[places], v[places], Segments(keys.lengths, k.device)
    return flash_attn_varlen_func(q, k, v, queries.cu_seqlens, keys.cu_seqlens, max(queries.lengths), max(keys.lengths))


ATTENTION: dict[str, Attention] = {"sdpa": sdpa_attention, "flash": flash_attention}


def find_attention(name: str) -> Attention:
    """The function of that name. Raises ConfigError when what it needs is not installed."""
    if name == "flash" and importlib.util.find_spec("flash_attn") is None:
        raise ConfigError(
            "model.attention=flash: flash-attn is not installed: pip install 'megasora[gpu]', or use sdpa"
        )
    return ATTENTION[name]
