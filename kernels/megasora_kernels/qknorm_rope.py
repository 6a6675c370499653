"""RMSNorm of queries or keys, then their rotation by position (RoPE), over a packed row of tokens.

    y = turn(x / sqrt(mean(x²) + eps) · weight, rotation[token])

The norm goes over the row of a token (as in Wan) or over each head (as in Flux and HunyuanVideo); `turn` multiplies neighbouring
channels, as one complex number, by the token's own (Su et al. 2021). Either part may be left out. Computed in fp32; what leaves
is rounded once, where torch rounds after the norm and again after the rotation.

Shapes: L tokens, N heads, K head width, D = N·K; x [L, D], weight [D] or [K], rotation [L, K/2, 2] fp32: cosine and sine of
each pair's angle, once for all layers. y [L, N, K], or with G groups [G, L, N/G, K]: what each of G ranks gets in Ulysses'
exchange of tokens for heads (Jacobs et al. 2023), which then needs no copy.

Cost in bf16: forward 4·L·D bytes and 10·L·D FLOPs, backward 6·L·D bytes and 20·L·D FLOPs, each with 4·L·K bytes of rotation.
Nothing but x is kept for the backward. It pays over torch.compile, which does not fuse complex numbers, keeps the normed row,
and sums the weight's gradient in a pass of its own. In torch on an H100, L = 32,760, D = 1536: the rotation 0.54 to 0.85 ms, the
norm 0.35 to 1.14 ms; these kernels do both in 0.08 ms, backward in 0.15 ms: 86 and 72 % of the bound.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megasora_kernels.packed import jit
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a plain CPU install: only the reference is used
    triton = None

FORWARD_TOKENS = 8  # per program: the weight stays in registers
BACKWARD_TOKENS = 32  # per program: a partial sum of the weight's gradient costs 8·D bytes, written and read
# Of a token, for each warp: the fastest of 256, 512 and 1024 on an H100 at D = 1536.
FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 1024, 256


def rotation_table(angles: Tensor) -> Tensor:
    """[L, K/2] angles -> [L, K/2, 2] fp32 (fp64 where they are): cosines and sines, for all layers of a model."""
    return torch.view_as_real(torch.polar(torch.ones_like(angles), angles))


def qknorm_rope_reference(
    x: Tensor, weight: Tensor | None, rotation: Tensor | None, head_width: int, eps: float = 1e-6, groups: int = 1
) -> Tensor:
    """What the kernels compute, in plain torch: fp32 inside, or fp64 where x is fp64."""
    heads = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, head_width))  # [L, N, K]
    if weight is not None:
        whole = heads if len(weight) == head_width else heads.flatten(1)
        heads = F.rms_norm(whole, weight.shape, weight.to(heads.dtype), eps).view_as(heads)
    if rotation is not None:
        heads = turn(heads, rotation.to(heads.dtype))
    y = heads.to(x.dtype)
    return y if groups == 1 else y.unflatten(1, (groups, -1)).transpose(0, 1).contiguous()


def turn(heads: Tensor, rotation: Tensor) -> Tensor:
    """[L, N, K] by [L, K/2, 2] of the same type. Compiled in real numbers: inductor writes no code for complex ones."""
    if torch.compiler.is_compiling():
        (real, imaginary), (cosine, sine) = heads.unflatten(-1, (-1, 2)).unbind(-1), rotation[:, None].unbind(-1)
        return torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-1).flatten(-2)
    pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)))  # [L, N, K/2]
    return torch.view_as_real(pairs * torch.view_as_complex(rotation)[:, None]).flatten(-2)


@jit
def _turn(value: tl.tensor, rotation: tl.tensor, back: tl.constexpr) -> tl.tensor:
    """[heads, channels] by the [channels] of one token's rotation, or back."""
    heads: tl.constexpr = value.shape[0]
    pairs: tl.constexpr = value.shape[1] // 2
    real, imaginary = tl.split(tl.reshape(value, [heads, pairs, 2]))
    cosine, sine = tl.split(tl.reshape(rotation, [pairs, 2]))
    cosine, sine = cosine[None, :], sine[None, :]
    if back:
        sine = -sine
    turned = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
    return tl.reshape(turned, [heads, 2 * pairs])


@jit
def _inverse_rms(value: tl.tensor, width: tl.tensor, eps: tl.tensor, per_head: tl.constexpr) -> tl.tensor:
    """[heads, channels] -> 1 / rms, of each head [heads, 1] or of all [1, 1]."""
    squares = tl.sum(value * value, 1, keep_dims=True)
    if not per_head:
        squares = tl.sum(squares, 0, keep_dims=True)
    return tl.rsqrt(squares / width + eps)


@jit
def _forward_kernel(
    x: tl.tensor,  # [tokens, heads, head_width], rows `x_stride` apart
    weight: tl.tensor,  # [heads, head_width] or [head_width]
    rotation: tl.tensor,  # [tokens, head_width]: cosine, sine, cosine, ...
    y: tl.tensor,  # [groups, tokens, group_heads, head_width]
    tokens: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    heads: tl.constexpr,  # constants, so that every load is known to be aligned
    head_width: tl.constexpr,
    group_heads: tl.constexpr,
    normed: tl.constexpr,  # whether there is a weight
    per_head: tl.constexpr,
    turned: tl.constexpr,  # whether there is a rotation
    block_tokens: tl.constexpr,
    block_heads: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    """One program: `block_tokens` tokens, one after the other, each in registers from its load to its store."""
    head, channel = tl.arange(0, block_heads)[:, None], tl.arange(0, block_channels)
    inside = (head < heads) & (channel < head_width)[None, :]
    place = head * head_width + channel[None, :]
    away = (head // group_heads).to(tl.int64) * tokens * group_heads + head % group_heads  # in heads, of token 0
    if normed:
        if per_head:
            factor = tl.load(weight + channel, mask=channel < head_width, other=0.0).to(tl.float32)[None, :]
        else:
            factor = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * block_tokens
    for token in range(first, tl.minimum(first + block_tokens, tokens)):
        value = tl.load(x + token * x_stride + place, mask=inside, other=0.0).to(tl.float32)
        if normed:
            width = head_width if per_head else heads * head_width
            value = value * _inverse_rms(value, width, eps, per_head) * factor
        if turned:
            angle = tl.load(rotation + token * head_width + channel, mask=channel < head_width, other=0.0)
            value = _turn(value, angle, False)
        target = (away + token * group_heads) * head_width + channel[None, :]
        tl.store(y + target, value.to(y.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    dy: tl.tensor,  # [groups, tokens, group_heads, head_width]
    x: tl.tensor,  # [tokens, heads, head_width], rows `x_stride` apart
    weight: tl.tensor,  # [heads, head_width] or [head_width]
    rotation: tl.tensor,  # [tokens, head_width]
    dx: tl.tensor,  # [tokens, heads, head_width]
    parts: tl.tensor,  # [blocks, heads, head_width] or [blocks, head_width]
    tokens: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    heads: tl.constexpr,  # constants, so that every load is known to be aligned
    head_width: tl.constexpr,
    group_heads: tl.constexpr,
    normed: tl.constexpr,
    per_head: tl.constexpr,
    turned: tl.constexpr,
    block_tokens: tl.constexpr,
    block_heads: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    """One program: dx of `block_tokens` tokens and their part of the weight's gradient."""
    head, channel = tl.arange(0, block_heads)[:, None], tl.arange(0, block_channels)
    inside = (head < heads) & (channel < head_width)[None, :]
    place = head * head_width + channel[None, :]
    away = (head // group_heads).to(tl.int64) * tokens * group_heads + head % group_heads
    width = head_width if per_head else heads * head_width
    if normed:
        if per_head:
            factor = tl.load(weight + channel, mask=channel < head_width, other=0.0).to(tl.float32)[None, :]
        else:
            factor = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
        dweight = tl.zeros([block_heads, block_channels], tl.float32)
    block = tl.program_id(0).to(tl.int64)
    first = block * block_tokens
    for token in range(first, tl.minimum(first + block_tokens, tokens)):
        source = (away + token * group_heads) * head_width + channel[None, :]
        grad = tl.load(dy + source, mask=inside, other=0.0).to(tl.float32)
        if turned:
            angle = tl.load(rotation + token * head_width + channel, mask=channel < head_width, other=0.0)
            grad = _turn(grad, angle, True)
        if normed:
            value = tl.load(x + token * x_stride + place, mask=inside, other=0.0).to(tl.float32)
            inverse = _inverse_rms(value, width, eps, per_head)
            value = value * inverse
            dweight += grad * value
            grad = grad * factor
            along = tl.sum(grad * value, 1, keep_dims=True)
            if not per_head:
                along = tl.sum(along, 0, keep_dims=True)
            grad = (grad - value * (along / width)) * inverse
        tl.store(dx + token * heads * head_width + place, grad.to(dx.dtype.element_ty), mask=inside)
    if normed:
        if per_head:
            tl.store(parts + block * head_width + channel, tl.sum(dweight, 0), mask=channel < head_width)
        else:
            tl.store(parts + block * heads * head_width + place, dweight, mask=inside)


@torch.library.custom_op("megasora_kernels::qknorm_rope", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor | None, rotation: Tensor | None, head_width: int, eps: float, groups: int
) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = x.new_empty(groups, len(x), x.shape[1] // head_width // groups, head_width)
    arguments, constants = _arguments(x, weight, rotation, head_width, eps, groups)
    _forward_kernel[(triton.cdiv(len(x), FORWARD_TOKENS),)](
        x,
        *arguments[:2],
        y,
        *arguments[2:],
        block_tokens=FORWARD_TOKENS,
        **constants,
        num_warps=warps(constants, FORWARD_ELEMENTS),
    )
    return y if groups > 1 else y[0]


@torch.library.custom_op("megasora_kernels::qknorm_rope_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rotation: Tensor | None, head_width: int, eps: float, groups: int
) -> tuple[Tensor, Tensor]:
    dy, x = dy.contiguous(), x if x.stride(-1) == 1 else x.contiguous()
    dx = x.new_empty(x.shape)
    blocks = triton.cdiv(len(x), BACKWARD_TOKENS)
    parts = x.new_empty(blocks, 0 if weight is None else len(weight), dtype=torch.float32)
    arguments, constants = _arguments(x, weight, rotation, head_width, eps, groups)
    _backward_kernel[(blocks,)](
        dy,
        x,
        *arguments[:2],
        dx,
        parts,
        *arguments[2:],
        block_tokens=BACKWARD_TOKENS,
        **constants,
        num_warps=warps(constants, BACKWARD_ELEMENTS),
    )
    return dx, parts.sum(0)


def _arguments(
    x: Tensor, weight: Tensor | None, rotation: Tensor | None, head_width: int, eps: float, groups: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What both launches share. A part that is left out is never read: x stands in for its pointer."""
    tokens, width = x.shape
    heads = width // head_width
    block_heads, block_channels = triton.next_power_of_2(heads), triton.next_power_of_2(head_width)
    given = (x if weight is None else weight.contiguous(), x if rotation is None else rotation.contiguous())
    constants = {
        "heads": heads,
        "head_width": head_width,
        "group_heads": heads // groups,
        "normed": weight is not None,
        "per_head": weight is not None and len(weight) == head_width,
        "turned": rotation is not None,
        "block_heads": block_heads,
        "block_channels": block_channels,
    }
    return (*given, tokens, x.stride(0), eps), constants


def warps(constants: dict[str, Any], elements: int) -> int:
    return min(max(constants["block_heads"] * constants["block_channels"] // elements, 1), 16)


@_forward.register_fake
def _(x: Tensor, weight: Tensor | None, rotation: Tensor | None, head_width: int, eps: float, groups: int) -> Tensor:
    heads = x.shape[1] // head_width
    return x.new_empty(*((groups,) if groups > 1 else ()), x.shape[0], heads // groups, head_width)


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor | None, rotation: Tensor | None, head_width: int, eps: float, groups: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if weight is None else weight.shape[0], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, rotation, *ctx.rest = inputs
    ctx.save_for_backward(x, weight, rotation)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, rotation = ctx.saved_tensors
    dx, dweight = _backward(dy, x, weight, rotation, *ctx.rest)
    return dx, None if weight is None else dweight.to(weight.dtype), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def qknorm_rope_triton(
    x: Tensor, weight: Tensor | None, rotation: Tensor | None, head_width: int, eps: float = 1e-6, groups: int = 1
) -> Tensor:
    """The kernels, with autograd, torch.compile and fake tensors: on CUDA, or on CPU in Triton's interpreter."""
    if triton is None:
        raise ImportError("qknorm_rope on CUDA needs triton: pip install triton")
    return _forward(x, weight, rotation, head_width, eps, groups)


def qknorm_rope(
    x: Tensor, weight: Tensor | None, rotation: Tensor | None, head_width: int, eps: float = 1e-6, groups: int = 1
) -> Tensor:
    """RMSNorm and rotation of queries or keys: kernels on CUDA, the reference on CPU and for fp64.

    x [L, D] of any float type; weight [D]: normed over the row, [K]: within each head, None: not normed; rotation [L, K/2, 2] of
    `rotation_table`, which gets no gradient, None: not turned. Returns [L, N, K] in the type of x, with groups > 1
    [groups, L, N/groups, K]. Raises ValueError where shapes or types do not fit, ImportError on CUDA without Triton.
    """
    if x.ndim != 2 or x.shape[1] % (head_width * groups) or head_width % 2:
        raise ValueError(
            f"x [L, D] of {[*x.shape]} is not {groups} groups of heads of {head_width} channels, an even number"
        )
    if weight is not None and weight.shape not in (x.shape[1:], (head_width,)):
        raise ValueError(f"weight must be of shape {[x.shape[1]]} or {[head_width]}, not {[*weight.shape]}")
    types = (torch.float32, torch.promote_types(x.dtype, torch.float32))
    if rotation is not None and (rotation.shape != (len(x), head_width // 2, 2) or rotation.dtype not in types):
        wanted = f"torch.float32 of shape {[len(x), head_width // 2, 2]}"
        raise ValueError(f"rotation must be {wanted}, not {rotation.dtype} {[*rotation.shape]}")
    if x.is_cuda and x.dtype != torch.float64:
        return qknorm_rope_triton(x, weight, rotation, head_width, eps, groups)
    return qknorm_rope_reference(x, weight, rotation, head_width, eps, groups)
