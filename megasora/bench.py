"""The benchmark of a training step: the trainer's own engine, loader and micro-batches, each part timed apart."""

import json
import math
import platform
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipelines.loader import Loader, StepBatch
from megasora import __version__
from megasora.build import build_engine, build_recipe, check_fit
from megasora.checkpoint.saver import Saver
from megasora.config import to_dict
from megasora.device import on_gpu
from megasora.engines.torch_native import Engine
from megasora.microbatch import MicroBatch, Recipe, build_microbatch, build_rows, training_loss
from megasora.models.flops import forward_macs
from megasora.observe.hardware import copy_peak, device_peak, gemm_peak, joules, peak_memory, synchronize
from megasora.observe.logs import log
from megasora.observe.profiler import communication, labelled, lines_of, profiler
from megasora.parallel.fp8 import fp8_share, mixed_peak
from megasora.parallel.mesh import Processes, processes
from megasora.parallel.zero import local
from megasora.planner.fitting import settle_recompute
from megasora.planner.watch import moved, watching
from megasora.schema import Config
from megasora.training_data import build_loader, open_data, synthetic_data

TEXT_TOKENS = 64  # of a synthetic caption
PARTS = ("data_wait", "microbatch", "forward_backward", "clip", "update")


def bench(config: Config, synthetic: bool) -> dict[str, Any]:
    """Runs updates of the first stage: until they are steady, then bench.steps that count; all ranks return the same result.

    Times are the main process's medians. A step's FLOPs are the closed form of its samples; `mfu` is over the device's dense
    peak, `mfu_gemm` over the best matrix product of this very run. `profiled` is one step more, under the profiler.
    """
    with processes(config.parallel.layout) as group:
        data = synthetic_data(config, TEXT_TOKENS) if synthetic else open_data(config, group.device)
        check_fit(config, group, data.facts)
        engine = build_engine(settle_recompute(config, group, data), group)
        loader = build_loader(config, group, data, config.stages[0], 0, {})
        recipe = build_recipe(config, group, data.facts, config.stages[0], 0)
        batches = loader.batches(0)
        warm: list[float] = []
        while not warmed(warm, config.bench.warmup):
            warm.append(agreed(take_step(config, engine, batches, recipe)["step_time_s"], group.device))
            log.info("bench: warm-up %d %.3f s", len(warm), warm[-1])
        precision = config.precision.precision
        peak, copy, energy = device_peak(group.device, precision), copy_peak(group.device), joules(group.device)
        steps: list[dict[str, float]] = []
        rounds: list[dict[str, float]] = []
        for share in split(config.bench.steps, config.bench.rounds):
            gemm = gemm_peak(group.device, precision)
            these = [take_step(config, engine, batches, recipe) for _ in range(share)]
            steps += these
            rounds.append({"gemm_flops": gemm, "step_time_s": statistics.median(step["step_time_s"] for step in these)})
            log.info("bench: step %d/%d %.3f s", len(steps), config.bench.steps, rounds[-1]["step_time_s"])
        used = joules(group.device)
        found = report(config, group, steps, rounds, peak)
        with watching() as watch:  # steps more, which are not timed
            take_step(config, engine, batches, recipe)
        with profiler(group.device) as profiled:
            whole = take_step(config, engine, batches, recipe)["step_time_s"]
        events = profiled.events()
        found |= {
            "data": "synthetic" if synthetic else config.data.path, "copy_bytes_per_s": copy, "bytes_sent": moved(watch.calls),
            "warmup": {"steps": len(warm), "steady": steady(warm)}, "memory_by_part": memory_by_part(engine),
            "profiled": {"step_time_s": whole, "parts": labelled(events, group.device),
                         "communication": communication(events, group.device)},
            "energy_joules": None if energy is None or used is None else (used - energy) / len(steps),
        }  # fmt: skip
        found |= fp8_figures(
            config, group, found, share_in_fp8(config, group, engine, build_rows(next(batches), recipe)[0])
        )
        batches.close()
        if config.bench.checkpoint:
            found["checkpoint"] = checkpoint_stall(config, group, engine)
        if config.bench.costs and group.is_main:
            write_costs(config, engine, loader, recipe)
        shared = [found]
        dist.broadcast_object_list(shared)
    if config.bench.output and group.is_main:
        Path(config.bench.output).write_text(json.dumps(shared[0], indent=1))
    return shared[0]


def take_step(config: Config, engine: Engine, batches: Iterator[StepBatch], recipe: Recipe) -> dict[str, float]:
    """One update; the seconds of its parts and of the whole, and what was in it."""
    clock = Clock(recipe.device)
    batch = next(batches)
    clock.lap("data_wait")
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


def warmed(times: Sequence[float], least: int) -> bool:
    """Whether the warm-up is over: so many steps at least, and steady, or five times as many."""
    return len(times) >= least and (steady(times) or len(times) >= 5 * least)


def steady(times: Sequence[float]) -> bool:
    """Whether the last three steps were no faster, in their median, than the three before them, but for 5 %. Of fewer than six
    steps all but the last three are what they are compared with; of three, nothing is known."""
    before = times[-6:-3]
    return bool(before) and statistics.median(times[-3:]) > 0.95 * statistics.median(before)


def agreed(seconds: float, device: torch.device) -> float:
    """The slowest rank's, on all ranks."""
    slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def split(steps: int, rounds: int) -> list[int]:
    """So many steps in rounds that are alike, as many as there are steps for."""
    rounds = min(steps, rounds)
    return [steps * (i + 1) // rounds - steps * i // rounds for i in range(rounds)]


class Clock:
    """Wall time of the parts of one step, the device being waited for at the end of each."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.laps = device, dict[str, float]()
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

    @property
    def total(self) -> float:
        return sum(self.laps.values())


def report(
    config: Config, group: Processes, steps: list[dict[str, float]], rounds: list[dict[str, float]], peak: float
) -> dict[str, Any]:
    """What the timed steps tell, with the names of metrics.jsonl at the top."""
    median = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    gemm = statistics.median(one["gemm_flops"] for one in rounds)
    times = sorted(step["step_time_s"] for step in steps)
    flops = statistics.median(step["flops"] / step["step_time_s"] for step in steps) / group.world
    every: list[list[float]] = [[] for _ in range(group.world)]
    dist.all_gather_object(every, [step["busy"] for step in steps])
    measured = statistics.mean(max(step) * len(step) / sum(step) for step in zip(*every, strict=True))
    return {
        "schema": 2, "step_time_s": median["step_time_s"], "data_wait_s": median["data_wait"],
        "tokens_per_s": statistics.median(step["tokens"] / step["step_time_s"] for step in steps),
        "tflops_per_device": flops / 1e12, "mfu": flops / peak, "mfu_gemm": flops / gemm,
        "imbalance": statistics.mean(step["imbalance"] for step in steps),
        "imbalance_measured": measured if group.device.type == "cpu" else None,
        "tokens": median["tokens"], "samples": config.data.global_batch, "loss": steps[-1]["loss"],
        "peak_memory_bytes": peak_memory(group.device), "world": group.world, "layout": str(group.layout),
        "engine": config.engine,
        "spread": {"min": times[0], "max": times[-1], "quartiles": statistics.quantiles(times, n=4) if times[1:] else []},
        "rounds": rounds, "parts": {name: median[name] for name in PARTS}, "peak_flops": peak, "gemm_flops": gemm,
        "steps": len(steps), "config": to_dict(config), "date": str(date.today()),
        "machine": {"device": device_name(group.device), "threads": torch.get_num_threads(),
                    "python": platform.python_version(), "torch": torch.__version__, "megasora": __version__},
    }  # fmt: skip


def memory_by_part(engine: Engine) -> dict[str, int]:
    """Bytes that this process keeps of the run's state from step to step, by what it is."""
    names = {"model": "weights", "optim": "optimizer", "ema": "ema"}
    parts = dict.fromkeys(names.values(), 0)
    for name, tensor in engine.tensors().items():
        if part := names.get(name.partition("/")[0]):
            parts[part] += local(tensor).nbytes
    return parts


def checkpoint_stall(config: Config, group: Processes, engine: Engine) -> dict[str, float]:
    """Seconds that a step waits for one save in the background, and that the save takes."""
    root = Path(config.bench.checkpoint) / "bench-checkpoint"
    saver = Saver(root, config.checkpoint, None, group.device)
    begin = time.perf_counter()
    saver.start(1, engine.tensors(), {"step": 1})
    blocked = time.perf_counter() - begin
    saved = saver.finish()
    saver.close()
    dist.barrier()
    if group.is_main:
        shutil.rmtree(root)
    return {"blocked_s": blocked, "seconds": saved.seconds if saved else math.inf}


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
    """Seconds of forward and backward of one sample of each bucket, for data.costs: the best of a few full rows."""
    seconds: dict[str, float] = {}
    loss = training_loss(recipe)
    for bucket in loader.expected():
        count = config.data.capacity // loader.tokens_of(bucket)
        row = [loader.example(bucket, position) for position in range(count)]
        batch = build_microbatch(row, recipe, config.data.capacity)
        times = []
        for _ in range(4):
            clock = Clock(recipe.device)
            loss(engine.model, batch).backward()
            clock.lap("step")
            times.append(clock.total)
        seconds[str(bucket)] = min(times) / count
        engine.discard()
    Path(config.bench.costs).write_text(json.dumps(seconds, indent=1))


def device_name(device: torch.device) -> str:
    """What the machine calls it."""
    if on_gpu(device):
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "cpu"


def fp8_lines(result: dict[str, Any]) -> list[str]:
    if not result["fp8_share"]:
        return []
    share, mfu = 100 * result["fp8_share"], 100 * result["mfu_fp8"]
    return [f"  with fp8 {mfu:9.1f} %   of a peak in which {share:.0f} % of the multiply-adds are at fp8's"]


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    found, warmup, profiled = result["imbalance_measured"], result["warmup"], result["profiled"]
    measured = f", {found:.3f} measured" if found is not None else ""
    whole, parts = profiled["step_time_s"], {**profiled["parts"]}
    state = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in result["memory_by_part"].items())
    lines = [
        f"layout {result['layout']} on {result['world']} x {result['machine']['device']}, data {result['data']}",
        f"step       {result['step_time_s']:9.4f} s   ({result['spread']['min']:.4f} to {result['spread']['max']:.4f}, "
        f"{result['steps']} steps after {warmup['steps']} of warm-up{'' if warmup['steady'] else ', NOT STEADY'})",
        *(f"  {name:<16} {s:9.4f} s {100 * s / result['step_time_s']:5.1f} %" for name, s in result["parts"].items()),
        f"of one more step under the profiler, {whole:.4f} s:",
        *(f"  {name:<16} {s:9.4f} s {100 * s / whole:5.1f} %" for name, s in parts.items()),
        *(f"  {line}" for line in lines_of(profiled["communication"])),
        f"tokens/s   {result['tokens_per_s']:11,.0f}",
        f"TFLOP/s    {result['tflops_per_device']:11.4f} per device",
        f"MFU        {100 * result['mfu']:9.1f} %   of the device's peak, {100 * result['mfu_gemm']:.1f} % of a GEMM here",
        *fp8_lines(result),
        f"imbalance  {result['imbalance']:11.3f}   predicted{measured}",
        f"memory     {result['peak_memory_bytes'] / 2**30:9.2f} GiB at most; from step to step {state}",
        f"sent       {result['bytes_sent'] / 2**20:9.2f} MiB a step, by the main process",
    ]
    if "checkpoint" in result:
        stall = result["checkpoint"]
        lines.append(f"checkpoint {stall['blocked_s']:9.4f} s   that a step waits; written in {stall['seconds']:.2f} s")
    if result["energy_joules"] is not None:
        lines.append(f"energy     {result['energy_joules']:9.1f} J   a step")
    return "\n".join(lines)
