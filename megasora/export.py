"""A checkpoint as a directory that diffusers opens: transformer, scheduler, and the encoders where they are diffusers' own."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from megasora.checkpoint.contents import Contents
from megasora.checkpoint.convert import write_safetensors
from megasora.checkpoint.manifest import write_json
from megasora.checkpoint.metadata import SavedTensor
from megasora.config import parse_config
from megasora.errors import ConfigError
from megasora.models.families import build_model
from megasora.models.interop import wan
from megasora.models.interop.names import export_weights
from megasora.models.packing import Item, in_patches, pack, patchify, unpatchify
from megasora.models.published_vae import PUBLISHED
from megasora.models.video_dit import VideoDiTConfig
from megasora.schema import Config

WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name
TOLERANCE = 1e-4  # of the outputs, relative, in fp32
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "special_tokens_map.json")


@dataclass(frozen=True)
class Report:
    """What was written, what is left to the user, and how far diffusers' output is from ours (None: not compared)."""

    transformer: str
    parameters: int
    parts: list[str]
    left_out: dict[str, str]
    parity: float | None


def export(source: Contents, target: Path, weights: str) -> Report:
    """Writes `target`, which must not be there. ConfigError for a model that diffusers has no class for."""
    config = parse_config(source.facts["config"])
    model = config.model
    if not isinstance(model, VideoDiTConfig) or model.temporal != "full" or config.objective != "flow":
        raise ConfigError(
            f"model.family={model.family}, objective={config.objective}: diffusers has a class for video_dit trained by flow"
        )
    names = [name.removeprefix(f"{weights}/") for name in source.tensors if name.startswith(f"{weights}/")]
    if not names:
        raise ConfigError(f"--weights={weights}: {source.path} has none; nearest is model")
    ours = {name: source.read(f"{weights}/{name}") for name in names}
    theirs = export_weights(ours, wan.weight_map(model), model.depth)
    arguments = wan.to_diffusers(model)
    target.mkdir(parents=True)
    transformer = target / "transformer"
    transformer.mkdir()
    write_json(transformer / "config.json", {"_class_name": "WanTransformer3DModel", **arguments})
    described = {name: SavedTensor(tuple(tensor.shape), tensor.dtype) for name, tensor in theirs.items()}
    write_safetensors(transformer / WEIGHTS, described, theirs.values())
    (target / "scheduler").mkdir()
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": config.sample.shift,
    }
    write_json(target / "scheduler" / "scheduler_config.json", scheduler)
    parts, left_out = copy_encoders(config, target)
    index: dict[str, Any] = {"_class_name": "WanPipeline"} | {
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        **parts,
    }
    write_json(target / "model_index.json", index)
    found = Report(
        "WanTransformer3DModel", sum(tensor.numel() for tensor in ours.values()), ["transformer", "scheduler", *parts],
        left_out, parity(model, ours, transformer),
    )  # fmt: skip
    (target / "export.json").write_text(json.dumps(vars(found) | {"source": str(source.path)}, indent=1) + "\n")
    return found


def copy_encoders(config: Config, target: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The VAE and the text encoder, where they are directories of diffusers' and transformers'; and why others are left out."""
    parts, left_out = {}, {}
    vae = Path(config.encode.vae)
    kind = read_kind(vae / "config.json", "_class_name")
    if kind in PUBLISHED:
        shutil.copytree(vae, target / "vae")
        parts["vae"] = ["diffusers", str(kind)]
    else:
        left_out["vae"] = f"{vae}: diffusers has no class for it"
    text = Path(config.encode.text.split(",")[0]) if config.encode.text else Path()
    architecture = read_kind(text / "config.json", "architectures")
    if config.encode.text and architecture:
        shutil.copytree(text, target / "text_encoder")
        parts["text_encoder"] = ["transformers", architecture[0]]
        tokenizer = [name for name in TOKENIZER if (text / name).exists()]
        if tokenizer:
            (target / "tokenizer").mkdir()
            for name in tokenizer:
                shutil.copy(text / name, target / "tokenizer" / name)
            kind = read_kind(text / "tokenizer_config.json", "tokenizer_class")
            parts["tokenizer"] = ["transformers", str(kind or "AutoTokenizer")]
    else:
        left_out["text_encoder"] = "the small one beside the latents: transformers has no class for it"
    return parts, left_out


def read_kind(file: Path, key: str) -> Any:
    try:
        return json.loads(file.read_text()).get(key)
    except (OSError, ValueError, AttributeError):
        return None


@torch.no_grad()
def parity(config: VideoDiTConfig, weights: dict[str, Tensor], transformer: Path) -> float | None:
    """Reads the export with diffusers and compares its output with ours on one drawn latent; None without diffusers."""
    try:
        from diffusers import WanTransformer3DModel
    except ImportError:
        return None
    arguments = json.loads((transformer / "config.json").read_text())
    theirs = WanTransformer3DModel.from_config(arguments).eval()  # from_pretrained asks for another package, accelerate
    theirs.load_state_dict(load_file(transformer / WEIGHTS))
    ours = build_model(config).eval()
    ours.load_state_dict(weights)
    generator = torch.Generator().manual_seed(0)
    patch = config.patch
    latent = torch.randn(config.channels, 2 * patch[0], 4 * patch[1], 4 * patch[2], generator=generator)
    text = torch.randn(5, config.text_width, generator=generator)
    expected = predict(ours, config, latent, 0.25, text)
    found = theirs(latent[None], torch.tensor([250.0]), text[None]).sample[0]
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def predict(
    model: Callable[[Any], Tensor] | nn.Module, config: VideoDiTConfig, latent: Tensor, t: float, text: Tensor
) -> Tensor:
    """Our model on one latent [C, T, H, W] at time t."""
    shape = in_patches(latent.shape[1:], config.patch)
    row = pack([Item(patchify(latent, config.patch), shape, torch.full((shape[0],), t), text, torch.zeros(0))])
    return unpatchify(model(row), latent.shape[1:], config.patch)
