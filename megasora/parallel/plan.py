"""Which layer of which family is split how. Data, not code: patterns of module names, the first that matches counts.

column: some outputs, of the tokens that all ranks of the group have together; column_whole: of tokens that each has anyway;
row: some inputs; norm: over a width that is split; heads: whole, but it sees its rank's heads alone. The first group of a
column's pattern names the layers with one input.
"""

import re
from dataclasses import replace
from math import gcd
from typing import Any

from megasora.errors import ConfigError
from megasora.parallel.layout import Layout
from megasora.parallel.schedule import CHUNKS
from megasora.parallel.tensor import Style

ATTENTION: list[tuple[str, Style]] = [
    (r"(blocks\.\d+(?:\.space|\.time)?\.(?:self_)?attention)\.[qkv]", "column"),
    (r"(blocks\.\d+(?:\.space|\.time)?\.cross_attention)\.q", "column"),
    (r"blocks\.\d+(?:\.space|\.time)?\.cross_attention\.[kv]", "column_whole"),
    (r"blocks\.\d+(?:\.space|\.time)?\.(?:self_|cross_)?attention\.out", "row"),
]
MLP: list[tuple[str, Style]] = [
    (r"(blocks\.\d+(?:\.space|\.time)?\.mlp)\.0", "column"),
    (r"blocks\.\d+(?:\.space|\.time)?\.mlp\.2", "row"),
]
PLANS: dict[str, list[tuple[str, Style]]] = {
    "video_dit": [*ATTENTION, (r"blocks\.\d+\.(?:self|cross)_attention\.norm_[qk]", "norm"), *MLP],
    "mmdit": [  # captions of a refiner are refined whole on every rank, and each goes on with its own stretch
        (r"(blocks\.\d+\.(?:text|video)\.qkv)\.[qkv]", "column"),
        (r"(blocks\.\d+\.(?:text|video)\.mlp)\.0", "column"),
        (r"blocks\.\d+\.(?:text|video)\.(?:out|mlp\.2)", "row"),
        (r"(blocks\.\d+)\.(?:qkv\.[qkv]|mlp)", "column"),
        (r"blocks\.\d+\.out", "row"),
        (r"blocks\.\d+\.(?:text\.|video\.)?qkv\.norm_[qk]", "heads"),
    ],
    "stdit": [*ATTENTION, *MLP, (r"blocks\.\d+\.(?:space|time)\.(?:self_|cross_)?attention\.norm_[qk]", "heads")],
    "dit": [*ATTENTION, *MLP],
}


def split_dim(family: str, name: str) -> int | None:
    """The dimension of a parameter that the family's plan divides among the ranks of a tensor group."""
    module, _, kind = name.rpartition(".")
    for pattern, style in PLANS.get(family, []):
        if re.fullmatch(pattern, module):
            if style == "row":
                return 1 if kind == "weight" else None
            return None if style == "heads" else 0
    return None


def check_layout(model: Any, layout: Layout, node: int | None = None) -> None:
    """Raises ConfigError, with the nearest layout that works, for one on which the model of a config cannot be spread; and, where
    a node has so many processes, for one whose tensor and Ulysses groups do not stay within nodes."""
    spread(model, layout)
    wide = layout.tp * (layout.cp if layout.dynamic else layout.ulysses)  # a pool's Ulysses groups begin anywhere in it
    if node is None or node % wide == 0 or layout.world <= node:
        return
    tp = gcd(layout.tp, node)
    ulysses = gcd(layout.ulysses, node // tp)
    ring = layout.cp // ulysses
    instead: dict[str, Any] = {"tp": tp, "ulysses": ulysses, "ring": ring, "dynamic": False}
    try:
        spread(model, replace(layout, **instead))
    except ConfigError:  # no ring for this family
        instead["ring"] = 1
    what = "tp x cp:dynamic" if layout.dynamic else "tp x Ulysses"
    why = f"{what} = {wide} goes beyond nodes of {node} processes (parallel.across_nodes=true allows it)"
    raise refusal(layout, why, **instead)


def spread(model: Any, layout: Layout) -> None:
    """`check_layout`, wherever the ranks lie."""
    stages = layout.pp * CHUNKS[layout.schedule]
    if layout.pp > 1 and stages > model.block_count:
        fitting = max(1, model.block_count // CHUNKS[layout.schedule])
        most = max(n for n in range(1, fitting + 1) if layout.pp % n == 0)
        why = f"{stages} stages are more than the model's {model.block_count} blocks"
        raise refusal(layout, why, pp=most)
    if layout.tp * layout.cp == 1:
        return
    family = model.family
    apart = family in ("vit", "vivit") or (family == "dit" and not model.adaptive)
    if apart:
        what = f"model.family={family}" if family != "dit" else f"model.design={model.design}"
        raise refusal(layout, f"{what} keeps whole rows: no cp, no tp", ulysses=1, ring=1, tp=1)
    if layout.tp > 1 and family not in PLANS:
        raise refusal(layout, f"model.family={family} has no tp in this version", ulysses=layout.cp * layout.tp, tp=1)
    if layout.dynamic and (family == "stdit" or (family == "video_dit" and model.temporal != "full")):
        raise refusal(layout, "attention in windows or in another order: no dynamic cp", dynamic=False)
    if layout.ring > 1 and (family == "stdit" or (family == "video_dit" and model.temporal != "full")):
        raise refusal(
            layout, "attention in windows or in another order wants whole rows: no ring", ulysses=layout.cp, ring=1
        )
    share = layout.tp * layout.ulysses
    if model.heads % share:
        least = max(
            n for n in range(1, share + 1) if (model.heads % n == 0 and share % n == 0 and n % layout.tp == 0) or n == 1
        )
        tp = layout.tp if least % layout.tp == 0 else 1
        ulysses = least // tp
        raise refusal(layout, f"{model.heads} heads do not divide by tp x Ulysses = {share}", tp=tp, ulysses=ulysses)
    if family != "stdit" and model.ffn % layout.tp:
        raise refusal(layout, f"model.ffn={model.ffn} does not divide by tp{layout.tp}", tp=1)


def refusal(layout: Layout, why: str, **instead: Any) -> ConfigError:
    """With the processes that are left over as data-parallel ranks."""
    other = replace(layout, **instead)
    spare = layout.world // other.world
    key = "dp_shard" if layout.zero else "dp_replicate"
    grown: dict[str, Any] = {key: getattr(other, key) * spare}
    return ConfigError(f"parallel.layout={layout}: {why}; nearest is {replace(other, **grown)}")
