"""What a run writes down: metrics.jsonl, events.jsonl, TensorBoard and the console line. Only the main process has one."""

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipelines.video_write import encode_gif
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


TENSORBOARD = {
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


def history(run: Path) -> list[dict[str, Any]]:
    """The steps of a run in order; of one step the highest attempt counts."""
    steps: dict[int, dict[str, Any]] = {}
    for line in read_lines(run / METRICS):
        if line["step"] not in steps or line["attempt"] >= steps[line["step"]]["attempt"]:
            steps[line["step"]] = line
    return [steps[step] for step in sorted(steps)]


class Journal:
    """Appends to the run directory. `events` are starts, saves, faults, bad samples, segments."""

    def __init__(self, run: Path, tensorboard: bool) -> None:
        self.run = run
        self.attempt = 1 + max((line["attempt"] for line in read_lines(run / EVENTS)), default=-1)
        self.metrics, self.events = Lines(run / METRICS), Lines(run / EVENTS)
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(run / "tb", flush_secs=10)

    def event(self, kind: str, **facts: Any) -> None:
        self.events.write({"attempt": self.attempt, "time": time.time(), "event": kind, **facts})

    def quarantine(self, shard: str, key: str, reason: str) -> None:
        """A sample that cannot be read, for whoever mends or removes it."""
        lines = Lines(self.run / QUARANTINE)
        lines.write({"shard": shard, "key": key, "reason": reason})
        lines.close()

    def step(self, metrics: StepMetrics) -> None:
        self.metrics.write(asdict(metrics))

    def scalars(self, metrics: StepMetrics) -> None:
        """One point of every TensorBoard curve."""
        with self._surviving():
            if self.board:
                values = asdict(metrics)
                for tag, key in TENSORBOARD.items():
                    self.board.add_scalar(tag, values[key], metrics.step)
                self.board.add_scalar(f"loss/stage_{metrics.stage}", metrics.loss, metrics.step)
                for bucket, samples in metrics.bucket.items():
                    self.board.add_scalar(f"data/bucket_{bucket}", samples, metrics.step)

    def evaluation(self, values: dict[str, float], step: int) -> None:
        """Points of the curves under eval/."""
        with self._surviving():
            if self.board:
                for name, value in values.items():
                    self.board.add_scalar(f"eval/{name}", value, step)

    def video(self, tag: str, frames: Any, fps: float, step: int) -> None:
        """A sample, uint8 [T, H, W, 3], as an animated image."""
        with self._surviving():
            if self.board:
                from tensorboard.compat.proto.summary_pb2 import Summary

                _, H, W, _ = frames.shape
                image = Summary.Image(height=H, width=W, colorspace=3, encoded_image_string=encode_gif(frames, fps))
                self.board._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def text(self, tag: str, text: str, step: int) -> None:
        with self._surviving():
            if self.board:
                self.board.add_text(tag, text, step)

    def close(self) -> None:
        self.metrics.close()
        self.events.close()
        with self._surviving():
            if self.board:
                self.board.close()

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """TensorBoard's writer does not outlive a full disk: it is given up, until the next start. metrics.jsonl has it all."""
        try:
            yield
        except OSError as error:
            log.warning("no more TensorBoard in this run: %s", error)
            self.board = None


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
