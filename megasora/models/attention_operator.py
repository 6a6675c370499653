"""Attention as operators that torch.compile calls and does not look into. Lengths come as tensors on the host: they are data to
a graph, not a part of it, so one graph serves rows of any lengths; and nothing waits for the device.

Two operators, each with the one of its backward pass: attention over packed spans, by the kernels that a ring of ranks has
(`flash`), and the turning of boxes, which brings together what sees each other.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megasora.models.attention import Attention, ChosenAttention, Span, alike, answer, lone
from megasora.models.flash import FLASH
from megasora.models.packing import Order, Segments, Windows


class AttentionOperator(ChosenAttention):
    """Stands where a model's attention was, for blocks that are compiled."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Segments | Order, keys: Segments | Windows | Order
    ) -> Tensor:
        """q [L, N, K], k and v [M, N, K] -> [L, N, K]."""
        if isinstance(queries, Order):
            assert isinstance(keys, Order)
            if queries.turns is None:
                return self(q, k, v, queries.segments, keys.segments)
            there, back = queries.turns
            q, k, v = (turn(x, there, back) for x in (q, k, v))
            return turn(self(q, k, v, queries.segments, keys.segments), back, there)
        assert not isinstance(keys, Order)
        return packed_attention(q, k, v, queries.spans, keys.spans, isinstance(keys, Windows), self.kernels(q))[0]

    def cpu_ready(self) -> bool:
        """`as_operator` has asked: a graph cannot."""
        return True


def as_operator(attention: Attention) -> Attention:
    """The same as operators."""
    assert isinstance(attention, ChosenAttention)
    name = "sdpa" if attention.name == "cpu" and not attention.cpu_ready() else attention.name
    return AttentionOperator(name, attention.forced)


def members(q: Tensor, queries: Tensor, keys: Tensor, windows: bool) -> Iterator[tuple[int, Span]]:
    """What `alike` finds in spans [2, S] each."""
    return alike(q, zip(*queries.tolist(), *keys.tolist(), strict=True), windows)


def stretch_of(x: Tensor, first: int, n: int, length: int) -> Tensor:
    """[L, ...] -> [n, length, ...]: a view."""
    return x[first : first + n * length].unflatten(0, (n, length))


def whole_row(q: Tensor, k: Tensor, queries: Tensor, keys: Tensor, windows: bool) -> int:
    """How many sequences a row has, if one call takes them all and they fill it: what a kernel gives is then the result itself.
    Else none."""
    found = list(members(q, queries, keys, windows))
    n, (a, length, b, width) = found[0] if found else (0, (0, 0, 0, 0))
    filled = (a, n * length, b, n * width) == (0, len(q), 0, len(k)) and length and width
    return n if len(found) == 1 and filled and not lone(q, length, width) else 0


def flattened(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """[n, L, ...] -> [n · L, ...], each."""
    return tuple(tensor.flatten(0, 1).contiguous() for tensor in tensors)


@torch.library.custom_op("megasora::packed_attention", mutates_args=())
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, windows: bool, library: str
) -> tuple[Tensor, Tensor]:
    """q [L, N, K], k and v [M, N, K], spans [2, S] int64 on the host -> out [L, N, K], lse [L, N] fp32. What sees no key gets
    zeros, and so does the lse of lone tokens, which the backward pass does not need."""
    flash = FLASH[library]
    if alone := whole_row(q, k, queries, keys, windows):
        out, lse = flattened(flash.forward(*(x.unflatten(0, (alone, -1)) for x in (q, k, v))))
        return out, lse
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    for n, (a, length, b, width) in members(q, queries, keys, windows):
        results = [stretch_of(x, a, n, length) for x in (out, lse)]
        found: Sequence[Tensor] = [torch.zeros_like(x) for x in results]
        if lone(q, length, width):
            found = answer(stretch_of(q, a, n, 1), *(stretch_of(x, b, n, 1) for x in (k, v))), found[1]
        elif length and width:
            found = flash.forward(stretch_of(q, a, n, length), *(stretch_of(x, b, n, width) for x in (k, v)))
        torch._foreach_copy_(results, list(found))
    return out, lse


@torch.library.custom_op("megasora::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, queries: Tensor, keys: Tensor,
    windows: bool, library: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v."""
    flash, grad = FLASH[library], grad.contiguous()
    if alone := whole_row(q, k, queries, keys, windows):
        dq, dk, dv = flattened(flash.backward(*(x.unflatten(0, (alone, -1)) for x in (grad, q, k, v, out, lse))))
        return dq, dk, dv
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    for n, (a, length, b, width) in members(q, queries, keys, windows):
        if lone(q, length, width):
            dv[b : b + n] += grad[a : a + n]
        elif length and width:
            mine = [stretch_of(x, a, n, length) for x in (grad, q, out, lse, dq)]
            seen = [stretch_of(x, b, n, width) for x in (k, v, dk, dv)]
            found = flash.backward(*mine[:2], *seen[:2], *mine[2:4])
            torch._foreach_add_([mine[4], *seen[2:]], list(found))  # windows overlap
    return dq, dk, dv


@packed_attention.register_fake
def _(q: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@packed_attention_backward.register_fake
def _(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, queries, keys, *ctx.how = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, queries, keys)


def _differentiate(ctx: Any, grad: Tensor, _lse: Tensor) -> tuple[Tensor | None, ...]:
    return *packed_attention_backward(grad, *ctx.saved_tensors, *ctx.how), None, None, None, None


packed_attention.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("megasora::turn", mutates_args=())
def turn(x: Tensor, there: Tensor, back: Tensor) -> Tensor:
    """[L, ...], which is boxes [n, A, B, ...] side by side -> the same with every box turned to [n, B, A, ...]. `there` has the
    boxes, [G, 3] int64 on the host, `back` the turned ones."""
    y, begin = x.new_empty(x.shape), 0
    for n, A, B in there.tolist():
        end = begin + n * A * B
        y[begin:end].unflatten(0, (n, B, A)).copy_(x[begin:end].unflatten(0, (n, A, B)).transpose(1, 2))
        begin = end
    return y


@turn.register_fake
def _(x: Tensor, _there: Tensor, _back: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _keep_boxes(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _turn_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    there, back = ctx.saved_tensors
    return turn(grad, back, there), None, None


turn.register_autograd(_turn_back, setup_context=_keep_boxes)
