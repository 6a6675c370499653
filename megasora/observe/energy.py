"""The energy that a device has used, where it tells. NVIDIA's counter never ran here: it needs a GPU."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megasora.device import on_gpu

RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """Joules up to now, from a beginning that does not matter; `full`: at how many it begins again at zero, 0 for never."""

    joules: float
    full: float = 0.0


def energy(device: torch.device) -> list[Counter] | None:
    """The counter of a GPU (NVML), or those of all packages of the machine (RAPL), which other processes use too. None where
    neither can be read."""
    return gpu_energy(device) if on_gpu(device) else package_energy()


def used(before: Sequence[Counter], after: Sequence[Counter]) -> float:
    """Joules between two readings, between which no counter was full more than once."""
    return sum(
        new.joules - old.joules + (new.full if new.joules < old.joules else 0.0)
        for old, new in zip(before, after, strict=True)
    )


def package_energy() -> list[Counter] | None:
    """Intel's and AMD's counters, full within the hour; mostly only root may read them."""
    try:
        packages = sorted(zone for zone in RAPL.glob("intel-rapl:*") if zone.name.count(":") == 1)
        names = ("energy_uj", "max_energy_range_uj")
        return [Counter(*(int((zone / name).read_text()) / 1e6 for name in names)) for zone in packages] or None
    except (OSError, ValueError):
        return None


def gpu_energy(device: torch.device) -> list[Counter] | None:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    failed = (
        library.nvmlInit_v2()
        or library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle))
        or library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
    )
    return None if failed else [Counter(millijoules.value / 1e3)]
