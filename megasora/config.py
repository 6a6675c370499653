"""The configuration of a run: YAML (with `base:`), then dotted overrides, validated into dataclasses beside their owners.

pydantic validates plain dataclasses without the owners knowing of it, and reads "1e-4" as the float that it means.
"""

import dataclasses
import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any

import pydantic
import yaml

from megasora.errors import ConfigError
from megasora.models.families import CONFIGS, DEFAULT, PRESETS, AnyModelConfig
from megasora.models.vae import VAE_PRESETS
from megasora.schema import Config

PASSWORD = re.compile(r"://[^/@:]+:(?!\d*(/|$))[^@]*@")  # scheme://user:password@host; a port is none


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
    return parse_config(raw)


def parse_config(raw: dict[str, Any]) -> Config:
    """From what `to_dict` gives, such as the facts of a checkpoint hold. Raises ConfigError.

    The config stands in every record of a run, so an address with a password in it is refused, and not repeated.
    """
    for key, value in flatten(raw).items():
        if isinstance(value, str) and PASSWORD.search(value):
            raise ConfigError(
                f"{key}: the address has a password in it; give that by the environment or by files of the client"
            )
    check_keys(raw, Config, "")
    try:
        return pydantic.TypeAdapter(Config).validate_python(raw)
    except pydantic.ValidationError as error:
        raise ConfigError(_first_line(error)) from None
    except ArithmeticError as error:  # of a check between numbers that none of them should be
        raise ConfigError(f"the numbers of the config do not fit together: {error}") from None


def read_yaml(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One YAML file merged over its `base:` (a path beside it): mappings merge, everything else replaces. `above`: the files that
    lie over this one."""
    try:
        with file.open() as stream:  # not its text alone: errors name the file and the place in it
            raw = yaml.safe_load(stream) or {}
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
    above = (*above, file.resolve())
    if parent in above:
        raise ConfigError(f"base={base}: {file} names a file that lies over it")
    return _merge(read_yaml(parent, above), raw)


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
    """Sets a dotted key, making sections on the way; a number steps into a list, whose first item need not be there."""
    parts = key.split(".")
    *path, last = parts
    place: Any = raw
    for i, part in enumerate(path):
        if isinstance(place, list):
            place = place[_item(place, part, key)]
        else:
            place = place.setdefault(part, [{}] if parts[i + 1].isdigit() else {})
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
