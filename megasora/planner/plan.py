"""The whole answer for one job on one kind of device: does it fit, how long does a step take, what limits it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megasora.errors import ConfigError
from megasora.observe.hardware import GIB, Device
from megasora.parallel.layout import Layout, ParallelConfig
from megasora.parallel.plan import check_layout
from megasora.planner.job import Job, Recompute, Row
from megasora.planner.memory import Memory, memory
from megasora.planner.mixture import Mixture
from megasora.planner.parameters import by_module, model_parameters
from megasora.planner.stages import blocks_of, stages
from megasora.planner.step_time import Step, StepTime, collectives_by_link, idle_share, step_time
from megasora.schema import Config

FRAGMENTATION = 0.04  # of what comes and goes: what the allocator cannot use again
STORAGE = 2e9  # bytes a second that a node writes a checkpoint with; assumed


@dataclass(frozen=True)
class Plan:
    """What a layout takes on a device: bytes of each stage, and the time of a step and of its parts."""

    job: Job
    device: Device
    memories: tuple[Memory, ...]  # by pipeline stage
    time: StepTime
    steps: tuple[Step, ...]

    @property
    def fullest(self) -> Memory:
        return max(self.memories, key=lambda found: found.total)

    def parts(self, found: Memory) -> dict[str, float]:
        """Bytes of a stage by part, with what the device itself and its allocator take."""
        return with_device(found, self.device)

    @property
    def needed(self) -> float:
        return sum(self.parts(self.fullest).values())

    @property
    def fits(self) -> bool:
        return self.needed <= self.device.memory

    @property
    def flops_per_s(self) -> float:
        """Of each device."""
        return self.time.model_flops / self.time.seconds / self.job.layout.world

    @property
    def mfu(self) -> float:
        return self.flops_per_s / self.device.peaks[self.job.precision]


def fragmentation(found: Memory) -> float:
    """Bytes that the allocator cannot use again."""
    return FRAGMENTATION * sum(
        found.parts[name] for name in ("gathered weights", "activations", "gradients", "buffers")
    )


def with_device(found: Memory, device: Device) -> dict[str, float]:
    """Bytes of a stage by part, with what the device itself and its allocator take."""
    lost = {"reserved": device.reserved, "fragmentation": fragmentation(found)}
    return {name: size for name, size in (found.parts | lost).items() if size}


def has_room(job: Job, device: Device) -> bool:
    """Whether the fullest stage fits: all of a plan that memory decides."""
    return sum(with_device(memory(job), device).values()) <= device.memory


def build_plan(job: Job, steps: Sequence[Step], device: Device) -> Plan:
    """Raises ConfigError for a layout that the model cannot be spread on."""
    check_layout(job.model, job.layout)
    memories = tuple(memory(job, stage) for stage in stages(job))
    return Plan(job, device, memories, step_time(job, steps, device), tuple(steps))


def job_of(
    config: Config, layout: Layout, steps: Sequence[Step], recompute: Recompute = "none", every: int = 1,
    kernels: bool = True, encoders: float = 0.0,
) -> Job:  # fmt: skip
    """The job of a config on a layout; the row of which a rank has most decides about memory."""
    every_row = [row for step in steps for rows in step.rows for row in rows]
    largest = max(every_row, key=lambda row: (row.length / (row.width or layout.cp), row.text))
    rows = max(len(rows) for step in steps for rows in step.rows)
    return Job(
        model=config.model, layout=layout, row=largest, rows=rows, precision=config.precision.precision,
        optim=config.optim, recompute=recompute, every=every, kernels=kernels, encoders=encoders,
    )  # fmt: skip


def recompute_of(parallel: ParallelConfig) -> tuple[Recompute, int]:
    """`every2` -> ("full", 2)."""
    policy = parallel.recompute
    if policy.startswith("every"):
        return "full", int(policy.removeprefix("every"))
    return next(known for known in ("none", "selective", "full") if policy == known), 1


def check_unit(config: Config, layout: Layout) -> Config:
    """The config with rows whose length every rank gets an equal share of."""
    unit = layout.row_unit
    up = {name: -(-getattr(config.data, name) // unit) * unit for name in ("row_multiple", "capacity")}
    if up["capacity"] % up["row_multiple"]:
        up["capacity"] = -(-up["capacity"] // up["row_multiple"]) * up["row_multiple"]
    return replace(config, data=replace(config.data, **up))


def flops_by_convention(parameters: float, layers: int, width: int, tokens: int) -> float:
    """FLOPs of a training token as Megatron and NeMo count them: six a parameter, and attention over all tokens."""
    return 6.0 * parameters + 12.0 * layers * width * tokens


def facts(plan: Plan, mixture: Mixture | None, config: Config | None = None) -> dict[str, Any]:
    """Everything as plain numbers: bytes, seconds, FLOPs."""
    job, layout, time = plan.job, plan.job.layout, plan.time
    parameters = model_parameters(job.model)
    total = sum(p.count for p in parameters)
    every = stages(job)
    owned = 4 + (4 if job.optim.name == "muon" else 8) + (4 if job.optim.ema else 0)
    longest = max((T * H * W for (T, H, W), _ in job.row.samples), default=0)
    idle = idle_share(layout.schedule, layout.pp, job.rows) if layout.pp > 1 else 0.0
    nodes = max(1, layout.world // plan.device.node)
    seconds = time.seconds
    found: dict[str, Any] = {
        "layout": str(layout), "world": layout.world, "gpu": plan.device.name, "recompute": job.recompute,
        "recompute_every": job.every, "precision": job.precision, "fits": plan.fits,
        "parameters": total, "parameters_by_module": by_module(parameters),
        "memory_bytes": plan.needed, "memory_limit_bytes": plan.device.memory,
        "memory_by_part": plan.parts(plan.fullest), "memory_by_stage": [plan.parts(one) for one in plan.memories],
        "rows_per_rank": job.rows, "row_tokens": job.row.length,
        "flops_per_step": time.model_flops, "flops_per_sample": time.model_flops / time.samples,
        "flops_per_token": time.model_flops / time.tokens,
        "flops_per_token_convention": flops_by_convention(total, blocks_of(job.model), job.model.width, longest),
        "flops_recomputed": time.model_flops / 3 * sum(n % job.every == 0 for n in range(blocks_of(job.model)))
        / blocks_of(job.model) if job.recompute == "full" else 0.0,
        "communication_bytes": collectives_by_link(job, every[0], plan.device, plan.steps[0].rows[0]),
        "bubble": idle, "step_time_s": seconds, "step_time_by_part": time.parts, "imbalance": time.imbalance,
        "tokens_per_s": time.tokens / seconds, "tokens_per_s_per_device": time.tokens / seconds / layout.world,
        "samples_per_s": time.samples / seconds, "tflops_per_device": plan.flops_per_s / 1e12, "mfu": plan.mfu,
        "checkpoint_bytes": total * owned, "checkpoint_s": total * owned / nodes / STORAGE,
        "limit": max(time.parts, key=lambda name: time.parts[name]),
    }  # fmt: skip
    if config is not None:
        found["storage_bytes_per_s"] = storage_rate(plan, config)
    if mixture is not None:
        found["data"] = "real" if mixture.real else "buckets alike"
        found["empty_buckets"] = [str(bucket) for bucket in mixture.empty]
    return found


def storage_rate(plan: Plan, config: Config) -> float:
    """Bytes a second that all ranks together read of latents and captions: mean and variance of each value, and the text."""
    value = 4 if config.encode.latent_dtype == "float32" else 2  # bytes
    row_text = sum(row.counts * row.text for step in plan.steps for rows in step.rows for row in rows) / len(plan.steps)
    size = plan.time.tokens * plan.job.model.patch_values * 2 + row_text * plan.job.model.text_width
    return value * size / plan.time.seconds


def budget(plan: Plan, tokens: float = 0, samples: float = 0, steps: float = 0) -> dict[str, float]:
    """Time and device-hours for so much training."""
    needed = max(steps, tokens / plan.time.tokens, samples / plan.time.samples)
    seconds = needed * plan.time.seconds
    return {"steps": needed, "seconds": seconds, "device_hours": seconds * plan.job.layout.world / 3600}


def refuse(plan: Plan, nearest: Plan | None) -> ConfigError:
    """One line for a job that cannot fit, with the nearest layout that does."""
    parts = plan.parts(plan.fullest)
    worst = max(parts, key=lambda name: parts[name])
    instead = f"nearest that fits is {label(nearest.job)}" if nearest else "no layout of so many devices fits"
    return ConfigError(
        f"parallel.layout={plan.job.layout}: needs {plan.needed / GIB:.1f} GiB of the {plan.device.memory / GIB:.1f} GiB of one "
        f"{plan.device.name}, {parts[worst] / GIB:.1f} for {worst}; {instead}"
    )


def label(job: Job) -> str:
    """A layout with what is recomputed."""
    return f"{job.layout}" + (f" parallel.recompute={job.policy}" if job.recompute != "none" else "")


def single_sample_step(shape: tuple[int, int, int], text: int, layout: Layout) -> Step:
    """Every data-parallel rank has one row of one sample."""
    row = Row(((shape, text),), -(-math.prod(shape) // layout.row_unit) * layout.row_unit)
    return Step(((row,),) * layout.dp)
