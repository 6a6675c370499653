"""torch.compile, block by block: the blocks of a model share a graph, and one serves rows of all buckets.

What differs from row to row is kept out of the graph: lengths are tensors that operators read (`attention_operator`), and how
many samples, runs and words a row has are sizes that nothing is specialised for. A row of another length costs a second graph,
in which that too is a variable. Compiled is what trains; without gradients (sampling, evaluation) blocks run as they are.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.decorators import mark_unbacked, maybe_mark_dynamic

from megasora.models.base import Setting
from megasora.models.packing import Order, PackedRow, Segments, Windows

FREE = ("text", "time", "modulation", "condition", "pooled")  # fields with a line for each word, run or sample


def compile_blocks(blocks: Iterable[nn.Module], backend: str = "inductor", fp8: bool = False) -> None:
    """Blocks compile themselves when they are first called, as they are then: split, and with what they compute again.

    With `fp8` the number of words is a variable of the graph: torch's fp8 products ask whether it is a multiple of 16.
    """
    torch._dynamo.config.optimize_ddp = False  # it would cut graphs at the buckets of DDP
    # A `Gather` lets go of what it holds before the block ends, so there is nothing to do again in the backward pass.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    free = tuple(name for name in FREE if not (fp8 and name == "text"))
    for block in blocks:
        block.forward = partial(call, torch.compile(block.forward, backend=backend), block.forward, free)


def call(
    compiled: Callable[..., Tensor], plain: Callable[..., Tensor], free: tuple[str, ...], x: Tensor, setting: Setting
) -> Tensor:
    """A block's forward pass, compiled where there are gradients."""
    if not torch.is_grad_enabled():
        return plain(x, setting)
    row = setting.row
    fixed = len(row.tokens), len(row.attended.tokens)
    make_ready(setting, fixed, free)
    if len(x) not in fixed:  # captions go along
        maybe_mark_dynamic(x, 0)
    return compiled(x, setting)


def make_ready(value: Any, fixed: tuple[int, ...], free: tuple[str, ...]) -> None:
    """Makes now what is otherwise made when it is first asked for, which would be inside the graph, and says which sizes differ
    from row to row: all but the `fixed`. Of the `free` fields nothing may be known."""
    if isinstance(value, Segments | Windows):
        mark_unbacked(value.spans, 1)
        if isinstance(value, Segments) and value.peers:
            mark_unbacked(value.shares, 1)
    elif isinstance(value, tuple):
        for part in value:
            make_ready(part, fixed, free)
    elif is_dataclass(value):
        if isinstance(value, PackedRow):
            _ = value.runs.index
        if isinstance(value, Order):
            for boxes in value.turns or ():
                mark_unbacked(boxes, 0)
        for field in fields(value):
            part = getattr(value, field.name)
            if not isinstance(part, Tensor):
                make_ready(part, fixed, free)
            elif field.name in free:
                mark_unbacked(part, 0)
            elif part.ndim and len(part) not in fixed:
                maybe_mark_dynamic(part, 0)
