"""What the tests' own harness says of ranks that fail: a rank that lost another one is often the first to speak."""

import os
import signal
import time

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


def test_a_hung_rank_is_named() -> None:
    with pytest.raises(RuntimeError, match="rank 1 hung"):
        run_distributed(one_hangs, 2, timeout=5)
