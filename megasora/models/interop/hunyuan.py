"""MMDiT <-> diffusers' HunyuanVideoTransformer3DModel (text="refiner") and FluxTransformer2DModel (text="linear").

Both name their blocks alike. Flux takes patches that are already flattened, channels first.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from megasora.models.interop.names import Change, Rename, linear, patch_convolution
from megasora.models.mmdit import MMDiTConfig


def weight_map(config: MMDiTConfig) -> list[Rename]:
    """Every line is written out: the blocks of ours are numbered through, theirs are two lists (three with the refiner)."""
    table = [
        Rename("patch_embed.weight", *_patch_embedding(config)),
        Rename("patch_embed.bias", "x_embedder.proj.bias" if config.text == "refiner" else "x_embedder.bias"),
        *_embedder("time_embed", "time_text_embed.timestep_embedder"),
        *_embedder("pooled_embed", "time_text_embed.text_embedder"),
        Rename("head.modulation.weight", "norm_out.linear.weight", swap_halves()),
        Rename("head.modulation.bias", "norm_out.linear.bias", swap_halves()),
        Rename("head.out.weight", "proj_out.weight", channels_first(config)),
        Rename("head.out.bias", "proj_out.bias", channels_first(config)),
    ]
    if config.guidance_embed:
        table += _embedder("guidance_embed", "time_text_embed.guidance_embedder")
    table += _refiner(config.refiner_depth) if config.text == "refiner" else linear("text_embed", "context_embedder")
    for i in range(config.depth):
        table += _double_block(f"blocks.{i}", f"transformer_blocks.{i}")
    for i in range(config.single_depth):
        table += _single_block(config, f"blocks.{config.depth + i}", f"single_transformer_blocks.{i}")
    return table


def to_diffusers(config: MMDiTConfig) -> dict[str, Any]:
    """The arguments of HunyuanVideoTransformer3DModel or FluxTransformer2DModel for our config."""
    pt, ph, pw = config.patch
    common = {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_width,
        "num_layers": config.depth,
        "num_single_layers": config.single_depth,
        "pooled_projection_dim": config.pooled_width,
        "guidance_embeds": config.guidance_embed,
    }
    if config.text == "linear":  # theta is 10,000 and the MLP four times the width, always
        return common | {
            "in_channels": config.patch_values,
            "out_channels": config.output_values,
            "joint_attention_dim": config.text_width,
            "axes_dims_rope": config.axes,
        }
    return common | {
        "in_channels": config.channels,
        "out_channels": config.output_values // (pt * ph * pw),
        "num_refiner_layers": config.refiner_depth,
        "mlp_ratio": config.ffn / config.width,
        "patch_size": ph,
        "patch_size_t": pt,
        "text_embed_dim": config.text_width,
        "rope_theta": config.theta,
        "rope_axes_dim": config.axes,
    }


def config_of(facts: dict[str, Any]) -> MMDiTConfig:
    """Our config for the arguments of HunyuanVideoTransformer3DModel."""
    width = facts["num_attention_heads"] * facts["attention_head_dim"]
    return MMDiTConfig(
        width=width, depth=facts["num_layers"], single_depth=facts["num_single_layers"], heads=facts["num_attention_heads"],
        ffn=round(facts["mlp_ratio"] * width), channels=facts["in_channels"],
        patch=(facts["patch_size_t"], facts["patch_size"], facts["patch_size"]), text_width=facts["text_embed_dim"],
        pooled_width=facts["pooled_projection_dim"], axes=tuple(facts["rope_axes_dim"]), theta=facts["rope_theta"],
        text="refiner", refiner_depth=facts["num_refiner_layers"], guidance_embed=facts["guidance_embeds"],
    )  # fmt: skip


def swap_halves() -> Change:
    """They say scale, then shift; we shift, then scale."""

    def swap(w: Tensor) -> Tensor:
        return w.roll(len(w) // 2, 0)

    return Change(swap, swap)


def channels_first(config: MMDiTConfig) -> Change:
    """Rows that give the numbers of a patch: theirs in the order (C pt ph pw), ours (pt ph pw C)."""
    sizes = dict(zip(("pt", "ph", "pw"), config.patch, strict=True), C=config.channels)
    return Change(
        to_ours=lambda w: rearrange(w, "(k C pt ph pw) ... -> (k pt ph pw C) ...", **sizes),
        to_theirs=lambda w: rearrange(w, "(k pt ph pw C) ... -> (k C pt ph pw) ...", **sizes),
    )


def head_by_head(config: MMDiTConfig) -> Change:
    """Columns for what attention has found and for the hidden values: theirs in this order, ours so for each head."""
    N, K, hidden = config.heads, config.head_width, config.ffn // config.heads

    def to_ours(w: Tensor) -> Tensor:
        parts = w.split([config.width, config.ffn], dim=1)
        return torch.cat([part.unflatten(1, (N, -1)) for part in parts], dim=-1).flatten(1)

    def to_theirs(w: Tensor) -> Tensor:
        return torch.cat([part.flatten(1) for part in w.unflatten(1, (N, -1)).split([K, hidden], dim=-1)], dim=1)

    return Change(to_ours, to_theirs)


def _patch_embedding(config: MMDiTConfig) -> tuple[str, Change]:
    if config.text == "refiner":
        return "x_embedder.proj.weight", patch_convolution(config.patch)
    rows = channels_first(config)
    return "x_embedder.weight", Change(lambda w: rows.to_ours(w.T).T, lambda w: rows.to_theirs(w.T).T)


def _embedder(ours: str, theirs: str) -> list[Rename]:
    return linear(f"{ours}.0", f"{theirs}.linear_1") + linear(f"{ours}.2", f"{theirs}.linear_2")


def _mlp(ours: str, theirs: str) -> list[Rename]:
    return linear(f"{ours}.0", f"{theirs}.net.0.proj") + linear(f"{ours}.2", f"{theirs}.net.2")


def _refiner(depth: int) -> list[Rename]:
    table = [
        *linear("text_embed.embed", "context_embedder.proj_in"),
        *_embedder("text_embed.time_embed", "context_embedder.time_text_embed.timestep_embedder"),
        *_embedder("text_embed.mean_embed", "context_embedder.time_text_embed.text_embedder"),
    ]
    for i in range(depth):
        ours, theirs = f"text_embed.blocks.{i}", f"context_embedder.token_refiner.refiner_blocks.{i}"
        table += _mlp(f"{ours}.mlp", f"{theirs}.ff") + linear(f"{ours}.modulation", f"{theirs}.norm_out.linear")
        for name in ("norm1", "norm2"):
            table += linear(f"{ours}.{name}", f"{theirs}.{name}")
        for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0")):
            table += linear(f"{ours}.{a}", f"{theirs}.attn.{b}")
    return table


def _qkv(ours: str, theirs: str, names: tuple[str, str, str, str, str]) -> list[Rename]:
    q, k, v, norm_q, norm_k = names
    return [
        *linear(f"{ours}.q", f"{theirs}.{q}"),
        *linear(f"{ours}.k", f"{theirs}.{k}"),
        *linear(f"{ours}.v", f"{theirs}.{v}"),
        Rename(f"{ours}.norm_q.weight", f"{theirs}.{norm_q}.weight"),
        Rename(f"{ours}.norm_k.weight", f"{theirs}.{norm_k}.weight"),
    ]


def _double_block(ours: str, theirs: str) -> list[Rename]:
    text = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")
    return [
        *linear(f"{ours}.video.modulation", f"{theirs}.norm1.linear"),
        *_qkv(f"{ours}.video.qkv", f"{theirs}.attn", ("to_q", "to_k", "to_v", "norm_q", "norm_k")),
        *linear(f"{ours}.video.out", f"{theirs}.attn.to_out.0"),
        *_mlp(f"{ours}.video.mlp", f"{theirs}.ff"),
        *linear(f"{ours}.text.modulation", f"{theirs}.norm1_context.linear"),
        *_qkv(f"{ours}.text.qkv", f"{theirs}.attn", text),
        *linear(f"{ours}.text.out", f"{theirs}.attn.to_add_out"),
        *_mlp(f"{ours}.text.mlp", f"{theirs}.ff_context"),
    ]


def _single_block(config: MMDiTConfig, ours: str, theirs: str) -> list[Rename]:
    return [
        *linear(f"{ours}.modulation", f"{theirs}.norm.linear"),
        *_qkv(f"{ours}.qkv", f"{theirs}.attn", ("to_q", "to_k", "to_v", "norm_q", "norm_k")),
        *linear(f"{ours}.mlp", f"{theirs}.proj_mlp"),
        Rename(f"{ours}.out.weight", f"{theirs}.proj_out.weight", head_by_head(config)),
        Rename(f"{ours}.out.bias", f"{theirs}.proj_out.bias"),
    ]
