"""ViT <-> transformers' ViTForImageClassification, and ViViT <-> its VivitForVideoClassification (names of transformers 5)."""

from typing import Any

from megasora.models.interop.latte import frame_convolution
from megasora.models.interop.names import Rename, leading_one, linear, patch_convolution
from megasora.models.vit import ClassifierConfig, ViViTConfig


def weight_map(config: ClassifierConfig) -> list[Rename]:
    vivit = isinstance(config, ViViTConfig)
    name, convolution = ("vivit", patch_convolution) if vivit else ("vit", frame_convolution)
    table = [
        Rename("cls", f"{name}.embeddings.cls_token", leading_one()),
        Rename("positions", f"{name}.embeddings.position_embeddings", leading_one()),
        Rename(
            "patch_embed.weight", f"{name}.embeddings.patch_embeddings.projection.weight", convolution(config.patch)
        ),
        Rename("patch_embed.bias", f"{name}.embeddings.patch_embeddings.projection.bias"),
        *linear("norm", f"{name}.layernorm"),
        *linear("head", "classifier"),
        *linear("blocks.{i}.norm1", f"{name}.layers.{{i}}.layernorm_before"),
        *linear("blocks.{i}.norm2", f"{name}.layers.{{i}}.layernorm_after"),
        *linear("blocks.{i}.mlp.0", f"{name}.layers.{{i}}.mlp.fc1"),
        *linear("blocks.{i}.mlp.2", f"{name}.layers.{{i}}.mlp.fc2"),
    ]
    for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "o_proj")):
        table += linear(f"blocks.{{i}}.attention.{ours}", f"{name}.layers.{{i}}.attention.{theirs}")
    return table


def to_transformers(config: ClassifierConfig) -> dict[str, Any]:
    """The arguments of ViTConfig or VivitConfig for our config.

    Raises ValueError for what it cannot express.
    """
    common = {
        "image_size": config.image_size,
        "num_channels": config.channels,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn,
        "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_fast"}[config.activation],
        "layer_norm_eps": config.eps,
        "num_labels": config.classes,
    }
    if isinstance(config, ViViTConfig):
        return common | {"num_frames": config.frames, "tubelet_size": config.patch}
    p = config.patch[1]
    for name, value in {"frames": 1, "patch": (1, p, p)}.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name}={getattr(config, name)}: transformers' ViT has {value}")
    return common | {"patch_size": p}
