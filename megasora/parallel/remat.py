"""Recomputation: what the backward pass of a block needs is kept, or computed again when it is needed.

full keeps only what enters a block (Chen et al. 2016); everyK does so to every K-th block. selective also keeps what matrix
products, attention and collectives gave, so that only cheap steps are repeated and nothing is sent twice. Beside it, what is kept
may wait in the host's memory.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
DEAR = re.compile(
    r"aten::_(scaled_dot_product|flash|efficient|cudnn).*attention|_c10d_functional::|megasora::.*attention"
    r"|megasora_kernels::flash|flash_attn\w*::.*forward"
)


def recompute(blocks: Iterable[nn.Module], how: str) -> None:
    """Makes blocks recompute themselves: none, full, selective, or everyK (the first of each K); auto, where nobody has chosen
    (without a backward pass, and in parity, which no recomputation changes), is none."""
    if how in ("none", "auto"):
        return
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if how == "selective":
        again = partial(again, context_fn=selective)
    every = int(how.removeprefix("every")) if how.startswith("every") else 1
    for number, block in enumerate(blocks):
        if number % every == 0:
            block.forward = partial(again, block.forward)


def offload(blocks: Iterable[nn.Module]) -> None:
    """What blocks keep waits on the host, but for their weights."""
    for block in blocks:
        block.forward = partial(offloaded, block, block.forward)


def selective() -> Any:
    """The contexts of a forward pass and of its repetition."""
    return create_selective_checkpoint_contexts(keep_the_dear)


def keep_the_dear(
    context: SelectiveCheckpointContext, op: torch._ops.OpOverload, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    """What would take long to repeat is kept."""
    if op in PRODUCTS or DEAR.match(op.name()):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def offloaded(block: nn.Module, forward: Callable[..., Tensor], *args: Any) -> Tensor:
    """A forward pass whose saved tensors wait on the host. Views of weights stay: what holds those here does so anyway, or FSDP2
    gathers them again into the same storage."""
    weights = {p.untyped_storage()._cdata for p in block.parameters()}
    host = save_on_cpu(pin_memory=torch.cuda.is_available())

    def pack(x: Tensor) -> Any:
        return x if x.untyped_storage()._cdata in weights else host.pack_hook(x)

    def unpack(kept: Any) -> Tensor:
        found: Tensor = kept if isinstance(kept, Tensor) else host.unpack_hook(kept)
        return found

    with saved_tensors_hooks(pack, unpack):
        return forward(*args)
