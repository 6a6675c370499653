"""Where the time of a step goes, by the host's clock."""

import time

import torch

from megasora.observe.hardware import synchronize


class Clock:
    """Wall time of the parts of one step. The device is waited for at the end of each, or where the code does so anyway
    (`wait=False`): then what it still had to do counts to a later part."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.laps = device, dict[str, float]()
        self.last = time.perf_counter()

    def lap(self, name: str, wait: bool = True) -> None:
        if wait:
            synchronize(self.device)
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

    @property
    def total(self) -> float:
        return sum(self.laps.values())
