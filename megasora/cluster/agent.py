"""torchrun's agent, which keeps how its workers ended and agrees with the other nodes on what that means.

torchrun's own stops the rest of the workers as soon as one has failed and then reports all codes alike. This one looks
first, waits a moment for the workers that fail of the same cause, and only then stops what still runs.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousClosedError

from data_pipelines.errors import DataError
from megasora.cluster.heartbeat import DIRECTORY, RECORDER, Beat, as_json, read_beats, verdict
from megasora.cluster.origin import node_name
from megasora.cluster.signals import catches
from megasora.errors import CheckpointError, ConfigError, StoppedEarly

STOPPED_EARLY = StoppedEarly.exit_code
VERDICTS = (ConfigError.exit_code, DataError.exit_code, CheckpointError.exit_code)
TOLD_BY_WORKER = (0, 1, *VERDICTS, STOPPED_EARLY)  # with these codes a worker has printed a message of its own

PREFIX = "megasora-"  # of the directories of heartbeats

# Seconds that are granted:
SETTLE = 2.0  # to all workers after a failure: those that fail of the same cause may end later than the first
TERMINATE = 10  # from SIGTERM to SIGKILL, for workers whose peers are gone
SAVE = 300.0  # to the other workers when one has stopped early: they may still be writing the checkpoint
AGREE = SETTLE + TERMINATE + 8.0  # to the other nodes to report after a failure
STACKS = 1.0  # to all workers to write their stacks, before a stalled run is killed
LEAVE = 5.0  # to the other nodes to leave the rendezvous before the one that serves it


@dataclass(frozen=True)
class Ending:
    """How one worker ended. `code`: exit code, or minus the signal that killed it; `time`: seconds since the epoch."""

    rank: int
    pid: int
    code: int
    time: float

    @property
    def exit_code(self) -> int:
        return self.code if self.code >= 0 else 128 - self.code


def root_cause(endings: Iterable[Ending]) -> Ending | None:
    """The ending whose code stands for all of them; None if every worker ended with 0.

    First a verdict (2 config, 3 data, 4 checkpoint), then a death by signal, then any other code, then 75: a worker
    whose peer is gone fails with 1 or aborts, and a run has stopped early only if nobody failed. Among equals the first
    in time.
    """
    failed = [ending for ending in endings if ending.code != 0]
    return min(failed, key=lambda ending: (_precedence(ending.code), ending.time, ending.rank), default=None)


def _precedence(code: int) -> int:
    if code in VERDICTS:
        return 0
    if code < 0:
        return 1
    return 3 if code == STOPPED_EARLY else 2


@dataclass
class Crew:
    """What the agent's thread and the launcher's main thread share."""

    pids: dict[int, int] = field(default_factory=dict)  # of the running workers, by global rank
    started: bool = False
    stopping: bool = False  # a signal has come: no restart any more


class Agent(LocalElasticAgent):
    """Runs this node's workers. `run_to_code` returns the code to exit with, which is the same on every node."""

    def __init__(self, spec: WorkerSpec, crew: Crew, nnodes: int, log_dir: Path | None, stall: int) -> None:
        self.output = _InheritedOutput()
        super().__init__(spec, self.output, shutdown_timeout=TERMINATE)
        self.crew = crew
        self.nnodes = nnodes
        self.log_dir = log_dir
        self.stall = stall  # seconds without progress; 0: any
        self.root: Ending | None = None
        os.environ.setdefault(RECORDER, "2000")

    def run_to_code(self) -> int:
        result = self.run()
        if result is None:
            raise RendezvousClosedError("the other nodes went on without this one")
        if not result.is_failed():
            return 0
        return self.root.exit_code if self.root else 1

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        # torch 2.13 keeps one store for all restarts, where new workers would find the addresses of dead ones.
        handler: Any = worker_group.spec.rdzv_handler
        handler._shared_tcp_store_server = handler._bootstrap_store_info = None
        super()._rendezvous(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.endings: list[Ending] = []
        self.failed_at: float | None = None  # monotonic: when a failure, here or elsewhere, was first seen
        self.stopped_at: float | None = None  # and when a worker here had stopped early
        self.reported_at: float | None = None  # and when this node had told the others how its workers ended
        self.stalled = False  # here or on another node
        self.beats: list[Beat] = []
        self.board = _Board(worker_group.store, worker_group.group_rank or 0, self.nnodes)
        sweep_heartbeats()
        self.heartbeats = tempfile.TemporaryDirectory(prefix=PREFIX, dir=memory_directory())
        os.environ[DIRECTORY] = self.output.errors = self.heartbeats.name
        pids = super()._start_workers(worker_group)
        self.crew.pids = {worker.global_rank: pids[worker.local_rank] for worker in worker_group.workers}
        self.crew.started = True
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """HEALTHY while anything is awaited. What ends after this method has stopped the workers does not count."""
        healthy = RunResult(state=WorkerState.HEALTHY)
        if self.reported_at is None:
            self._look_for_endings()
            self._look_for_failures()
            self._look_for_stall()
            if self.crew.pids and time.monotonic() < self._deadline_of_workers():
                return healthy
            self._stop_the_rest()
            self.board.report(root_cause(self.endings))
            self.reported_at = time.monotonic()
        reports = self.board.reports()
        root = root_cause([*self.endings, *(report for report in reports.values() if report)])
        complete = len(reports) == self.nnodes - 1
        if not complete and time.monotonic() < self._deadline_of_nodes(root):
            return healthy
        if root is None and self.failed_at is None:
            return super()._monitor_workers(worker_group)  # every worker of every node has ended with 0
        self._settle_on(root)
        return RunResult(state=WorkerState.FAILED)

    def _look_for_endings(self) -> None:
        """Moves workers that have ended from crew to endings; they stay zombies, for torchrun's agent to reap."""
        running = dict(self.crew.pids)
        for rank, pid in self.crew.pids.items():
            status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if status is not None:
                code = status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
                self.endings.append(Ending(rank, pid, code, time.time()))
                del running[rank]
        self.crew.pids = running

    def _look_for_failures(self) -> None:
        """Takes the times from which the patience with the others is counted, and tells the other nodes."""
        now = time.monotonic()
        codes = {ending.code for ending in self.endings}
        if self.failed_at is None and codes - {0, STOPPED_EARLY}:
            self.failed_at = now
            self.board.tell_failure()
        if self.failed_at is None and self.board.failure_told():
            self.failed_at = now
        if self.stopped_at is None and STOPPED_EARLY in codes:
            self.stopped_at = now

    def _look_for_stall(self) -> None:
        """If a rank here or on another node has made no progress for too long: kills the workers, after a look at them."""
        if not self.stall or self.failed_at is not None:
            return
        self.beats = read_beats(Path(self.heartbeats.name), node_name())
        if not (any(beat.is_stalled(self.stall) for beat in self.beats) or self.board.stall_told()):
            return
        self.stalled = True
        self.failed_at = time.monotonic() - SETTLE  # no patience with the workers
        self.board.tell_stall(self.beats)
        for pid in self.crew.pids.values():
            if catches(pid, signal.SIGUSR2):
                os.kill(pid, signal.SIGUSR2)
        time.sleep(STACKS)
        for (
            pid
        ) in self.crew.pids.values():  # not SIGTERM: nothing is to be saved in this state, and a stopped process waits
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.endings = []

    def _deadline_of_workers(self) -> float:
        """Until when (monotonic) the workers still running may run on."""
        if self.failed_at is not None:
            return self.failed_at + SETTLE
        return self.stopped_at + SAVE if self.stopped_at is not None else float("inf")

    def _deadline_of_nodes(self, root: Ending | None) -> float:
        """Until when (monotonic) the other nodes' reports are awaited."""
        assert self.reported_at is not None
        if self.failed_at is not None or (root is not None and root.code != STOPPED_EARLY):
            return self.reported_at + AGREE
        return self.reported_at + SAVE if root is not None else float("inf")

    def _stop_the_rest(self) -> None:
        """The running workers by SIGTERM, then SIGKILL; by SIGKILL what the ended ones have left in their groups."""
        self.crew.pids = {}
        for ending in self.endings:
            with suppress(ProcessLookupError):
                os.killpg(ending.pid, signal.SIGKILL)
        self._shutdown(timeout=TERMINATE)

    def _settle_on(self, root: Ending | None) -> None:
        self.root = root
        if self.stalled:
            self._report_stall()
        if self.crew.stopping or (root is not None and root.code in (*VERDICTS, STOPPED_EARLY)):
            self._remaining_restarts = 0  # a restart would mend nothing
        if root is not None and root in self.endings and (root.code not in TOLD_BY_WORKER or self._error_of(root)):
            sys.stderr.write(f"megasora: {self._obituary(root)}\n")  # in one piece: the workers write there too

    def _report_stall(self) -> None:
        """Names the rank that held up the others, on one of the nodes, and keeps what all ranks were doing."""
        others = self.board.stalls()
        if any(node < self.board.node for node in others):
            return
        beats = sorted(
            [*self.beats, *(beat for found in others.values() for beat in found)], key=lambda beat: beat.rank
        )
        missing = self.nnodes - 1 - len(others)
        kept = f"; {missing} nodes said nothing" if missing else ""
        if self.log_dir:
            file = self.log_dir / f"stall-{time.strftime('%Y%m%d-%H%M%S')}.json"
            file.write_text(as_json(beats))
            kept += f"; all ranks are in {file}, the stacks of each in rank-NNNNN.stacks beside it"
        sys.stderr.write(f"megasora: no progress for {self.stall} s: {verdict(beats)[1]}{kept}\n")

    def _obituary(self, ending: Ending) -> str:
        end = f"ended with exit code {ending.code}"
        if ending.code < 0:
            end = f"was killed by signal {-ending.code} ({signal.Signals(-ending.code).name})"
        if error := self._error_of(ending):
            end += f", {error}"
        log = self.log_dir / f"rank-{ending.rank:05d}.log" if self.log_dir else None
        where = f"; its log is {log}" if log and log.exists() else ""
        return f"rank {ending.rank} (process {ending.pid} on {node_name()}) {end}{where}"

    def _error_of(self, ending: Ending) -> str:
        """What the worker has left in its error file; empty if it has left none."""
        file = Path(self.heartbeats.name) / f"{ending.rank}.error"
        return str(json.loads(file.read_text())["message"]["message"]) if file.exists() else ""


class _InheritedOutput(LogsSpecs):
    """Every worker writes straight to the launcher's stdout and stderr, and the error it dies of to a file of its own."""

    errors = os.devnull  # directory

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        console = dict.fromkeys(envs, "")
        files = {local_rank: f"{self.errors}/{env['RANK']}.error" for local_rank, env in envs.items()}
        for local_rank, env in envs.items():
            env["TORCHELASTIC_ERROR_FILE"] = files[local_rank]
        return LogsDest(stdouts=console, stderrs=console, error_files=files)

    @property
    def root_log_dir(self) -> str:
        return os.devnull


def memory_directory() -> str:
    """Where heartbeats lie, in a directory of a random name that is for this user alone."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()  # nosec B108


def sweep_heartbeats(seconds: float = 86400.0) -> None:
    """Removes those of this user's launchers that were killed: nobody has written there for so long, nor was suspended."""
    for old in Path(memory_directory()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            if old.stat().st_uid == os.getuid() and time.time() - old.stat().st_mtime > seconds:
                shutil.rmtree(old)


@dataclass(frozen=True)
class _Board:
    """What the nodes tell each other about one start of the workers, in the rendezvous store, which is new each time.

    A store that no longer answers means that its node is gone: then each node knows only of itself.
    """

    store: Any
    node: int
    nnodes: int

    def tell_failure(self) -> None:
        self._write("failed", "")

    def failure_told(self) -> bool:
        return self._is_written("failed")

    def tell_stall(self, beats: list[Beat]) -> None:
        self._write(f"stall/{self.node}", as_json(beats))
        self._write("stalled", "")

    def stall_told(self) -> bool:
        return self._is_written("stalled")

    def stalls(self) -> dict[int, list[Beat]]:
        """What the ranks of the other nodes were doing."""
        told = [node for node in self._others() if self._is_written(f"stall/{node}")]
        return {node: [Beat(**beat) for beat in json.loads(self.store.get(f"megasora/stall/{node}"))] for node in told}

    def report(self, root: Ending | None) -> None:
        self._write(f"ended/{self.node}", json.dumps(asdict(root) if root else None))

    def reports(self) -> dict[int, Ending | None]:
        """The root causes of the other nodes that have reported."""
        found: dict[int, Ending | None] = {}
        for node in self._others():
            if self._is_written(f"ended/{node}"):
                report = json.loads(self.store.get(f"megasora/ended/{node}"))
                found[node] = Ending(**report) if report else None
        return found

    def leave(self) -> None:
        """The last word of a node: it will not use the store any more."""
        self._write(f"left/{self.node}", "")

    def wait_until_left(self) -> None:
        """Waits for the other nodes to leave; for the node that serves the store, which ends with its process."""
        deadline = time.monotonic() + LEAVE
        while time.monotonic() < deadline and not all(self._is_written(f"left/{node}") for node in self._others()):
            time.sleep(0.05)

    def _others(self) -> list[int]:
        return [node for node in range(self.nnodes) if node != self.node]

    def _write(self, key: str, value: str) -> None:
        if self.nnodes > 1:
            with suppress(RuntimeError):
                self.store.set(f"megasora/{key}", value)

    def _is_written(self, key: str) -> bool:
        with suppress(RuntimeError):
            return self.nnodes > 1 and bool(self.store.check([f"megasora/{key}"]))
        return False
