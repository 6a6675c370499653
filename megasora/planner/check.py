"""What `train` asks before it begins: does every stage fit on this machine's devices, and would another layout do better?

On a CPU memory alone is planned, in the host's memory divided by the processes that share it: nothing is measured for it.
"""

import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from megasora.errors import ConfigError
from megasora.observe.hardware import DEVICES, GIB, Device, this_cpu
from megasora.parallel.layout import Layout
from megasora.planner.encoders import encoder_bytes
from megasora.planner.job import Job, Recompute
from megasora.planner.memory import memory
from megasora.planner.mixture import find_mixture
from megasora.planner.plan import build_plan, has_room, job_of, label, recompute_of, refuse, with_device
from megasora.planner.search import Make, beside, layouts, nearest, search
from megasora.planner.step_time import Step
from megasora.schema import Config, Stage
from megasora.training_data import TrainingData

WORTH = 0.85  # of a step's time: a layout that a run is told of


def device_here(device: torch.device) -> Device:
    """This machine's device with the memory that it has. A GPU that is not in the table is taken for an A100 of that memory."""
    if device.type == "cpu":
        return this_cpu({}, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    properties = torch.cuda.get_device_properties(device)
    known = next((found for name, found in DEVICES.items() if name in properties.name), DEVICES["A100"])
    return replace(known, name=properties.name, memory=properties.total_memory)


def check_plan(config: Config, layout: Layout, device: Device, data: TrainingData, advise: bool) -> list[str]:
    """What there is to say about a run before it begins, a line each; `advise`: also of better layouts. Raises ConfigError for
    a stage that cannot fit, naming a layout that does, if parallel.plan_check=refuse."""
    said = []
    encoders = encoder_bytes(config)
    for stage in config.stages:
        make = maker(config, stage, device, data, encoders)
        job, steps = make(layout, *recompute_of(config.parallel))
        if not has_room(job, device):
            problem = refusal(make, job, steps, device)
            if config.parallel.plan_check == "refuse":
                raise ConfigError(f"{problem} (stage {stage.name}; parallel.plan_check=warn goes on)")
            said.append(f"stage {stage.name}: {problem}")
        elif advise and device.peaks:
            said += better(make, job, steps, device, stage)
    return said


def maker(config: Config, stage: Stage, device: Device, data: TrainingData, encoders: float) -> Make:
    mixture = find_mixture(config, stage, None, data)

    def make(layout: Layout, recompute: Recompute, every: int) -> tuple[Job, Sequence[Step]]:
        steps = mixture.steps(layout)
        return job_of(config, layout, steps, recompute, every, bool(device.peaks), encoders), steps

    return make


def refusal(make: Make, job: Job, steps: Sequence[Step], device: Device) -> ConfigError:
    if device.peaks:
        found = search(make, layouts(job.layout.world, device.node, job.model), device, job.model)
        return refuse(build_plan(job, steps, device), nearest(found, job.layout))
    needed = sum(with_device(memory(job), device).values())
    return ConfigError(
        f"parallel.layout={job.layout}: needs {needed / GIB:.1f} GiB of the {device.memory / GIB:.1f} GiB that each process of this "
        f"machine has; nearest is parallel.recompute=full, a smaller data.capacity or fewer processes"
    )


def better(make: Make, job: Job, steps: Sequence[Step], device: Device, stage: Stage) -> list[str]:
    ours = build_plan(job, steps, device)
    best = search(make, beside(job.layout, device.node, job.model), device, job.model)[0].plan
    if best is None or best.time.seconds > WORTH * ours.time.seconds:
        return []
    return [
        f"stage {stage.name}: parallel.layout={label(job)} is planned at {ours.time.seconds:.2f} s a step, "
        f"{label(best.job)} at {best.time.seconds:.2f} s; see megasora plan --search"
    ]
