"""Signs of life: what each rank is doing, in a small file of its own that the launcher's watchdog reads.

A thread renews it once a second, so a process that does not run at all differs from one that waits. When a phase lasts, the
thread also notes the collective that the rank waits in, from torch's flight recorder.

Times are those of the machine's monotonic clock, which all its processes share: a step of its wall clock stalls nobody.
"""

import faulthandler
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import torch

DIRECTORY = "MEGASORA_HEARTBEATS"  # environment: where the launcher looks; without it there are no heartbeats
RECORDER = "TORCH_FR_BUFFER_SIZE"  # environment: how many collectives torch remembers; 0, the default: none
INTERVAL = 1.0  # seconds
LASTING = 3.0  # seconds in a phase, before the flight recorder is asked
PATIENCE = {"start": 4, "save": 4, "evaluate": 4, "show": 10}  # phases that may last so many times as long as others


@dataclass(frozen=True)
class Beat:
    """One rank, as its launcher sees it. `idle`: seconds in this phase; `silent`: seconds since the last sign of life."""

    rank: int
    pid: int
    host: str
    step: int
    phase: str
    bucket: str
    collective: str  # that it waits in; empty: none, or not known
    number: int  # of that collective in its group
    stopped: bool  # by SIGSTOP or a debugger
    idle: float
    silent: float

    def is_stalled(self, seconds: float) -> bool:
        return self.silent > seconds or self.idle > seconds * PATIENCE.get(self.phase, 1)


class Heartbeat:
    """Written by one rank. `enter` at every change of phase; costs some microseconds, no collective, no disk."""

    def __init__(self, rank: int) -> None:
        directory = os.environ.get(DIRECTORY)
        self.file = Path(directory) / f"{rank}.json" if directory else None
        self.state = {
            "rank": rank,
            "pid": os.getpid(),
            "step": 0,
            "phase": "start",
            "bucket": "",
            "since": time.monotonic(),
        }
        self.closed = threading.Event()
        self.stacks: TextIO | None = None
        if self.file:
            self._write()
            threading.Thread(target=self._renew, daemon=True).start()

    def enter(self, step: int, phase: str, bucket: str = "") -> None:
        self.state |= {"step": step, "phase": phase, "bucket": bucket, "since": time.monotonic()}

    def keep_stacks(self, file: Path) -> None:
        """From now on SIGUSR2 appends the stacks of all threads to a file, even while one of them holds the interpreter."""
        if self.file:
            self.stacks = file.open("a")
            faulthandler.register(signal.SIGUSR2, self.stacks, all_threads=True)

    def close(self) -> None:
        self.closed.set()
        if self.stacks:
            faulthandler.unregister(signal.SIGUSR2)
            self.stacks.close()
            if not Path(self.stacks.name).stat().st_size:
                Path(self.stacks.name).unlink()

    def _renew(self) -> None:
        while not self.closed.wait(INTERVAL):
            self._write()

    def _write(self) -> None:
        assert self.file is not None
        now = time.monotonic()
        state = dict(self.state)
        collective, number = waiting_in() if now - float(str(state["since"])) > LASTING else ("", 0)
        temporary = self.file.with_suffix(".new")
        with suppress(OSError):  # a full memory file system is no reason to end, nor never to try again
            temporary.write_text(json.dumps(state | {"alive": now, "collective": collective, "number": number}))
            temporary.rename(self.file)


@contextmanager
def heartbeat(rank: int) -> Iterator[Heartbeat]:
    """Within, this rank shows signs of life."""
    beat = Heartbeat(rank)
    try:
        yield beat
    finally:
        beat.close()


def waiting_in() -> tuple[str, int]:
    """The first collective that this process has begun and not ended, such as "all_reduce of 7 in default_pg", and its number."""
    recorder = "_dump_nccl_trace_json" if torch.cuda.is_available() else "_dump_fr_trace_json"
    dump = getattr(torch._C._distributed_c10d, recorder)
    entries = json.loads(dump(True, True)).get("entries", [])  # collectives, only those that have not ended
    waiting = [entry for entry in entries if not entry["retired"]]
    if not waiting:
        return "", 0
    first = min(waiting, key=lambda entry: entry["record_id"])
    sizes = " + ".join("x".join(map(str, size)) or "1" for size in first["input_sizes"])
    name = str(first["profiling_name"]).partition(":")[2] or str(first["profiling_name"])
    return f"{name} of {sizes} in {first['process_group'][1]}", int(first["collective_seq_id"])


def read_beats(directory: Path, host: str) -> list[Beat]:
    """Of the ranks of this machine, in order; none before the workers have written any."""
    beats = []
    now = time.monotonic()
    for file in directory.glob("*.json"):
        found = json.loads(file.read_text())
        beats.append(Beat(
            rank=found["rank"], pid=found["pid"], host=host, step=found["step"], phase=found["phase"],
            bucket=found["bucket"], collective=found["collective"], number=found["number"],
            stopped=_state(found["pid"]) in "Tt", idle=now - found["since"], silent=now - found["alive"],
        ))  # fmt: skip
    return sorted(beats, key=lambda beat: beat.rank)


def _state(pid: int) -> str:
    """A letter: proc(5), stat. X when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def verdict(beats: list[Beat]) -> tuple[Beat | None, str]:
    """Which rank holds up the others, and a line that says why; None if none stands out.

    A process that does not run; else one that waits in no collective while others do; else one that waits in an earlier
    collective than the others, or alone in another one.
    """
    for beat in sorted(beats, key=lambda beat: -beat.silent):
        if beat.stopped or beat.silent > 5 * INTERVAL:
            return beat, f"{_who(beat)} {'is stopped' if beat.stopped else 'gives no sign of life'} {_where(beat)}"
    alike = Counter(beat.collective for beat in beats)
    order = sorted(beats, key=lambda b: (b.step, b.collective != "", b.number, alike[b.collective], -b.idle))
    first, last = order[0], order[-1]
    behind = f"; {_who(last)} waits for it in {last.collective}" if last.collective else ""
    if not first.collective and (last.collective or len(beats) == 1 or first.step < last.step):
        return first, f"{_who(first)} hangs {_where(first)}{behind}"
    if (first.step, first.number, first.collective) != (last.step, last.number, last.collective):
        return first, f"{_who(first)} is at another collective than the others, {_where(first)}{behind}"
    return None, f"all ranks wait alike {_where(first)}: a link between them, or storage, may be at fault"


def _who(beat: Beat) -> str:
    return f"rank {beat.rank} (process {beat.pid} on {beat.host})"


def _where(beat: Beat) -> str:
    bucket = f", bucket {beat.bucket}" if beat.bucket else ""
    collective = f" in {beat.collective}, number {beat.number}" if beat.collective else ""
    return f"in phase {beat.phase} of step {beat.step}{bucket}{collective}, for {beat.idle:.0f} s"


def as_json(beats: list[Beat]) -> str:
    return json.dumps([asdict(beat) for beat in beats])
