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

LINKS = ("even", "odd", "closing")  # of a pipeline: see `Place`
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
    def peers(self) -> dist.ProcessGroup | None:
        """The processes that hold the same stage of the model, or shards of it; None where this one is alone."""
        if self.world == self.layout.pp:
            return None
        return self.mesh["dp_replicate", "dp_shard", "cp", "tp"]._flatten("peers").get_group()

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
        layout = self.layout
        links = LINKS if layout.schedule == "interleaved" and layout.pp % 2 else LINKS[:2]
        forward, backward = (
            tuple(
                dist.new_group(ranks, use_local_synchronization=True, group_desc=f"pp_{way}_{link}") for link in links
            )
            for way in ("forward", "backward")
        )
        return Place(self.place["pp"], layout.pp, layout.schedule, forward, backward)

    @property
    def speaks(self) -> bool:
        """Whether this process is the one of its replica that writes down what all of them have."""
        return not any(self.place[axis] for axis in ("pp", "cp", "tp"))

    @cached_property
    def speakers(self) -> dist.ProcessGroup:
        """Those that speak, over gloo: what they say stays in the hosts' memory. All of them ask for it together."""
        ranks = self.mesh.mesh[0, :, :, 0, 0].flatten().tolist()
        return dist.new_group(ranks, backend="gloo", use_local_synchronization=True, group_desc="speakers")

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def on_main(group: Processes, mine: dict[int, T]) -> dict[int, T]:
    """What all processes that speak have, by number, on the main one; the others get nothing."""
    if not group.speaks:
        return {}
    found: list[dict[int, T]] | None = [mine] * group.layout.dp if group.is_main else None
    dist.gather_object(mine, found, group=group.speakers)  # padded to the largest share: too much for a GPU
    return {number: value for share in found or [] for number, value in share.items()}


def ranks_of_nodes(group: Processes, name: str) -> dict[str, list[int]]:
    """The ranks of each node, by the name that every process gives its own. All ask for it together."""
    names: list[str] = [""] * group.world
    dist.all_gather_object(names, name)
    return {node: [number for number, found in enumerate(names) if found == node] for node in names}


def node_report(layout: Layout, nodes: dict[str, list[int]]) -> str:
    """Which rank lies on which node, and what of the layout goes from node to node: a line."""
    lies = ", ".join(f"{spans(ranks)} -> {node}" for node, ranks in nodes.items())
    return f"ranks {lies}; between nodes: {', '.join(between_nodes(layout, nodes)) or 'nothing'}"


def between_nodes(layout: Layout, nodes: dict[str, list[int]]) -> list[str]:
    """The axes of which some group has ranks on several nodes."""
    node_of = {number: node for node, ranks in nodes.items() for number in ranks}
    sizes = {
        "tp": layout.tp, "ulysses": layout.ulysses, "ring": layout.ring, "dp_shard": layout.dp_shard,
        "dp_replicate": layout.dp_replicate, "pp": layout.pp,
    }  # from the innermost  # fmt: skip
    found, stride = [], 1
    for axis, size in sizes.items():
        firsts = ((number, number - number // stride % size * stride) for number in range(layout.world))
        if any(node_of[number] != node_of[first] for number, first in firsts):
            found.append(axis)
        stride *= size
    return found


def spans(numbers: list[int]) -> str:
    """0, 1, 2, 5 -> 0-2 5."""
    firsts = [n for n in numbers if n - 1 not in numbers]
    lasts = [n for n in numbers if n + 1 not in numbers]
    return " ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(firsts, lasts, strict=True))


def world_size() -> int:
    """How many processes the launcher started (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_of_a_node() -> int:
    """How many of them it started on each node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


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
