"""What the tests' own harness says of ranks that fail: a rank that lost another one is often the first to speak."""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.harness import run_distributed


def one_is_killed() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def one_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1's own words")
    dist.all_reduce(torch.ones(1))


def one_leaves() -> None:
    if dist.get_rank() == 1:
        os._exit(0)
    dist.barrier()


def one_hangs() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def test_a_killed_rank_is_named_beside_the_one_that_lost_it() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 ended with -9\nrank 0:\n"):
        run_distributed(one_is_killed, 2)


def test_what_every_rank_said_is_told() -> None:
    with pytest.raises(RuntimeError, match="rank 1's own words") as caught:
        run_distributed(one_raises, 2)
    assert "rank 0:\n" in str(caught.value)


def test_a_rank_that_leaves_without_a_word_is_named_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 ended with 0"):
        run_distributed(one_leaves, 2, timeout=600)
    assert time.monotonic() - started < 60


def test_a_hung_rank_is_named() -> None:
    with pytest.raises(RuntimeError, match="rank 1 hung"):
        run_distributed(one_hangs, 2, timeout=5)


def holds_a_lock(directory: Path) -> None:
    file = (directory / str(dist.get_rank())).open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write("held")
    file.flush()
    time.sleep(600)


def test_ranks_end_with_tests_that_are_killed(tmp_path: Path) -> None:
    call = f"run_distributed(holds_a_lock, 2, Path({str(tmp_path)!r}), timeout=600)"
    words = [sys.executable, "-c", f"from tests.distributed.test_harness import *\n{call}"]
    with tempfile.TemporaryDirectory() as left:  # by Python itself, of what is killed; a short name, for sockets
        tests = subprocess.Popen(words, cwd=Path(__file__).parents[2], env=os.environ | {"TMPDIR": left})
        deadline = time.monotonic() + 120
        locks = [tmp_path / "0", tmp_path / "1"]
        while not all(lock.exists() and lock.read_text() for lock in locks):
            assert tests.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        tests.kill()
        tests.wait()
    deadline = time.monotonic() + 30
    for lock in locks:
        with lock.open() as file:
            while True:  # the kernel lets go of it when its holder has ended
                with suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                assert time.monotonic() < deadline, "a rank lives on"
                time.sleep(0.05)
