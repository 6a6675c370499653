"""VideoDiT <-> diffusers' WanTransformer3DModel (text to video)."""

from typing import Any

from megasora.models.interop.names import Rename, leading_one, linear, patch_convolution
from megasora.models.video_dit import VideoDiTConfig


def weight_map(config: VideoDiTConfig) -> list[Rename]:
    table = [
        Rename("patch_embed.weight", "patch_embedding.weight", patch_convolution(config.patch)),
        Rename("patch_embed.bias", "patch_embedding.bias"),
        *linear("text_embed.0", "condition_embedder.text_embedder.linear_1"),
        *linear("text_embed.2", "condition_embedder.text_embedder.linear_2"),
        *linear("time_embed.0", "condition_embedder.time_embedder.linear_1"),
        *linear("time_embed.2", "condition_embedder.time_embedder.linear_2"),
        *linear("time_modulation", "condition_embedder.time_proj"),
        Rename("head.modulation", "scale_shift_table", leading_one()),
        *linear("head.out", "proj_out"),
        Rename("blocks.{i}.modulation", "blocks.{i}.scale_shift_table", leading_one()),
        *linear("blocks.{i}.norm_cross", "blocks.{i}.norm2"),
        *linear("blocks.{i}.mlp.0", "blocks.{i}.ffn.net.0.proj"),
        *linear("blocks.{i}.mlp.2", "blocks.{i}.ffn.net.2"),
    ]
    for ours, theirs in (("self_attention", "attn1"), ("cross_attention", "attn2")):
        for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0")):
            table += linear(f"blocks.{{i}}.{ours}.{a}", f"blocks.{{i}}.{theirs}.{b}")
        for norm in ("norm_q", "norm_k"):
            table.append(Rename(f"blocks.{{i}}.{ours}.{norm}.weight", f"blocks.{{i}}.{theirs}.{norm}.weight"))
    return table


def to_diffusers(config: VideoDiTConfig) -> dict[str, Any]:
    """The arguments of WanTransformer3DModel for our config."""
    return {
        "patch_size": config.patch,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_width,
        "in_channels": config.channels,
        "out_channels": config.channels,
        "text_dim": config.text_width,
        "freq_dim": 256,
        "ffn_dim": config.ffn,
        "num_layers": config.depth,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": config.eps,
        "rope_max_seq_len": 1024,
    }


def config_of(facts: dict[str, Any]) -> VideoDiTConfig:
    """Our config for the arguments of theirs."""
    return VideoDiTConfig(
        width=facts["num_attention_heads"] * facts["attention_head_dim"], depth=facts["num_layers"],
        heads=facts["num_attention_heads"], ffn=facts["ffn_dim"], channels=facts["in_channels"],
        patch=tuple(facts["patch_size"]), text_width=facts["text_dim"], eps=facts["eps"],
    )  # fmt: skip
