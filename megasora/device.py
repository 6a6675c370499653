"""The device of a process, and the one place that names it: everything else asks. So what runs on a CPU runs on a GPU."""

import os

import torch


def pick_device() -> torch.device:
    """This process's accelerator if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def devices_here() -> list[torch.device]:
    """All accelerators of this machine, or its CPU."""
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"
