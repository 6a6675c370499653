"""The links between ranks: every pair of them at once in rounds, so that each rank talks to one other at a time."""

import os
import time
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from megasora.cluster.doctor import Finding, Limits
from megasora.device import on_gpu
from megasora.parallel.mesh import Processes


@dataclass(frozen=True)
class Link:
    """Between two ranks of different nodes: gigabytes a second, both ways at once, each counted."""

    ranks: tuple[int, int]
    nodes: tuple[str, str]
    gbs: float


def rounds(world: int) -> list[list[tuple[int, int]]]:
    """Every pair once, in rounds in which nobody is twice (the circle method); with an odd number one rests each time."""
    seats: list[int | None] = [*range(world), *[None] * (world % 2)]
    found = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def measure_links(
    group: Processes, node: str, megabytes: int = 16, repeats: int = 3
) -> tuple[list[Link], dict[str, float]]:
    """All links between nodes, and each node's clock minus the first one's in seconds. All ranks call it and get all."""
    nodes: list[str] = [""] * group.world
    dist.all_gather_object(nodes, node)
    payload = torch.ones(megabytes << 18, device=group.device)  # fp32
    box = torch.empty_like(payload)
    mine: list[Link] = []
    for pairs in rounds(group.world):
        dist.barrier()
        pair = next((pair for pair in pairs if group.rank in pair), None)
        if pair is None or nodes[pair[0]] == nodes[pair[1]]:
            continue
        other = pair[0] + pair[1] - group.rank
        best = min(_exchange(payload, box, other, group.device) for _ in range(repeats + 1))  # the first connects
        if group.rank == pair[0]:
            mine.append(Link(pair, (nodes[pair[0]], nodes[pair[1]]), 2 * payload.nbytes / 1e9 / best))
    everyone: list[list[Link]] = [[]] * group.world
    dist.all_gather_object(everyone, mine)
    clocks: list[float] = [0.0] * group.world
    dist.barrier()
    dist.all_gather_object(clocks, time.time())
    skew = {name: clock - clocks[0] for name, clock in zip(nodes, clocks, strict=True)}
    return [link for links in everyone for link in links], skew


def _exchange(payload: torch.Tensor, box: torch.Tensor, other: int, device: torch.device) -> float:
    begin = time.perf_counter()
    ops = [dist.P2POp(dist.isend, payload, other), dist.P2POp(dist.irecv, box, other)]
    for request in dist.batch_isend_irecv(ops):
        request.wait()
    if on_gpu(device):
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def judge_links(links: list[Link], skew: dict[str, float], limits: Limits) -> dict[str, list[Finding]]:
    """Findings a node: its links' median against the limits, so that one bad node does not discredit those it talks to."""
    if not links:
        return {node: [] for node in skew}
    typical = median(link.gbs for link in links)
    least = max(limits.link_gbs, limits.link_share * typical)
    middle = median(skew.values())
    found = {}
    for node in skew:
        own = [link for link in links if node in link.nodes]
        speed, worst = median(link.gbs for link in own), min(own, key=lambda link: link.gbs)
        text = f"{speed:.2f} GB/s, the worst {worst.gbs:.2f} between {' and '.join(worst.nodes)}"
        off = abs(skew[node] - middle)
        found[node] = [
            Finding("links", text, f">= {least:.2f}", speed >= least),
            Finding("clock_between_nodes_s", f"{off:.2f}", f"<= {limits.skew_s:g}", off <= limits.skew_s),
        ]
    return found


def one_a_node() -> bool:
    """Whether this process speaks for its node."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
