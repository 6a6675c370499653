"""Runs a function on several gloo processes, with a hard time-out and no process left behind."""

import faulthandler
import os
import pickle
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _end_with_tests() -> None:
    """The server of processes lives as long as one of them does, so it does not end them when the tests are killed."""
    tests = mp.parent_process()
    assert tests is not None
    tests.join()
    os._exit(1)


def _worker(rank: int, world: int, store: str, variables: dict[str, str], call: bytes, results: Any) -> None:
    os.environ.update(variables)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    faulthandler.enable()  # a crash in compiled code says where
    threading.Thread(target=_end_with_tests, daemon=True).start()
    # What libraries leave there goes with it, also if this process is killed. Some do so when they are imported, by `call`.
    tempfile.tempdir = str(Path(store).parent)
    try:
        func, args = pickle.loads(call)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        value = func(*args)
        dist.barrier()
        dist.destroy_process_group()
        results.put((rank, pickle.dumps(value), None))  # by value: tensors outlive their process
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise


def forget_groups() -> None:
    """Ends all process groups but the one of all ranks. Each has threads that look for work a hundred times a second: after some
    dozens of cases in one set of processes those are all that a small machine does. All ranks call it."""
    dist.barrier()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def run_distributed(func: Callable[..., Any], world: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Calls `func(*args)` on `world` processes joined by gloo; returns every rank's result, in order of rank.

    `func` is a module-level function, its result picklable. The rendezvous is a file, so no port is taken. A failure on
    any rank, or the time-out (seconds), kills all of them and raises with what every rank said: the first to speak may only
    have lost the one that failed.
    """
    context = mp.get_context("forkserver")  # torch is imported once, not by each process
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed.tensor", "triton"])
    call = pickle.dumps((func, args))
    results = context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory) / "store")
        workers = [
            context.Process(target=_worker, args=(rank, world, store, dict(os.environ), call, results), daemon=True)
            for rank in range(world)
        ]
        for worker in workers:
            worker.start()
        values: dict[int, Any] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        try:
            while len(values) + len(errors) < world and time.monotonic() < deadline:
                with suppress(Empty):
                    rank, value, error = results.get(timeout=0.1)
                    if error is None:
                        values[rank] = pickle.loads(value)
                    else:
                        errors[rank] = error
                silent = [rank for rank in range(world) if rank not in values and rank not in errors]
                if errors or any(workers[rank].exitcode is not None for rank in silent):
                    deadline = min(deadline, time.monotonic() + 3)  # for the others' words
            if len(values) < world:
                ends = {rank: workers[rank].exitcode for rank in silent}
                said = [f"rank {rank} {'hung' if end is None else f'ended with {end}'}" for rank, end in ends.items()]
                said += [f"rank {rank}:\n{error}" for rank, error in errors.items()]
                raise RuntimeError(f"{func.__name__}: " + "\n".join(said))
        finally:
            for worker in workers:
                worker.join(timeout=5 if len(values) == world else 0)
                if worker.is_alive():
                    worker.kill()
                    worker.join()
    return [values[rank] for rank in range(world)]
