"""The training run: build order, then the loop. Everything that happens in a step happens here, in this order, in sight."""

import math
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import xxhash
import yaml

from data_pipelines.batches.loader import Replacement, StepBatch
from data_pipelines.buckets import buckets_of
from data_pipelines.errors import DataError
from megasora.build import build_engine, build_recipe, build_tally, check_fit, open_boards, open_run_directory
from megasora.checkpoint.directory import latest
from megasora.checkpoint.fence import take_fence
from megasora.checkpoint.load import read_facts, verify
from megasora.checkpoint.ranks import Ranks
from megasora.checkpoint.save import prune
from megasora.checkpoint.saver import Saver
from megasora.cluster.heartbeat import Heartbeat, heartbeat
from megasora.cluster.origin import node_name, origin
from megasora.cluster.signals import StopRequest, stop_on_signal
from megasora.cluster.stragglers import FirstCall, StepTimes
from megasora.config import to_dict
from megasora.engines.optim import learning_rate
from megasora.errors import CheckpointError, StoppedEarly, StorageFull, Superseded
from megasora.evaluation import check_evaluation, evaluation_loss, evaluation_videos, score_videos
from megasora.microbatch import Recipe, build_rows, training_loss
from megasora.models.families import parameter_count
from megasora.observe.clock import Clock
from megasora.observe.hardware import device_peak, peak_memory
from megasora.observe.logs import log
from megasora.observe.metrics import EVENTS, Journal, StepMetrics, console_line
from megasora.observe.profiler import StepProfiler
from megasora.observe.spikes import SpikeWatch
from megasora.parallel.mesh import Processes, node_report, processes, rank, ranks_of_nodes, spans
from megasora.planner.check import check_plan, device_here
from megasora.planner.fitting import settle_recompute
from megasora.rendering import write_videos
from megasora.resume import find_start, load_from, load_start, save_digests
from megasora.schema import Config, Stage
from megasora.segments import Segment, segments_of
from megasora.training_data import build_loader, check_current, open_data, settle_replacements

SAVE_MARGIN = 1.5  # a save may take so many times as long as the last one
MAX_SKIPPED = 20  # steps in a row without an update, before a run that learns nothing is ended


def train(config: Config) -> None:
    """Trains as `config` says, in this process and its peers. Raises StoppedEarly when a signal ended it with a checkpoint."""
    with processes(config.parallel.layout) as group, stop_on_signal() as stop, heartbeat(rank()) as beat:
        trainer = Trainer(config, group, stop, beat)
        try:
            trainer.run()
        finally:
            trainer.close()


class Trainer:
    """One run on one process. Of `step`s those skipped count too; a stage is a segment of the data's order."""

    def __init__(self, config: Config, group: Processes, stop: StopRequest, beat: Heartbeat) -> None:
        self.config, self.group, self.stop, self.beat = config, group, stop, beat
        self.data = open_data(config, group.device)
        check_fit(config, group, self.data.facts)
        check_evaluation(config, group)
        check_current(config)
        fitted = settle_recompute(config, group, self.data)
        warnings = check_plan(fitted, group.layout, device_here(group.device), self.data, group.is_main)
        start = find_start(config, self.data)
        self.run_dir = open_run_directory(config, group)
        beat.keep_stacks(self.run_dir / "logs" / f"rank-{group.rank:05d}.stacks")
        self.fence = Ranks().every(
            "", lambda: take_fence(self.run_dir, config.checkpoint.fence) if group.is_main else None
        )
        self.engine = build_engine(fitted, group, blank=start.source is not None)
        load_start(start, config, self.engine)
        self.saver = Saver(
            self.run_dir / "checkpoints", config.checkpoint, self.fence.check if self.fence else None, group.device
        )
        self.unsaved: CheckpointError | None = None  # why the last save failed, if it did
        self.watch = SpikeWatch(config.spikes, start.recent, start.spikes)
        self.step, self.obey, self.breaks, self.resumed_from = start.step, start.obey, start.breaks, start.resumed_from
        self.good = start.source  # the newest checkpoint of this continuation of the run
        self.segments = segments_of(config, self.breaks)
        self.last = self.segments[-1].end
        self.profiler = StepProfiler(config.profile, self.run_dir, group.device, group.rank)
        self.journal = Journal(self.run_dir) if group.is_main else None
        self.tally = build_tally(config, group.device)
        for warning in warnings:
            log.warning("%s", warning)
        if self.journal:  # only now: a config that may not resume here leaves the old one
            (self.run_dir / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
            save_digests(self.run_dir, self.data)
            open_boards(self.journal, config)
        self.peak_flops = device_peak(group.device, config.precision.precision)
        self.own_times, self.own_wait, self.forward_s = StepTimes(group.world), 0.0, 0.0
        self.parts: dict[str, float] = {}  # seconds of the last step
        self.bad_samples = self.skipped = 0
        self.save_seconds = 0.0  # of the last one in this attempt
        self.hurried = False  # whether a scheduler has set a time to stop by
        self.step_times: deque[float] = deque(maxlen=50)
        nodes = ranks_of_nodes(group, node_name())
        self.event("start", step=self.step, checkpoint=str(start.source), world=group.world, layout=str(group.layout),
                   fingerprint=self.data.fingerprint, torch=torch.__version__,
                   nodes={node: spans(ranks) for node, ranks in nodes.items()},
                   **origin())  # fmt: skip
        log.info("%s step %d | %s parameters | %s latents | %s on %s", "resuming after" if self.step else "starting at",
                 self.step, f"{parameter_count(config.model):,}", f"{self.data.samples:,}",
                 group.layout, group.device)  # fmt: skip
        log.info("%s: %s", group.layout, node_report(group.layout, nodes))

    def run(self) -> None:
        for segment in self.segments:
            if self.step < segment.end:
                self.run_segment(segment)
        if self.step > self.last:
            log.info("nothing to do: %d steps are done, run.steps=%d", self.step, self.last)
        if self.unsaved:
            raise CheckpointError(f"the end of the run is not saved: {self.unsaved}")
        log.info("done: %d steps; everything lies in %s", self.step, self.run_dir)

    def run_segment(self, segment: Segment) -> None:
        """The updates from `self.step` to the end of a stage, or of the part of it that has the data of this run."""
        stage = segment.stage
        if self.step == segment.stage_first:  # what another stage's losses were says nothing about its own
            self.watch = SpikeWatch(self.config.spikes)
        loader = build_loader(self.config, self.group, self.data, stage, segment.number, self.obey)
        recipe = build_recipe(self.config, self.group, self.data.facts, stage, segment.number)
        found = loader.expected()
        self.event("segment", segment=segment.number, stage=stage.name, step=self.step, samples=loader.samples,
                   unfit=loader.unfit, buckets={str(bucket): round(n, 1) for bucket, n in found.items()})  # fmt: skip
        log.info("stage %s: steps %d to %d, %d samples in %d buckets, %d fit none", stage.name, self.step + 1, segment.end,
                 loader.samples, len(found), loader.unfit)  # fmt: skip
        if empty := [str(bucket) for bucket in buckets_of(stage.buckets) if bucket not in found]:
            log.warning("stage %s: %d buckets have no sample: %s", stage.name, len(empty), ", ".join(empty[:8]))
        batches = loader.batches(self.step - segment.first)
        while self.step < segment.end:
            begin = time.perf_counter()
            self.profiler.begin(self.step + 1)
            self.beat.enter(self.step + 1, "data")
            batch, stopping = self.next_batch(batches, segment.number)
            data_wait = time.perf_counter() - begin

            done = self.step - segment.stage_first
            self.beat.enter(self.step + 1, "train", " ".join(batch.buckets))
            lr = learning_rate(self.config.optim, stage.lr or self.config.optim.lr, done, stage.steps)
            loss, grad_norm = self.train_step(batch, recipe, lr)
            self.step += 1
            self.record(stage, batch, loss, grad_norm, lr, time.perf_counter() - begin, data_wait)
            self.profiler.end(self.step)
            for slow in self.own_times.add(self.own_wait, self.forward_s):
                self.event("slow_rank", step=self.step, **vars(slow))
                log.warning("slow: %s", slow)

            if stopping and self.too_late():
                raise StoppedEarly(f"{self.stop.signal}: stopped after step {self.step}, with no time left to save it")
            score = self.evaluate(stage) if self.due(self.config.eval.loss_every) and not self.hurried else None
            final = self.step == self.last or stopping
            if self.saver.due(self.step) or final:
                self.save(segment, score)
            if final and self.saver.step is not None:
                self.finish_save(copy=not self.hurried)
            if stopping and self.step < self.last:
                raise self.stopped_early()
            if self.due(self.config.eval.every):
                self.show()
        batches.close()

    def train_step(self, batch: StepBatch, recipe: Recipe, lr: float) -> tuple[float, float]:
        """One update; the loss of the global batch and the gradient norm before clipping."""
        clock = Clock(self.group.device)  # it waits where this does
        rows = build_rows(batch, recipe, self.tally)
        clock.lap("microbatch", wait=False)
        judge = FirstCall(training_loss(recipe, self.tally), self.group.device)
        loss = self.engine.forward_backward(rows, judge).item()
        clock.lap("forward_backward", wait=False)
        grad_norm = self.engine.clip().item()
        clock.lap("clip", wait=False)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        spike = self.watch.judge(loss, grad_norm) if finite else ""
        if spike:
            self.event("spike", step=self.step + 1, why=spike, policy=self.config.spikes.policy, samples=batch.keys)
            log.warning("step %d is a spike: %s", self.step + 1, spike)
        if finite and not (spike and self.config.spikes.policy != "record"):
            self.engine.update(lr)
            self.skipped = 0
        else:  # never reaches the weights
            self.engine.discard()
            self.skipped += 1
            self.event("skipped", step=self.step + 1, loss=str(loss), grad_norm=str(grad_norm), samples=batch.keys)
            log.warning("step %d skipped: loss %s, gradient norm %s", self.step + 1, loss, grad_norm)
            if self.skipped == MAX_SKIPPED:
                raise DataError(f"{self.config.data.path}: {MAX_SKIPPED} steps without an update; see {EVENTS}")
            if spike and self.config.spikes.policy == "rollback":
                self.roll_back()
        clock.lap("update")
        self.parts = clock.laps
        self.forward_s = judge.seconds() if self.group.layout.pp == 1 else 0.0  # stages wait for each other
        return loss, grad_norm

    def roll_back(self) -> None:
        """Weights and optimizer of this run's newest checkpoint; the order of the data goes on where it is."""
        self.beat.enter(self.step + 1, "start")
        if self.saver.step is not None:
            self.finish_save(copy=False)
        if self.good is None or verify(self.good):
            log.warning("no good checkpoint to roll back to: the step is skipped")
            return
        load_from(self.good, self.engine)
        facts = read_facts(self.good)
        first = next(segment.stage_first for segment in self.segments if self.step < segment.end)
        if self.watch.recent and facts["step"] > first:  # else what was of late then is no measure now
            self.watch = SpikeWatch(self.config.spikes, facts.get("recent", []), self.watch.in_a_row)
        self.event("rollback", step=self.step + 1, to=facts["step"], path=str(self.good))
        log.warning("rolled back to the weights of step %d", facts["step"])

    def next_batch(self, batches: Iterator[StepBatch], segment: int) -> tuple[StepBatch, bool]:
        """The next batch and whether to stop after it: both agreed by all ranks, replaced samples logged before use. Raises
        RuntimeError where ranks that share a row did not read the same."""
        failure, batch, begin = "", None, time.perf_counter()
        try:
            batch = next(batches)
        except DataError as error:
            failure = str(error)
        replaced: list[Replacement] = batch.replacements if batch else []
        self.own_wait = time.perf_counter() - begin
        self.beat.enter(self.step + 1, "agree", " ".join(batch.buckets) if batch else "")
        flags = [bool(self.stop), bool(failure), len(replaced), self.saver.done, math.isfinite(self.stop.seconds_left)]
        agreed = torch.tensor(flags, device=self.group.device)
        dist.all_reduce(agreed)
        stopping, failed, bad, saved, self.hurried = agreed.tolist()
        if saved == self.group.world:
            self.finish_save()
        if failed or bad:
            everyone: list[Any] = [None] * self.group.world
            dist.all_gather_object(everyone, (failure, replaced, batch.own if batch else {}))
            failures, found, own = zip(*everyone, strict=True)
            if failed:
                raise DataError(next(filter(None, failures)))
            settled, quarrel = settle_replacements(found, own)
            for replacement in settled:
                self.event("bad_sample", segment=segment, **vars(replacement))
                log.warning("bad sample %(key)s (%(reason)s): %(by)s instead", vars(replacement))
                if self.journal:
                    self.journal.quarantine(replacement.shard, replacement.key, replacement.reason)
            if quarrel:
                raise RuntimeError(f"step {self.step + 1}: {quarrel}; started again, all read what {EVENTS} says")
            self.bad_samples += len(settled)
        assert batch is not None
        return batch, bool(stopping)

    def record(
        self, stage: Stage, batch: StepBatch, loss: float, grad_norm: float, lr: float, seconds: float, wait: float
    ) -> None:
        """A line of metrics.jsonl; now and then the boards and the console."""
        self.step_times.append(seconds)
        shown = self.step % self.config.observe.every == 0 or self.step in (1, self.last)
        losses, sizes = (self.tally.take(), self.engine.sizes()) if shown and self.tally else ({}, {})
        if self.journal is None:
            return
        flops_per_s = batch.flops / seconds / self.group.world
        metrics = StepMetrics(
            attempt=self.journal.attempt, time=time.time(), step=self.step, stage=stage.name, loss=loss,
            grad_norm=grad_norm, lr=lr, samples=self.config.data.global_batch, tokens=batch.tokens,
            bucket=batch.buckets, order=xxhash.xxh3_64_hexdigest("\n".join(batch.keys).encode()), bad_samples=self.bad_samples,
            step_time_s=seconds, data_wait_s=wait, parts=self.parts, tokens_per_s=batch.tokens / seconds,
            tflops_per_device=flops_per_s / 1e12, mfu=flops_per_s / self.peak_flops, imbalance=batch.imbalance,
            padding=batch.padding, peak_memory_bytes=peak_memory(self.group.device),
            world=self.group.world, layout=str(self.group.layout),
        )  # fmt: skip
        self.journal.step(metrics)
        if shown:
            self.journal.scalars(metrics, losses, sizes)
            seconds_left = (self.last - self.step) * sum(self.step_times) / len(self.step_times)
            log.info("%s", console_line(metrics, self.last, seconds_left))

    def save(self, segment: Segment, score: float | None) -> None:
        """Begins a checkpoint of everything that the next step depends on. Randomness needs none: it follows from positions."""
        self.beat.enter(self.step, "save")
        if self.saver.step is not None:
            self.finish_save(copy=False)
        if self.saver.step is not None:  # it hangs
            return
        facts = {
            "step": self.step, "segment": segment.number, "segment_step": self.step - segment.first, "world": self.group.world,
            "breaks": list(self.breaks), "recent": list(self.watch.recent), "spikes": self.watch.in_a_row,
            "config": to_dict(self.config), "fingerprint": self.data.fingerprint, "resumed_from": self.resumed_from,
            "layout": str(self.group.layout), "score": score if score is not None and math.isfinite(score) else None,
        }  # fmt: skip
        try:
            durable = True if self.step == self.last else False if self.hurried else None
            self.saver.start(self.step, self.engine.tensors(), facts, durable=durable)
            check = self.fence.check if self.fence else lambda: None
            own = self.engine.save_own(self.run_dir / "deepspeed", self.step, facts, check)
            if own is not None:
                prune(own.parent, self.config.checkpoint)
                self.event("save_own", step=self.step, path=str(own))
        except CheckpointError as error:
            self.not_saved(error)
        if not self.config.checkpoint.background and self.saver.step is not None:
            self.finish_save()

    def finish_save(self, copy: bool = True) -> None:
        """Waits for the save in flight, and for its copy. A failure is no reason to stop: the last good checkpoint is there."""
        step = self.saver.step
        try:
            saved, copied = self.saver.finish(copy=copy, patience=self.stop.seconds_left), self.saver.copied()
        except Superseded:
            raise
        except CheckpointError as error:
            self.not_saved(error)
            return
        if saved is None:
            self.not_saved(CheckpointError(f"the save of step {step} hangs; look at the storage"))
            return
        self.unsaved, self.save_seconds, self.good = None, saved.seconds, saved.path
        for of in filter(None, (copied, saved)):
            if of.durable_failure:
                self.event("copy_failed", step=of.step, reason=of.durable_failure)
                log.warning("step %d is saved, but not copied to the durable store: %s", of.step, of.durable_failure)
        if copied and copied.durable:
            self.event("copy", step=copied.step, durable=str(copied.durable), seconds=round(copied.durable_seconds, 3))
        self.event("save", step=saved.step, path=str(saved.path), seconds=round(saved.seconds, 3),
                   blocked_s=round(saved.blocked, 3), durable=str(saved.durable or ""))  # fmt: skip
        log.info("saved %s in %.1f s, of which training waited %.1f s", saved.path, saved.seconds, saved.blocked)

    def not_saved(self, error: CheckpointError) -> None:
        self.unsaved = error
        self.event("save_failed", step=self.step, reason=str(error))
        log.warning("not saved, training goes on: %s", error)

    def stopped_early(self) -> Exception:
        """What to end with after a signal: 75 where there is a checkpoint and running the command again helps."""
        why = self.stop.signal or "a signal to another process"
        if not self.unsaved:
            again = "" if self.config.run.resume == "auto" else " with run.resume=auto"
            return StoppedEarly(f"{why}: stopped after step {self.step}, saved; the same command{again} goes on there")
        good = Ranks().first("", lambda: latest(self.run_dir / "checkpoints"))
        if good is None or isinstance(self.unsaved, StorageFull):
            return CheckpointError(f"{why}: stopped after step {self.step}, which is not saved: {self.unsaved}")
        return StoppedEarly(f"{why}: stopped, step {self.step} not saved ({self.unsaved}); going on from {good}")

    def too_late(self) -> bool:
        """Whether a save, judged by the last one, would outlast what a scheduler's warning leaves of the job. All ranks agree."""
        needed = SAVE_MARGIN * self.save_seconds * (1 if self.saver.step is None else 2)  # one is in flight
        late = torch.tensor(float(self.stop.seconds_left < needed), device=self.group.device)
        dist.all_reduce(late, op=dist.ReduceOp.MAX)
        return bool(late.item())

    def due(self, every: int) -> bool:
        """Whether something done every so many steps, and after the last, is due now."""
        return bool(every) and (self.step % every == 0 or self.step == self.last)

    def evaluate(self, stage: Stage) -> float:
        """The loss of fixed samples at fixed timesteps, their mean."""
        begin = time.perf_counter()
        self.beat.enter(self.step, "evaluate")
        losses = evaluation_loss(self.config, self.group, self.engine, self.data, stage)
        self.event("eval", step=self.step, seconds=round(time.perf_counter() - begin, 3), **losses)
        if self.journal:
            self.journal.evaluation(losses, self.step)
        log.info("eval after step %d: %s", self.step, ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
        return losses["loss"]

    def show(self) -> None:
        """Videos of the averaged weights for fixed prompts: all ranks compute, the main one writes."""
        begin = time.perf_counter()
        self.beat.enter(self.step, "show")
        videos = evaluation_videos(self.config, self.group, self.engine)
        if self.journal and videos:
            directory = self.run_dir / "samples" / f"step-{self.step:08d}"
            try:
                write_videos(videos, self.config.sample, directory)
                log.info("samples in %s", directory)
            except OSError as error:
                log.warning("samples cannot be written now: %s", error)
            for i, (caption, video) in enumerate(videos):
                self.journal.sample(f"samples/{i:02d}", video, self.config.sample.fps, caption, self.step)
            if scores := score_videos(self.config.eval, videos):
                self.event("scores", step=self.step, **scores)
                self.journal.evaluation(scores, self.step)
            self.event("show", step=self.step, seconds=round(time.perf_counter() - begin, 3))

    def event(self, kind: str, **facts: Any) -> None:
        if self.journal:
            self.journal.event(kind, **facts)

    def close(self) -> None:
        self.profiler.close()
        self.saver.close(self.stop.seconds_left)
        if self.fence:
            self.fence.release()
        if self.journal:
            self.journal.close()
