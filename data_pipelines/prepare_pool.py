"""Independent jobs on several processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, Self

from data_pipelines.errors import DataError


class Pool:
    """`workers` processes, or this one where it is alone; they end when it does, however it ends. A context manager."""

    def __init__(self, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes = ProcessPoolExecutor(workers, context, _begin) if workers > 1 else None

    def run(self, function: Callable[..., object], jobs: Sequence[tuple[Any, ...]]) -> Iterator[int]:
        """function(*job) for every job; yields their numbers as they are done. The first error ends all.

        Raises `DataError` where a process dies.
        """
        if self._processes is None:
            for number, job in enumerate(jobs):
                function(*job)
                yield number
            return
        try:
            numbers = {self._processes.submit(function, *job): number for number, job in enumerate(jobs)}
            for future in as_completed(numbers):
                future.result()
                yield numbers[future]
        except BrokenProcessPool:
            raise DataError(
                "a process died (killed, out of memory?); what is done is kept, run again to go on"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._processes is not None:
            self._processes.shutdown(cancel_futures=True)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C goes to all: these end at once, the parent says so
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()
