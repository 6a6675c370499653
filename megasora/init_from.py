"""The weights that a run begins with: of a checkpoint, an export or a diffusers directory, fitted to another model by rule.

What fits goes over as it is. What does not is named in `run.init_rules`, pattern -> rule, or the run is refused:

    repeat    over and over until the axis is full; blocks that are missing repeat those that are there
    inflate   the same, divided by how often where it is an input: a picture gives what it gave (Carreira and Zisserman 2017)
    zero      in the leading corner, zeros behind; a tensor that is missing is all zeros
    new       drawn, as if there were no source
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megasora.checkpoint.contents import open_checkpoint
from megasora.checkpoint.load import load
from megasora.checkpoint.manifest import MANIFEST, Place
from megasora.checkpoint.ranks import Ranks
from megasora.checkpoint.save import save
from megasora.config import parse_config
from megasora.engines.torch_native import Engine
from megasora.errors import CheckpointError, ConfigError
from megasora.models.base import ModelConfig
from megasora.models.families import build_model
from megasora.models.interop.classes import CLASSES
from megasora.observe.logs import log
from megasora.schema import Config

INPUTS, OUTPUTS = ("patch_embed.weight",), ("head.out.weight", "head.out.bias", "out.weight", "out.bias")
# What changes no weight's meaning, and what names and shapes tell.
TOLD = ("preset", "attention", "family", "width", "depth", "single_depth", "refiner_depth", "channels", "patch", "learn_sigma",
        "text_width", "pooled_width", "classes", "ffn")  # fmt: skip


@dataclass
class Report:
    """By name: what went over as it was, what by a rule, what is drawn anew, and what of the source has no place here; and the
    settings of the two models that differ, though no shape shows it."""

    matched: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """Weights under our names, on demand, and the model that they were of."""

    names: frozenset[str]
    read: Callable[[str], Tensor]
    model: ModelConfig


def init_from(path: Place, config: Config, engine: Engine, run: Path) -> Report:
    """Fills the engine's weights and their average from `path`. All ranks call it; one fits them, in its memory.

    Raises ConfigError for what does not fit and has no rule, CheckpointError for what is damaged or no source.
    """
    ranks, root = Ranks(), run / ".init"
    parts = ("model/", "ema/") if config.optim.ema else ("model/",)

    def fit() -> tuple[Path, Report]:
        fitted: dict[str, Tensor] = {}
        report = Report()
        for part in parts:
            found, report = fit_weights(open_source(path, part), config.model, config.run.init_rules)
            fitted |= {part + name: tensor for name, tensor in found.items()}
        (run / "init.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
        return save(root, 0, fitted, {}, Ranks(alone=True)), report

    made, report = ranks.first("", fit)
    new = {part + name for part in parts for name in report.new}
    load(made, {n: t for n, t in engine.tensors().items() if n.startswith(parts) and n not in new}, prefix=parts)
    ranks.first("", lambda: shutil.rmtree(root))
    log.info("weights from %s: %d as they are, %d by a rule, %d new, %d of theirs unused; see %s", path,
             len(report.matched), len(report.adapted), len(report.new), len(report.unused), run / "init.json")  # fmt: skip
    if report.settings:
        log.warning("the model of %s has other settings: %s", path, ", ".join(report.settings))
    return report


def is_source(path: Place) -> bool:
    """Whether weights can be taken from here."""
    return any((path / name).exists() for name in (MANIFEST, "config.json", "transformer/config.json"))


def open_source(path: Place, part: str) -> Source:
    """`part` (model/ or ema/) of a checkpoint, sharded or consolidated, or the weights of a diffusers directory."""
    if not (path / MANIFEST).exists():
        return _open_diffusers(Path(str(path)))
    contents = open_checkpoint(path)
    named = part if any(name.startswith(part) for name in contents.tensors) else "model/"
    names = frozenset(name.removeprefix(named) for name in contents.tensors if name.startswith(named))
    return Source(names, lambda name: contents.read(named + name), parse_config(contents.facts["config"]).model)


def _open_diffusers(path: Path) -> Source:
    directory = path / "transformer" if (path / "transformer").is_dir() else path
    facts = json.loads((directory / "config.json").read_text())
    known = CLASSES.get(facts.get("_class_name"))
    if known is None:
        raise CheckpointError(f"{directory}: a {facts.get('_class_name')}; known are {', '.join(CLASSES)}")
    theirs: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        theirs |= load_file(file)
    try:
        config = known.config(facts)
        ours = known.read(theirs, config)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{directory}: not a {known.name} that is known here: {error}") from error
    return Source(frozenset(ours), ours.__getitem__, config)


def fit_weights(source: Source, model: ModelConfig, rules: Mapping[str, str]) -> tuple[dict[str, Tensor], Report]:
    """What the model's weights begin with, by name; those that are `new` are left out.

    Raises ConfigError for what does not fit and has no rule, and for other heads in the same width, which have the same shapes.
    """
    if source.model.width == model.width and source.model.heads != model.heads:
        raise ConfigError(
            f"run.init_from: {source.model.heads} heads there, model.heads={model.heads} here: the same weights would mean "
            "another model"
        )
    with torch.device("meta"):
        wanted = {name: tuple(parameter.shape) for name, parameter in build_model(model).named_parameters()}
    depths = {name: depth for name in source.names if (depth := _block(name)) is not None}
    there = 1 + max(depths.values(), default=-1)
    report, fitted = Report(), {}
    for name, shape in wanted.items():
        rule = next((rule for pattern, rule in rules.items() if fnmatch(name, pattern)), "")
        missing = name not in source.names
        if missing and rule == "repeat" and there and (block := _block(name)) is not None:
            found = source.read(name.replace(f"blocks.{block}.", f"blocks.{block % there}."))
        elif missing and rule in ("zero", "repeat", "inflate"):
            found = torch.zeros(shape)
        else:
            found = torch.zeros(0) if missing else source.read(name)
        if rule == "new" and (missing or tuple(found.shape) != shape):
            report.new.append(name)
        elif tuple(found.shape) == shape and not (_is_patch(name) and source.model.patch != model.patch):
            fitted[name] = found
            report.adapted |= {name: rule} if missing else {}
            report.matched += [] if missing else [name]
        elif rule:
            fitted[name] = adapt(name, found, shape, source, model, rule)
            report.adapted[name] = rule
        else:
            had = "is not there" if missing else f"is {list(found.shape)} there, {list(shape)} here"
            raise ConfigError(
                f"run.init_from: {name} {had}; give run.init_rules, such as {{{name}: repeat}}, zero or new"
            )
    report.unused = sorted(source.names - wanted.keys())
    report.settings = other_settings(asdict(source.model), asdict(model))
    return fitted, report


def other_settings(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What both models have, differently, and what neither names nor shapes of weights tell."""
    names = [name for name in here if name in there and name not in TOLD and there[name] != here[name]]
    return [f"{name} {there[name]} there, {here[name]} here" for name in names]


def adapt(name: str, found: Tensor, shape: tuple[int, ...], source: Source, model: ModelConfig, rule: str) -> Tensor:
    """A tensor of another shape, axis by axis. An axis of patches is taken apart first: a new channel lies in every pixel."""
    axis = 1 if name in INPUTS else 0
    sizes = list(shape)
    if _is_patch(name):
        old = (*source.model.patch, source.model.channels)
        found = found.unflatten(axis, (found.shape[axis] // math.prod(old), *old))
        new = (*model.patch, model.channels)
        sizes[axis : axis + 1] = [shape[axis] // math.prod(new), *new]
    for i, size in enumerate(sizes):
        had = found.shape[i]
        if had == size:
            continue
        if rule == "zero":
            kept = found.narrow(i, 0, min(had, size))
            found = torch.cat(
                [kept, kept.new_zeros(*kept.shape[:i], size - kept.shape[i], *kept.shape[i + 1 :])], dim=i
            )
        else:
            found = found.index_select(i, torch.arange(size) % had)
            if rule == "inflate" and name in INPUTS and i > 0:
                found = found * (had / size)
    return found.reshape(shape)


def _is_patch(name: str) -> bool:
    return name in INPUTS or name in OUTPUTS


def _block(name: str) -> int | None:
    match = re.match(r"blocks\.(\d+)\.", name)
    return int(match[1]) if match else None
