"""What devices can do: one table of their numbers, each with its source; the denominator of MFU, and the memory meter."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megasora.device import on_gpu

GIB = 2**30


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peaks that are reached; `operation` is the time that a call of an operation takes at least, and `overlap`
    the share of communication that can hide behind computing does."""

    gemm: float
    attention: float  # of the conventional count, backward being twice the forward
    memory: float
    link: float
    network: float
    operation: float = 0.0  # seconds
    overlap: float = 1.0


@dataclass(frozen=True)
class Device:
    """What one device can do. Bytes and bytes per second; a link's and a network's are one device's, in one direction."""

    name: str
    peaks: dict[str, float]  # dense FLOP/s by precision
    memory: float
    bandwidth: float
    link: float  # to the devices of its node
    node: int  # devices of a node
    network: float  # to other nodes
    reserved: float  # of its memory: context, communication, allocator
    efficiency: Efficiency
    sources: dict[str, str] = field(default_factory=dict)
    latency: float = 5e-6  # seconds of a collective, besides its bytes


SHEET = {
    "H100": "NVIDIA H100 Tensor Core GPU data sheet (2023): SXM5, dense; NVLink 900 GB/s both ways",
    "H200": "NVIDIA H200 Tensor Core GPU data sheet (2024): SXM, dense; NVLink 900 GB/s both ways",
    "A100": "NVIDIA A100 80GB data sheet (2021): SXM4, dense; NVLink 600 GB/s both ways",
    "B200": "NVIDIA DGX B200 data sheet (2024), an eighth of it, dense; NVLink 1.8 TB/s both ways",
}
MEASURED = (
    "benchmarks/reports/2026-11-26-bench-wan-1.3b-bf16-cuda.json: this project's own step and GEMM on an H100 80GB HBM3"
)
HOPPER = Efficiency(gemm=0.72, attention=0.44, memory=0.62, link=0.78, network=0.80, operation=67e-6, overlap=0.9)
RESERVED = 3.0 * GIB  # CUDA context 0.6, NCCL 1.5 for half a dozen groups, cuBLAS's and the allocator's own
ASSUMED = "assumed, not measured by this project: fit it with plan --calibrate"


def sources(name: str, rails: str, efficiency: str) -> dict[str, str]:
    return {
        "peaks, bandwidth, link": SHEET[name],
        "memory": "torch.cuda.get_device_properties",
        "network": rails,
        "efficiency": efficiency,
        "reserved": "context, NCCL's buffers and cuBLAS's workspace; " + ASSUMED,
    }


DEVICES: dict[str, Device] = {
    "H100 PCIe": Device(
        "H100 PCIe", {"fp8": 1513e12, "bf16": 756e12, "fp32": 51e12}, 79.1 * GIB, 2.0e12, 64e9, 8, 25e9, RESERVED, HOPPER,
        {"peaks, bandwidth, link": "NVIDIA H100 PCIe data sheet (2022), PCIe 5.0 x16", "efficiency": ASSUMED},
    ),
    "H100": Device(
        "H100", {"fp8": 1978.9e12, "bf16": 989.4e12, "fp32": 66.9e12}, 79.1 * GIB, 3.35e12, 450e9, 8, 50e9, RESERVED, HOPPER,
        sources("H100", "DGX H100: a ConnectX-7 of 400 Gb/s a GPU", MEASURED + "; links: NCCL's bus bandwidth, assumed"),
    ),
    "H200": Device(
        "H200", {"fp8": 1978.9e12, "bf16": 989.4e12, "fp32": 66.9e12}, 139.7 * GIB, 4.8e12, 450e9, 8, 50e9, RESERVED, HOPPER,
        sources("H200", "DGX H200: a ConnectX-7 of 400 Gb/s a GPU", "the H100's; " + ASSUMED),
    ),
    "B200": Device(
        "B200", {"fp8": 4500e12, "bf16": 2250e12, "fp32": 75e12}, 178.3 * GIB, 8.0e12, 900e9, 8, 50e9, RESERVED,
        Efficiency(gemm=0.68, attention=0.4, memory=0.62, link=0.75, network=0.80, operation=67e-6, overlap=0.9),
        sources("B200", "DGX B200: a ConnectX-7 of 400 Gb/s a GPU", ASSUMED),
    ),
    "A100": Device(
        "A100", {"bf16": 312e12, "fp32": 19.5e12}, 79.2 * GIB, 2.039e12, 300e9, 8, 25e9, RESERVED,
        Efficiency(gemm=0.74, attention=0.5, memory=0.7, link=0.78, network=0.80, operation=67e-6, overlap=0.9),
        sources("A100", "DGX A100: a ConnectX-6 of 200 Gb/s a GPU", ASSUMED),
    ),
}  # fmt: skip
# What the driver calls exactly these. Their kin (H100 NVL, GH200, GB200, an A100 of 40 GB, a MIG slice) have other peaks.
NAMES = {
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "NVIDIA A100-SXM4-80GB": "A100",
}
# A device that overlaps nothing and has no node: this machine's processes, over loopback.
CPU_EFFICIENCY = Efficiency(gemm=0.8, attention=0.4, memory=1.0, link=1.0, network=1.0, operation=15e-6, overlap=0.0)


def this_cpu(peaks: dict[str, float], share: int = 1) -> Device:
    """This machine as the device of one of `share` processes; `peaks` by precision, as `gemm_peak` measures them."""
    pages = Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]
    return Device(
        "cpu", peaks, int(pages) * 1024 / share, 6e9, 0.8e9, 2**20, 0.8e9, 0.0, CPU_EFFICIENCY,
        {"peaks": "the best matrix product measured now", "memory": "/proc/meminfo, shared by the processes",
         "bandwidth, link, network, efficiency": ASSUMED}, latency=200e-6,
    )  # fmt: skip


def known_device(name: str) -> Device | None:
    """The GPU that the driver calls so; None for one whose numbers are not in the table, however alike its name."""
    return DEVICES[NAMES[name]] if name in NAMES else None


def device_peak(device: torch.device, precision: str, fp8: bool = False) -> float:
    """FLOP/s: the data sheet's for a known GPU, else (and on every CPU) the best GEMM measured now, 0.2 s.
    With `fp8` that of fp8 products, where the device has them."""
    if on_gpu(device) and (known := known_device(torch.cuda.get_device_name(device))):
        return known.peaks.get("fp8" if fp8 else precision, known.peaks[precision])
    return gemm_peak(device, precision)


def gemm_peak(device: torch.device, precision: str, seconds: float = 0.2) -> float:
    """FLOP/s of the best of repeated square matrix products: on a GPU, or on a CPU with this process's threads."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    size = 8192 if on_gpu(device) else 1024  # a GPU does 1024 in less time than it takes to start
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))  # a GPU is faster on ones
    return 2 * size**3 / best_of(lambda: a @ b, device, seconds)


def copy_peak(device: torch.device, seconds: float = 0.2) -> float:
    """Bytes/s of the best of repeated copies of more than the caches hold, read and written bytes counted."""
    size = 2**30 if on_gpu(device) else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)  # zeros that nobody wrote are all one page
    target = torch.empty_like(source)
    return 2 * size / best_of(lambda: target.copy_(source), device, seconds)


def best_of(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The least seconds that it takes, of as many times as there is time for."""
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        begin = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if on_gpu(device):
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the CUDA allocator's peak, or on a CPU the process's own (VmHWM)."""
    if on_gpu(device):
        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def device_name(device: torch.device) -> str:
    """What the machine calls it."""
    if on_gpu(device):
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "cpu"
