"""Stopping on request: SIGTERM, SIGUSR1 or Ctrl-C ends the run after the step at hand, with a checkpoint.

A training process asks itself after each step; a launcher collects what it is to pass on.
"""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from megasora.errors import StoppedEarly

WARNING = "MEGASORA_WARNING"  # environment: seconds from SIGUSR1 to the end of the job
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


@contextmanager
def collected_signals() -> Iterator[list[int]]:
    """The signals that come, in order of arrival, instead of what they would do to this process."""
    received: list[int] = []
    before = {number: signal.signal(number, lambda number, _frame: received.append(number)) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """True once a signal has asked this process to stop."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self.deadline = math.inf  # monotonic

    def ask(self, number: int) -> None:
        self.signal = signal.Signals(number).name
        if number == signal.SIGUSR1 and WARNING in os.environ:
            self.deadline = min(self.deadline, time.monotonic() + float(os.environ[WARNING]))

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within, the first signal only asks; a second Ctrl-C interrupts at once. Handlers are put back at the end."""
    request = StopRequest()

    def handle(number: int, _: FrameType | None) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.ask(number)

    previous = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def ended_by_warning() -> Iterator[None]:
    """Within, SIGUSR1 ends the work at hand with StoppedEarly: for work that is done piece by piece and keeps what is done."""

    def handle(number: int, _: FrameType | None) -> None:
        raise StoppedEarly(f"{signal.Signals(number).name}: what is done is kept; the same command goes on from there")

    previous = signal.signal(signal.SIGUSR1, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, previous)


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal: proc(5), SigCgt."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False
