"""DiT <-> diffusers' DiTTransformer2DModel, which keeps the timestep's and the class's embedders once a block.

Theirs has its own waves for the timestep, 10,000^(-i/127) where DiT's own code and ours have 10,000^(-i/128). So outputs are
equal where our config has `time_period=DIFFUSERS_TIME_PERIOD`; weights go over either way.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from megasora.models.dit import DiTConfig
from megasora.models.interop.latte import frame_convolution
from megasora.models.interop.names import Change, Rename, import_weights, linear

DIFFUSERS_TIME_PERIOD = 10_000.0 ** (128 / 127)


def weight_map(config: DiTConfig) -> list[Rename]:
    """Our one embedder has a line for each block of theirs: reading takes the last block's, writing fills them all."""
    table = [
        Rename("patch_embed.weight", "pos_embed.proj.weight", frame_convolution(config.patch)),
        Rename("patch_embed.bias", "pos_embed.proj.bias"),
        *linear("out_modulation", "proj_out_1"),
        Rename("out.weight", "proj_out_2.weight", variance_last(config)),
        Rename("out.bias", "proj_out_2.bias", variance_last(config)),
        *linear("blocks.{i}.modulation", "transformer_blocks.{i}.norm1.linear"),
        *linear("blocks.{i}.mlp.0", "transformer_blocks.{i}.ff.net.0.proj"),
        *linear("blocks.{i}.mlp.2", "transformer_blocks.{i}.ff.net.2"),
    ]
    for ours, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0")):
        table += linear(f"blocks.{{i}}.attention.{ours}", f"transformer_blocks.{{i}}.attn1.{theirs}")
    for block in range(config.depth):
        embedder = f"transformer_blocks.{block}.norm1.emb"
        table += [
            *linear("time_embed.0", f"{embedder}.timestep_embedder.linear_1"),
            *linear("time_embed.2", f"{embedder}.timestep_embedder.linear_2"),
            Rename("label_embed.weight", f"{embedder}.class_embedder.embedding_table.weight"),
        ]
    return table


def variance_last(config: DiTConfig) -> Change:
    """Their outputs are each pixel's means and then its variances; ours are the patch's means and then its variances."""
    parts = config.output_values // config.patch_values
    return Change(
        to_ours=lambda w: rearrange(w, "(pixel part C) ... -> (part pixel C) ...", part=parts, C=config.channels),
        to_theirs=lambda w: rearrange(w, "(part pixel C) ... -> (pixel part C) ...", part=parts, C=config.channels),
    )


def from_diffusers(theirs: dict[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Our state dict. Raises ValueError where the embedders of their blocks differ; else like `import_weights`."""
    first = "transformer_blocks.0.norm1.emb."
    for name in [name for name in theirs if name.startswith(first)]:
        for block in range(1, config.depth):
            other = name.replace(".0.", f".{block}.", 1)
            if not torch.equal(theirs[name], theirs[other]):
                raise ValueError(f"{other} is not {name}: ours has one embedder for all blocks")
    return import_weights(theirs, weight_map(config), config.depth)


def to_diffusers(config: DiTConfig, side: int) -> dict[str, Any]:
    """The arguments of DiTTransformer2DModel for our config and latents of `side` by `side`.

    Raises ValueError for what it cannot express.
    """
    p = config.patch[1]
    for name, value in {"design": "adaln_zero", "patch": (1, p, p), "ffn": 4 * config.width}.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name}={getattr(config, name)}: diffusers' DiT has {value}")
    if config.classes < 1:
        raise ValueError("classes=0: diffusers' DiT has at least 1")
    return {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_width,
        "in_channels": config.channels,
        "out_channels": config.channels * (2 if config.learn_sigma else 1),
        "num_layers": config.depth,
        "attention_bias": True,
        "sample_size": side,
        "patch_size": p,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": config.classes,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }


def config_of(facts: dict[str, Any]) -> DiTConfig:
    """Our config for the arguments of theirs."""
    width, p = facts["num_attention_heads"] * facts["attention_head_dim"], facts["patch_size"]
    return DiTConfig(
        width=width, depth=facts["num_layers"], heads=facts["num_attention_heads"], ffn=4 * width,
        channels=facts["in_channels"], patch=(1, p, p), learn_sigma=facts["out_channels"] == 2 * facts["in_channels"],
        classes=facts["num_embeds_ada_norm"], time_period=DIFFUSERS_TIME_PERIOD,
    )  # fmt: skip
