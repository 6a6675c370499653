"""STDiT <-> diffusers' LatteTransformer3DModel."""

from typing import Any

from einops import rearrange

from megasora.models.interop.names import Change, Rename, linear
from megasora.models.packing import Patch
from megasora.models.stdit import STDiTConfig

FIXED = {  # what every Latte has
    "qk_norm": False,
    "time_position": "sincos",
    "time_text": False,
    "fps_condition": False,
    "area_scale": False,
    "eps": 1e-6,
}


def weight_map(config: STDiTConfig) -> list[Rename]:
    table = [
        Rename("patch_embed.weight", "pos_embed.proj.weight", frame_convolution(config.patch)),
        Rename("patch_embed.bias", "pos_embed.proj.bias"),
        *linear("text_embed.0", "caption_projection.linear_1"),
        *linear("text_embed.2", "caption_projection.linear_2"),
        *linear("time_embed.0", "adaln_single.emb.timestep_embedder.linear_1"),
        *linear("time_embed.2", "adaln_single.emb.timestep_embedder.linear_2"),
        *linear("time_modulation", "adaln_single.linear"),
        Rename("head.modulation", "scale_shift_table"),
        Rename("head.out.weight", "proj_out.weight", head_rows(config)),
        Rename("head.out.bias", "proj_out.bias", head_rows(config)),
    ]
    attentions = [("space", "self", "attn1"), ("space", "cross", "attn2"), ("time", "self", "attn1")]
    names = {"space": "transformer_blocks", "time": "temporal_transformer_blocks"}
    for ours, theirs in names.items():
        table += [
            Rename(f"blocks.{{i}}.{ours}.modulation", f"{theirs}.{{i}}.scale_shift_table"),
            *linear(f"blocks.{{i}}.{ours}.mlp.0", f"{theirs}.{{i}}.ff.net.0.proj"),
            *linear(f"blocks.{{i}}.{ours}.mlp.2", f"{theirs}.{{i}}.ff.net.2"),
        ]
    for block, kind, attention in attentions:
        for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0")):
            table += linear(f"blocks.{{i}}.{block}.{kind}_attention.{a}", f"{names[block]}.{{i}}.{attention}.{b}")
    return table


def frame_convolution(patch: Patch) -> Change:
    """A convolution [D, C, ph, pw] over one frame, whose stride is its kernel, and the linear layer [D, ph·pw·C] that it is."""
    _, ph, pw = patch
    return Change(
        to_ours=lambda w: rearrange(w, "D C ph pw -> D (ph pw C)"),
        to_theirs=lambda w: rearrange(w, "D (ph pw C) -> D C ph pw", ph=ph, pw=pw),
    )


def head_rows(config: STDiTConfig) -> Change:
    """Their outputs are each pixel's means and then its variances; ours are the patch's means and then its variances."""
    parts = 2 if config.learn_sigma else 1
    return Change(
        to_ours=lambda w: rearrange(w, "(pixel part C) ... -> (part pixel C) ...", part=parts, C=config.channels),
        to_theirs=lambda w: rearrange(w, "(part pixel C) ... -> (pixel part C) ...", part=parts, C=config.channels),
    )


def to_diffusers(config: STDiTConfig, frames: int = 16) -> dict[str, Any]:
    """The arguments of LatteTransformer3DModel for our config and clips of `frames` latent frames.

    Raises ValueError for what it cannot express.
    """
    p = config.patch[1]
    for name, value in {**FIXED, "ffn": 4 * config.width, "patch": (1, p, p)}.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name}={getattr(config, name)}: Latte has {value}")
    sample_size = config.base_size * p
    if sample_size >= 128:  # from here on they scale positions down again
        raise ValueError(f"base_size={config.base_size}: Latte has at most {127 // p}")
    return {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_width,
        "in_channels": config.channels,
        "out_channels": config.channels * (2 if config.learn_sigma else 1),
        "num_layers": config.depth,
        "cross_attention_dim": config.width,
        "attention_bias": True,
        "sample_size": sample_size,
        "patch_size": p,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": config.eps,
        "caption_channels": config.text_width,
        "video_length": frames,
    }


def config_of(facts: dict[str, Any]) -> STDiTConfig:
    """Our config for the arguments of theirs."""
    width, p = facts["num_attention_heads"] * facts["attention_head_dim"], facts["patch_size"]
    return STDiTConfig(
        width=width, depth=facts["num_layers"], heads=facts["num_attention_heads"], ffn=4 * width,
        channels=facts["in_channels"], patch=(1, p, p), learn_sigma=facts["out_channels"] == 2 * facts["in_channels"],
        text_width=facts["caption_channels"], base_size=facts["sample_size"] // p, qk_norm=False, time_position="sincos",
        time_text=False, fps_condition=False, area_scale=False,
    )  # fmt: skip
