"""What a run recomputes where the config leaves that to its device's memory (parallel.recompute=auto): as little as fits, by the
closed form that `megasora plan` has."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from megasora.device import on_gpu
from megasora.errors import ConfigError
from megasora.observe.hardware import GIB, RESERVED
from megasora.observe.logs import log
from megasora.parallel.mesh import Processes
from megasora.planner.encoders import encoder_bytes
from megasora.planner.job import Job, Recompute
from megasora.planner.memory import memory
from megasora.planner.mixture import find_mixture
from megasora.planner.plan import fragmentation, job_of
from megasora.planner.search import POLICIES
from megasora.schema import Config
from megasora.training_data import TrainingData


def settle_recompute(config: Config, group: Processes, data: TrainingData) -> Config:
    """The config with what blocks recompute, on every rank the same. All ranks call it; raises ConfigError where nothing fits."""
    if config.parallel.recompute != "auto":
        return config
    room = room_of(config, group)
    jobs = [
        job_of(
            config,
            group.layout,
            find_mixture(config, stage, None, data).steps(group.layout),
            kernels=on_gpu(group.device),
            encoders=encoder_bytes(config),
        )
        for stage in config.stages
    ]
    recompute, every = cheapest(jobs, room, config)
    policy = f"every{every}" if every > 1 else recompute
    needs = max(needed(replace(job, recompute=recompute, every=every)) for job in jobs)
    log.info("parallel.recompute=auto: %s, %.2f GiB of %.2f GiB", policy, needs / GIB, room / GIB)
    return replace(config, parallel=replace(config.parallel, recompute=policy, memory=0.0))


def room_of(config: Config, group: Processes) -> float:
    """Bytes for weights and what comes and goes: the config's, or what the smallest of the devices has. On a CPU no bound."""
    if config.parallel.memory:
        return config.parallel.memory * GIB
    if not on_gpu(group.device):
        return math.inf
    found = torch.tensor(torch.cuda.get_device_properties(group.device).total_memory - RESERVED, device=group.device)
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return float(found.item())


def cheapest(jobs: Sequence[Job], room: float, config: Config) -> tuple[Recompute, int]:
    """What to recompute, and of how many blocks one, so that every job fits."""
    # There a block is repeated whole or not at all.
    whole = config.parallel.offload or (config.engine == "deepspeed" and jobs[0].layout.zero == 3)
    for recompute, every in (policy for policy in POLICIES if not (whole and policy[0] == "selective")):
        needs = max(needed(replace(job, recompute=recompute, every=every)) for job in jobs)
        if needs <= room:
            return recompute, every
    nearest = math.ceil(needs / GIB * 100) / 100
    what = f"memory={config.parallel.memory}" if config.parallel.memory else "recompute=auto"
    raise ConfigError(
        f"parallel.{what}: {jobs[0].layout} needs {nearest:.2f} GiB a device where all is recomputed; nearest is "
        f"parallel.memory={nearest:.2f}, or another layout (megasora plan --search)"
    )


def needed(job: Job) -> float:
    """Bytes on the fullest rank, with what the allocator cannot use again."""
    fullest = memory(job)
    return fullest.total + fragmentation(fullest)
