"""The configuration of a run: YAML (with `base:`), then dotted overrides, validated into dataclasses beside their owners.

pydantic validates plain dataclasses without the owners knowing of it, and reads "1e-4" as the float that it means.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml

from data_pipelines.buckets import BucketConfig
from data_pipelines.loader import DataConfig
from data_pipelines.prepare import PrepareConfig
from megasora.checkpoint.directory import CheckpointConfig
from megasora.diffusion.conditioning import check_tasks
from megasora.diffusion.flow import FlowConfig
from megasora.diffusion.gaussian import GaussianConfig
from megasora.diffusion.samplers import SAMPLERS
from megasora.engines.optim import OptimConfig
from megasora.engines.torch_native import EngineConfig
from megasora.errors import ConfigError
from megasora.models.families import CLASSIFIERS, CONFIGS, DEFAULT, PRESETS, AnyModelConfig
from megasora.models.vae import VAE_PRESETS, VAEConfig
from megasora.models.video_dit import VideoDiTConfig
from megasora.vae_training import TrainVAEConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives and how it begins."""

    dir: str = "runs/default"
    seed: int = 0
    steps: int | None = (
        None  # stop after so many steps (default: the stages' own); the last stage goes on if they are fewer
    )
    resume: str = "auto"  # auto: the newest good checkpoint; none: refuse a directory with checkpoints; or a PATH
    init_from: str = ""  # a checkpoint whose weights alone are taken, when there is none to resume from
    allow_change: tuple[str, ...] = ()  # keys that may differ from the checkpoint's config, `data` for the data itself
    determinism: Literal["replay", "bitwise"] = "replay"

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps}: at least 1")
        for name in ("dir", "resume"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}=: is empty; leave it out for the default")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes share the work: `auto`, or terms such as dp4,zero2 or hsdp2x4,zero3."""

    layout: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of the run with its own buckets, rate and timestep shift. Stages follow each other in one history."""

    name: str = "main"
    steps: int = 1000
    lr: float | None = None  # peak; default optim.lr
    shift: float = 1.0  # of the timesteps, towards noise
    drop_captions: float = 0.1  # share of samples trained on the empty caption or without their class, for guidance
    tasks: dict[str, float] = field(
        default_factory=lambda: {"text": 1.0}
    )  # shares: text, image, first_last, extend, ...
    buckets: BucketConfig = field(default_factory=BucketConfig)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: at least 1")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr}: a positive number is expected")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift={self.shift}: a positive number is expected")
        if not 0 <= self.drop_captions <= 1:
            raise ValueError(f"drop_captions={self.drop_captions}: from 0 to 1")
        check_tasks(self.tasks)


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Shards -> latent shards, for the buckets of all stages, and the encoders that `sample` uses again."""

    input: str = "data/shards"
    output: str = "data/latents"
    vae: str = "data/vae"  # of `train-vae`, a diffusers directory (Wan, HunyuanVideo, CogVideoX), or the word pixels
    tile: int = 0  # pixels a side of the tiles that our VAE goes through large pictures in; 0: whole
    tile_overlap: int = 64
    text: str = ""  # T5_DIR, or T5_DIR,CLIP_DIR for a pooled vector; empty: a small encoder is made from the captions
    text_dtype: Literal["float32", "bfloat16"] = "float32"  # of a published text encoder's weights
    latent_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What `sample` makes. Given pictures (`first`, `last`) and video (`extend`) are files; the model fills in the rest.

    Longer than `window`, a video is made in stretches: by chunks where the model is chunk-causal, else in windows of which
    each begins with the last `overlap` frames of the one before. Memory then does not grow with the length.
    """

    prompts: tuple[str, ...] = ()
    negative: str = ""
    labels: tuple[int, ...] = ()  # for models conditioned on classes: one a prompt, or alone
    frames: int = 17
    height: int = 128
    width: int = 224
    fps: float = 12.0
    steps: int = 30
    sampler: str = ""  # flow: euler (default), heun; gaussian: ddpm (default), ddim, dpmpp
    guidance: float = 4.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # timesteps in which guidance acts
    shift: float = 1.0
    seed: int = 0
    first: str = ""  # a picture that the video begins with
    last: str = ""  # a picture that it ends with
    loop: bool = False  # it ends as it begins: `last` is `first`
    extend: str = ""  # a video that it goes on from
    window: int = 0  # frames that the model makes at once (those it was trained on); 0: all
    overlap: int = 5  # of them, frames that two windows share
    checkpoint: str = "latest"  # latest of run.dir, or a PATH to a step directory
    weights: Literal["ema", "model"] = "ema"
    output: str = ""  # default: run.dir/samples

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("height", 1), ("width", 1), ("steps", 1), ("window", 0), ("overlap", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least}")
        for name in ("fps", "shift"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: a positive number is expected")
        known = [name for samplers in SAMPLERS.values() for name in samplers]
        if self.sampler and self.sampler not in known:
            raise ValueError(f"sampler={self.sampler}: is not one of {', '.join(known)}")
        if not 0 <= self.guidance_interval[0] <= self.guidance_interval[1]:
            raise ValueError(f"guidance_interval={list(self.guidance_interval)}: two timesteps, the lower first")
        if self.window and self.overlap >= self.window:
            raise ValueError(f"overlap={self.overlap}: less than window={self.window}")
        if self.loop and not self.first:
            raise ValueError("loop=true: give the picture that it begins and ends with as sample.first")
        if self.loop and self.last:
            raise ValueError(f"last={self.last}: a loop ends with sample.first")
        if self.extend and self.first:
            raise ValueError(f"first={self.first}: a video that goes on from sample.extend begins with that")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What training shows and measures of the averaged weights, every so many steps (0: never)."""

    every: int = 0  # fixed prompts with fixed noise, by the settings of `sample`
    prompts: tuple[str, ...] = ()  # default: sample.prompts
    loss_every: int = 0  # the loss of fixed samples at fixed quantiles of the timesteps
    path: str = ""  # latents held out for that; default: data.path
    samples: int = 16
    quantiles: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    clip: str = ""  # a local CLIP directory: how well the videos fit their prompts
    fvd: str = ""  # a local TorchScript file of I3D features: the distance to `fvd_reference`
    fvd_reference: str = ""  # a directory of real videos

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("loss_every", 0), ("samples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least}")
        if not self.quantiles or not all(0 < q < 1 for q in self.quantiles):
            raise ValueError(f"quantiles={list(self.quantiles)}: numbers between 0 and 1")
        if bool(self.fvd) != bool(self.fvd_reference):
            raise ValueError(f"fvd={self.fvd}: give it together with eval.fvd_reference")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """`bench`: measured steps after warm-up. `--data=synthetic` draws latents of the first stage's buckets, no files needed."""

    warmup: int = 3
    steps: int = 10
    against: str = ""
    output: str = ""

    def __post_init__(self) -> None:
        for name, least in (("warmup", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least}")


@dataclass(frozen=True, kw_only=True)
class ObserveConfig:
    """The console and TensorBoard, every so many steps; metrics.jsonl has every step."""

    every: int = 10
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every}: at least 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything. Each section is read by the part of the code it is named after."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    engine: Literal["torch_native"] = "torch_native"
    run: RunConfig = field(default_factory=RunConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    train_vae: TrainVAEConfig = field(default_factory=TrainVAEConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: Annotated[AnyModelConfig, pydantic.Field(discriminator="family")] = field(default_factory=VideoDiTConfig)
    objective: Literal["flow", "gaussian", "classify"] = "flow"
    flow: FlowConfig = field(default_factory=FlowConfig)
    gaussian: GaussianConfig = field(default_factory=GaussianConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    stages: tuple[Stage, ...] = (Stage(),)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages: a run needs at least one")
        classifier = self.model.family in CLASSIFIERS
        if (self.objective == "classify") != classifier:
            wanted = "classify" if classifier else "flow or gaussian"
            raise ValueError(f"objective={self.objective}: model.family={self.model.family} learns by {wanted}")
        learned = self.objective == "gaussian" and self.gaussian.variance == "learned_range"
        if self.model.learn_sigma != learned and not classifier:
            raise ValueError(
                f"model.learn_sigma={str(self.model.learn_sigma).lower()}: goes together with objective=gaussian and "
                f"gaussian.variance=learned_range"
            )
        if self.sample.sampler and not classifier and self.sample.sampler not in SAMPLERS[self.objective]:
            known = ", ".join(SAMPLERS[self.objective])
            raise ValueError(f"sample.sampler={self.sample.sampler}: objective={self.objective} has {known}")


def load_config(file: Path | None, overrides: list[str]) -> Config:
    """Reads the file and its bases, applies `--a.b=value` overrides (later ones win), expands the preset, validates.

    Raises ConfigError: one line with the key, the value and the nearest valid key.
    """
    raw = read_yaml(file) if file else {}
    for override in overrides:
        key, separator, value = override.removeprefix("--").partition("=")
        if not override.startswith("--") or not separator:
            raise ConfigError(f"{override}: overrides are written --section.key=value, with the equals sign")
        _set(raw, key, _parse(value))
    _expand_preset(raw)
    _expand_vae_preset(raw)
    check_keys(raw, Config, "")
    try:
        return pydantic.TypeAdapter(Config).validate_python(raw)
    except pydantic.ValidationError as error:
        raise ConfigError(_first_line(error)) from None
    except ArithmeticError as error:  # of a check between numbers that none of them should be
        raise ConfigError(f"the numbers of the config do not fit together: {error}") from None


def read_yaml(file: Path) -> dict[str, Any]:
    """One YAML file merged over its `base:` (a path beside it): mappings merge, everything else replaces."""
    try:
        raw = yaml.safe_load(file.read_text()) or {}
    except FileNotFoundError:
        raise ConfigError(f"--config {file}: no such file") from None
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file}: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"--config {file}: a mapping of sections is expected")
    base = raw.pop("base", None)
    if base is None:
        return raw
    parent = (file.parent / str(base)).resolve()
    if parent == file.resolve():
        raise ConfigError(f"base={base}: {file} names itself")
    return _merge(read_yaml(parent), raw)


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved config as plain mappings and lists: what config.yaml holds and what a resume compares."""
    plain = _plain(config)
    assert isinstance(plain, dict)
    return plain


def flatten(raw: Any, prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}; lists by number."""
    items = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else None
    if items is None or not raw:
        return {prefix: raw}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def check_keys(raw: Any, kind: Any, prefix: str) -> None:
    """Raises ConfigError for the first key of `raw` that the dataclass `kind` does not have, with the nearest that it has."""
    kind = _family(raw, prefix) if _is_model(kind) else _inner_dataclass(kind)
    if kind is None:
        return
    if isinstance(raw, list):
        for i, item in enumerate(raw):
            check_keys(item, kind, f"{prefix}{i}.")
        return
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{prefix.removesuffix('.')}={raw}: a section with keys is expected, such as {prefix}{_keys(kind)[0]}"
        )
    hints = typing.get_type_hints(kind)
    for key, value in raw.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise ConfigError(f"{name}={_brief(value)}: unknown key; did you mean {_nearest(name, kind, prefix)}?")
        if value is None and (_is_model(hints[key]) or _inner_dataclass(hints[key]) is not None):
            raise ConfigError(f"{name}: the section is empty")
        check_keys(value, hints[key], f"{name}.")
        if isinstance(value, bool) and hints[key] in (int, float, int | None, float | None):
            raise ConfigError(f"{name}={value}: a number is expected")


def _nearest(name: str, kind: Any, prefix: str) -> str:
    """The most similar key: of the same section if one is close, else one of the same last name, else of all."""
    here = [f"{prefix}{key}" for key in _keys(kind)]
    everywhere = sorted(flatten(to_dict(Config())))
    same_leaf = [key for key in everywhere if key.split(".")[-1] == name.split(".")[-1]]
    for candidates, cutoff in ((here, 0.75), (same_leaf, 0.0), (everywhere, 0.6), (here, 0.0)):
        if found := difflib.get_close_matches(name, candidates, n=1, cutoff=cutoff):
            return found[0]
    return here[0]


def _keys(kind: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]


def _is_model(kind: Any) -> bool:
    """Whether a hint is the one of `model`, whose keys depend on its family."""
    return kind == AnyModelConfig


def _family(raw: Any, prefix: str) -> Any:
    """The config class that `model.family` names. Raises ConfigError with the nearest one."""
    name = raw["family"] if isinstance(raw, dict) and "family" in raw else DEFAULT
    if name not in CONFIGS:
        nearest = difflib.get_close_matches(str(name), CONFIGS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{prefix}family={_brief(name)}: unknown family; did you mean {nearest}?")
    return CONFIGS[name]


def _inner_dataclass(kind: Any) -> Any:
    """The dataclass in `X`, `X | None` or `tuple[X, ...]`, else None."""
    if dataclasses.is_dataclass(kind):
        return kind
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) in (typing.Union, tuple, list):
        return next((inner for arg in typing.get_args(kind) if (inner := _inner_dataclass(arg))), None)
    return None


def _expand_preset(raw: dict[str, Any]) -> None:
    """Puts the preset's numbers under those that are given, and the family where none is named."""
    model = raw.setdefault("model", {})
    if not isinstance(model, dict):
        return  # check_keys says so
    preset = model.get("preset", "")
    if preset:
        if preset not in PRESETS:
            nearest = difflib.get_close_matches(str(preset), PRESETS, n=1, cutoff=0.0)[0]
            raise ConfigError(f"model.preset={preset}: unknown preset; did you mean {nearest}?")
        raw["model"] = dataclasses.asdict(PRESETS[preset]) | model
    raw["model"].setdefault("family", DEFAULT)


def _expand_vae_preset(raw: dict[str, Any]) -> None:
    """`vae.preset` is a compression such as 4x16x16: it stands for the numbers that give it, and is itself not kept."""
    vae = raw.get("vae")
    if not isinstance(vae, dict) or "preset" not in vae:
        return
    preset = str(vae["preset"])
    if preset not in VAE_PRESETS:
        nearest = difflib.get_close_matches(preset, VAE_PRESETS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"vae.preset={preset}: unknown preset; did you mean {nearest}?")
    given = {key: value for key, value in vae.items() if key != "preset"}
    raw["vae"] = dataclasses.asdict(VAE_PRESETS[preset]) | given


def _first_line(error: pydantic.ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    loc = first["loc"]
    if loc[:1] == ("model",) and loc[1:2] and loc[1] in CONFIGS:  # the union's tag is no key
        loc = (loc[0], *loc[2:])
    where = ".".join(str(part) for part in loc)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":  # a cross-field check, whose message begins with the field's name
        return f"{where}.{message}" if where else message
    if first["type"] == "tuple_type":
        return f"{where}={_brief(first['input'])}: a list is expected, as in --{where}=[{_brief(first['input'])}]"
    return f"{where}={_brief(first['input'])}: {message[0].lower()}{message[1:]}"


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key, making sections on the way; a number steps into a list."""
    *path, last = key.split(".")
    place: Any = raw
    for i, part in enumerate(path):
        if isinstance(place, list):
            place = place[_item(place, part, key)]
        else:
            place = place.setdefault(part, {})
        if not isinstance(place, dict | list):
            raise ConfigError(f"{key}={_brief(value)}: {'.'.join(path[: i + 1])} is a value, not a section")
    if isinstance(place, list):
        place[_item(place, last, key)] = value
    else:
        place[last] = value


def _item(items: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"{key}: {part!r} is not one of the items 0 to {len(items) - 1}")
    return int(part)


def _parse(text: str) -> Any:
    """Lists, mappings and null are YAML; everything else stays text, and the field's type reads it."""
    if text == "null" or text[:1] in ("[", "{"):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return text


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = base | over
    for key in base.keys() & over.keys():
        if isinstance(base[key], dict) and isinstance(over[key], dict):
            both[key] = _merge(base[key], over[key])
    return both


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def describe(section: str) -> Iterator[str]:
    """Lines for --help: every key of a section with its default."""
    value = getattr(Config(), section)
    if isinstance(value, tuple):
        value = value[0]
        section += ".0"
    if not dataclasses.is_dataclass(value):
        yield f"  --{section}={value}"
        return
    for key, default in flatten(_plain(value), section).items():
        yield f"  --{key}={default}"
