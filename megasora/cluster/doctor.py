"""Is a node fit for a job? What can be found out in seconds, each finding beside the limit that it is held to."""

import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from megasora.device import devices_here, on_gpu
from megasora.observe.hardware import gemm_peak, synchronize

BLOCK = 1 << 20
RAMP = 2.0  # seconds of work after which a clock is up
GPU_FIELDS = {  # of nvidia-smi --query-gpu
    "driver": "driver_version",
    "clock": "clocks.current.sm",
    "clock_max": "clocks.max.sm",
    "memory_errors": "ecc.errors.uncorrected.volatile.total",
    "pending_rows": "remapped_rows.pending",
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a node must have. 0: not asked for."""

    gpus: int = 0
    cpus: int = 0
    memory_gib: float = 0.0
    driver: str = ""
    clock_share: float = 0.0  # of the highest SM clock; asked while products run, for idle GPUs clock down
    tflops: float = 0.0  # a GPU, or all cores, bf16 on a GPU
    free_gb: float = 1.0
    disk_mbs: float = 5.0  # written and synced
    skew_s: float = 2.0
    link_gbs: float = 0.0  # GB/s, each way at once
    link_share: float = 0.2  # of the median of all links
    site: str = ""  # a command of the site, run without a shell: exit code 0 means fit


@dataclass(frozen=True)
class Finding:
    """`ok` None: could not be looked at here, which holds nothing against the node."""

    check: str
    found: str
    limit: str
    ok: bool | None


def examine(limits: Limits, directory: Path) -> Iterator[Finding]:
    """Looks at this machine; `directory` is where the run writes."""
    cores, memory = len(os.sched_getaffinity(0)), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Finding("cpus", str(cores), f">= {limits.cpus}", cores >= limits.cpus)
    yield Finding("memory_gib", f"{memory:.1f}", f">= {limits.memory_gib}", memory >= limits.memory_gib)
    yield from gpu_findings(limits)
    yield computing(limits)
    for name, place in (("run", directory), ("tmp", Path(tempfile.gettempdir()))):
        yield from disk_findings(name, place, limits)
    yield clock_against_files(directory, limits)
    yield own_name()
    if limits.site:
        yield site_check(limits.site)


def gpu_findings(limits: Limits) -> Iterator[Finding]:
    """Count, driver, clocks and memory errors, by the driver's own tool."""
    visible = torch.cuda.device_count()
    yield Finding("gpus", str(visible), f">= {limits.gpus}", visible >= limits.gpus)
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield Finding("gpu_health", "no nvidia-smi", "", None)
        return
    loaded = [device for device in devices_here() if on_gpu(device)] if limits.clock_share else []
    query = [tool, f"--query-gpu={','.join(GPU_FIELDS.values())}", "--format=csv,noheader,nounits"]
    try:
        with busy(loaded):
            done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        yield Finding("gpu_health", "nvidia-smi hangs", "an answer within 60 s", False)
        return
    if done.returncode != 0:
        yield Finding("gpu_health", " ".join((done.stdout + done.stderr).split())[:200], "nvidia-smi works", False)
        return
    for index, line in enumerate(done.stdout.strip().splitlines()):
        values = dict(zip(GPU_FIELDS, (value.strip() for value in line.split(",")), strict=True))
        yield from one_gpu(index, values, limits)


@contextmanager
def busy(devices: Sequence[torch.device]) -> Iterator[None]:
    """Within, each device multiplies matrices all the time, so that its clock is the one that work gets."""
    done = threading.Event()

    def multiply(device: torch.device) -> None:
        with suppress(RuntimeError):  # of a device that fails: `computing` meets it again, and says so
            while not done.is_set():
                gemm_peak(device, "bf16")

    threads = [threading.Thread(target=multiply, args=(device,), daemon=True) for device in devices]
    for thread in threads:
        thread.start()
    if threads:
        time.sleep(RAMP)
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join(timeout=RAMP)


def one_gpu(index: int, values: dict[str, str], limits: Limits) -> Iterator[Finding]:
    driver = values["driver"]
    if limits.driver:
        yield Finding(f"gpu{index}_driver", driver, f"== {limits.driver}", driver == limits.driver)
    for name in ("memory_errors", "pending_rows"):
        count = values[name]  # "[N/A]" where a card has no such counter
        clean = int(count) == 0 if count.isdigit() else count.lower() != "yes"
        yield Finding(f"gpu{index}_{name}", count, "none", clean)
    if limits.clock_share and values["clock"].isdigit():
        share = int(values["clock"]) / int(values["clock_max"])
        yield Finding(
            f"gpu{index}_clock", f"{share:.2f} of the highest", f">= {limits.clock_share}", share >= limits.clock_share
        )


def computing(limits: Limits) -> Finding:
    """Speed of every device, and the same product twice: a device that contradicts itself computes wrongly."""
    devices = devices_here()
    speeds = []
    for device in devices:
        a = torch.randn(512, 512, device=device, generator=torch.Generator(device).manual_seed(0))
        results = [a @ a for _ in range(4)]
        synchronize(device)
        if not all(torch.equal(result, results[0]) for result in results) or not results[0].isfinite().all():
            return Finding("computing", f"{device} contradicts itself", "the same product each time", False)
        speeds.append(gemm_peak(device, "bf16" if on_gpu(device) else "fp32") / 1e12)
    worst = min(speeds)
    return Finding(
        "computing", f"{worst:.2f} TFLOP/s, the slowest device", f">= {limits.tflops}", worst >= limits.tflops
    )


def disk_findings(name: str, place: Path, limits: Limits, megabytes: int = 32) -> Iterator[Finding]:
    try:
        free = shutil.disk_usage(place).free / 1e9
        yield Finding(f"{name}_free_gb", f"{free:.1f}", f">= {limits.free_gb}", free >= limits.free_gb)
        if free < limits.free_gb:
            return
        with tempfile.NamedTemporaryFile(dir=place, prefix=".megasora-doctor-") as file:
            block = os.urandom(BLOCK)
            begin = time.perf_counter()
            for _ in range(megabytes):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = megabytes * BLOCK / 1e6 / (time.perf_counter() - begin)
            file.seek(0)
            whole = all(file.read(BLOCK) == block for _ in range(megabytes))
    except OSError as error:
        yield Finding(f"{name}_disk", f"{place}: {error.strerror}", "can be written", False)
        return
    yield Finding(f"{name}_disk_mbs", f"{speed:.0f}", f">= {limits.disk_mbs:g}", speed >= limits.disk_mbs)
    yield Finding(f"{name}_disk_reads", "what was written" if whole else "something else", "what was written", whole)


def clock_against_files(directory: Path, limits: Limits) -> Finding:
    """This clock against that of the file server, which stamps what is written."""
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".megasora-doctor-") as file:
            file.write(b"x")
            file.flush()
            skew = abs(time.time() - os.fstat(file.fileno()).st_mtime)
    except OSError as error:
        return Finding("clock_skew_s", f"{directory}: {error.strerror}", "", None)
    return Finding("clock_skew_s", f"{skew:.2f}", f"<= {limits.skew_s:g}", skew <= limits.skew_s)


def own_name() -> Finding:
    """Whether the node's name resolves. Jobs do not need it: SLURM knows the addresses."""
    try:
        return Finding("name", f"{socket.gethostname()} is {socket.gethostbyname(socket.gethostname())}", "", True)
    except OSError:
        return Finding("name", f"{socket.gethostname()} does not resolve", "", None)


def site_check(command: str) -> Finding:
    """What runs is the first word, with the others as its arguments: who wants a shell says so, `bash -c '...'`."""
    try:
        done = subprocess.run(shlex.split(command), capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return Finding("site", "no end within 120 s", "exit code 0", False)
    except (OSError, ValueError) as error:  # no such program, a quote that does not end
        return Finding("site", " ".join(str(error).split())[:200], "exit code 0", False)
    words = " ".join((done.stdout + done.stderr).split())[:200]
    return Finding("site", f"exit code {done.returncode} {words}".strip(), "exit code 0", done.returncode == 0)
