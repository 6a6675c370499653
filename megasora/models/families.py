"""The families of generators and classifiers, by the name in `model.family`, and every preset by name."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from megasora.models import video_dit
from megasora.models.base import ModelConfig

DEFAULT = "video_dit"
CONFIGS: dict[str, type[ModelConfig]] = {
    "video_dit": video_dit.VideoDiTConfig,
}
MODELS: dict[str, Callable[[Any], nn.Module]] = {
    "video_dit": video_dit.VideoDiT,
}
CLASSIFIERS = ("vit", "vivit")  # trained on labels, not by diffusion
PRESETS: Mapping[str, ModelConfig] = {**video_dit.PRESETS}
AnyModelConfig = video_dit.VideoDiTConfig


def build_model(config: Any) -> nn.Module:
    """The module of a family's config, on the default device, its weights undrawn (see `init_weights`)."""
    return MODELS[config.family](config)


def chunk_of(config: AnyModelConfig) -> int:
    """Frames of patches that share a timestep: a chunk where the model is chunk-causal; 0: the whole sample."""
    return config.chunk if isinstance(config, video_dit.VideoDiTConfig) and config.temporal == "chunk_causal" else 0
