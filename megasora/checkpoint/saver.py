"""Saves while training goes on: the step waits for a copy in the host's memory, a thread of each rank does the rest."""

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import MetadataIndex

from megasora.checkpoint.directory import CheckpointConfig
from megasora.checkpoint.durable import copy
from megasora.checkpoint.manifest import Place, place_of
from megasora.checkpoint.ranks import Ranks
from megasora.checkpoint.save import Shares, plan_shares, prune, write
from megasora.device import on_gpu
from megasora.errors import CheckpointError, Superseded

LOOK = 2.0  # seconds between two looks at the other ranks, while all wait for a save


@dataclass(frozen=True)
class Saved:
    """A finished save: how long the step waited for it, and how long all of it took."""

    step: int
    path: Path
    blocked: float
    seconds: float
    durable: Place | None = None  # where it was copied to, in what time, and why that failed
    durable_seconds: float = 0.0
    durable_failure: str = ""


class Saver:
    """At most one save is in flight. All ranks call `start` and `finish` alike.

    The threads of the ranks talk over a gloo group of their own, so that they never meet the collectives of training. `check`
    raises Superseded, on rank 0, when another job has taken over.
    """

    def __init__(
        self, root: Path, config: CheckpointConfig, check: Callable[[], None] | None, device: torch.device
    ) -> None:
        self.root, self.config, self.device = root, config, device
        self.check = check or (lambda: None)
        self.ranks = Ranks()
        self.behind = self._group()
        self.step: int | None = None  # of the save in flight
        self._thread: threading.Thread | None = None
        self._outcome: Saved | BaseException | None = None
        self._copies: dict[MetadataIndex, torch.Tensor] = {}
        self._cost = self._durable_cost = 0.0  # seconds that the last save and the last copy took
        self._last = time.monotonic()
        self._durable_last, self._durable_step = -math.inf, 0

    @property
    def done(self) -> bool:
        """Whether this rank's part of a save waits to be finished."""
        return self._thread is not None and not self._thread.is_alive()

    def due(self, step: int) -> bool:
        """Whether to save after `step`. Where the interval follows from time, rank 0's clock counts."""
        if self.config.every:
            return step % self.config.every == 0
        return self.ranks.gather(time.monotonic() - self._last >= self.interval(self._cost))[0]

    def interval(self, cost: float) -> float:
        """Seconds between two saves that cost so many, by which least time is lost (Young 1974, equation 1)."""
        return math.sqrt(2 * self.config.failure_hours * 3600 * cost)

    def start(
        self, step: int, tensors: Mapping[str, torch.Tensor], facts: dict[str, Any], *, last: bool = False
    ) -> None:
        """Begins to save `tensors` as they are now; they may change when it returns. CheckpointError on all ranks. The `last`
        one of a run is copied to the durable store in any case."""
        assert self._thread is None, f"the save of step {self.step} is not finished"
        begin = time.perf_counter()
        shares = plan_shares(self.ranks, f"saving step {step} in {self.root}", tensors)
        durable = self.ranks.gather(self._durable_due(step, last))[0]
        if self.config.background:
            shares = replace(shares, pieces=self._copied(shares))
        self.step, self._last = step, time.monotonic()
        blocked = time.perf_counter() - begin
        # A daemon: a thread that hangs in a dead storage must not keep the process.
        self._thread = threading.Thread(
            target=self._run, args=(step, shares, facts, durable, begin, blocked), name="checkpoint", daemon=True
        )
        self._thread.start()

    def finish(self) -> Saved | None:
        """Waits for the save in flight; None if it still hangs after `checkpoint.timeout`. CheckpointError if it failed."""
        assert self._thread is not None
        begin, deadline = time.perf_counter(), time.monotonic() + self.config.timeout
        while not all(self.ranks.gather(self._joined(deadline))):
            if self.ranks.gather(time.monotonic() > deadline)[0]:
                return None
        waited = time.perf_counter() - begin
        step, outcome = self.step, self._outcome
        self.step, self._thread, self._outcome = None, None, None

        def result() -> Saved:
            if isinstance(outcome, BaseException):
                raise outcome
            assert outcome is not None
            return outcome

        try:
            saved = self.ranks.every(f"saving step {step} in {self.root}", result)
        except CheckpointError:
            if any(self.ranks.gather(not isinstance(outcome, Saved | CheckpointError))):
                self.behind = self._group()  # the threads lost each other
            raise
        self._cost, self._last = saved.seconds, time.monotonic()
        if saved.durable is not None:
            self._durable_cost, self._durable_last = saved.durable_seconds, time.monotonic()
            self._durable_step = saved.step
        return replace(saved, blocked=saved.blocked + waited)

    def close(self) -> None:
        """Gives a save in flight the time to end: this rank's part of it, without a word to the others."""
        if self._thread is not None:
            self._thread.join(self.config.timeout)

    def _joined(self, deadline: float) -> bool:
        assert self._thread is not None
        self._thread.join(max(0.0, min(LOOK, deadline - time.monotonic())))
        return not self._thread.is_alive()

    def _group(self) -> Ranks:
        if not self.ranks.joined:
            return self.ranks
        return Ranks(dist.new_group(backend="gloo", timeout=timedelta(seconds=self.config.timeout)))

    def _durable_due(self, step: int, last: bool) -> bool:
        if not self.config.durable or last:
            return bool(self.config.durable)
        if self.config.durable_every:
            return step - self._durable_step >= self.config.durable_every
        return time.monotonic() - self._durable_last >= self.interval(self._durable_cost)

    def _copied(self, shares: Shares) -> dict[MetadataIndex, torch.Tensor]:
        """The pieces in the host's memory. The same memory serves all saves: a fresh page costs more than the copy."""
        pinned = on_gpu(self.device)
        for index, piece in shares.pieces.items():
            copied = self._copies.get(index)
            if copied is None or copied.shape != piece.shape or copied.dtype != piece.dtype:
                self._copies[index] = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=pinned)
            self._copies[index].copy_(piece, non_blocking=pinned)
        if pinned:
            torch.cuda.synchronize(self.device)
        return {index: self._copies[index] for index in shares.pieces}

    def _run(
        self, step: int, shares: Shares, facts: dict[str, Any], durable: bool, begin: float, blocked: float
    ) -> None:
        try:
            path = write(self.behind, self.root, step, shares, facts, self.check)
            saved = Saved(step, path, blocked, time.perf_counter() - begin)
            self._outcome = self._copy(saved) if durable else saved
            prune(self.root, self.config, self.behind)
        except BaseException as error:
            self._outcome = error

    def _copy(self, saved: Saved) -> Saved:
        """Puts it into the durable store too. That this fails makes the save no less good."""
        begin, root = time.perf_counter(), place_of(self.config.durable)
        target, failure = None, ""
        try:
            target = copy(self.behind, saved.path, root, self.check)
            prune(root, self.config, self.behind)
        except Superseded:
            raise
        except CheckpointError as error:
            failure = str(error)
        return replace(saved, durable=target, durable_seconds=time.perf_counter() - begin, durable_failure=failure)
