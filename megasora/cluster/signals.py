"""Stopping on request: SIGTERM, SIGUSR1 or Ctrl-C ends the run after the step at hand, with a checkpoint.

A training process asks itself after each step; a launcher collects what it is to pass on.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

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

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within, the first signal only asks; a second Ctrl-C interrupts at once. Handlers are put back at the end."""
    request = StopRequest()

    def handle(number: int, _: FrameType | None) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number).name

    previous = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
