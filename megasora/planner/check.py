"""What `train` asks before it begins: does every stage fit on this machine's devices, and would another layout do better?

On a CPU memory alone is planned, in the host's memory divided by the processes that share it: nothing is measured for it.
"""

import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from megasora.errors import ConfigError
from megasora.observe.hardware import DEVICES, GIB, Device, known_device, this_cpu
from megasora.parallel.layout import Layout
from megasora.parallel.plan import check_layout
from megasora.planner.encoders import encoder_bytes
from megasora.planner.job import Job, Recompute
from megasora.planner.memory import memory
from megasora.planner.mixture import find_mixture
from megasora.planner.plan import build_plan, has_room, job_of, label, recompute_of, refuse, with_device
from megasora.planner.search import POLICIES, Make, beside, layouts, nearest, search
from megasora.planner.step_time import Step, step_time
from megasora.schema import Config, Stage
from megasora.training_data import TrainingData

WORTH = 0.85  # of the run's time: a layout that it is told of


def device_here(device: torch.device) -> Device:
    """This machine's device with the memory that it has. A GPU that is not in the table is taken for an A100 of that memory."""
    if device.type == "cpu":
        return this_cpu({}, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    properties = torch.cuda.get_device_properties(device)
    known = known_device(properties.name) or DEVICES["A100"]
    return replace(known, name=properties.name, memory=properties.total_memory)


def check_plan(config: Config, layout: Layout, device: Device, data: TrainingData, advise: bool) -> list[str]:
    """What there is to say about a run before it begins, a line each; `advise`: also of a better layout. Raises ConfigError for
    a stage that cannot fit, naming a layout that does, if parallel.plan_check=refuse; with `off` nothing is looked at."""
    if config.parallel.plan_check == "off":
        return []
    said = []
    encoders, policy = encoder_bytes(config), recompute_of(config.parallel)
    node = None if config.parallel.across_nodes else device.node
    makes = [maker(config, stage, device, data, encoders) for stage in config.stages]
    for make, stage in zip(makes, config.stages, strict=True):
        job, steps = make(layout, *policy)
        if not has_room(job, device):
            problem = refusal(make, job, steps, device, node)
            if config.parallel.plan_check == "refuse":
                raise ConfigError(f"{problem} (stage {stage.name}; parallel.plan_check=warn goes on)")
            said.append(f"stage {stage.name}: {problem}")
    if advise and device.peaks and not said:
        said += better(makes, config.stages, layout, policy, device, node)
    return said


def maker(config: Config, stage: Stage, device: Device, data: TrainingData, encoders: float) -> Make:
    mixture = find_mixture(config, stage, None, data)

    def make(layout: Layout, recompute: Recompute, every: int) -> tuple[Job, Sequence[Step]]:
        steps = mixture.steps(layout)
        return job_of(config, layout, steps, recompute, every, bool(device.peaks), encoders), steps

    return make


def refusal(make: Make, job: Job, steps: Sequence[Step], device: Device, node: int | None) -> ConfigError:
    if device.peaks:
        found = search(make, layouts(job.layout.world, device.node, job.model), device, job.model, node)
        return refuse(build_plan(job, steps, device), nearest(found, job.layout))
    needed = sum(with_device(memory(job), device).values())
    return ConfigError(
        f"parallel.layout={job.layout}: needs {needed / GIB:.1f} GiB of the {device.memory / GIB:.1f} GiB of each process of "
        "this machine; nearest is parallel.recompute=full, a smaller data.capacity or fewer processes"
    )


def better(
    makes: Sequence[Make], stages: Sequence[Stage], layout: Layout, policy: tuple[Recompute, int], device: Device,
    node: int | None,
) -> list[str]:  # fmt: skip
    """A layout beside that one, with the least recomputation that fits, on which all stages together take much less."""
    ours, job = seconds_of(makes, stages, layout, policy, device, node)
    best, instead = ours, job
    for other in beside(layout, device.node, job.model):
        for tried in POLICIES:
            try:
                seconds, found = seconds_of(makes, stages, other, tried, device, node)
            except ConfigError:
                break  # the layout and the model or the batch do not go together
            if seconds < float("inf"):
                if seconds < best:
                    best, instead = seconds, found
                break
    if best > WORTH * ours:
        return []
    return [
        f"parallel.layout={label(job)} is planned to take {ours / 86400:.3g} days, {label(instead)} {best / 86400:.3g}; "
        "see megasora plan --search"
    ]


def seconds_of(
    makes: Sequence[Make], stages: Sequence[Stage], layout: Layout, policy: tuple[Recompute, int], device: Device,
    node: int | None,
) -> tuple[float, Job]:  # fmt: skip
    """Of all stages, infinite if one does not fit; and the last one's job. Raises ConfigError."""
    total = 0.0
    for make, stage in zip(makes, stages, strict=True):
        job, steps = make(layout, *policy)
        check_layout(job.model, layout, node)
        if not has_room(job, device):
            return float("inf"), job
        total += stage.steps * step_time(job, steps, device).seconds
    return total, job
