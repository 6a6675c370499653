"""Jobs on other processes of this machine, whose large results come back through shared memory.

The shared memory has no name (memfd): it ends with the last process that holds it, however that ends, and the size of
/dev/shm does not matter. Pickles go between these processes alone, through pipes without a name.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle  # nosec B403 # see above
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import reduction
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any, Self

import numpy as np

SHARED = 1 << 16  # bytes: larger arrays go through shared memory
KEPT = 1 << 24  # bytes of shared memory that a worker keeps between jobs
FOR_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class WorkerDied(Exception):
    """The process that had the job ended before it answered: killed, crashed, out of memory, or the pool was closed."""


class WorkerPool:
    """`workers` spawned processes of one thread each; 0: a thread of this process. A context manager.

    They start with the first jobs and end with this process, however it ends. Linux.
    """

    def __init__(self, workers: int) -> None:
        if workers < 0:
            raise ValueError(f"workers={workers}: not below 0")
        self.workers = workers
        self._here = None if workers else ThreadPoolExecutor(1, thread_name_prefix="worker")
        self._jobs: SimpleQueue[tuple[Future[Any], bytes] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._running: set[_Worker] = set()
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """function(*args), both found by import or pickled. What it raises, the future raises, with a note of where.

        A worker that dies fails the one job that it had with `WorkerDied` and is replaced. Contiguous arrays anywhere in the
        result are copied once by each side; they can be written to.
        """
        if self._here:
            return self._here.submit(function, *args)
        future: Future[Any] = Future()
        job = future, pickle.dumps((function, args), 5)
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool is closed")
            self._jobs.put(job)
        return future

    def close(self) -> None:
        """Cancels what waits and ends the processes; a job that runs fails with `WorkerDied`."""
        atexit.unregister(self.close)
        if self._here:
            self._here.shutdown(cancel_futures=True)
        with self._lock:
            self._closed = True
            while not self._jobs.empty():
                if job := self._jobs.get():
                    job[0].cancel()
            for worker in self._running:
                worker.process.kill()
            for _ in self._threads:
                self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        """Gives one process after the other, each in the place of one that died, a job at a time."""
        worker: _Worker | None = None
        while job := self._jobs.get():
            future, call = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if worker is None or not worker.process.is_alive():
                    worker = self._replace(worker)
                result = worker.run(call)
            except WorkerDied as error:
                worker = self._replace(worker, start=False)
                future.set_exception(error)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
        self._replace(worker, start=False)

    def _replace(self, worker: _Worker | None, start: bool = True) -> Any:
        with self._lock:  # of multiprocessing's list of children, too
            if worker:
                self._running.discard(worker)
                worker.end()
            if not start:
                return None
            if self._closed:
                raise WorkerDied("the pool was closed")
            worker = _Worker()
            self._running.add(worker)
            return worker


class _Worker:
    """The parent's side of one process."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._channel, other = context.Pipe()
        self._arena = os.memfd_create("worker")
        self.process = context.Process(target=_work, args=(other,), daemon=True)
        try:
            self.process.start()
            reduction.send_handle(self._channel, self._arena, self.process.pid)
        except BaseException:
            self._close()
            raise
        finally:
            other.close()

    def run(self, call: bytes) -> Any:
        """The result of a pickled call, or what it raised. Raises `WorkerDied`."""
        try:
            self._channel.send_bytes(call)
            good, content, sizes = self._channel.recv()
        except (EOFError, OSError):
            self.process.join(10)
            raise WorkerDied(f"a worker process died ({_how(self.process.exitcode)})") from None
        arrays, offset = [np.empty(size, np.uint8) for size in sizes], 0
        for array in arrays:
            _transfer(os.preadv, self._arena, array.data, offset)
            offset += array.size
        if offset > KEPT:
            os.ftruncate(self._arena, 0)
        result = pickle.loads(content, buffers=arrays)  # nosec B301 # from the process that this one has started
        if good:
            return result
        kind, args, state = result
        error = kind.__new__(kind, *args)  # not by its __init__, which may want other arguments
        error.__dict__.update(state)
        raise error

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self._close()

    def _close(self) -> None:
        self._channel.close()
        os.close(self._arena)


def _how(exitcode: int | None) -> str:
    return signal.Signals(-exitcode).name if exitcode and exitcode < 0 else f"exit code {exitcode}"


def _transfer(call: Callable[..., int], file: int, view: memoryview, offset: int) -> None:
    """All of `view`, from or to a file: one call of the system moves at most 2 GiB."""
    while view:
        moved = call(file, [view], offset)
        if not moved:
            raise EOFError("shared memory is shorter than the result")
        view, offset = view[moved:], offset + moved


def _work(channel: Connection) -> None:
    """The process: answers one call after the other until the parent is gone."""
    for number in FOR_THE_PARENT:  # sent to a whole process group, they are the parent's to obey; it ends us
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # for a torch that is imported later
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    with suppress(EOFError, OSError):
        arena = reduction.recv_handle(channel)
        while True:
            channel.send(_answer(channel.recv_bytes(), arena))


def _end_with_parent() -> None:
    """Also in the middle of a job."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _answer(call: bytes, arena: int) -> tuple[bool, bytes, list[int]]:
    """Whether it went well; the pickled result, or the error's type, arguments and attributes; bytes of each large array."""
    try:
        function, args = pickle.loads(call)  # nosec B301 # from the process that has started this one
        return True, *_pack(function(*args), arena)
    except Exception as error:
        error.add_note("in a worker:\n" + "".join(traceback.format_exception(error)).rstrip())
        try:
            return False, *_pack((type(error), error.args, error.__dict__), arena)
        except Exception:
            return False, *_pack((RuntimeError, (repr(error),), {"__notes__": error.__notes__}), arena)


def _pack(result: Any, arena: int) -> tuple[bytes, list[int]]:
    large: list[memoryview] = []

    def stays(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes > SHARED:
            large.append(view)
        return view.nbytes <= SHARED

    content, offset = pickle.dumps(result, 5, buffer_callback=stays), 0
    for view in large:
        _transfer(os.pwritev, arena, view, offset)
        offset += view.nbytes
    return content, [view.nbytes for view in large]
