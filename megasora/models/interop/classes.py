"""The transformers of diffusers' that a model of ours can become, and be read from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megasora.models.base import ModelConfig
from megasora.models.dit import DiTConfig
from megasora.models.interop import dit, hunyuan, latte, wan
from megasora.models.interop.names import Rename
from megasora.models.mmdit import MMDiTConfig
from megasora.models.packing import Item
from megasora.models.stdit import STDiTConfig
from megasora.models.video_dit import VideoDiTConfig

SIDE = 64  # diffusers' DiT fixes the side of its latents; another one is an argument of its config


@dataclass(frozen=True)
class Class:
    """`arguments` of its config for a model of ours, and back: `config`. `call` gives what it says of one latent [C, T, H, W]:
    [C or 2·C, T, H, W], for a sample's timestep (of 1000), text and so on."""

    name: str
    pipeline: str
    weight_map: Callable[[Any], list[Rename]]
    arguments: Callable[[Any], dict[str, Any]]
    config: Callable[[dict[str, Any]], ModelConfig]
    call: Callable[[nn.Module, Tensor, Tensor, Item], Tensor]


def _call_wan(theirs: nn.Module, latent: Tensor, t: Tensor, item: Item) -> Tensor:
    return theirs(latent[None], t, item.text[None]).sample[0]


def _call_hunyuan(theirs: nn.Module, latent: Tensor, t: Tensor, item: Item) -> Tensor:
    seen = torch.ones(1, len(item.text))
    return theirs(latent[None], t, item.text[None], seen, item.pooled[None]).sample[0]


def _call_dit(theirs: nn.Module, latent: Tensor, t: Tensor, item: Item) -> Tensor:
    frames = latent.transpose(0, 1)  # of one picture
    return theirs(frames, t.long(), torch.tensor([item.label])).sample.transpose(0, 1)


def _call_latte(theirs: nn.Module, latent: Tensor, t: Tensor, item: Item) -> Tensor:
    return theirs(latent[None], t.long(), item.text[None]).sample[0]


WAN = Class("WanTransformer3DModel", "WanPipeline", wan.weight_map, wan.to_diffusers, wan.config_of, _call_wan)
HUNYUAN = Class(
    "HunyuanVideoTransformer3DModel", "HunyuanVideoPipeline",
    hunyuan.weight_map, hunyuan.to_diffusers, hunyuan.config_of, _call_hunyuan,
)  # fmt: skip
LATTE = Class(
    "LatteTransformer3DModel", "LattePipeline", latte.weight_map, latte.to_diffusers, latte.config_of, _call_latte
)
DIT = Class(
    "DiTTransformer2DModel", "DiTPipeline",
    dit.weight_map, lambda config: dit.to_diffusers(config, SIDE), dit.config_of, _call_dit,
)  # fmt: skip
CLASSES = {known.name: known for known in (WAN, HUNYUAN, LATTE, DIT)}


def class_of(model: ModelConfig) -> Class:
    """What diffusers calls this model. Raises ValueError for one that it has no class for."""
    match model:
        case VideoDiTConfig(temporal="full", position="rope"):
            return WAN
        case MMDiTConfig(text="refiner", guidance_embed=False):
            return HUNYUAN
        case STDiTConfig():
            return LATTE
        case DiTConfig():
            return DIT
    raise ValueError(f"family={model.family}: diffusers has no class for such a model")  # type: ignore[attr-defined]
