"""The benchmark of a training step: the trainer's own engine, loader and micro-batches, each part timed apart."""

import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipelines.batches.loader import Loader, StepBatch
from megasora import __version__
from megasora.build import build_engine, build_recipe, check_fit
from megasora.checkpoint.saver import Saver
from megasora.config import to_dict
from megasora.device import on_gpu
from megasora.engines.torch_native import Engine
from megasora.errors import CheckpointError, ConfigError
from megasora.microbatch import MicroBatch, Recipe, build_microbatch, build_rows, training_loss
from megasora.models.flops import forward_macs
from megasora.observe.clock import Clock
from megasora.observe.energy import energy, used
from megasora.observe.hardware import copy_peak, device_name, device_peak, gemm_peak, peak_memory
from megasora.observe.logs import log
from megasora.observe.memory import held, living, state_by_part, storages
from megasora.observe.noise import is_steady
from megasora.observe.profiler import communication, computing, copied_in, labelled, length, lines_of, profiler
from megasora.parallel.fp8 import fp8_share, mixed_peak
from megasora.parallel.mesh import Processes, processes
from megasora.parallel.zero import local
from megasora.planner.fitting import settle_recompute
from megasora.planner.watch import moved, watching
from megasora.schema import Config
from megasora.segments import find_stage
from megasora.training_data import build_loader, open_data, synthetic_data

TEXT_TOKENS = 64  # of a synthetic caption
SCHEMA = 2
EXTRA = 12  # steps of warm-up beyond those asked for, at most
PARTS = ("data_wait", "microbatch", "forward_backward", "clip", "update")


def bench(config: Config, synthetic: bool) -> dict[str, Any]:
    """Runs updates of one stage: until they are steady, then bench.steps that count; all ranks return the same result.

    Times are the main process's medians. A step's FLOPs are the closed form of its samples; `mfu` is over the device's dense
    peak, `mfu_gemm` over the best matrix product of this very run. What cannot be timed from outside is found in steps that
    follow and do not count: `profiled` under torch's profiler, `memory_by_part` by watching what lives.
    """
    if config.bench.stage:
        config = replace(config, stages=(find_stage(config, "bench.stage", config.bench.stage),))
    with processes(config.parallel.layout) as group:
        data = synthetic_data(config, TEXT_TOKENS) if synthetic else open_data(config, group.device)
        check_fit(config, group, data.facts)
        if config.bench.costs and group.world > 1:
            raise ConfigError(f"bench.costs={config.bench.costs}: measured on one process, not on {group.world}")
        config = settle_recompute(config, group, data)
        engine = build_engine(config, group)
        loader = build_loader(config, group, data, config.stages[0], 0, {})
        recipe = build_recipe(config, group, data.facts, config.stages[0], 0)
        batches = loader.batches(0)
        warm = warm_up(config, engine, batches, recipe)
        steps, rounds = measure(config, engine, batches, recipe)
        found = report(config, group, steps, rounds)
        found |= {"data": "synthetic" if synthetic else config.data.path, "warmup": warm}
        found |= watched(config, engine, next(batches), recipe)
        found["profiled"] = profile_step(config, group, engine, batches, recipe)
        found["imbalance_measured"] = imbalance_measured(group, steps, found["profiled"]["computing_s"])
        found["copy_bytes_per_s"] = copy_peak(group.device)
        found |= fp8_figures(
            config, group, found, share_in_fp8(config, group, engine, build_rows(next(batches), recipe)[0])
        )
        batches.close()
        if config.bench.checkpoint:
            found["checkpoint"] = checkpoint_stall(config, group, engine)
        if config.bench.costs:
            write_costs(config, engine, loader, recipe)
        shared = [found]
        dist.broadcast_object_list(shared)
        if config.bench.output and group.is_main:
            Path(config.bench.output).write_text(json.dumps(shared[0], indent=1) + "\n")
    return shared[0]


def take_step(config: Config, engine: Engine, batch: StepBatch, recipe: Recipe, clock: Clock) -> dict[str, float]:
    """One update; the seconds of its parts and of the whole, and what was in it."""
    rows = build_rows(batch, recipe)
    clock.lap("microbatch")
    busy = time.thread_time()
    loss = engine.forward_backward(rows, training_loss(recipe)).item()
    busy = time.thread_time() - busy  # on a CPU: the time that this rank computes, not what it waits for others
    clock.lap("forward_backward")
    engine.clip().item()
    clock.lap("clip")
    engine.update(config.optim.lr)
    clock.lap("update")
    return {**clock.laps, "step_time_s": clock.total, "busy": busy, "loss": loss, "tokens": batch.tokens, "flops": batch.flops,
            "imbalance": batch.imbalance}  # fmt: skip


def next_step(config: Config, engine: Engine, batches: Iterator[StepBatch], recipe: Recipe) -> dict[str, float]:
    """`take_step` with the waiting for its batch."""
    clock = Clock(recipe.device)
    batch = next(batches)
    clock.lap("data_wait")
    return take_step(config, engine, batch, recipe, clock)


def warm_up(config: Config, engine: Engine, batches: Iterator[StepBatch], recipe: Recipe) -> dict[str, Any]:
    """At least bench.warmup steps, and on until those of the slowest rank are steady; EXTRA more at most. Batches that this saves
    are passed over, so that those of the steps that count are always the same."""
    least = config.bench.warmup
    most = least + EXTRA if least else 0
    costs: list[float] = []
    while len(costs) < most and not (len(costs) >= least and is_steady(costs)):
        step = next_step(config, engine, batches, recipe)
        costs.append(agreed(step["step_time_s"] / step["flops"], recipe.device))
        log.info("bench: warm-up %d %.3f s", len(costs), step["step_time_s"])
    for _ in range(most - len(costs)):
        next(batches)
    return {"steps": len(costs), "steady": is_steady(costs) if costs else None}


def agreed(seconds: float, device: torch.device) -> float:
    """The slowest rank's, on all ranks."""
    slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def measure(
    config: Config, engine: Engine, batches: Iterator[StepBatch], recipe: Recipe
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The steps that count, and rounds of them, each after a matrix product of its own: a clock that slows down slows both.
    `cost` is the round's step in products: how many times longer than its FLOPs would take there, the inverse of MFU."""
    steps, rounds, world = list[dict[str, float]](), list[dict[str, float]](), dist.get_world_size()
    for share in split(config.bench.steps, config.bench.rounds):
        gemm = gemm_peak(recipe.device, config.precision.precision)
        dist.barrier()
        log.info("bench: round of %d steps, a matrix product at %.4g TFLOP/s", share, gemm / 1e12)
        before = energy(recipe.device)
        these = [next_step(config, engine, batches, recipe) for _ in range(share)]
        after = energy(recipe.device)
        steps += these
        cost = statistics.median(step["step_time_s"] * world * gemm / step["flops"] for step in these)
        seconds = statistics.median(step["step_time_s"] for step in these)
        rounds.append({"gemm_flops": gemm, "step_time_s": seconds, "cost": cost})
        if before is not None and after is not None:
            rounds[-1]["joules"] = used(before, after) / share
        log.info("bench: step %d/%d %.3f s", len(steps), config.bench.steps, seconds)
    return steps, rounds


def split(steps: int, rounds: int) -> list[int]:
    """So many steps in rounds that are alike, as many as there are steps for."""
    rounds = min(steps, rounds)
    return [steps * (i + 1) // rounds - steps * i // rounds for i in range(rounds)]


def report(
    config: Config, group: Processes, steps: list[dict[str, float]], rounds: list[dict[str, float]]
) -> dict[str, Any]:
    """What the timed steps tell, with the names of metrics.jsonl at the top."""
    for step in steps:
        step["tokens_per_s"] = step["tokens"] / step["step_time_s"]
        step["tflops_per_device"] = step["flops"] / step["step_time_s"] / group.world / 1e12
    median = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    times = [step["step_time_s"] for step in steps]
    gemm = max(one["gemm_flops"] for one in rounds)
    peak = device_peak(group.device, config.precision.precision) if on_gpu(group.device) else gemm
    flops = 1e12 * median["tflops_per_device"]
    return {
        "schema": SCHEMA, "step_time_s": median["step_time_s"], "data_wait_s": median["data_wait"],
        "tokens_per_s": median["tokens_per_s"], "tflops_per_device": median["tflops_per_device"],
        "mfu": flops / peak, "mfu_gemm": flops / gemm, "imbalance": statistics.mean(step["imbalance"] for step in steps),
        "tokens": median["tokens"], "samples": config.data.global_batch, "loss": steps[-1]["loss"],
        "peak_memory_bytes": peak_memory(group.device), "world": group.world, "layout": str(group.layout),
        "engine": config.engine,
        "spread": {"min": min(times), "max": max(times), "mean": statistics.mean(times), "quartiles": quartiles(times)},
        "parts": {name: median[name] for name in PARTS},
        "quartiles": {name: quartiles([step[name] for step in steps]) for name in (*PARTS, "tokens_per_s")},
        "rounds": rounds, "peak_flops": peak, "gemm_flops": gemm, "steps": len(steps),
        "energy_joules": joules(group, rounds), "config": to_dict(config), "date": str(date.today()),
        "machine": {"device": device_name(group.device), "gpu": on_gpu(group.device), "threads": torch.get_num_threads(),
                    "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__,
                    "megasora": __version__},
    }  # fmt: skip


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4) if values[1:] else []


def joules(group: Processes, rounds: list[dict[str, float]]) -> float | None:
    """Of a step: of all GPUs, or of this machine and whatever else it did; None where nobody tells."""
    here = statistics.median(one["joules"] for one in rounds) if all("joules" in one for one in rounds) else None
    every: list[float | None] = [None] * group.world
    dist.all_gather_object(every, here)
    if not on_gpu(group.device) or here is None:
        return here
    return None if None in every else sum(filter(None, every))


def imbalance_measured(group: Processes, steps: list[dict[str, float]], computing: float) -> float:
    """Max over mean of the ranks' time for computing: on a CPU in all steps, on a GPU that of its kernels in the profiled one."""
    own = [computing] if on_gpu(group.device) else [step["busy"] for step in steps]
    every: list[list[float]] = [[] for _ in range(group.world)]
    dist.all_gather_object(every, own)
    return statistics.mean(max(step) * len(step) / sum(step) for step in zip(*every, strict=True))


def watched(config: Config, engine: Engine, batch: StepBatch, recipe: Recipe) -> dict[str, Any]:
    """Bytes that this rank sends in a step, and what lives in it by part. `activations` are the most that lived at once of what
    the step made but for gradients: what is kept for backward, and what comes and goes. None where torch.compile hides it."""
    device = recipe.device
    before = living(device)
    if on_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
    with watching() as watch:
        engine.forward_backward(build_rows(batch, recipe), training_loss(recipe))
        gradients = [local(p.grad) for p in engine.model.parameters() if p.grad is not None]
        if not gradients:  # the engine has put them elsewhere
            gradients = [part for gradient in engine.gradients().values() for part in held(gradient)]
        engine.clip()
        engine.update(config.optim.lr)
    parts = state_by_part(engine.model.parameters(), engine.tensors())
    parts["gradients"] = sum(storages(gradients).values())
    made: int | None = watch.peak(without=gradients)
    if on_gpu(device):
        made = peak_memory(device) - before - parts["gradients"]
    elif config.parallel.compile:
        made = None
    state = sum(parts[name] for name in ("weights", "optimizer", "ema"))
    return {
        "memory_by_part": {**parts, "activations": made, "other": max(0, before - state)},
        "bytes_sent": moved(watch.calls),
        "bytes_by_kind": {kind: moved(call for call in watch.calls if call.kind == kind) for kind in
                          sorted({call.kind for call in watch.calls})},
    }  # fmt: skip


def profile_step(
    config: Config, group: Processes, engine: Engine, batches: Iterator[StepBatch], recipe: Recipe
) -> dict[str, Any]:
    """One step under torch's profiler, which makes it longer. `parts` are all of it: `exchange` is what forward_backward does
    beside both passes (sums over ranks, waiting for other stages), `gather` what update does beside optimizer and ema."""
    with profiler(group.device) as profiled:
        step = next_step(config, engine, batches, recipe)
    events = profiled.events()
    found = labelled(events, group.device)
    if "backward" not in found:  # a GPU's kernels of it come from a thread of their own, which the label does not reach
        found["backward"] = step["forward_backward"] - found["forward"]
    ema = found.get("ema", 0.0)
    exchange = step["forward_backward"] - found["forward"] - found["backward"]
    gather = step["update"] - found["optimizer"] - ema
    parts = {
        "data_wait": step["data_wait"], "microbatch": step["microbatch"], "forward": found["forward"],
        "backward": found["backward"], "exchange": max(0.0, exchange), "clip": step["clip"],
        "optimizer": found["optimizer"], "ema": ema, "gather": max(0.0, gather),
    }  # fmt: skip
    return {
        "step_time_s": step["step_time_s"], "parts": parts, "communication": communication(events, group.device),
        "computing_s": 1e-6 * length(computing(events, group.device)),
        "host_to_device_s": copied_in(events) if on_gpu(group.device) else None,
    }  # fmt: skip


def checkpoint_stall(config: Config, group: Processes, engine: Engine) -> dict[str, float]:
    """Seconds that a step waits for a save in the background, and that the save takes; of the second of two, for the first also
    has to get the memory."""
    shared = [f"bench-{os.getpid()}"]
    dist.broadcast_object_list(shared)
    root = Path(config.bench.checkpoint) / shared[0]
    saver = Saver(root, config.checkpoint, None, group.device)
    for step in (1, 2):
        begin = time.perf_counter()
        saver.start(step, engine.tensors(), {"step": step})
        blocked = time.perf_counter() - begin
        if (saved := saver.finish()) is None:
            raise CheckpointError(f"{root}: a save hangs for more than {config.checkpoint.timeout:.0f} s")
        found = {"blocked_s": blocked, "seconds": saved.seconds}
    saver.close()
    dist.barrier()
    if group.is_main:
        shutil.rmtree(root)
    return found


def fp8_figures(config: Config, group: Processes, found: dict[str, Any], share: float | None) -> dict[str, Any]:
    """MFU over a peak of which a share is that of fp8."""
    fast = device_peak(group.device, config.precision.precision, fp8=True)
    mixed = None if share is None else found["tflops_per_device"] * 1e12 / mixed_peak(share, fast, found["peak_flops"])
    return {"fp8_share": share, "mfu_fp8": mixed}


def share_in_fp8(config: Config, group: Processes, engine: Engine, batch: MicroBatch) -> float | None:
    """The share of a row's multiply-adds that is in fp8; None where no rank has a whole row of a whole model to count."""
    if config.precision.fp8 == "none":
        return 0.0
    if group.layout.tp * group.layout.cp * group.layout.pp > 1:
        return None
    row = batch.row
    macs = sum(forward_macs(config.model, s, n) for s, n in zip(row.shapes, row.caption.lengths, strict=True))
    return fp8_share(engine.model, lambda: engine.predict(row), macs)


def write_costs(config: Config, engine: Engine, loader: Loader, recipe: Recipe) -> None:
    """Seconds of forward and backward of one sample of each bucket, for data.costs: the best of a few full rows, as long as
    training makes them."""
    seconds: dict[str, float] = {}
    loss = training_loss(recipe)
    for bucket in loader.expected():
        tokens, multiple = loader.tokens_of(bucket), config.data.row_multiple
        count = config.data.capacity // tokens
        row = [loader.example(bucket, position) for position in range(count)]
        batch = build_microbatch(row, recipe, -(-count * tokens // multiple) * multiple)
        times = []
        for _ in range(4):
            clock = Clock(recipe.device)
            engine.forward_backward([batch], loss)
            clock.lap("step")
            engine.discard()
            times.append(clock.total)
        seconds[str(bucket)] = min(times) / count
    Path(config.bench.costs).write_text(json.dumps(seconds, indent=1))


def fp8_lines(result: dict[str, Any]) -> list[str]:
    if not result["fp8_share"]:
        return []
    share, mfu = 100 * result["fp8_share"], 100 * result["mfu_fp8"]
    return [f"  with fp8 {mfu:9.1f} %   of a peak in which {share:.0f} % of the multiply-adds are at fp8's"]


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    warmup, profiled, whole = result["warmup"], result["profiled"], result["step_time_s"]
    quartile = {name: f"   {q[0]:.4f} to {q[2]:.4f}" if q else "" for name, q in result["quartiles"].items()}
    memory = ", ".join(
        f"{part} {size / 2**30:.2f}" for part, size in result["memory_by_part"].items() if size is not None
    )
    lines = [
        f"layout {result['layout']} on {result['world']} x {result['machine']['device']}, data {result['data']}",
        f"step       {whole:9.4f} s   ({result['spread']['min']:.4f} to {result['spread']['max']:.4f}, {result['steps']} steps "
        f"after {warmup['steps']} of warm-up{', NOT STEADY' if warmup['steady'] is False else ''})",
        *(f"  {name:<16} {s:9.4f} s {100 * s / whole:5.1f} %{quartile[name]}" for name, s in result["parts"].items()),
        f"one step more, under the profiler: {profiled['step_time_s']:.4f} s",
        *(
            f"  {name:<16} {s:9.4f} s {100 * s / profiled['step_time_s']:5.1f} %"
            for name, s in profiled["parts"].items()
        ),
        *(f"  {line}" for line in lines_of(profiled["communication"])),
        f"tokens/s   {result['tokens_per_s']:11,.0f}",
        f"TFLOP/s    {result['tflops_per_device']:11.4f} per device",
        f"MFU        {100 * result['mfu']:9.1f} %   of the device's peak, {100 * result['mfu_gemm']:.1f} % of a GEMM here",
        *fp8_lines(result),
        f"imbalance  {result['imbalance']:11.3f}   predicted, {result['imbalance_measured']:.3f} measured",
        f"memory     {result['peak_memory_bytes'] / 2**30:9.2f} GiB at most; {memory}",
        f"copies     {result['copy_bytes_per_s'] / 2**30:9.1f} GiB/s",
        f"sent       {result['bytes_sent'] / 2**20:9.2f} MiB a step, by the main process",
    ]
    if "checkpoint" in result:
        stall = result["checkpoint"]
        lines.append(f"checkpoint {stall['blocked_s']:9.4f} s   that a step waits; written in {stall['seconds']:.2f} s")
    if result["energy_joules"] is not None:
        lines.append(f"energy     {result['energy_joules']:9.1f} J   a step")
    return "\n".join(lines)
