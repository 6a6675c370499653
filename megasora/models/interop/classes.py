"""The transformers of diffusers' that a model of ours can become, and be read from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megasora.models.base import ModelConfig
from megasora.models.dit import DiTConfig
from megasora.models.interop import dit, hunyuan, latte, wan
from megasora.models.interop.names import Rename, import_weights
from megasora.models.mmdit import MMDiTConfig
from megasora.models.packing import Item, Shape
from megasora.models.stdit import STDiTConfig
from megasora.models.video_dit import VideoDiTConfig


@dataclass(frozen=True)
class Class:
    """`arguments` of its config for a model of ours and its largest latents (T, H, W), and back: `config`. `read` gives our
    state dict for theirs, and raises like `import_weights`. `call` gives what it says of one latent [C, T, H, W]:
    [C or 2·C, T, H, W], for a sample's timestep (of 1000), text and so on."""

    name: str
    pipeline: str
    weight_map: Callable[[Any], list[Rename]]
    arguments: Callable[[Any, Shape], dict[str, Any]]
    config: Callable[[dict[str, Any]], ModelConfig]
    read: Callable[[dict[str, Tensor], Any], dict[str, Tensor]]
    call: Callable[[nn.Module, Tensor, Tensor, Item], Tensor]


def _by_map(weight_map: Callable[[Any], list[Rename]]) -> Callable[[dict[str, Tensor], Any], dict[str, Tensor]]:
    return lambda theirs, model: import_weights(theirs, weight_map(model), model.depth)


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


WAN = Class(
    "WanTransformer3DModel", "WanPipeline",
    wan.weight_map, lambda model, _: wan.to_diffusers(model), wan.config_of,
    _by_map(wan.weight_map), _call_wan,
)  # fmt: skip
HUNYUAN = Class(
    "HunyuanVideoTransformer3DModel", "HunyuanVideoPipeline",
    hunyuan.weight_map, lambda model, _: hunyuan.to_diffusers(model), hunyuan.config_of,
    _by_map(hunyuan.weight_map), _call_hunyuan,
)  # fmt: skip
LATTE = Class(
    "LatteTransformer3DModel", "LattePipeline",
    latte.weight_map, lambda model, latent: latte.to_diffusers(model, latent[0]), latte.config_of,
    _by_map(latte.weight_map), _call_latte,
)  # fmt: skip
DIT = Class(
    "DiTTransformer2DModel", "DiTPipeline",
    dit.weight_map, lambda model, latent: dit.to_diffusers(model, max(latent[1:])), dit.config_of,
    dit.from_diffusers, _call_dit,
)  # fmt: skip
CLASSES = {known.name: known for known in (WAN, HUNYUAN, LATTE, DIT)}


def class_of(model: ModelConfig) -> Class:
    """What diffusers calls this model. Raises ValueError, naming what it has no place for."""
    match model:
        case VideoDiTConfig():
            return WAN
        case MMDiTConfig(guidance_embed=True):
            raise ValueError("guidance_embed=true: of such models only false is exported")
        case MMDiTConfig(text="refiner"):
            return HUNYUAN
        case MMDiTConfig():
            raise ValueError(f"text={model.text}: diffusers' HunyuanVideo has refiner")
        case STDiTConfig():
            return LATTE
        case DiTConfig():
            return DIT
    raise ValueError("family: diffusers has no class for it")
