"""Multiply-adds by closed form: the one count that MFU, balance and the planner share. One multiply-add is two FLOPs."""

from megasora.models.video_dit import VideoDiTConfig


def forward_macs(config: VideoDiTConfig, tokens: int, text_tokens: int) -> int:
    """Multiply-adds of one sample's forward pass: `tokens` patches, `text_tokens` valid tokens of its caption.

    Linears and both products of attention; norms, activations and the rotation (under 1 %) are not counted, as is the custom.
    """
    D = config.width
    per_token = 4 * D * D + 2 * D * D + 2 * D * config.ffn  # self-attention, cross-attention's q and out, MLP
    per_text_token = 2 * D * D  # cross-attention's k and v
    block = tokens * per_token + text_tokens * per_text_token + 2 * tokens * tokens * D + 2 * tokens * text_tokens * D
    embed = text_tokens * (config.text_width * D + D * D) + 256 * D + D * D + 6 * D * D
    return config.depth * block + embed + 2 * tokens * config.patch_values * D


def training_flops(config: VideoDiTConfig, tokens: int, text_tokens: int) -> int:
    """FLOPs of forward and backward (twice the forward) of one sample."""
    return 3 * 2 * forward_macs(config, tokens, text_tokens)
