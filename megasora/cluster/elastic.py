"""With how many nodes a job may go on, and how they share the work."""

from dataclasses import replace

from megasora.parallel.layout import Layout


def shrunken_layout(layout: Layout, world: int, global_batch: int) -> Layout | None:
    """The layout of `world` processes for a run that began with `layout`; None if there is none.

    The rule: a sample is computed as before (pipeline, context and tensor parallelism stay), fewer of them at a time. The
    global batch stays, so it must divide among the data-parallel ranks. HSDP keeps the width of its shards while that
    divides, and becomes plain ZeRO-3 else.
    """
    whole = layout.pp * layout.cp * layout.tp
    dp = world // whole
    if dp < 1 or world % whole or global_batch % dp:
        return None
    if layout.zero == 0:
        return replace(layout, dp_replicate=dp, dp_shard=1)
    if layout.dp_replicate > 1 and dp % layout.dp_shard == 0:
        return replace(layout, dp_replicate=dp // layout.dp_shard)
    return replace(layout, dp_replicate=1, dp_shard=dp)


def layouts_by_nodes(layout: Layout, nodes: int, least: int, nproc: int, global_batch: int) -> dict[int, str]:
    """node count -> `parallel.layout`, the most nodes first: those of `least` to `nodes` for which the rule has a layout.

    `layout` is that of all nodes, whose data-parallel ranks share the batch evenly.
    """
    found = {count: shrunken_layout(layout, count * nproc, global_batch) for count in range(nodes, least - 1, -1)}
    return {count: str(layout) for count, layout in found.items() if layout is not None}
