"""What the device could do at best: the denominator of MFU, and the memory meter."""

import time
from pathlib import Path

import torch

# Dense peaks in FLOP/s without sparsity, from the vendors' data sheets: bf16 (tensor cores), fp32 (tf32 off).
PEAKS: dict[str, dict[str, float]] = {
    "H100 PCIe": {"bf16": 756e12, "fp32": 51e12},
    "H100": {"bf16": 989.4e12, "fp32": 66.9e12},
    "H200": {"bf16": 989.4e12, "fp32": 66.9e12},
    "B200": {"bf16": 2250e12, "fp32": 75e12},
    "A100": {"bf16": 312e12, "fp32": 19.5e12},
}


def device_peak(device: torch.device, precision: str) -> float:
    """FLOP/s: the data sheet's for a known GPU, else (and on every CPU) the best GEMM measured now, 0.2 s."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, peaks in PEAKS.items():
            if known in name:
                return peaks[precision]
    return gemm_peak(device, precision)


def gemm_peak(device: torch.device, precision: str, seconds: float = 0.2) -> float:
    """FLOP/s of the best of repeated square matrix products: on a GPU, or on a CPU with this process's threads."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    size = 8192 if device.type == "cuda" else 1024  # a GPU does 1024 in less time than it takes to start
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))  # a GPU is faster on ones
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the CUDA allocator's peak, or on a CPU the process's own (VmHWM)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
