"""A checkpoint as a directory that diffusers opens: transformer, scheduler, and the encoders where they are diffusers' own."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from data_pipelines.buckets import buckets_of
from megasora.checkpoint.contents import Contents
from megasora.checkpoint.convert import write_safetensors
from megasora.checkpoint.manifest import write_json
from megasora.checkpoint.metadata import SavedTensor
from megasora.config import parse_config
from megasora.errors import ConfigError
from megasora.microbatch import patches_of
from megasora.models.base import ModelConfig
from megasora.models.dit import DiTConfig
from megasora.models.families import build_model
from megasora.models.first_stage import PIXELS
from megasora.models.interop.classes import class_of
from megasora.models.interop.names import export_weights
from megasora.models.packing import Item, Shape, in_patches, pack, patchify
from megasora.models.published_vae import PUBLISHED
from megasora.models.stdit import STDiTConfig
from megasora.models.text import tokenizer_directory
from megasora.schema import Config

WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name
PREDICTIONS = {"noise": "epsilon", "data": "sample", "velocity": "v_prediction"}  # diffusers' names
TOLERANCE = 1e-4  # of the outputs, relative, in fp32
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "spiece.model",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)


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
    try:
        known = class_of(model)
        arguments = known.arguments(model, largest_latent(config))
    except ValueError as error:
        raise ConfigError(
            f"model.{error}; diffusers has no such model, `megasora ckpt convert` makes one safetensors file"
        ) from None
    names = [name.removeprefix(f"{weights}/") for name in source.tensors if name.startswith(f"{weights}/")]
    if not names:
        raise ConfigError(f"--weights={weights}: {source.path} has none; nearest is model")
    ours = {name: source.read(f"{weights}/{name}") for name in names}
    theirs = export_weights(ours, known.weight_map(model), model.depth)
    target.mkdir(parents=True)
    transformer = target / "transformer"
    transformer.mkdir()
    write_json(transformer / "config.json", {"_class_name": known.name, **arguments})
    described = {name: SavedTensor(tuple(tensor.shape), tensor.dtype) for name, tensor in theirs.items()}
    write_safetensors(transformer / WEIGHTS, described, theirs.values())
    (target / "scheduler").mkdir()
    scheduler = scheduler_of(config)
    write_json(target / "scheduler" / "scheduler_config.json", scheduler)
    parts, left_out = copy_encoders(config, target)
    index: dict[str, Any] = {"_class_name": known.pipeline} | {
        "transformer": ["diffusers", known.name],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        **parts,
    }
    write_json(target / "model_index.json", index)
    found = Report(
        known.name, sum(tensor.numel() for tensor in ours.values()), ["transformer", "scheduler", *parts],
        left_out, parity(model, ours, transformer),
    )  # fmt: skip
    (target / "export.json").write_text(json.dumps(vars(found) | {"source": str(source.path)}, indent=1) + "\n")
    return found


def largest_latent(config: Config) -> Shape:
    """(T, H, W) of the longest clips and the largest pictures of the last stage."""
    buckets = buckets_of(config.stages[-1].buckets)
    every = [patches_of(bucket, config.vae.compression, (1, 1, 1)) for bucket in buckets]
    T, H, W = (max(sizes) for sizes in zip(*every, strict=True))
    return T, H, W


def scheduler_of(config: Config) -> dict[str, Any]:
    """The scheduler's config: of the flow, or of the chain that the model was trained by."""
    if config.objective == "flow":
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": config.sample.shift
        }  # fmt: skip
    chain = config.gaussian
    cosine, scale = chain.schedule == "cosine", 1000 / chain.steps
    return {
        "_class_name": "DDPMScheduler", "num_train_timesteps": chain.steps, "clip_sample": False,
        "beta_schedule": "squaredcos_cap_v2" if cosine else "linear",
        "beta_start": 1e-4 * scale, "beta_end": 0.02 * scale, "variance_type": chain.variance,
        "prediction_type": PREDICTIONS[chain.prediction],
    }  # fmt: skip


def copy_encoders(config: Config, target: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The VAE and the text encoders, where they are directories of diffusers' and transformers'; and why others are left out."""
    parts: dict[str, list[str]] = {}
    left_out: dict[str, str] = {}
    vae = Path(config.encode.vae)
    kind = read_kind(vae / "config.json", "_class_name")
    if kind in PUBLISHED:
        shutil.copytree(vae, target / "vae")
        parts["vae"] = ["diffusers", str(kind)]
    else:
        missing = config.encode.vae != PIXELS and not vae.exists()
        left_out["vae"] = f"{vae}: " + ("is not here" if missing else "diffusers has no class for it")
    if not config.encode.text:
        left_out["text_encoder"] = "the small one beside the latents: transformers has no class for it"
        return parts, left_out
    for number, directory in enumerate(config.encode.text.split(","), 1):
        suffix = f"_{number}" if number > 1 else ""  # as in diffusers' pipelines
        text = Path(directory.strip())
        tokenizer = tokenizer_directory(text)
        architecture = read_kind(text / "config.json", "architectures")
        if not architecture:
            reason = "transformers has no class for it" if text.exists() else "is not here"
            left_out[f"text_encoder{suffix}"] = f"{text}: {reason}"
            continue
        shutil.copytree(text, target / f"text_encoder{suffix}")
        parts[f"text_encoder{suffix}"] = ["transformers", architecture[0]]
        files = [name for name in TOKENIZER if (tokenizer / name).exists()]
        if not files:
            left_out[f"tokenizer{suffix}"] = f"{tokenizer}: has none of {', '.join(TOKENIZER)}"
            continue
        (target / f"tokenizer{suffix}").mkdir()
        for name in files:
            shutil.copy(tokenizer / name, target / f"tokenizer{suffix}" / name)
        kind = read_kind(tokenizer / "tokenizer_config.json", "tokenizer_class")
        parts[f"tokenizer{suffix}"] = ["transformers", str(kind or "AutoTokenizer")]
    return parts, left_out


def read_kind(file: Path, key: str) -> Any:
    try:
        return json.loads(file.read_text()).get(key)
    except (OSError, ValueError, AttributeError):
        return None


@torch.no_grad()
def parity(model: ModelConfig, weights: dict[str, Tensor], transformer: Path) -> float | None:
    """Reads the export with diffusers and compares its output with ours on one drawn latent; None without diffusers."""
    try:
        import diffusers
    except ImportError:
        return None
    known = class_of(model)
    arguments = json.loads((transformer / "config.json").read_text())
    theirs = getattr(diffusers, known.name).from_config(arguments).eval()  # from_pretrained asks for accelerate
    theirs.load_state_dict(load_file(transformer / WEIGHTS))
    ours = build_model(model).eval()
    ours.load_state_dict(weights)
    latent, item = drawn(model, arguments)
    expected = ours(pack([item]))
    found = known.call(theirs, latent, 1000 * item.timesteps[:1], item)
    found = torch.cat([patchify(part, model.patch) for part in found.split(model.channels)], dim=1)
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def drawn(model: ModelConfig, arguments: dict[str, Any]) -> tuple[Tensor, Item]:
    """A latent [C, T, H, W], as long and as large as theirs must be where it must, and the item that it is to us."""
    generator = torch.Generator().manual_seed(0)
    pt, ph, pw = model.patch
    frames, height, width = 2 * pt, 4 * ph, 4 * pw
    if isinstance(model, STDiTConfig):
        frames = arguments["video_length"]
    if isinstance(model, DiTConfig):
        frames, height, width = 1, arguments["sample_size"], arguments["sample_size"]
    latent = torch.randn(model.channels, frames, height, width, generator=generator)
    text = torch.randn(5, model.text_width, generator=generator)
    pooled = torch.randn(model.pooled_width, generator=generator)
    shape = in_patches(latent.shape[1:], model.patch)
    label = model.classes - 1 if model.classes else None
    item = Item(patchify(latent, model.patch), shape, torch.full((shape[0],), 0.25), text, pooled)
    return latent, item if label is None else replace(item, label=label)
