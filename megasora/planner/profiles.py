"""Devices by name, and profiles on disk, whose efficiencies were fitted to what `bench` measured (calibrate.py)."""

import difflib
import json
from dataclasses import asdict
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
