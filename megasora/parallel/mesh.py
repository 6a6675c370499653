"""The processes of a job: device, process group, and the one DeviceMesh that every group is cut from."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megasora.device import on_gpu, pick_device
from megasora.parallel.context import Context
from megasora.parallel.layout import Layout, parse_layout
from megasora.parallel.pipeline import Place

LINKS = ("pp_forward_even", "pp_forward_odd", "pp_backward_even", "pp_backward_odd")
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among its peers: its device, the layout and the mesh that realises it."""

    rank: int
    world: int
    device: torch.device
    layout: Layout
    mesh: DeviceMesh

    @cached_property
    def place(self) -> dict[str, int]:
        """This process's number along each axis."""
        return dict(zip(AXES, self.mesh.get_coordinate() or [], strict=True))

    @property
    def data_rank(self) -> int:
        """Which data-parallel share of the global batch is this process's."""
        return self.place["dp_replicate"] * self.layout.dp_shard + self.place["dp_shard"]

    def part(self, width: int) -> tuple[int, int, int]:
        """Which stretch is this process's of a row that `width` of the cp ranks share, of how many, and how many its attention
        layers see together."""
        tp, place = self.layout.tp, self.place["cp"] % width
        if not self.layout.sequence_parallel:
            return place, width, 1
        return place * tp + self.place["tp"], width * tp, tp

    @property
    def share(self) -> float:
        """Of the loss on its tokens: a tensor group that does not divide the tokens divides the loss."""
        return 1.0 if self.layout.sequence_parallel else 1.0 / self.layout.tp

    @cached_property
    def shards(self) -> DeviceMesh:
        """Over which parameters are sharded: data-parallel shards x context parts; with HSDP, replicas before them."""
        if self.layout.cp == 1:
            names = ("dp_replicate", "dp_shard") if self.layout.dp_replicate > 1 else ("dp_shard",)
            return self.mesh[names]
        shard = self.mesh["dp_shard", "cp"]._flatten("shard")
        if self.layout.dp_replicate == 1:
            return shard
        every = self.mesh["dp_replicate", "dp_shard", "cp"]._flatten("replicas")
        return every._unflatten(0, (self.layout.dp_replicate, shard.size()), ("replicate", "shard_cp"))

    @cached_property
    def replicas(self) -> DeviceMesh:
        """The mesh over which everything is replicated without ZeRO."""
        return self.mesh["dp_replicate", "dp_shard", "cp"]._flatten("replicas")

    @cached_property
    def contexts(self) -> dict[int, Context]:
        """The groups that exchange tokens for heads, and those that form rings, by the number of ranks that share a row."""
        found = {}
        for width in self.layout.widths:
            if width > 1:
                ulysses, ring = self.layout.context(width)
                names = (f"rows_of_{width}", f"ring_of_{width}", f"ulysses_of_{width}")
                cp = self.mesh["cp"]._unflatten(0, (self.layout.cp // width, ring, ulysses), names)
                found[width] = Context(cp[names[2]].get_group(), cp[names[1]].get_group(), (ulysses, ring))
        return found

    @cached_property
    def pipeline(self) -> Place:
        """This process's place in its pipeline. All ranks of the pipeline ask for it together."""
        ranks = dist.get_process_group_ranks(self.mesh["pp"].get_group())
        groups = [dist.new_group(ranks, use_local_synchronization=True, group_desc=name) for name in LINKS]
        layout = self.layout
        return Place(self.place["pp"], layout.pp, layout.schedule, (groups[0], groups[1]), (groups[2], groups[3]))

    @property
    def speaks(self) -> bool:
        """Whether this process is the one of its replica that writes down what all of them have."""
        return not any(self.place[axis] for axis in ("pp", "cp", "tp"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def on_main(group: Processes, mine: dict[int, T]) -> dict[int, T]:
    """What all processes have, by number, on the main one; the others get nothing."""
    found: list[dict[int, T]] | None = [mine] * group.world if group.is_main else None
    dist.gather_object(mine, found)
    return {number: value for share in found or [] for number, value in share.items()}


def world_size() -> int:
    """How many processes the launcher started (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def processes(layout: str, timeout: timedelta = timedelta(minutes=10)) -> Iterator[Processes]:
    """Joins the process group that the launcher set up (or a group of one) and lays the mesh over it; leaves it at the end.

    NCCL on GPUs, gloo on CPU. Raises ConfigError, before anything is started, for a layout that does not fit the world.
    """
    parsed = parse_layout(layout, world_size())
    device = pick_device()
    if on_gpu(device):
        torch.cuda.set_device(device)
    store = None if "RANK" in os.environ else dist.HashStore()
    gpu = device if on_gpu(device) else None
    dist.init_process_group(
        "nccl" if gpu else "gloo", store=store, rank=rank(), world_size=world_size(), timeout=timeout, device_id=gpu
    )
    try:
        shape = (parsed.pp, parsed.dp_replicate, parsed.dp_shard, parsed.cp, parsed.tp)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=AXES)
        yield Processes(rank(), world_size(), device, parsed, mesh)
    finally:
        dist.destroy_process_group()
