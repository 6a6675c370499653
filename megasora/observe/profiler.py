"""Some steps of a run under torch's profiler: a trace of every rank, its largest costs, and what communication was hidden."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from megasora.device import on_gpu
from megasora.observe.logs import log

ROWS = 20  # operators in the table
LABELS = ("forward", "backward", "optimizer", "ema")  # that the engine puts into a profile
NCCL, GLOO, C10D = "ncclDevKernel_", "gloo:", "c10d::"
OF_NCCL = {"AllReduce": "all_reduce", "AllGather": "all_gather", "ReduceScatter": "reduce_scatter", "SendRecv": "p2p",
           "Broadcast": "broadcast", "Reduce": "reduce"}  # fmt: skip
# By what the name of a call of c10d begins with, and by what gloo calls its own.
OF_C10D = {
    "allreduce": "all_reduce", "allgather": "all_gather", "_allgather": "all_gather", "reduce_scatter": "reduce_scatter",
    "_reduce_scatter": "reduce_scatter", "alltoall": "all_to_all", "send": "p2p", "recv": "p2p", "broadcast": "broadcast",
    "reduce_": "reduce", "scatter": "scatter", "gather": "gather", "barrier": "barrier",
}  # fmt: skip
OF_GLOO = {
    "all_reduce": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter", "all_to_all": "all_to_all",
    "send": "p2p", "recv": "p2p", "broadcast": "broadcast", "reduce": "reduce", "scatter": "scatter", "gather": "gather",
    "barrier": "barrier",
}  # fmt: skip

Span = tuple[float, float]  # microseconds


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """`steps`: those to profile, such as 10-12 or 10; none if empty. Written to RUN/profile."""

    steps: str = ""

    def __post_init__(self) -> None:
        first, last = self.span
        if self.steps and not 1 <= first <= last:
            raise ValueError(f"steps={self.steps}: such as 10-12 or 10, the first step is 1")

    @property
    def span(self) -> tuple[int, int]:
        """The first and the last step; (0, -1) where there is none or it cannot be read."""
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", self.steps)
        return (int(found[1]), int(found[2] or found[1])) if found else (0, -1)


def profiler(device: torch.device) -> profile:
    """Of this process, and of the device's kernels where there are any."""
    return profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu(device))


class StepProfiler:
    """`begin` and `end` are called around every step; outside the steps that are asked for they do nothing.

    Each rank writes rank-NNNNN.pt.trace.json (for ui.perfetto.dev, or TensorBoard's profiler), rank-NNNNN.txt with the operators
    that cost most, and on a GPU rank-NNNNN.memory.pickle for pytorch.org/memory_viz. The last never ran on a GPU.
    """

    def __init__(self, config: ProfileConfig, run: Path, device: torch.device, rank: int) -> None:
        self.first, self.last = config.span
        self.path, self.device = run / "profile" / f"rank-{rank:05d}", device
        self.running: profile | None = None

    def begin(self, step: int) -> None:
        if step != self.first:
            return
        if on_gpu(self.device):
            torch.cuda.memory._record_memory_history()
        self.running = profiler(self.device)
        self.running.start()

    def end(self, step: int) -> None:
        if step >= self.last:
            self.close()

    def close(self) -> None:
        """Writes what there is: a run may end before the last of the steps."""
        if self.running is None:
            return
        found, self.running = self.running, None
        found.stop()
        try:
            self._write(found)
        except OSError as error:
            log.warning("the profile cannot be written: %s", error)

    def _write(self, found: profile) -> None:
        self.path.parent.mkdir(exist_ok=True)
        found.export_chrome_trace(f"{self.path}.pt.trace.json")
        lines = [largest(found, self.device), *lines_of(communication(found.events(), self.device))]
        if not on_gpu(self.device):
            lines.append("no snapshot of the memory: this device keeps no record of its own")
        self.path.with_suffix(".txt").write_text("\n".join(lines) + "\n")
        if on_gpu(self.device):
            torch.cuda.memory._dump_snapshot(f"{self.path}.memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        log.info("profile in %s.*", self.path)


def largest(found: profile, device: torch.device) -> str:
    """A table of the operators whose own time is largest."""
    return str(
        found.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=ROWS, max_name_column_width=60)
    )


def communication(events: Iterable[Any], device: torch.device) -> dict[str, dict[str, float]]:
    """By kind of collective on this rank: calls, seconds from its start to its end, and how many of these seconds are hidden:
    while this rank computes. The others are exposed: the rank waits for the exchange, or for ranks that come to it later.
    To NCCL all_to_all is sending and receiving: p2p. What torch.compile made for a CPU is not known to compute."""
    every = list(events)
    spans: dict[str, list[Span]] = {}
    for kind, span in nccl_calls(every) if on_gpu(device) else gloo_calls(every):
        spans.setdefault(kind, []).append(span)
    busy = computing(every, device)
    found = {}
    for kind, these in sorted(spans.items()):
        whole = union(these)
        found[kind] = {"calls": len(these), "seconds": 1e-6 * length(whole), "hidden_s": 1e-6 * overlap(whole, busy)}
    return found


def computing(events: Iterable[Any], device: torch.device) -> list[Span]:
    """When the device has a kernel under way that is no exchange; a CPU, an operator that calls no other one."""
    if on_gpu(device):
        return union(span_of(event) for event in events if is_kernel(event) and not event.name.startswith(NCCL))
    return union(
        span_of(event)
        for event in events
        if event.name.startswith("aten::") and not event.cpu_children and not event.is_async
    )


def nccl_calls(events: Iterable[Any]) -> list[tuple[str, Span]]:
    kernels = [event for event in events if is_kernel(event) and event.name.startswith(NCCL)]
    names = [event.name.removeprefix(NCCL).split("_")[0].split("(")[0] for event in kernels]
    return [(OF_NCCL.get(name, name), span_of(event)) for name, event in zip(names, kernels, strict=True)]


def gloo_calls(events: Iterable[Any]) -> list[tuple[str, Span]]:
    """Gloo's threads tell when; what it was tell the calls, which come in the same order: gloo makes a reduce_scatter of an
    all_reduce and calls it that."""
    whole = in_order(event for event in events if event.name.startswith(GLOO))
    calls = in_order(event for event in events if event.name.startswith(C10D))
    kinds = [kind for call in calls if (kind := kind_of(call.name.removeprefix(C10D), OF_C10D))]
    if len(kinds) != len(whole):  # the profile begins or ends amid one
        kinds = [kind_of(event.name.removeprefix(GLOO), OF_GLOO) or event.name for event in whole]
    return [(kind, span_of(event)) for kind, event in zip(kinds, whole, strict=True)]


def kind_of(name: str, table: Mapping[str, str]) -> str:
    """By what the name begins with; empty for what is no exchange, such as waiting."""
    return next((kind for begin, kind in table.items() if name.startswith(begin)), "")


def in_order(events: Iterable[Any]) -> list[Any]:
    return sorted(events, key=lambda event: float(event.time_range.start))


def is_kernel(event: Any) -> bool:
    """On a GPU; what the profiler draws around several of them is none."""
    return bool(event.device_type == DeviceType.CUDA and not event.is_user_annotation)


def span_of(event: Any) -> Span:
    return event.time_range.start, event.time_range.end


def labelled(events: Iterable[Any], device: torch.device) -> dict[str, float]:
    """Seconds of what the engine labels; on a GPU those of its kernels (never run there). A label that never came is missing."""
    kind = DeviceType.CUDA if on_gpu(device) else DeviceType.CPU
    found: dict[str, float] = {}
    for event in events:
        if event.name in LABELS and event.device_type == kind:
            begin, end = span_of(event)
            found[event.name] = found.get(event.name, 0.0) + 1e-6 * (end - begin)
    return found


def copied_in(events: Iterable[Any]) -> float:
    """Seconds in which a GPU is sent memory of the host."""
    return 1e-6 * length(union(span_of(event) for event in events if event.name.startswith("Memcpy HtoD")))


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time in spans that are in order and apart."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def length(spans: Iterable[Span]) -> float:
    return sum(end - begin for begin, end in spans)


def overlap(some: list[Span], others: list[Span]) -> float:
    """Of two unions, the time that both have."""
    both = length(union([*some, *others]))
    return length(some) + length(others) - both


def lines_of(found: dict[str, dict[str, float]]) -> list[str]:
    """What `communication` found, for people."""
    return [
        f"{kind:<16} {int(of['calls']):6d} calls {of['seconds']:9.4f} s, of which {of['hidden_s']:.4f} s hidden behind computing"
        for kind, of in found.items()
    ]
