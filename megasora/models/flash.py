"""The flash attention kernels of every library, behind two small signatures: attention over packed segments, and the pair
of calls that a ring of ranks needs, which hands out the logarithms of the sums.

Libraries are imported when they are called. Those for GPUs are held to their sources' signatures in tests/unit/test_libraries.py;
on a GPU torch's own, cuDNN's and our Triton kernels have run (an H100: exact in parts, tests/gpu), before these calls took
several sequences at once; the others never.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from megasora_kernels.flash_cpu import flash_cpu, flash_cpu_backward
from megasora_kernels.flash_varlen import flash_varlen, flash_varlen_backward
from torch import Tensor, nn

from megasora.models.packing import Segments

LSE_MULTIPLE = 32  # to which torch's efficient attention pads its logarithms


@dataclass(frozen=True)
class Flash:
    """One library's kernels over n whole sequences of one size. Both are exact whatever part of the keys they see, given the
    final `out` and `lse`."""

    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """q [n, L, N, K], k and v [n, M, N, K] -> out [n, L, N, K], lse [n, L, N] fp32: the logarithms of the softmax's sums."""
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    """Gradient of out, q, k, v, out, lse -> gradients of q, k and v."""


Varlen = Callable[[Tensor, Tensor, Tensor, Segments, Segments], Tensor]


def deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """[n, L, N, ...] -> [n, N, L, ...], as torch's own take it."""
    return [t.transpose(1, 2) for t in tensors]


def contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def tokens_first(*tensors: Tensor) -> list[Tensor]:
    """[n, N, L, ...] -> [n, L, N, ...]."""
    return [t.transpose(1, 2) for t in tensors]


# torch


def cpu_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = tokens_first(*torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first(q, k, v))[:2])
    return out, lse.float()


def cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    given = [*heads_first(grad, q, k, v, out), lse.transpose(1, 2).contiguous()]
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, False)
    return tuple(tokens_first(dq, dk, dv))  # type: ignore[return-value]


def sdpa_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return cpu_forward(q, k, v)
    if q.dtype == torch.float32:
        return efficient_forward(q, k, v)
    out, lse = tokens_first(*torch.ops.aten._scaled_dot_product_flash_attention(*heads_first(q, k, v))[:2])
    return out, lse


def sdpa_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu":
        return cpu_backward(grad, q, k, v, out, lse)
    if q.dtype == torch.float32:
        return efficient_backward(grad, q, k, v, out, lse)
    given = [*heads_first(grad, q, k, v, out), lse.transpose(1, 2).contiguous()]
    seed, offset = torch.zeros(2, 2, dtype=torch.uint64, device=q.device)  # of dropout, of which there is none
    found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *given, None, None, q.shape[1], k.shape[1], 0.0, False, seed, offset
    )
    return tuple(tokens_first(*found))  # type: ignore[return-value]


def efficient_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """For 32 bits on a GPU (Rabe and Staats 2021), which flash attention does not take."""
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(*heads_first(q, k, v), None, True)[:2]
    out, lse = tokens_first(out, lse[..., : q.shape[1]])  # its lse is padded
    return out, lse


def efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    padded = nn.functional.pad(lse.transpose(1, 2), (0, -q.shape[1] % LSE_MULTIPLE), value=torch.inf)
    seed, offset = torch.zeros(2, dtype=torch.int64, device=q.device)
    found = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        *heads_first(grad, q, k, v),
        None,
        *heads_first(out),
        padded,
        seed,
        offset,
        0.0,
        [True, True, True, False],
        False,
    )
    return tuple(tokens_first(*found[:3]))  # type: ignore[return-value]


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if k.shape[1] == 1:  # cuDNN refuses a single key
        return sdpa_forward(q, k, v)
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(*contiguous(*heads_first(q, k, v)), None, True)[:2]
    out, lse = tokens_first(out, lse.flatten(2))  # cuDNN's lse has a dimension of one at its end
    return out, lse


def cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if k.shape[1] == 1:
        return sdpa_backward(grad, q, k, v, out, lse)
    given = contiguous(*heads_first(grad, q, k, v, out, lse[..., None]))
    seed, offset = torch.zeros(2, dtype=torch.int64, device=q.device)
    found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *given, seed, offset, None, None, None, q.shape[1], k.shape[1], 0.0, False
    )
    return tuple(tokens_first(*found))  # type: ignore[return-value]


# flash-attn 2 (Dao 2023)


def flash2(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        k,
        v,
        queries.cu_seqlens,
        keys.cu_seqlens,
        max(queries.lengths),
        max(keys.lengths),
        deterministic=deterministic(),
    )


def flash2_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_forward

    out, lse, *_ = _flash_attn_forward(
        q, k, v, dropout_p=0.0, softmax_scale=q.shape[-1] ** -0.5, causal=False, window_size_left=-1,
        window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    )  # fmt: skip
    return out, lse.transpose(1, 2)


def flash2_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_backward

    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    _flash_attn_backward(
        grad, q, k, v, out, lse.transpose(1, 2).contiguous(), dq, dk, dv,
        dropout_p=0.0, softmax_scale=q.shape[-1] ** -0.5, causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, alibi_slopes=None, deterministic=deterministic(),
    )  # fmt: skip
    return dq, dk, dv


# flash-attn 3 (Shah et al. 2024), from the folder hopper of flash-attn's source


def flash3(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        k,
        v,
        queries.cu_seqlens,
        keys.cu_seqlens,
        max(queries.lengths),
        max(keys.lengths),
        deterministic=deterministic(),
    )


def flash3_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn_interface import _flash_attn_forward

    none: dict[str, Any] = dict.fromkeys(
        ["k_new", "v_new", "qv", "out", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new", "seqused_q", "seqused_k",
         "max_seqlen_q", "max_seqlen_k", "page_table", "kv_batch_idx", "leftpad_k", "rotary_cos", "rotary_sin",
         "seqlens_rotary", "q_descale", "k_descale", "v_descale"]
    )  # fmt: skip
    out, lse, *_ = _flash_attn_forward(q=q, k=k, v=v, softmax_scale=q.shape[-1] ** -0.5, causal=False, **none)
    return out, lse.transpose(1, 2)


def flash3_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn_interface import _flash_attn_backward

    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    _flash_attn_backward(
        grad, q, k, v, out, lse.transpose(1, 2).contiguous(), cu_seqlens_q=None, cu_seqlens_k=None,
        sequed_q=None, sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=dq, dk=dk, dv=dv,
        softmax_scale=q.shape[-1] ** -0.5, causal=False, deterministic=deterministic(),
    )  # fmt: skip
    return dq, dk, dv


# flash-attn 4, in the CuTe language


def flash4(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
    from flash_attn.cute.interface import flash_attn_varlen_func

    found = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=queries.cu_seqlens, cu_seqlens_k=keys.cu_seqlens, max_seqlen_q=max(queries.lengths),
        max_seqlen_k=max(keys.lengths), deterministic=deterministic(),
    )  # fmt: skip
    return found[0] if isinstance(found, tuple) else found


def flash4_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    out, lse, *_ = _flash_attn_fwd(q, k, v, return_lse=True)
    return out, lse.transpose(1, 2)


def flash4_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    dq, dk, dv, *_ = _flash_attn_bwd(
        q, k, v, out, grad, lse.transpose(1, 2).contiguous(), deterministic=deterministic()
    )
    return dq, dk, dv


# TransformerEngine; it keeps the logarithms for itself


@cache
def te_module(heads: int, head_width: int) -> Any:
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        num_attention_heads=heads,
        kv_channels=head_width,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding",
    )


def te(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
    out = te_module(q.shape[1], q.shape[2])(
        q, k, v, cu_seqlens_q=queries.cu_seqlens, cu_seqlens_kv=keys.cu_seqlens, max_seqlen_q=max(queries.lengths),
        max_seqlen_kv=max(keys.lengths),
    )  # fmt: skip
    return out.view_as(q)


# Our own, in Triton


def triton(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
    return flash_varlen(q, k, v, queries.cu_seqlens, keys.cu_seqlens, max(queries.lengths), max(keys.lengths))[0]


def side_by_side(x: Tensor) -> Tensor:
    """Where each of the n sequences of [n, L, N, K] begins, and the end."""
    n, L = x.shape[:2]
    return torch.arange(n + 1, dtype=torch.int32, device=x.device) * L


def triton_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = flash_varlen(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), side_by_side(q), side_by_side(k), q.shape[1], k.shape[1]
    )
    return out.view_as(q), lse.view(q.shape[:3])


def triton_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad, *flat, out, lse = (t.flatten(0, 1) for t in (grad, q, k, v, out, lse))
    where = side_by_side(q), side_by_side(k), q.shape[1], k.shape[1]
    found = flash_varlen_backward(grad, flat[0], flat[1], flat[2], out, lse, *where)
    return tuple(g.view_as(t) for g, t in zip(found, (q, k, v), strict=True))  # type: ignore[return-value]


def lacks(*modules: str) -> str:
    """The first of the modules that is not installed, or nothing."""
    for module in modules:
        try:
            if importlib.util.find_spec(module) is None:
                return module
        except ModuleNotFoundError:  # its parent
            return module
    return ""


FLASH = {
    "sdpa": Flash(sdpa_forward, sdpa_backward),
    "cpu": Flash(flash_cpu, flash_cpu_backward),
    "cudnn": Flash(cudnn_forward, cudnn_backward),
    "flash2": Flash(flash2_forward, flash2_backward),
    "flash3": Flash(flash3_forward, flash3_backward),
    "flash4": Flash(flash4_forward, flash4_backward),
    "triton": Flash(triton_forward, triton_backward),
}
VARLEN: dict[str, Varlen] = {"flash2": flash2, "flash3": flash3, "flash4": flash4, "te": te, "triton": triton}
MODULES: dict[str, tuple[str, ...]] = {  # what each needs
    "flash2": ("flash_attn", "flash_attn.flash_attn_interface"),
    "flash3": ("flash_attn_interface",),
    "flash4": ("flash_attn.cute",),
    "te": ("transformer_engine.pytorch",),
    "triton": ("triton",),
}
# The least compute capability, tens and ones.
CAPABILITY = {"flash2": 80, "flash3": 90, "flash4": 90, "te": 80, "triton": 80, "cudnn": 80}
HOW = {
    "flash2": "pip install 'megasora[gpu]'",
    "flash3": "from the folder hopper of flash-attn's source",
    "flash4": "pip install flash-attn-4",
    "te": "pip install 'megasora[gpu]'",
    "triton": "pip install triton",
}
