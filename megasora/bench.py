"""The benchmark of a training step: the trainer's own engine, loader and micro-batches, each part timed apart."""

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipelines.loader import Loader
from megasora import __version__
from megasora.build import build_engine, build_recipe, check_fit
from megasora.config import to_dict
from megasora.device import on_gpu
from megasora.engines.torch_native import Engine
from megasora.errors import CheckFailed, ConfigError
from megasora.microbatch import MicroBatch, Recipe, build_microbatch, build_rows, training_loss
from megasora.models.flops import forward_macs
from megasora.observe.hardware import device_peak, gemm_peak, peak_memory, synchronize
from megasora.observe.logs import log
from megasora.parallel.fp8 import fp8_share, mixed_peak
from megasora.parallel.mesh import Processes, processes
from megasora.planner.fitting import settle_recompute
from megasora.planner.watch import moved, watching
from megasora.schema import Config
from megasora.training_data import build_loader, open_data, synthetic_data

TEXT_TOKENS = 64  # of a synthetic caption
PARTS = ("data_wait", "microbatch", "forward_backward", "clip", "update")


def bench(config: Config, synthetic: bool) -> dict[str, Any]:
    """Runs bench.warmup + bench.steps updates of the first stage; all ranks return the same result.

    Times are the main process's medians. A step's FLOPs are the closed form of its samples; `mfu` is over the device's dense
    peak, `mfu_gemm` over the best matrix product of this very run.
    """
    with processes(config.parallel.layout) as group:
        data = synthetic_data(config, TEXT_TOKENS) if synthetic else open_data(config, group.device)
        check_fit(config, group, data.facts)
        engine = build_engine(settle_recompute(config, group, data), group)
        loader = build_loader(config, group, data, config.stages[0], 0, {})
        recipe = build_recipe(config, group, data.facts, config.stages[0], 0)
        batches = loader.batches(0)
        precision = config.precision.precision
        peak, gemm = device_peak(group.device, precision), gemm_peak(group.device, precision)
        steps: list[dict[str, float]] = []
        loss = 0.0
        for number in range(config.bench.warmup + config.bench.steps):
            clock = Clock(group.device)
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
            log.info("bench: step %d/%d %.3f s", number + 1, config.bench.warmup + config.bench.steps, clock.total)
            if number >= config.bench.warmup:
                seconds = clock.total
                steps.append(
                    {**clock.laps, "step_time_s": seconds, "busy": busy, "tokens": batch.tokens, "imbalance": batch.imbalance,
                     "tokens_per_s": batch.tokens / seconds,
                     "tflops_per_device": batch.flops / seconds / group.world / 1e12}
                )  # fmt: skip
        with watching() as watch:  # one step more, which is not timed
            engine.forward_backward(build_rows(next(batches), recipe), training_loss(recipe))
            engine.clip()
            engine.update(config.optim.lr)
        batches.close()
        share = share_in_fp8(config, group, engine, rows[0])
        if config.bench.costs and group.is_main:
            write_costs(config, engine, loader, recipe)
        return report(config, group, steps, loss, peak, gemm, share, moved(watch.calls), synthetic)


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
    config: Config,
    group: Processes,
    steps: list[dict[str, float]],
    loss: float,
    peak: float,
    gemm: float,
    share: float | None,
    sent: float,
    synthetic: bool,
) -> dict[str, Any]:
    """The result, with the names of metrics.jsonl at the top."""
    median = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    times = sorted(step["step_time_s"] for step in steps)
    every: list[list[float]] = [[] for _ in range(group.world)]
    dist.all_gather_object(every, [step["busy"] for step in steps])
    measured = statistics.mean(max(step) * len(step) / sum(step) for step in zip(*every, strict=True))
    result = {
        "schema": 1, "step_time_s": median["step_time_s"], "data_wait_s": median["data_wait"],
        "tokens_per_s": median["tokens_per_s"], "tflops_per_device": median["tflops_per_device"],
        "mfu": median["tflops_per_device"] * 1e12 / peak, "mfu_gemm": median["tflops_per_device"] * 1e12 / gemm,
        "fp8_share": share, "mfu_fp8": None if share is None else median["tflops_per_device"] * 1e12
        / mixed_peak(share, device_peak(group.device, config.precision.precision, fp8=True), peak),
        "imbalance": statistics.mean(step["imbalance"] for step in steps),
        "imbalance_measured": measured if group.device.type == "cpu" else None,
        "tokens": median["tokens"], "samples": config.data.global_batch, "loss": loss,
        "peak_memory_bytes": peak_memory(group.device), "bytes_sent": sent, "world": group.world, "layout": str(group.layout),
        "spread": {"min": times[0], "max": times[-1], "quartiles": statistics.quantiles(times, n=4) if times[1:] else []},
        "parts": {name: median[name] for name in PARTS}, "peak_flops": peak, "gemm_flops": gemm,
        "steps": len(steps), "data": "synthetic" if synthetic else config.data.path, "config": to_dict(config),
        "machine": {"device": device_name(group.device), "threads": torch.get_num_threads(),
                    "python": platform.python_version(), "torch": torch.__version__, "megasora": __version__},
    }  # fmt: skip
    shared = [result]
    dist.broadcast_object_list(shared)
    result = shared[0]
    if config.bench.output and group.is_main:
        Path(config.bench.output).write_text(json.dumps(result, indent=1))
    return result


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


def read_result(file: str) -> dict[str, Any]:
    """An earlier result to compare with. Raises ConfigError when it is none."""
    try:
        old = json.loads(Path(file).read_text())
        assert isinstance(old, dict)
        relative_spread(old), old["step_time_s"] * old["gemm_flops"]
    except OSError as error:
        raise ConfigError(f"bench.against={file}: {error.strerror}") from None
    except (ValueError, KeyError, IndexError, TypeError, AssertionError):
        raise ConfigError(f"bench.against={file}: not a result of `megasora bench` with two steps or more") from None
    return old


def relative_spread(result: dict[str, Any]) -> float:
    """Distance of the quartiles of the step time, over its median."""
    first, _, third = result["spread"]["quartiles"]
    return (third - first) / result["step_time_s"]


def compare(result: dict[str, Any], old: dict[str, Any], name: str) -> None:
    """Raises CheckFailed when the step, in units of the same run's GEMM, got slower by more than both runs' spread."""
    before, after = (r["step_time_s"] * r["gemm_flops"] for r in (old, result))
    noise = sum(relative_spread(r) for r in (old, result) if r["spread"]["quartiles"])
    slower = after / before - 1
    log.info("against %s: %+.1f %% (noise %.1f %%)", name, 100 * slower, 100 * noise)
    if slower > max(noise, 0.03):
        raise CheckFailed(
            f"step_time_s: {100 * slower:.1f} % slower than {name}, beyond the noise of {100 * noise:.1f} %"
        )


def fp8_lines(result: dict[str, Any]) -> list[str]:
    if not result["fp8_share"]:
        return []
    share, mfu = 100 * result["fp8_share"], 100 * result["mfu_fp8"]
    return [f"  with fp8 {mfu:9.1f} %   of a peak in which {share:.0f} % of the multiply-adds are at fp8's"]


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    found = result["imbalance_measured"]
    measured = f", {found:.3f} measured" if found is not None else ""
    lines = [
        f"layout {result['layout']} on {result['world']} x {result['machine']['device']}, data {result['data']}",
        f"step       {result['step_time_s']:9.4f} s   ({result['spread']['min']:.4f} to {result['spread']['max']:.4f}, "
        f"{result['steps']} steps)",
        *(f"  {name:<16} {s:9.4f} s {100 * s / result['step_time_s']:5.1f} %" for name, s in result["parts"].items()),
        f"tokens/s   {result['tokens_per_s']:11,.0f}",
        f"TFLOP/s    {result['tflops_per_device']:11.4f} per device",
        f"MFU        {100 * result['mfu']:9.1f} %   of the device's peak, {100 * result['mfu_gemm']:.1f} % of a GEMM here",
        *fp8_lines(result),
        f"imbalance  {result['imbalance']:11.3f}   predicted{measured}",
        f"memory     {result['peak_memory_bytes'] / 2**30:9.2f} GiB",
        f"sent       {result['bytes_sent'] / 2**20:9.2f} MiB a step, by the main process",
    ]
    return "\n".join(lines)
