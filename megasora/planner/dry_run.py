"""One rank of the real job, built and stepped on fake tensors in a world of the real size: nothing is allocated, nothing is sent.

What it does is compared with the closed forms: its parameters and its optimizer's state to the byte, every collective by kind,
group, number and bytes, and the most memory that lives at once. On a CPU the kernels' references run, so the closed form is
taken for them too.
"""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.testing._internal.distributed.fake_pg import FakeStore

from megasora.build import build_recipe
from megasora.encoders import LatentFacts
from megasora.engines.muon import nth_chunk
from megasora.engines.torch_native import EngineConfig, TorchNative
from megasora.errors import ConfigError
from megasora.microbatch import MicroBatch, training_loss
from megasora.models.base import Model
from megasora.models.families import build_model
from megasora.models.packing import Item, pack
from megasora.models.text import Text
from megasora.parallel.layout import ParallelConfig
from megasora.parallel.mesh import AXES, Processes
from megasora.parallel.plan import PLANS
from megasora.parallel.zero import local
from megasora.planner.communication import communication
from megasora.planner.job import Job, Row
from megasora.planner.memory import memory, optimizer_bytes
from megasora.planner.stages import Stage, stages
from megasora.planner.watch import Watch, watching
from megasora.schema import Config

PEAK = 0.15  # how far the most that lives at once may be from the closed form


@dataclass(frozen=True)
class DryRun:
    """What one rank did, beside what the closed form says: (found, expected) by name, and what disagrees."""

    rank: int
    stage: int
    compared: dict[str, tuple[float, float]]
    differences: list[str]
    watch: Watch


def alone(job: Job, rows: int = 2) -> Job:
    """The job with rows of one sample without padding: lengths of several are data, which fake tensors do not have. It is as much
    wider as makes the ranks' stretches of it equal. There are as many rows as fill the pipeline, and `rows` at least: two tell
    what a row costs from what a step costs."""
    (T, H, W), text = max(job.row.samples, key=lambda sample: sample[0][0] * sample[0][1] * sample[0][2])
    unit = 2 * job.layout.tp * job.layout.cp
    W = -(-W // (unit // math.gcd(unit, T * H))) * (unit // math.gcd(unit, T * H))
    return replace(job, row=Row((((T, H, W), text),), T * H * W), rows=min(job.rows, max(job.layout.pp, rows)),
                   kernels=False)  # fmt: skip


def dry_run(config: Config, job: Job, rank: int = 0, rows: int = 2) -> DryRun:
    """Builds and steps `alone(job, rows)` as that rank. No process group may be there; none is left."""
    job = alone(job, rows)
    if job.ddp:
        nearest = replace(job.layout, zero=1)
        raise ConfigError(f"parallel.layout={job.layout}: DDP does not take fake tensors; nearest is {nearest}")
    with fake_processes(job, rank) as group, FakeTensorMode(allow_non_fake_inputs=True):
        step = build_step(config, job, group, partial(undrawn, job))
        with watching() as watch, uncollected():
            step.forward_backward()
            peak = watch.peak()
            step.update()
        return compare(job, group, step.engine, watch, peak)


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's collector of cycles, which would look through a large model's objects again and again. What a step makes
    ends with its last reference."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class OneStep:
    """One rank of a job, and its rows of a step."""

    engine: TorchNative
    rows: list[MicroBatch]
    loss: Callable[..., Tensor]

    def forward_backward(self) -> None:
        self.engine.forward_backward(self.rows, self.loss)

    def update(self) -> None:
        self.engine.clip()
        self.engine.update(1e-4)


def build_step(config: Config, job: Job, group: Processes, build: Callable[[], Model[Any]]) -> OneStep:
    """Of a job whose rows have one sample each."""
    engine = TorchNative(
        build, 0, group, ParallelConfig(recompute=job.policy), EngineConfig(precision=job.precision), job.optim,
        PLANS.get(job.model.family, []),
    )  # fmt: skip
    for optimizer in engine.optimizers:
        in_small_groups(optimizer)
    null = Text(torch.zeros(1, job.model.text_width), torch.zeros(job.model.pooled_width))
    recipe = build_recipe(config, group, LatentFacts({}, null), config.stages[-1], 0)
    return OneStep(engine, [micro_batch(job) for _ in range(job.rows)], training_loss(recipe))


def in_small_groups(optimizer: torch.optim.Optimizer, size: int = 16) -> None:
    """DTensor's rules for one call on a thousand parameters take the time of their square; the update is the same in pieces."""
    optimizer.param_groups = [
        group | {"params": group["params"][begin : begin + size]}
        for group in optimizer.param_groups
        for begin in range(0, len(group["params"]), size)
    ]


def undrawn(job: Job) -> Any:
    """The model, whose weights are never drawn: they have no values. Off the meta device each fake parameter is made anew, for
    torch would swap the old ones, which fake tensors refuse; FSDP's are not fake themselves, and it knows them by identity."""
    model = build_model(job.model)
    model.init_weights = lambda: None  # type: ignore[method-assign]
    if job.layout.zero < 2:
        model.to_empty = partial(made_anew, model)  # type: ignore[method-assign, assignment]
    return model


def made_anew(model: nn.Module, device: torch.device) -> nn.Module:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=device)))
    return model


def compare(job: Job, group: Processes, engine: TorchNative, watch: Watch, peak: int) -> DryRun:
    stage = stages(job)[group.place["pp"]]
    expected = memory(job, stage).parts
    weights, state = owned(job, stage, group)
    optimizer = sum(
        size_of(value) for one in engine.optimizers for state in one.state.values() for value in state.values()
    )
    compared = {
        "weights": (float(sum(size_of(p) for p in engine.model.parameters())), weights),
        "optimizer": (float(optimizer), state),
        "peak of what comes and goes": (
            float(peak),
            sum(expected[name] for name in ("activations", "gradients", "gathered weights", "buffers")),
        ),
    }
    differences = [
        f"{name}: {found:,.0f} bytes, the closed form says {wanted:,.0f}"
        for name, (found, wanted) in compared.items()
        if abs(found - wanted) > wanted * (PEAK if name.startswith("peak") else 0)
    ]
    said, wanted = found_calls(watch), expected_calls(job, stage, group)
    for key in sorted(said.keys() | wanted.keys()):
        kind, ranks = key
        (calls, sent), (calls_wanted, sent_wanted) = said.get(key, (0, 0)), wanted.get(key, (0, 0))
        name = f"{kind} over ranks {ranks[0]}, {ranks[1]}, ... of {len(ranks)}"
        compared[name] = (float(sent), float(sent_wanted))
        if (calls, sent) != (calls_wanted, sent_wanted):
            differences.append(
                f"{name}: {calls} calls of {sent:,} bytes, the closed form says {calls_wanted} of {sent_wanted:,}"
            )
    return DryRun(group.rank, stage.number, compared, differences, watch)


def owned(job: Job, stage: Stage, group: Processes) -> tuple[float, float]:
    """Bytes of weights and of the optimizer's state on this very rank; `memory` has the first one of those that share them."""
    mine, place = stage.parameters(job.model), place_of(job, group)
    own = [p.owned(job.layout.tp, job.shards, place) for p in mine]
    weights = own if job.layout.zero >= 2 else [p.here(job.layout.tp) for p in mine]
    return 4.0 * sum(weights), float(optimizer_bytes(job, mine, own))


def place_of(job: Job, group: Processes) -> int:
    """Of this rank among those that share the optimizer's state."""
    ranks = ranks_of("data" if job.layout.zero == 1 else "shard", group)
    return ranks.index(group.rank) if job.shards > 1 else 0


Calls = dict[tuple[str, tuple[int, ...]], tuple[int, int]]  # (kind, ranks) -> calls and bytes in


def found_calls(watch: Watch) -> Calls:
    found: Calls = {}
    for call in watch.calls:
        if len(call.ranks) == 1:  # nobody else
            continue
        calls, sent = found.get((call.kind, call.ranks), (0, 0))
        found[call.kind, call.ranks] = calls + 1, sent + call.sent
    return found


def expected_calls(job: Job, stage: Stage, group: Processes) -> Calls:
    found: Calls = {}
    for one in communication(job, stage, place_of(job, group)):
        key = one.kind, ranks_of(one.axis, group)
        calls, sent = found.get(key, (0, 0))
        found[key] = calls + one.count, sent + one.sent * one.count
    return found


def ranks_of(axis: str, group: Processes) -> tuple[int, ...]:
    """The ranks that an axis of the closed form means here."""
    if axis == "world":
        return tuple(range(group.world))
    if axis in ("ulysses", "ring"):
        context = group.contexts[group.layout.cp]
        return tuple(dist.get_process_group_ranks(context.ulysses if axis == "ulysses" else context.ring))
    if axis == "peers":
        return tuple(dist.get_process_group_ranks(group.peers)) if group.peers else (group.rank,)
    meshes = {"tp": lambda: group.mesh["tp"], "pp": lambda: group.mesh["pp"], "data": lambda: group.replicas}
    if axis in meshes:
        return tuple(dist.get_process_group_ranks(meshes[axis]().get_group()))
    shards = group.shards
    dim = shards.ndim - 1 if axis == "shard" else 0
    return tuple(dist.get_process_group_ranks(shards.get_group(dim)))


def size_of(tensor: Tensor) -> int:
    here = local(tensor)
    return here.numel() * here.element_size()


@dataclass(frozen=True)
class Chunks:
    """The ranks' shares of a parameter, each made when it is asked for: FSDP asks for one or two of thousands, and making the
    others would take nearly all of a dry run's time."""

    tensor: Tensor
    parts: int
    dim: int

    def __getitem__(self, number: int) -> Tensor:
        share = nth_chunk(self.tensor, number, self.parts, self.dim)
        return share if share.numel() else share.new_empty(0)


@contextmanager
def fake_processes(job: Job, rank: int, device: str = "cpu") -> Iterator[Processes]:
    """A process group of the layout's world in which this process is `rank` and nobody answers; tensors lie on a `device`."""
    layout = job.layout
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    concatenate = DeviceMesh._concatenate

    def for_real(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():  # it reads the ranks, which fake tensors have not
            return concatenate(*args, **kwargs)

    DeviceMesh._concatenate = staticmethod(for_real)  # type: ignore[method-assign]
    chunk = _fsdp_param._chunk_with_empty
    _fsdp_param._chunk_with_empty = Chunks  # type: ignore[assignment]
    try:
        shape = (layout.pp, layout.dp_replicate, layout.dp_shard, layout.cp, layout.tp)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=AXES)
        group = Processes(rank, layout.world, torch.device(device), layout, mesh)
        for axis in ("shard", "data", "tp", "pp", "peers", *(("ulysses",) if layout.cp > 1 else ())):
            ranks_of(axis, group)  # meshes are cut now, for that too reads ranks
        if layout.pp > 1:
            assert group.pipeline
        yield group
    finally:
        DeviceMesh._concatenate = staticmethod(concatenate)  # type: ignore[method-assign]
        _fsdp_param._chunk_with_empty = chunk
        dist.destroy_process_group()


def micro_batch(job: Job) -> MicroBatch:
    """A row of the job's one sample, of fake numbers."""
    model, ((shape, text),) = job.model, job.row.samples
    patches = torch.zeros(job.row.length, model.patch_values)
    with unset_fake_temporarily():
        timesteps = torch.full((shape[0],), 0.5)
        item = Item(torch.zeros(job.row.length, 1), shape, timesteps, torch.zeros(text, model.text_width),
                    torch.zeros(model.pooled_width), 24.0, 0 if model.classes else -1)  # fmt: skip
        row = pack([item])
        _ = row.run_sample
    row = replace(row, tokens=torch.zeros(job.row.length, model.patch_values))
    return MicroBatch(row, patches, patches, torch.zeros(job.row.length))
