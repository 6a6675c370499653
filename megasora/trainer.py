"""The training run: build order, then the loop. Everything that happens in a step happens here, in this order, in sight."""

import itertools
import math
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
import yaml

from data_pipelines.errors import DataError
from data_pipelines.loader import Replacement, StepBatch
from data_pipelines.shards import ShardSet
from megasora.build import build_engine, build_loader, build_recipe, check_fit, open_run_directory
from megasora.checkpoint.save import prune, save
from megasora.cluster.signals import StopRequest, stop_on_signal
from megasora.config import to_dict
from megasora.encoders import open_facts
from megasora.engines.optim import learning_rate
from megasora.errors import StoppedEarly
from megasora.evaluation import evaluation_loss, evaluation_videos, score_videos
from megasora.microbatch import Recipe, build_microbatch, training_loss
from megasora.observe.hardware import device_peak, peak_memory, synchronize
from megasora.observe.logs import log
from megasora.observe.metrics import EVENTS, Journal, StepMetrics, console_line
from megasora.parallel.mesh import Processes, processes
from megasora.rendering import write_sheet, write_video
from megasora.resume import find_start, load_start
from megasora.schema import Config, Stage

MAX_SKIPPED = 20  # steps in a row, before a run that learns nothing is ended


def train(config: Config) -> None:
    """Trains as `config` says, in this process and its peers. Raises StoppedEarly when a signal ended it with a checkpoint."""
    with processes(config.parallel.layout) as group, stop_on_signal() as stop:
        trainer = Trainer(config, group, stop)
        try:
            trainer.run()
        finally:
            trainer.close()


class Trainer:
    """One run on one process. `step` counts the updates done, over all stages; a stage is a segment of the data's order."""

    def __init__(self, config: Config, group: Processes, stop: StopRequest) -> None:
        self.config, self.group, self.stop = config, group, stop
        self.shards = ShardSet.open(Path(config.data.path))
        self.latents = open_facts(Path(config.data.path))
        check_fit(config, group, self.latents)
        start = find_start(config, self.shards.fingerprint)
        self.run_dir = open_run_directory(config, group)
        self.engine = build_engine(config, group)
        load_start(start, config, self.engine)
        self.step, self.obey = start.step, start.obey
        self.last = stage_spans(config)[-1][3]
        self.journal = Journal(self.run_dir, config.observe.tensorboard) if group.is_main else None
        if group.is_main:  # only now: a config that may not resume here leaves the old one
            (self.run_dir / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
        self.peak_flops = device_peak(group.device, config.precision.precision)
        self.bad_samples = self.skipped = 0
        self.step_times: deque[float] = deque(maxlen=50)
        self.event("start", step=self.step, checkpoint=str(start.source), world=group.world, layout=str(group.layout),
                   fingerprint=self.shards.fingerprint, torch=torch.__version__)  # fmt: skip
        log.info("%s step %d | %s parameters | %s latents | %s on %s", "resuming after" if self.step else "starting at",
                 self.step, f"{sum(p.numel() for p in self.engine.model.parameters()):,}", f"{len(self.shards):,}",
                 group.layout, group.device)  # fmt: skip

    def run(self) -> None:
        for segment, stage, first, end in stage_spans(self.config):
            if self.step < end:
                self.run_stage(segment, stage, first, end)
        if self.step > self.last:
            log.info("nothing to do: %d steps are done, run.steps=%d", self.step, self.last)
        log.info("done: %d steps; everything lies in %s", self.step, self.run_dir)

    def run_stage(self, segment: int, stage: Stage, first: int, end: int) -> None:
        """The updates from `self.step` to `end` of the stage that began at `first`."""
        loader = build_loader(self.config, self.group, self.shards, self.latents, stage, segment, self.obey)
        recipe = build_recipe(self.config, self.group, self.latents, stage, segment)
        self.event("segment", segment=segment, stage=stage.name, step=self.step, samples=len(loader.items))
        log.info("stage %s: steps %d to %d, %d latents in %d buckets", stage.name, self.step + 1, end,
                 len(loader.items), len(loader.by_bucket))  # fmt: skip
        batches = loader.batches(self.step - first)
        while self.step < end:
            begin = time.perf_counter()
            batch, stopping = self.next_batch(batches, segment)
            data_wait = time.perf_counter() - begin

            lr = learning_rate(self.config.optim, stage.lr or self.config.optim.lr, self.step - first, stage.steps)
            loss, grad_norm = self.train_step(batch, recipe, lr)
            self.step += 1
            self.record(stage, batch, loss, grad_norm, lr, time.perf_counter() - begin, data_wait)

            if self.step % self.config.checkpoint.every == 0 or self.step == self.last or stopping:
                self.save(segment, self.step - first)
            if stopping and self.step < self.last:
                why = self.stop.signal or "a signal to another process"
                raise StoppedEarly(f"{why}: stopped after step {self.step}, saved; the same command goes on from there")
            if self.due(self.config.eval.loss_every):
                self.evaluate(stage)
            if self.due(self.config.eval.every):
                self.show()

    def train_step(self, batch: StepBatch, recipe: Recipe, lr: float) -> tuple[float, float]:
        """One update; the loss of the global batch and the gradient norm before clipping."""
        rows = [build_microbatch(samples, recipe) for samples in batch.rows]
        loss = self.engine.forward_backward(rows, training_loss(recipe)).item()
        grad_norm = self.engine.clip().item()
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.engine.update(lr)
            self.skipped = 0
        else:  # never reaches the weights
            self.engine.discard()
            self.skipped += 1
            self.event("skipped", step=self.step + 1, loss=str(loss), grad_norm=str(grad_norm), samples=batch.keys)
            log.warning("step %d skipped: loss %s, gradient norm %s", self.step + 1, loss, grad_norm)
            if self.skipped == MAX_SKIPPED:
                raise DataError(
                    f"{self.config.data.path}: {MAX_SKIPPED} steps in a row without a finite loss; see {EVENTS}"
                )
        synchronize(self.group.device)
        return loss, grad_norm

    def next_batch(self, batches: Iterator[StepBatch], segment: int) -> tuple[StepBatch, bool]:
        """The next batch and whether to stop after it: both agreed by all ranks, replaced samples logged before use."""
        failure, batch = "", None
        try:
            batch = next(batches)
        except DataError as error:
            failure = str(error)
        replaced: list[Replacement] = batch.replacements if batch else []
        flags = torch.tensor([bool(self.stop), bool(failure), len(replaced)], device=self.group.device)
        dist.all_reduce(flags)
        stopping, failed, bad = flags.tolist()
        if failed or bad:
            everyone: list[Any] = [None] * self.group.world
            dist.all_gather_object(everyone, (failure, replaced))
            if failed:
                raise DataError(next(message for message, _ in everyone if message))
            for replacement in itertools.chain.from_iterable(found for _, found in everyone):
                self.event("bad_sample", segment=segment, **vars(replacement))
                log.warning("bad sample %(key)s (%(reason)s): %(by)s instead", vars(replacement))
        self.bad_samples += bad
        assert batch is not None
        return batch, bool(stopping)

    def record(
        self, stage: Stage, batch: StepBatch, loss: float, grad_norm: float, lr: float, seconds: float, wait: float
    ) -> None:
        """A line of metrics.jsonl; now and then TensorBoard and the console."""
        self.step_times.append(seconds)
        if self.journal is None:
            return
        flops_per_s = batch.cost / seconds / self.group.world
        row_tokens = len(batch.rows) * self.group.layout.dp * self.config.data.capacity
        metrics = StepMetrics(
            attempt=self.journal.attempt, time=time.time(), step=self.step, stage=stage.name, loss=loss,
            grad_norm=grad_norm, lr=lr, samples=self.config.data.global_batch, tokens=batch.tokens,
            bucket=batch.buckets, order=xxhash.xxh3_64_hexdigest("\n".join(batch.keys).encode()), bad_samples=self.bad_samples,
            step_time_s=seconds, data_wait_s=wait, tokens_per_s=batch.tokens / seconds,
            tflops_per_device=flops_per_s / 1e12, mfu=flops_per_s / self.peak_flops, imbalance=batch.imbalance,
            padding=1 - batch.tokens / row_tokens, peak_memory_bytes=peak_memory(self.group.device),
            world=self.group.world, layout=str(self.group.layout),
        )  # fmt: skip
        self.journal.step(metrics)
        if self.step % self.config.observe.every == 0 or self.step in (1, self.last):
            self.journal.scalars(metrics)
            seconds_left = (self.last - self.step) * sum(self.step_times) / len(self.step_times)
            log.info("%s", console_line(metrics, self.last, seconds_left))

    def save(self, segment: int, position: int) -> None:
        """A checkpoint of everything that the next step depends on. Randomness needs none: it follows from positions."""
        begin = time.perf_counter()
        facts = {
            "step": self.step, "segment": segment, "segment_step": position, "config": to_dict(self.config),
            "fingerprint": self.shards.fingerprint, "layout": str(self.group.layout), "world": self.group.world,
        }  # fmt: skip
        root = self.run_dir / "checkpoints"
        path = save(root, self.step, self.engine.tensors(), facts)
        prune(root, self.config.checkpoint)
        seconds = time.perf_counter() - begin
        self.event("save", step=self.step, path=str(path), seconds=round(seconds, 3))
        log.info("saved %s in %.1f s", path, seconds)

    def due(self, every: int) -> bool:
        """Whether something done every so many steps, and after the last, is due now."""
        return bool(every) and (self.step % every == 0 or self.step == self.last)

    def evaluate(self, stage: Stage) -> None:
        """The loss of fixed samples at fixed timesteps."""
        losses = evaluation_loss(self.config, self.group, self.engine, self.shards, self.latents, stage)
        self.event("eval", step=self.step, **losses)
        if self.journal:
            self.journal.evaluation(losses, self.step)
        log.info(
            "eval after step %d: %s", self.step, ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
        )

    def show(self) -> None:
        """Videos of the averaged weights for fixed prompts: all ranks compute, the main one writes."""
        videos = evaluation_videos(self.config, self.group, self.engine)
        if self.journal and videos:
            directory, fps = self.run_dir / "samples" / f"step-{self.step:08d}", self.config.sample.fps
            previews = []
            for i, (caption, video) in enumerate(videos):
                previews.append(write_video([video], self.config.sample, directory / f"{i:02d}.mp4"))
                self.journal.video(f"samples/{i:02d}", video, fps, self.step)
                self.journal.text(f"samples/{i:02d}", caption, self.step)
            write_sheet(previews, [caption for caption, _ in videos], directory)
            scores = score_videos(self.config.eval, videos)
            if scores:
                self.event("scores", step=self.step, **scores)
                self.journal.evaluation(scores, self.step)
            log.info("samples in %s", directory)

    def event(self, kind: str, **facts: Any) -> None:
        if self.journal:
            self.journal.event(kind, **facts)

    def close(self) -> None:
        if self.journal:
            self.journal.close()


def stage_spans(config: Config) -> list[tuple[int, Stage, int, int]]:
    """(segment, stage, first step, end) of each stage that `run.steps` reaches; the last stage goes on if it asks for more."""
    spans, first = [], 0
    last = config.run.steps or sum(stage.steps for stage in config.stages)
    for segment, stage in enumerate(config.stages):
        final = segment == len(config.stages) - 1
        end = last if final else min(first + stage.steps, last)
        if first < end:
            spans.append((segment, stage, first, end))
        first += stage.steps
    return spans
