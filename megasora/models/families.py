"""The families of generators and classifiers, by the name in `model.family`, and every preset by name."""

from collections.abc import Mapping
from typing import Any

import torch

from megasora.models import dit, mmdit, stdit, video_dit, vit
from megasora.models.base import Model, ModelConfig

DEFAULT = "video_dit"
CONFIGS: dict[str, type[ModelConfig]] = {
    "video_dit": video_dit.VideoDiTConfig,
    "mmdit": mmdit.MMDiTConfig,
    "stdit": stdit.STDiTConfig,
    "dit": dit.DiTConfig,
    "vit": vit.ViTConfig,
    "vivit": vit.ViViTConfig,
}
AnyModelConfig = (
    video_dit.VideoDiTConfig | mmdit.MMDiTConfig | stdit.STDiTConfig | dit.DiTConfig | vit.ViTConfig | vit.ViViTConfig
)
MODELS: dict[str, type[Model[Any]]] = {
    "video_dit": video_dit.VideoDiT,
    "mmdit": mmdit.MMDiT,
    "stdit": stdit.STDiT,
    "dit": dit.DiT,
    "vit": vit.ViT,
    "vivit": vit.ViT,
}
CLASSIFIERS = ("vit", "vivit")  # trained on labels, not by diffusion
PRESETS: Mapping[str, ModelConfig] = {
    **video_dit.PRESETS,
    **mmdit.PRESETS,
    **stdit.PRESETS,
    **dit.PRESETS,
    **vit.PRESETS,
}


def build_model(config: Any) -> Model[Any]:
    """The module of a family's config, on the default device, its weights undrawn (see `init_weights`)."""
    return MODELS[config.family](config)


def chunk_of(config: AnyModelConfig) -> int:
    """Frames of patches that share a timestep: a chunk where the model is chunk-causal; 0: the whole sample."""
    return config.chunk if isinstance(config, video_dit.VideoDiTConfig) and config.temporal == "chunk_causal" else 0


def window_of(config: AnyModelConfig) -> int:
    """Frames of patches before its own chunk that a frame of a chunk-causal model sees; 0: all."""
    return config.window * config.chunk if isinstance(config, video_dit.VideoDiTConfig) else 0


def hears_guidance(config: AnyModelConfig) -> bool:
    """Whether the model is told the guidance scale and answers as if guided."""
    return isinstance(config, mmdit.MMDiTConfig) and config.guidance_embed


def parameter_count(config: Any) -> int:
    """Parameters of a model, counted without building its weights; of DiT as its authors count, with the table of positions."""
    with torch.device("meta"):
        count = sum(p.numel() for p in build_model(config).parameters())
    return count + (dit.position_table(config) if config.family == "dit" else 0)
