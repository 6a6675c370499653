"""Attention over packed rows: each segment's queries see its own keys only. Context parallelism replaces this one seam."""

import importlib.util
from collections.abc import Callable
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from megasora.errors import ConfigError
from megasora.models.packing import Segments, Windows

Attention = Callable[[Tensor, Tensor, Tensor, Segments, Segments | Windows], Tensor]


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments | Windows) -> Tensor:
    """q [L, N, K], k and v [M, N, K] -> [L, N, K], by torch's flash attention; neighbouring segments of one size in one call.

    A segment without keys (padding in cross-attention) gets zeros. Vaswani et al. 2017, eq. 1.
    """
    outputs = []
    sizes = zip(queries.starts, queries.lengths, keys.starts, keys.lengths, strict=True)
    # Windows overlap, so they go one by one.
    same: Callable[[tuple[int, int, int, int]], tuple[int, ...]] = (
        (lambda size: size) if isinstance(keys, Windows) else (lambda size: (size[1], size[3]))
    )
    for _, group in groupby(sizes, same):
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
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


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
