"""The few collective steps that saving and loading need. They work without torch.distributed, as a world of one."""

import errno
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megasora.errors import CheckpointError, MegasoraError, StorageFull

T = TypeVar("T")

WHAT_TO_DO = {
    errno.ENOSPC: "; free space there, or keep fewer: checkpoint.keep_last",
    errno.EDQUOT: "; the quota is used up: free space there, or keep fewer: checkpoint.keep_last",
    errno.EROFS: "; mount it writable, or give another run.dir",
    errno.EACCES: "; give this user the right to write there, or give another run.dir",
    errno.EIO: "; the storage fails: look at its own log",
    errno.ESTALE: "; the storage went away: mount it again",
}


class Ranks:
    """All processes, by way of the default group or another one.

    A failure on one becomes the same error on all: a CheckpointError, or what it was if it is one of ours.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, alone: bool = False) -> None:
        self.group = group
        self.joined = not alone and dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.joined else 0
        self.world = dist.get_world_size() if self.joined else 1

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of rank, on every rank. Values are pickled: keep them small."""
        if not self.joined:
            return [value]
        values: list[T] = [value] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def every(self, what: str, func: Callable[[], T]) -> T:
        """Runs `func` on every rank, returns the own result. If one failed, all raise, naming `what` unless it is empty."""
        result, caught = _attempt(func)
        failures = self.gather(None if caught is None else (_kind(caught), _one_line(self.rank, caught)))
        failure = next(filter(None, failures), None)
        if failure is not None:
            kind, reason = failure
            raise kind(reason if reason.startswith(what) else f"{what}: {reason}") from caught
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


def _kind(error: Exception) -> type[MegasoraError]:
    if isinstance(error, MegasoraError):
        return type(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return StorageFull if full else CheckpointError


def _one_line(rank: int, error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, MegasoraError):
        return text
    advice = WHAT_TO_DO.get(error.errno or 0, "") if isinstance(error, OSError) else ""
    return f"rank {rank}: {type(error).__name__}: {text}{advice}"
