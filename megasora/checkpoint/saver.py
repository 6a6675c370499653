"""Saves while training goes on: the step waits for a copy in the host's memory, a thread of each rank does the rest.

That thread also copies some checkpoints to the durable store. When the next save is due before such a copy has ended, the copy
goes on beside it: a store that is slow, or hangs, delays no save.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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


@dataclass(eq=False)
class _Flight:
    """One save on its way. `near` is set when the checkpoint is complete: what may follow is its copy."""

    step: int
    ranks: Ranks  # by which the threads talk
    near: Saved | None = None
    outcome: Saved | BaseException | None = None
    lost: bool = False  # the threads of the ranks may be at different collectives
    thread: threading.Thread = field(default_factory=threading.Thread)


class Saver:
    """At most one save is in flight, and at most one copy to the durable store. All ranks call `start`, `finish` and `copied`
    alike.

    The threads of the ranks talk over a gloo group of their own, so that they never meet the collectives of training. `check`
    raises Superseded, on rank 0, when another job has taken over.
    """

    def __init__(
        self, root: Path, config: CheckpointConfig, check: Callable[[], None] | None, device: torch.device
    ) -> None:
        self.root, self.config, self.device = root, config, device
        self.check = check or (lambda: None)
        self.ranks = Ranks()
        self._groups = [self._group()]  # that no thread uses
        self._flight: _Flight | None = None
        self._copying: _Flight | None = None  # whose checkpoint is complete and whose copy still goes on
        self._copies: dict[MetadataIndex, torch.Tensor] = {}
        self._cost = self._durable_cost = 0.0  # seconds that the last save and the last copy took
        self._last = time.monotonic()
        self._durable_last, self._durable_step, self._copying_since = -math.inf, 0, 0.0

    @property
    def step(self) -> int | None:
        """Of the save in flight."""
        return self._flight.step if self._flight else None

    @property
    def done(self) -> bool:
        """Whether this rank's part of a save waits to be finished."""
        return self._flight is not None and not self._flight.thread.is_alive()

    def due(self, step: int) -> bool:
        """Whether to save after `step`. Where the interval follows from time, rank 0's clock counts."""
        if self.config.every:
            return step % self.config.every == 0
        return self.ranks.gather(time.monotonic() - self._last >= self.interval(self._cost))[0]

    def interval(self, cost: float) -> float:
        """Seconds between two saves that cost so many, by which least time is lost (Young 1974, equation 1)."""
        return math.sqrt(2 * self.config.failure_hours * 3600 * cost)

    def start(
        self, step: int, tensors: Mapping[str, torch.Tensor], facts: dict[str, Any], *, durable: bool | None = None
    ) -> None:
        """Begins to save `tensors` as they are now; they may change when it returns. CheckpointError on all ranks. `durable`:
        whether to copy it to the durable store, if there is one; by default when that is due."""
        assert self._flight is None, f"the save of step {self.step} is not finished"
        begin = time.perf_counter()
        shares = plan_shares(self.ranks, f"saving step {step} in {self.root}", tensors)
        wanted = self.ranks.gather(self._durable_due(step) if durable is None else durable)[0]
        if self.config.background:
            shares = replace(shares, pieces=self._copied(shares))
        flight = _Flight(step, self._groups.pop() if self._groups else self._group())
        self._flight, self._last = flight, time.monotonic()
        blocked = time.perf_counter() - begin
        # A daemon: a thread that hangs in a dead storage must not keep the process.
        flight.thread = threading.Thread(
            target=self._run, args=(flight, shares, facts, wanted and bool(self.config.durable), self._copying, begin, blocked),
            name="checkpoint", daemon=True,
        )  # fmt: skip
        flight.thread.start()

    def finish(self, *, copy: bool = True, patience: float = math.inf) -> Saved | None:
        """Waits for the save in flight, and for its copy unless that may go on beside training; None if it still hangs after
        `checkpoint.timeout` or `patience`, seconds by rank 0's clock. CheckpointError if it failed."""
        flight = self._flight
        assert flight is not None
        begin, deadline = time.perf_counter(), time.monotonic() + min(self.config.timeout, patience)

        def settled() -> bool:
            flight.thread.join(max(0.0, min(LOOK, deadline - time.monotonic())))
            return not flight.thread.is_alive() or (not copy and flight.near is not None)

        while not all(self.ranks.gather(settled())):
            if self.ranks.gather(time.monotonic() > deadline)[0]:
                break
        if any(self.ranks.gather(flight.thread.is_alive())):
            if not all(self.ranks.gather(flight.near is not None)):
                self._last = time.monotonic()  # the next one has to wait its time, too
                return None
            saved, self._flight, self._copying = flight.near, None, flight
            self._copying_since = time.monotonic()
            assert saved is not None
        else:
            saved = self._landed(flight)
        waited = time.perf_counter() - begin
        self._cost, self._last = saved.seconds, time.monotonic()
        return replace(saved, blocked=saved.blocked + waited)

    def copied(self) -> Saved | None:
        """The checkpoint whose copy went on beside training, if that has ended since."""
        flight = self._copying
        if flight is None or any(self.ranks.gather(flight.thread.is_alive())):
            return None
        return self._landed(flight)

    def close(self, patience: float = math.inf) -> None:
        """Gives a save in flight the time to end: this rank's part of it, without a word to the others. Not a copy."""
        if self._flight is not None:
            deadline = time.monotonic() + min(self.config.timeout, patience)
            while self._flight.near is None and self._flight.thread.is_alive() and time.monotonic() < deadline:
                self._flight.thread.join(0.1)

    def _landed(self, flight: _Flight) -> Saved:
        """What became of a save whose threads have all ended. CheckpointError on all ranks if it failed on one."""
        if flight is self._flight:
            self._flight = None
        else:
            self._copying = None
        outcome = flight.outcome

        def result() -> Saved:
            if isinstance(outcome, BaseException):
                raise outcome
            assert outcome is not None
            return outcome

        if not any(self.ranks.gather(flight.lost or not isinstance(outcome, Saved | CheckpointError))):
            self._groups.append(flight.ranks)
        saved = self.ranks.every(f"saving step {flight.step} in {self.root}", result)
        if saved.durable is not None:
            self._durable_cost, self._durable_last = saved.durable_seconds, time.monotonic()
            self._durable_step = saved.step
        return saved

    def _group(self) -> Ranks:
        if not self.ranks.joined:
            return self.ranks
        return Ranks(dist.new_group(backend="gloo", timeout=timedelta(seconds=self.config.timeout)))

    def _durable_due(self, step: int) -> bool:
        """While another copy goes on none is due, until that one is so late that its failure has to be told."""
        if self._copying is not None:
            return time.monotonic() - self._copying_since >= self.config.timeout
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
        self, flight: _Flight, shares: Shares, facts: dict[str, Any], durable: bool, copying: _Flight | None, begin: float,
        blocked: float,
    ) -> None:  # fmt: skip
        try:
            path = write(flight.ranks, self.root, flight.step, shares, facts, self.check)
            saved = Saved(flight.step, path, blocked, time.perf_counter() - begin)
            prune(self.root, self.config, flight.ranks, spare=copying.near.path if copying and copying.near else None)
            flight.near = saved
            if durable and copying:
                saved = replace(saved, durable_failure=f"the copy of step {copying.step} still goes on")
            flight.outcome = self._copy(flight, saved) if durable and not copying else saved
        except BaseException as error:
            flight.outcome = error

    def _copy(self, flight: _Flight, saved: Saved) -> Saved:
        """Puts it into the durable store too. That this fails makes the save no less good."""
        begin, root = time.perf_counter(), place_of(self.config.durable)
        target, failure = None, ""
        try:
            target = copy(flight.ranks, saved.path, root, self.check)
            prune(root, self.config, flight.ranks)
        except Superseded:
            raise
        except Exception as error:
            failure, flight.lost = str(error), not isinstance(error, CheckpointError)
        return replace(saved, durable=target, durable_seconds=time.perf_counter() - begin, durable_failure=failure)
