"""Multiply-adds by closed form: the one count that MFU, balance and the planner share. One multiply-add is two FLOPs.

Linears and both products of attention; norms, activations and rotations (under 1 %) are not counted, as is the custom.
"""

from collections.abc import Callable
from typing import Any

from megasora.models.packing import Shape
from megasora.models.video_dit import VideoDiTConfig


def video_dit(config: VideoDiTConfig, shape: Shape, text_tokens: int) -> int:
    D, (T, H, W) = config.width, shape
    tokens = T * H * W
    per_token = 4 * D * D + 2 * D * D + 2 * D * config.ffn  # self-attention, cross-attention's q and out, MLP
    per_text_token = 2 * D * D  # cross-attention's k and v
    pairs = tokens * tokens
    if config.temporal == "chunk_causal":
        pairs = seen_frames(T, config.chunk, config.window) * (H * W) ** 2
    block = tokens * per_token + text_tokens * per_text_token + 2 * pairs * D + 2 * tokens * text_tokens * D
    embed = text_tokens * (config.text_width * D + D * D) + 256 * D + D * D + 6 * D * D
    return config.depth * block + embed + tokens * (config.patch_values + config.output_values) * D


def seen_frames(frames: int, chunk: int, window: int) -> int:
    """Pairs (frame, frame that it sees) of block-causal attention."""
    pairs = 0
    for first in range(0, frames, chunk):
        end = min(first + chunk, frames)
        pairs += (end - first) * (end - (max(0, first - window * chunk) if window else 0))
    return pairs


FORWARD_MACS: dict[str, Callable[[Any, Shape, int], int]] = {"video_dit": video_dit}


def forward_macs(config: Any, shape: Shape, text_tokens: int) -> int:
    """Multiply-adds of one sample's forward pass: a `shape` of patches, `text_tokens` valid tokens of its caption."""
    return FORWARD_MACS[config.family](config, shape, text_tokens)


def training_flops(config: Any, shape: Shape, text_tokens: int) -> int:
    """FLOPs of forward and backward (twice the forward) of one sample."""
    return 3 * 2 * forward_macs(config, shape, text_tokens)
