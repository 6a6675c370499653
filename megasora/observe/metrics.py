"""What a run writes down: metrics.jsonl, events.jsonl, the points of curves and the console line. Only the main process does."""

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megasora.observe.boards import Board
from megasora.observe.logs import log

METRICS, EVENTS, QUARANTINE = "metrics.jsonl", "events.jsonl", "quarantine.jsonl"


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One line of metrics.jsonl. Seconds, bytes, tokens; `bucket` counts samples; `order` is a digest of the samples' keys."""

    attempt: int
    time: float
    step: int
    stage: str
    loss: float
    grad_norm: float
    lr: float
    samples: int
    tokens: int
    bucket: dict[str, int]
    order: str
    bad_samples: int  # of this attempt so far
    step_time_s: float
    data_wait_s: float
    parts: dict[str, float]  # seconds of the step's microbatch, forward_backward, clip, update
    tokens_per_s: float
    tflops_per_device: float
    mfu: float
    imbalance: float
    padding: float  # share of the packed rows
    peak_memory_bytes: int
    world: int
    layout: str


CURVES = {
    "loss/train": "loss",
    "optim/lr": "lr",
    "optim/grad_norm": "grad_norm",
    "perf/step_time_s": "step_time_s",
    "perf/data_wait_s": "data_wait_s",
    "perf/tokens_per_s": "tokens_per_s",
    "perf/tflops_per_device": "tflops_per_device",
    "perf/mfu": "mfu",
    "memory/peak_bytes": "peak_memory_bytes",
    "data/imbalance": "imbalance",
    "data/padding": "padding",
    "data/bad_samples": "bad_samples",
}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file; a last line that a killed process tore is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                try:
                    yield json.loads(line)
                except ValueError:
                    continue  # the torn end of an earlier attempt, closed by the next one


def read_steps(run: Path) -> Iterator[tuple[dict[str, Any], bool]]:
    """Every line of metrics.jsonl, and whether its step counts: not where a later attempt went on from a step before it."""
    starts = {line["attempt"]: line["step"] for line in read_lines(run / EVENTS) if line["event"] == "start"}
    ends = {own: min((at for later, at in starts.items() if later > own), default=math.inf) for own in starts}
    for line in read_lines(run / METRICS):
        yield line, line["step"] <= ends.get(line["attempt"], math.inf)


def history(run: Path, only: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The steps of a run that count, in order; of each `only` some fields, where a long run is not to fill the memory."""
    steps = {
        line["step"]: {field: line[field] for field in only} if only else line
        for line, counts in read_steps(run)
        if counts
    }
    return [steps[step] for step in sorted(steps)]


class Journal:
    """Appends to the run directory. `events` are starts, saves, faults, bad samples, segments."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.attempt = 1 + max((line["attempt"] for line in read_lines(run / EVENTS)), default=-1)
        self.metrics, self.events = Lines(run / METRICS), Lines(run / EVENTS)
        self.boards: list[Board] = []
        self.buckets: Counter[str] = Counter()  # samples of each since the last point

    def open_board(self, board: Callable[[], Board]) -> None:
        """From now on points go there too; a board that cannot be opened is done without."""
        try:
            self.boards.append(board())
        except Exception as error:
            log.warning("training goes on without a board: %s: %s", type(error).__name__, error)

    def event(self, kind: str, **facts: Any) -> None:
        self.events.write({"attempt": self.attempt, "time": time.time(), "event": kind, **facts})

    def quarantine(self, shard: str, key: str, reason: str) -> None:
        """A sample that cannot be read, for whoever mends or removes it."""
        lines = Lines(self.run / QUARANTINE)
        lines.write({"shard": shard, "key": key, "reason": reason})
        lines.close()

    def step(self, metrics: StepMetrics) -> None:
        self.metrics.write(asdict(metrics))
        self.buckets.update(metrics.bucket)

    def scalars(self, metrics: StepMetrics, losses: dict[str, float], sizes: dict[str, float]) -> None:
        """One point of every curve, those of a tally's losses and of the engine's sizes among them."""
        values = asdict(metrics)
        points = {tag: values[key] for tag, key in CURVES.items()}
        points[f"loss/stage_{metrics.stage}"] = metrics.loss
        points |= {f"data/bucket_{bucket}": float(samples) for bucket, samples in self.buckets.items()}
        self.buckets = Counter(dict.fromkeys(self.buckets, 0))
        points |= {f"loss/{name}": loss for name, loss in losses.items()}
        points |= {f"optim/{name}": size for name, size in sizes.items()}
        self._show(lambda board: board.scalars(points, metrics.step))

    def evaluation(self, values: dict[str, float], step: int) -> None:
        """Points of the curves under eval/."""
        points = {f"eval/{name}": value for name, value in values.items()}
        self._show(lambda board: board.scalars(points, step))

    def sample(self, name: str, frames: Any, fps: float, caption: str, step: int) -> None:
        """A video that the model made, uint8 [T, H, W, 3]."""
        self._show(lambda board: board.sample(name, frames, fps, caption, step))

    def close(self) -> None:
        self.metrics.close()
        self.events.close()
        self._show(lambda board: board.close())

    def _show(self, what: Callable[[Board], None]) -> None:
        """A board that fails (TensorBoard does not outlive a full disk) is given up, until the next start."""
        for board in list(self.boards):
            try:
                what(board)
            except Exception as error:
                log.warning("no more %s in this run: %s: %s", type(board).__name__, type(error).__name__, error)
                self.boards.remove(board)


class Lines:
    """Appends to a .jsonl file, on a line of its own even after a torn write.

    Where nothing can be written (a full disk), lines wait and are written with the next one, so training goes on.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.waiting = path, b""
        with path.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
        self.file = path.open("ab", buffering=0)

    def write(self, line: dict[str, Any]) -> None:
        # One write a line, so that a kill tears at most the last one. JSON has no NaN.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self.waiting += json.dumps(clean, allow_nan=False).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            log.warning("%s cannot be written now: %s", self.path, error.strerror)

    def close(self) -> None:
        self.flush()
        self.file.close()


def console_line(metrics: StepMetrics, last: int, seconds_left: float) -> str:
    """step 120/400 video loss 0.4312 grad 0.83 lr 1.0e-04 | 812 tok/s 0.12 TFLOP/s MFU 61 % | data 2 ms mem 1.2 GiB ETA 3:10"""
    minutes, seconds = divmod(int(seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    eta = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
    return (
        f"step {metrics.step}/{last} {metrics.stage} loss {metrics.loss:.4f} grad {metrics.grad_norm:.3f} "
        f"lr {metrics.lr:.1e} | {metrics.tokens_per_s:,.0f} tok/s {metrics.tflops_per_device:.3f} TFLOP/s "
        f"MFU {100 * metrics.mfu:.0f} % | data {1000 * metrics.data_wait_s:.0f} ms "
        f"mem {metrics.peak_memory_bytes / 2**30:.2f} GiB ETA {eta}"
    )
