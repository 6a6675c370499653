"""The processes of a job: device, process group, and the one DeviceMesh that every group is cut from."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megasora.parallel.context import Context
from megasora.parallel.layout import Layout, parse_layout
from megasora.parallel.pipeline import Place

LINKS = ("pp_forward_even", "pp_forward_odd", "pp_backward_even", "pp_backward_odd")
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


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

    @property
    def part(self) -> tuple[int, int, int]:
        """Which stretch of a row's tokens is this process's, of how many, and how many its attention layers see together."""
        layout = self.layout
        return self.place["cp"] * layout.tp + self.place["tp"], layout.cp * layout.tp, layout.tp

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
    def context(self) -> Context:
        """The groups that exchange tokens for heads, and those that form rings."""
        cp = self.mesh["cp"]._unflatten(0, (self.layout.ring, self.layout.ulysses), ("ring", "ulysses"))
        return Context(cp["ulysses"].get_group(), cp["ring"].get_group(), (self.layout.ulysses, self.layout.ring))

    @cached_property
    def pipeline(self) -> Place:
        """This process's place in its pipeline. All ranks of the pipeline ask for it together."""
        ranks = dist.get_process_group_ranks(self.mesh["pp"].get_group())
        groups = [dist.new_group(ranks, use_local_synchronization=True, group_desc=name) for name in LINKS]
        layout = self.layout
        return Place(self.place["pp"], layout.pp, layout.schedule, (groups[0], groups[1]), (groups[2], groups[3]))

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world_size() -> int:
    """How many processes the launcher started (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", "0"))


def pick_device() -> torch.device:
    """This process's accelerator if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def processes(layout: str, timeout: timedelta = timedelta(minutes=10)) -> Iterator[Processes]:
    """Joins the process group that the launcher set up (or a group of one) and lays the mesh over it; leaves it at the end.

    NCCL on GPUs, gloo on CPU. Raises ConfigError, before anything is started, for a layout that does not fit the world.
    """
    parsed = parse_layout(layout, world_size())
    device = pick_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = None if "RANK" in os.environ else dist.HashStore()
    gpu = device if device.type == "cuda" else None
    dist.init_process_group(
        "nccl" if gpu else "gloo", store=store, rank=rank(), world_size=world_size(), timeout=timeout, device_id=gpu
    )
    try:
        shape = (parsed.pp, parsed.dp_replicate, parsed.dp_shard, parsed.cp, parsed.tp)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=AXES)
        yield Processes(rank(), world_size(), device, parsed, mesh)
    finally:
        dist.destroy_process_group()
