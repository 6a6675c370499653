"""The few collective steps that saving and loading need. They work without torch.distributed, as a world of one."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megasora.errors import CheckpointError

T = TypeVar("T")


class Ranks:
    """All processes of the default group. A failure on one of them becomes the same CheckpointError on all."""

    def __init__(self) -> None:
        self.joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.joined else 0
        self.world = dist.get_world_size() if self.joined else 1

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of rank, on every rank. Values are pickled: keep them small."""
        if not self.joined:
            return [value]
        values: list[T] = [value] * self.world
        dist.all_gather_object(values, value)
        return values

    def every(self, what: str, func: Callable[[], T]) -> T:
        """Runs `func` on every rank, returns the own result. If it failed anywhere, all ranks raise, naming `what`."""
        result, caught = _attempt(func)
        failures = self.gather(None if caught is None else _one_line(self.rank, caught))
        failure = next(filter(None, failures), None)
        if failure is not None:
            raise CheckpointError(f"{what}: {failure}") from caught
        return result[0]

    def first(self, what: str, func: Callable[[], T]) -> T:
        """Runs `func` on rank 0 and returns its result on all ranks, or raises on all."""
        result = self.every(what, lambda: func() if self.rank == 0 else None)
        return self.gather(result)[0]  # type: ignore[return-value]


def _attempt(func: Callable[[], T]) -> tuple[list[T], Exception | None]:
    try:
        return [func()], None
    except Exception as error:
        return [], error


def failure_of_dcp(failure: CheckpointException) -> str:
    """What torch.distributed.checkpoint raises on all ranks when one fails, in one line.

    It also catches what is no Exception: a KeyboardInterrupt goes on as itself.
    """
    rank, (error, _) = min(failure.failures.items())
    if not isinstance(error, Exception):
        raise error
    return _one_line(rank, error)


def _one_line(rank: int, error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, CheckpointError) else f"rank {rank}: {type(error).__name__}: {text}"
