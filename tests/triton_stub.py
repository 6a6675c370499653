"""Triton kernels compiled for an H100 that is not there: a driver that compiles for sm_90a and launches nothing.

The public functions, their heuristics and Triton's autotuner run as they would on a GPU, on CPU tensors; every kernel that they
would launch is compiled, and what it costs is read from its PTX and from ptxas. In a process of its own, since Triton has one
driver a process.
"""

import hashlib
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

SHARED_LIMIT = 232_448  # bytes that one program may have on an H100
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
Cost = dict[str, Any]


class H100Stub:
    """What Triton asks a driver, answered for an H100."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> None:
        return None

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def benchmark(call: Callable[[], None], quantiles: Any = None, **_: Any) -> list[float]:
            call()
            return [1.0, 1.0, 1.0]

        return benchmark

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {
                "max_shared_mem": SHARED_LIMIT, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32
            }  # fmt: skip

        @staticmethod
        def load_binary(*args: Any) -> tuple[int, ...]:
            return (0, 0, 0, 0, 1024)

    class launcher_cls:
        def __init__(self, *args: Any) -> None:
            pass

        def __call__(self, *args: Any, **kwargs: Any) -> None:
            """Launches nothing."""


def cost(name: str, ptx: str, shared: int, warps: int) -> Cost:
    """What ptxas and the PTX say of one compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        arch = re.findall(r"\.target (\w+)", ptx)[0]
        command = [str(PTXAS), "-v", "--gpu-name", arch, "-o", str(file.with_suffix(".cubin")), str(file)]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def count(pattern: str) -> int:
        return len(re.findall(pattern, ptx))

    return {
        "kernel": name,
        "arch": arch,
        "warps": warps,
        "registers": int(re.findall(r"Used (\d+) registers", log)[0]),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log))),
        "stack": max(map(int, re.findall(r"(\d+) bytes stack frame", log))),
        "shared": shared,
        "wide_loads": count(r"ld\.global[^;]*\.v[48]") + count(r"cp\.async\.cg\.shared\.global[^;]*0x10"),
        "wgmma": count(r"wgmma\.mma_async"),
        "tma": count(r"cp\.async\.bulk\.tensor"),
        "fp8_columns": max(map(int, re.findall(r"wgmma\.mma_async\S*\.m64n(\d+)k32\.f32\.e[45]m", ptx)), default=0),
        "fp32_sums": count(r"(?:add|fma)\S*\.f32"),
        "fp8_casts": count(r"cvt\.rn\.satfinite\.e[45]m[32]x2"),
    }


_costs: list[Cost] = []
_seen: dict[str, Cost] = {}


def _listen(src: Any, metadata: dict[str, Any], metadata_group: dict[str, str], times: Any, cache_hit: bool) -> None:
    """Called by Triton for each kernel that it compiled or found in its cache."""
    ptx = next(Path(path).read_text() for name, path in metadata_group.items() if name.endswith(".ptx"))
    key = hashlib.sha256(ptx.encode()).hexdigest()
    if key not in _seen:
        _seen[key] = cost(metadata["name"], ptx, metadata["shared"], metadata["num_warps"])
    _costs.append(_seen[key])


def _prepare() -> None:
    torch.set_num_threads(1)
    driver.set_active(H100Stub())  # type: ignore[no-untyped-call]
    knobs.compilation.listener = _listen


def compiled_by(function: Callable[..., Any], *args: Any) -> list[Cost]:
    """The costs of the kernels that a call launches, each once. To be submitted to the process below."""
    for name, module in list(sys.modules.items()):
        if name.startswith("megasora_kernels"):
            for kernel in vars(module).values():
                if isinstance(kernel, triton.runtime.Autotuner):
                    kernel.cache.clear()
                    kernel = kernel.fn
                if isinstance(kernel, triton.JITFunction):
                    kernel.device_caches.clear()
    _costs.clear()
    function(*args)
    return list(_costs)


@contextmanager
def stub_process() -> Iterator[ProcessPoolExecutor]:
    """One fresh process that compiles: `pool.submit(compiled_by, function, *args).result()`, with a module-level function."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_prepare) as pool:
        yield pool


def faults(found: Cost) -> list[str]:
    """What would make a kernel slow or unable to start on an H100."""
    limit = min(255, 65536 // (32 * found["warps"]))
    return [
        *([f"{found['spilled']} bytes spilled"] if found["spilled"] else []),
        *([f"{found['stack']} bytes of stack"] if found["stack"] else []),
        *([f"{found['registers']} registers, {limit} there are"] if found["registers"] > limit else []),
        *([f"{found['shared']} bytes of shared memory"] if found["shared"] > SHARED_LIMIT else []),
        # Of a wgmma on fp8 a thread holds columns / 2 sums; each must be added to one in fp32.
        *(["unpromoted fp8 sums"] if found["fp32_sums"] < found["fp8_columns"] // 2 else []),
        *([f"compiled for {found['arch']}"] if found["arch"] != "sm_90a" else []),
    ]
