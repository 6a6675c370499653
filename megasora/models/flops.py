"""Multiply-adds by closed form: the one count that MFU, balance and the planner share. One multiply-add is two FLOPs.

Linears and both products of attention; norms, activations and rotations (under 1 %) are not counted, as is the custom. Each
family's form stands at the end of its own file.
"""

from collections.abc import Callable
from typing import Any

from megasora.models import dit, mmdit, stdit, video_dit, vit
from megasora.models.packing import Shape

FORWARD_MACS: dict[str, Callable[[Any, Shape, int], int]] = {
    "video_dit": video_dit.forward_macs,
    "mmdit": mmdit.forward_macs,
    "stdit": stdit.forward_macs,
    "dit": dit.forward_macs,
    "vit": vit.forward_macs,
    "vivit": vit.forward_macs,
}

ATTENTION_MACS: dict[str, Callable[[Any, Shape, int], int]] = {
    "video_dit": video_dit.attention_macs,
    "mmdit": mmdit.attention_macs,
    "stdit": stdit.attention_macs,
    "dit": dit.attention_macs,
    "vit": vit.attention_macs,
    "vivit": vit.attention_macs,
}


def attention_macs(config: Any, shape: Shape, text_tokens: int) -> int:
    """Of `forward_macs` what both products of attention take, which run at another speed than linear layers."""
    return ATTENTION_MACS[config.family](config, shape, text_tokens)


def forward_macs(config: Any, shape: Shape, text_tokens: int) -> int:
    """Multiply-adds of one sample's forward pass: a `shape` of patches, `text_tokens` valid tokens of its caption."""
    return FORWARD_MACS[config.family](config, shape, text_tokens)


def training_flops(config: Any, shape: Shape, text_tokens: int) -> int:
    """FLOPs of forward and backward (twice the forward) of one sample."""
    return 3 * 2 * forward_macs(config, shape, text_tokens)
