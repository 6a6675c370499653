"""The energy that a device has used, where it tells. NVIDIA's counter never ran here: it needs a GPU."""

import ctypes
from pathlib import Path

import torch

from megasora.device import on_gpu

RAPL = Path("/sys/class/powercap")


def energy(device: torch.device) -> float | None:
    """Joules up to now, from a beginning that does not matter: of a GPU (NVML), or of all packages of the machine (RAPL), which
    other processes use too. None where neither can be read."""
    return gpu_energy(device) if on_gpu(device) else package_energy()


def package_energy() -> float | None:
    """Intel's and AMD's counters; mostly only root may read them."""
    try:
        packages = [zone for zone in RAPL.glob("intel-rapl:*") if zone.name.count(":") == 1]
        return sum(int((zone / "energy_uj").read_text()) for zone in packages) / 1e6 if packages else None
    except (OSError, ValueError):
        return None


def gpu_energy(device: torch.device) -> float | None:
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
    return None if failed else millijoules.value / 1e3
