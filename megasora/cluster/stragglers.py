"""Ranks that are slower than the others, from what each has measured of its own steps."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from megasora.cluster.origin import node_name
from megasora.device import on_gpu

WINDOW = 20  # steps
FACTOR = 1.5  # of the median of all ranks
LEAST = 0.02  # seconds above it: less is noise


@dataclass(frozen=True)
class Straggler:
    """Seconds a step that are this rank's own, in the median of a window: waiting for its data, its first forward pass."""

    rank: int
    host: str
    data_s: float
    forward_s: float
    typical_s: float  # both, in the median of the ranks

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on {self.host}: {self.data_s:.3f} s for data and {self.forward_s:.3f} s for a forward pass, "
            f"against {self.typical_s:.3f} s for both on the others"
        )


class StepTimes:
    """Gathers every WINDOW steps what the ranks have measured. Backward passes are left out: in them ranks wait for each other,
    as they do to some degree in the forward passes of ZeRO-3, where a slow rank therefore stands out less."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.steps: list[tuple[float, float]] = []

    def add(self, data_s: float, forward_s: float) -> list[Straggler]:
        """The slow ranks, at the end of a window. A collective call: all ranks add their steps, and get the same."""
        if self.world == 1:
            return []
        self.steps.append((data_s, forward_s))
        if len(self.steps) < WINDOW:
            return []
        own = tuple(median(values) for values in zip(*self.steps, strict=True))
        self.steps.clear()
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, (*own, node_name()))
        typical = median(data + forward for data, forward, _ in everyone)
        return [
            Straggler(rank, host, data, forward, typical)
            for rank, (data, forward, host) in enumerate(everyone)
            if data + forward > max(FACTOR * typical, typical + LEAST)
        ]


class FirstCall:
    """A function that notes how long after `begin` its first call ended, by the device's own clock on a GPU."""

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self.function, self.device = function, device
        self.marks = [self._mark()]

    def __call__(self, *arguments: Any) -> Any:
        value = self.function(*arguments)
        if len(self.marks) == 1:
            self.marks.append(self._mark())
        return value

    def seconds(self) -> float:
        """To be asked once the device has done its work."""
        if len(self.marks) == 1:  # a stage of a pipeline that sees no loss
            return 0.0
        begin, end = self.marks
        if on_gpu(self.device):
            return float(begin.elapsed_time(end)) / 1000
        return float(end - begin)

    def _mark(self) -> Any:
        if not on_gpu(self.device):
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
