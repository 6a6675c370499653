"""Devices by name, and their efficiencies fitted to what `bench` measured."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from megasora.errors import ConfigError
from megasora.observe.hardware import DEVICES, Device, Efficiency, gemm_peak, this_cpu


def find_device(name: str, precision: str) -> Device:
    """The profile of that name (any case), this machine's for `cpu`, or of a file that `write_profile` made."""
    known = {key.lower(): device for key, device in DEVICES.items()}
    if name.lower() in known:
        return known[name.lower()]
    if name == "cpu":
        return this_cpu({precision: gemm_peak(torch.device("cpu"), precision)})
    if name.endswith(".json"):
        return read_profile(Path(name))
    nearest = difflib.get_close_matches(name.lower(), [*known, "cpu"], n=1, cutoff=0.0)[0]
    raise ConfigError(f"--gpu={name}: unknown device; did you mean {nearest}?")


def read_profile(file: Path) -> Device:
    """Raises ConfigError for a file that is none."""
    try:
        raw: dict[str, Any] = json.loads(file.read_text())
        return Device(**{**raw, "efficiency": Efficiency(**raw["efficiency"])})
    except OSError as error:
        raise ConfigError(f"--gpu={file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"--gpu={file}: not a profile of plan --calibrate") from None


def write_profile(device: Device, file: Path) -> None:
    file.write_text(json.dumps(asdict(device), indent=1))


# What each efficiency stands under in `Work`: seconds of a part are inverse to it.
FITTED = {
    "gemm": ("linear",),
    "attention": ("attention",),
    "memory": ("traffic", "update"),
    "link": ("link",),
    "network": ("network",),
}


def fit(
    device: Device, seconds: Sequence[dict[str, float]], measured: Sequence[float], firmness: float = 0.05
) -> Device:
    """The efficiencies at which parts add up to what was measured.

    `seconds[i]` are the parts of run i at the device's present efficiencies, by the name of the efficiency they stand under
    (`operation` too); `measured[i]` is the whole. Least squares of relative errors in the factors by which each part is longer
    (at least a twentieth), drawn to 1 by `firmness` so that few runs do not decide about what they hardly contain.
    """
    names = sorted({name for parts in seconds for name in parts})
    shares = [[parts.get(name, 0.0) / whole for name in names] for parts, whole in zip(seconds, measured, strict=True)]
    rows = torch.tensor(shares, dtype=torch.float64)
    wanted = torch.ones(len(rows), dtype=torch.float64)
    prior = firmness * torch.eye(len(names), dtype=torch.float64)
    scale = float((rows.sum(1) @ wanted) / (rows.sum(1) @ rows.sum(1)))  # first all alike, then each
    factors = torch.full((len(names),), scale, dtype=torch.float64)
    free = torch.ones(len(names), dtype=torch.bool)
    for _ in names:  # an active set: what would fall below the least stays there
        fixed = rows[:, ~free] @ factors[~free]
        system = torch.cat([rows[:, free], prior[free][:, free]])
        target = torch.cat([wanted - fixed, torch.full((int(free.sum()),), firmness * scale, dtype=torch.float64)])
        factors[free] = torch.linalg.lstsq(system, target[:, None]).solution[:, 0]
        low = free & (factors < scale / 20)
        if not low.any():
            break
        factors[low] = scale / 20
        free &= ~low
    by_name = dict(zip(names, factors.tolist(), strict=True))
    old = device.efficiency
    new = {
        f.name: getattr(old, f.name) * (by_name[f.name] if f.name == "operation" else 1 / by_name[f.name])
        for f in fields(Efficiency)
        if f.name in by_name
    }
    return replace(device, efficiency=replace(old, **new))
