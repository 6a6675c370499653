"""How long a step takes: each rank's computing by what limits it, what it says to others where nothing hides it, the pipeline's
bubble, and the slowest rank of every meeting.

A row's time is that of its samples (matrix products and attention at the device's efficiencies), of what goes over memory
besides, and of its collectives. Times are linear in the reciprocals of the efficiencies, which is what makes them easy to fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from megasora.models.flops import attention_macs, forward_macs, training_flops
from megasora.models.packing import Shape
from megasora.observe.hardware import Device
from megasora.parallel.layout import Layout
from megasora.parallel.schedule import bubble
from megasora.planner.communication import of_rows, of_state
from megasora.planner.job import Job, Row
from megasora.planner.memory import again, tapes
from megasora.planner.stages import Stage, blocks_of, stages
from megasora.planner.tape import Collective
from megasora.training_data import meeting

UPDATE = 52  # bytes over memory a parameter: the norm, clipping, AdamW and the average


@dataclass(frozen=True)
class Work:
    """What one rank does in a step, in units of what limits it."""

    linear: float  # FLOPs of matrix products
    attention: float  # FLOPs of attention
    traffic: float  # bytes over memory of all else
    operations: float  # calls of operations
    update: float  # bytes over memory of the optimizer's step
    link: float  # bytes to the ranks of the node
    network: float  # bytes to other nodes
    messages: float  # collectives
    hidden_link: float = 0.0  # of the above what computing can hide
    hidden_network: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


NOTHING = Work(0, 0, 0, 0, 0, 0, 0, 0)


def compute_parts(work: Work, device: Device, precision: str) -> dict[str, float]:
    """Seconds of computing by what limits it."""
    peak, e = device.peaks[precision], device.efficiency
    found = {
        "matrix products": work.linear / (peak * e.gemm),
        "attention": work.attention / (peak * e.attention),
        "norms and the like": work.traffic / (device.bandwidth * e.memory),
        "optimizer": work.update / (device.bandwidth * e.memory),
    }
    computing = sum(found.values()) - found["optimizer"]
    starting = work.operations * e.operation
    # A GPU computes while the next operation is being started; a CPU does one after the other.
    return found | {"starting operations": max(0.0, starting - computing) if e.overlap else starting}


def parts(work: Work, device: Device, precision: str) -> dict[str, float]:
    """Seconds of everything, communication being what nothing hides."""
    e, computing = device.efficiency, compute_parts(work, device, precision)
    hidden = work.hidden_link / (device.link * e.link) + work.hidden_network / (device.network * e.network)
    every = work.link / (device.link * e.link) + work.network / (device.network * e.network)
    behind = e.overlap * (sum(computing.values()) - computing["optimizer"])
    shown = every - hidden + max(0.0, hidden - behind) + work.messages * device.latency
    return computing | {"communication": shown}


def link_of(axis: str, layout: Layout, node: int) -> str:
    """Whether the ranks of an axis are of one node: it is, from the innermost, tp, Ulysses, ring, shards, replicas, stages."""
    spans = {
        "tp": layout.tp,
        "ulysses": layout.tp * layout.ulysses,
        "ring": layout.tp * layout.cp,
        "shard": layout.tp * layout.cp * layout.dp_shard,
        "data": layout.tp * layout.cp * layout.dp,
        "replicate": layout.tp * layout.cp * layout.dp,
        "peers": layout.world // layout.pp,
    }
    return "link" if spans.get(axis, layout.world) <= node else "network"


@lru_cache(maxsize=4096)
def sample_flops(model: Any, shape: Shape, text: int) -> tuple[float, float]:
    """Of linear layers and of attention, forward."""
    of_attention = attention_macs(model, shape, text)
    return 2.0 * (forward_macs(model, shape, text) - of_attention), 2.0 * of_attention


@lru_cache(maxsize=1 << 16)
def row_flops(model: Any, row: Row) -> tuple[float, float, float]:
    """Forward, padding too, of linear layers and of attention; and of training its samples, as MFU counts."""
    found = [sample_flops(model, shape, text) for shape, text in row.padded]
    linear, attention = (sum(values) for values in zip(*found, strict=True))
    return linear, attention, float(sum(training_flops(model, shape, text) for shape, text in row.samples))


idle_share = lru_cache(maxsize=4096)(bubble)


def products(job: Job, stage: Stage, row: Row) -> Work:
    """Matrix products and attention of one row, padding too, forward and backward, on one rank of a stage."""
    linear, attention, _ = row_flops(job.model, row)
    share = len(stage.blocks) / blocks_of(job.model) / (job.layout.tp * (row.width or job.layout.cp))
    passes = 3 + (repeated(job, stage) if job.recompute == "full" else 0)
    return replace(NOTHING, linear=share * passes * linear, attention=share * passes * attention)


def around_products(job: Job, stage: Stage, row: Row, device: Device) -> Work:
    """All else of a row, which its length decides: traffic, operations, what the blocks say to each other."""
    here = replace(job, row=row, rows=1)
    blocks, passes = tapes(here, stage), 3 + repeated(job, stage)
    traffic, operations = (passes * sum(getattr(tape, of) for tape in blocks) for of in ("traffic", "operations"))
    said = of_rows(here, stage)
    return replace(spoken(said, job.layout, device), traffic=traffic, operations=operations)


def repeated(job: Job, stage: Stage) -> float:
    """The share of the stage's blocks whose forward pass is computed again."""
    return sum(again(job, stage, number) for number in stage.blocks) / max(1, len(stage.blocks))


def spoken(said: Sequence[Collective], layout: Layout, device: Device) -> Work:
    """Bytes over links and network, and messages."""
    sums = dict.fromkeys(("link", "network", "hidden_link", "hidden_network"), 0.0)
    for one in said:
        where = link_of(one.axis, layout, device.node)
        sums[where] += one.total
        if one.hidden:
            sums[f"hidden_{where}"] += one.total
    return replace(NOTHING, messages=float(sum(one.count for one in said)), **sums)


def step_work(job: Job, stage: Stage, device: Device) -> Work:
    """What comes once a step, or with weights: gathers, reductions, the optimizer."""
    owned = sum(one.owned for one in stage.sizes(job).values())
    said = of_state(job, stage)
    return replace(spoken(said, job.layout, device), update=float(UPDATE * owned))


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part, and what it does in that time."""

    parts: dict[str, float]
    model_flops: float  # of all samples of the step, as MFU counts them
    tokens: float
    samples: float
    imbalance: float  # time over the mean of the ranks that meet

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Step:
    """A global batch as the loader would spread it: rows[group][micro-batch]. Groups are the ranks that share all rows, or with
    dynamic context parallelism single ranks."""

    rows: tuple[tuple[Row, ...], ...]


def step_time(job: Job, steps: Sequence[Step], device: Device) -> StepTime:
    """The mean over some steps of the mixture of buckets, each as long as its slowest ranks."""
    slowest = max(stages(job), key=lambda one: len(one.blocks))
    by_length: dict[tuple[int, int], Work] = {}
    cache: dict[Row, float] = {}

    def work_of(row: Row) -> Work:
        key = row.length, row.width
        if key not in by_length:
            by_length[key] = around_products(job, slowest, row, device)
        return products(job, slowest, row) + by_length[key]

    def seconds(row: Row) -> float:
        if row not in cache:
            cache[row] = sum(parts(work_of(row), device, job.precision).values())
        return cache[row]

    sums: dict[str, float] = {}
    model_flops = tokens = samples = whole = even = 0.0
    for step in steps:
        times = [[seconds(row) for row in rows] for rows in step.rows]
        totals = [sum(found) for found in times]
        meets = meeting(job.layout) == "micro"
        took = sum(max(micro) for micro in zip(*times, strict=True)) if meets else max(totals)
        whole, even = whole + took, even + sum(totals) / len(totals)
        longest = totals.index(max(totals))
        once = step_work(replace(job, rows=len(step.rows[0])), slowest, device)
        found = parts(sum(map(work_of, step.rows[longest]), once), device, job.precision)
        found["waiting for the slowest"] = took - max(totals)
        if job.layout.pp > 1:
            idle = idle_share(job.layout.schedule, job.layout.pp, len(step.rows[0]))
            found["pipeline bubble"] = took * idle / (1 - idle)
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value / len(steps)
        every = [row for rows in step.rows for row in rows]
        model_flops += sum(row.counts * row_flops(job.model, row)[2] for row in every)
        tokens += sum(row.counts * (row.length - row.padding) for row in every)
        samples += sum(row.counts * len(row.samples) for row in every)
    n = len(steps)
    return StepTime(sums, model_flops / n, tokens / n, samples / n, whole / even)


def collectives_by_link(job: Job, stage: Stage, device: Device, rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """{"link": {"all_gather over shard": bytes sent}, "network": ...} of a rank that has these rows in a step."""
    found: dict[str, dict[str, float]] = {"link": {}, "network": {}}
    said = [one for row in rows for one in of_rows(replace(job, row=row, rows=1), stage)]
    for one in [*said, *of_state(replace(job, rows=len(rows)), stage)]:
        name = f"{one.kind} over {one.axis}"
        place = found[link_of(one.axis, job.layout, device.node)]
        place[name] = place.get(name, 0.0) + one.total
    return found
