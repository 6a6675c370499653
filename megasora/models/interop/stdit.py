"""STDiT <-> STDiT3 of Open-Sora 1.2, which fuses queries, keys and values and keeps two tensors that are no weights: the
rotary frequencies, and the null caption [300, E] that stands for a dropped one."""

import torch
from torch import Tensor

from megasora.models.interop.latte import head_rows
from megasora.models.interop.names import Rename, export_weights, import_weights, linear, patch_convolution
from megasora.models.stdit import STDiTConfig

FREQUENCIES, NULL_CAPTION = "rope.freqs", "y_embedder.y_embedding"


def weight_map(config: STDiTConfig) -> list[Rename]:
    """The map once what is fused lies apart, under the names that `fused` gives."""
    table = [
        Rename("patch_embed.weight", "x_embedder.proj.weight", patch_convolution(config.patch)),
        Rename("patch_embed.bias", "x_embedder.proj.bias"),
        *linear("text_embed.0", "y_embedder.y_proj.fc1"),
        *linear("text_embed.2", "y_embedder.y_proj.fc2"),
        *linear("time_embed.0", "t_embedder.mlp.0"),
        *linear("time_embed.2", "t_embedder.mlp.2"),
        *linear("fps_embed.0", "fps_embedder.mlp.0"),
        *linear("fps_embed.2", "fps_embedder.mlp.2"),
        *linear("time_modulation", "t_block.1"),
        Rename("head.modulation", "final_layer.scale_shift_table"),
        Rename("head.out.weight", "final_layer.linear.weight", head_rows(config)),
        Rename("head.out.bias", "final_layer.linear.bias", head_rows(config)),
    ]
    for kind in ("space", "time"):
        ours, theirs = f"blocks.{{i}}.{kind}", "spatial_blocks.{i}" if kind == "space" else "temporal_blocks.{i}"
        table += [
            Rename(f"{ours}.modulation", f"{theirs}.scale_shift_table"),
            *linear(f"{ours}.mlp.0", f"{theirs}.mlp.fc1"),
            *linear(f"{ours}.mlp.2", f"{theirs}.mlp.fc2"),
            *linear(f"{ours}.cross_attention.q", f"{theirs}.cross_attn.q_linear"),
        ]
        for a, b, parts in (("self_attention", "attn", "qkv"), ("cross_attention", "cross_attn", "kv")):
            for part in parts:
                table += linear(f"{ours}.{a}.{part}", f"{theirs}.{b}.{part}")
            table += linear(f"{ours}.{a}.out", f"{theirs}.{b}.proj")
        if config.qk_norm:
            for a, b in (("norm_q", "q_norm"), ("norm_k", "k_norm")):
                table.append(Rename(f"{ours}.self_attention.{a}.weight", f"{theirs}.attn.{b}.weight"))
    return table


def fused(config: STDiTConfig) -> dict[str, list[str]]:
    """The name of each fused tensor, and those of its parts from the top."""
    names = {}
    for block in (f"{kind}_blocks.{i}" for kind in ("spatial", "temporal") for i in range(config.depth)):
        for module, whole, parts in (("attn", "qkv", "qkv"), ("cross_attn", "kv_linear", "kv")):
            for end in ("weight", "bias"):
                names[f"{block}.{module}.{whole}.{end}"] = [f"{block}.{module}.{part}.{end}" for part in parts]
    return names


def from_open_sora(theirs: dict[str, Tensor], config: STDiTConfig) -> tuple[dict[str, Tensor], Tensor]:
    """Our state dict, and the null caption: who samples from those weights with guidance gives it as the text.

    Raises like `import_weights`.
    """
    weights = {name: tensor for name, tensor in theirs.items() if name != FREQUENCIES}
    null_caption = weights.pop(NULL_CAPTION)
    for whole, parts in fused(config).items():
        weights.update(zip(parts, weights.pop(whole).chunk(len(parts)), strict=True))
    return import_weights(weights, weight_map(config), config.depth), null_caption


def to_open_sora(ours: dict[str, Tensor], config: STDiTConfig, null_caption: Tensor) -> dict[str, Tensor]:
    """The state dict of STDiT3 with this null caption. Raises like `export_weights`."""
    weights = export_weights(ours, weight_map(config), config.depth)
    for whole, parts in fused(config).items():
        weights[whole] = torch.cat([weights.pop(part) for part in parts])
    steps = torch.arange(0, config.head_width, 2).float() / config.head_width
    return weights | {FREQUENCIES: 1.0 / 10_000.0**steps, NULL_CAPTION: null_caption}
