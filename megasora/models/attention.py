"""Attention over packed rows: each sample's queries see that sample's keys only. Context parallelism replaces this one seam."""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megasora.errors import ConfigError
from megasora.models.packing import Segments

Attention = Callable[[Tensor, Tensor, Tensor, Segments, Segments], Tensor]


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
    """q [L, N, K], k and v [M, N, K] -> [L, N, K], by torch's flash attention, a sample at a time.

    A sample without keys (padding in cross-attention) gets zeros. Vaswani et al. 2017, eq. 1.
    """
    outputs = []
    for i, (length, width) in enumerate(zip(queries.lengths, keys.lengths, strict=True)):
        a, b = queries.offsets[i], keys.offsets[i]
        if width == 0:
            outputs.append(torch.zeros_like(q[a : a + length]))
            continue
        part_q, part_k, part_v = q[a : a + length], k[b : b + width], v[b : b + width]
        batch = (x.transpose(0, 1).unsqueeze(0) for x in (part_q, part_k, part_v))  # torch wants [1, N, L, K]
        outputs.append(F.scaled_dot_product_attention(next(batch), next(batch), next(batch)).squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
    """The same by flash-attn 2's variable-length kernel (Dao 2023). Never run: needs a GPU and the extra [gpu]."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, queries.cu_seqlens, keys.cu_seqlens, max(queries.lengths), max(keys.lengths))


ATTENTION: dict[str, Attention] = {"sdpa": sdpa_attention, "flash": flash_attention}


def find_attention(name: str) -> Attention:
    """The function of that name. Raises ConfigError when what it needs is not installed."""
    if name == "flash" and importlib.util.find_spec("flash_attn") is None:
        raise ConfigError(
            "model.attention=flash: flash-attn is not installed: pip install 'megasora[gpu]', or use sdpa"
        )
    return ATTENTION[name]
