"""What one rank says to others in a step: every collective, the axis it goes along and its bytes, as the engine has them.

Tensor parallelism and context parallelism speak in every block (tape.py). ZeRO and DDP speak of weights and gradients: zero2
gathers a block's weights once a step, zero3 twice a row, both reduce-scatter its gradients once a step (parallel/zero.py,
FSDP2). Muon gathers each matrix that is sharded, and one rank hands round what it made of it
(engines/muon.py).
"""

from collections.abc import Sequence

from megasora.parallel.schedule import CHUNKS
from megasora.parallel.zero import BUCKET
from megasora.planner.job import Job
from megasora.planner.memory import again, tapes
from megasora.planner.parameters import Sizes
from megasora.planner.stages import Stage
from megasora.planner.tape import FLOAT, Call, Collective


def communication(job: Job, stage: Stage, place: int = 0) -> list[Collective]:
    """Of a step, on a rank of that stage, and at that place of the shards: the last ones may have less. Kind and axis by kind and
    axis, of equal ones their number."""
    return of_rows(job, stage) + of_state(job, stage, place)


def of_rows(job: Job, stage: Stage) -> list[Collective]:
    """What belongs to a row's own forward and backward pass."""
    return in_blocks(job, stage) + between_stages(job, stage)


def of_state(job: Job, stage: Stage, place: int = 0) -> list[Collective]:
    """What belongs to weights and gradients, and what all say to all."""
    found = weights(job, stage) + gradients(job, stage, place) + orthogonalised(job, stage)
    world = job.layout.world
    return [*found, Collective("all_reduce", "world", world, FLOAT, 2)] if world > 1 else found  # loss and norm


def in_blocks(job: Job, stage: Stage) -> list[Collective]:
    """Of tensor and context parallelism. A block that is computed again speaks again, unless what it heard was kept."""
    counts: dict[Call, int] = {}
    for number, tape in zip(stage.blocks, tapes(job, stage), strict=True):
        twice = again(job, stage, number) and job.recompute == "full"
        for calls, times in ((tape.calls, 2 if twice else 1), (tape.backward_calls, 1)):
            for call in calls:
                counts[call] = counts.get(call, 0) + times * job.rows
    return [Collective(*call, count=count) for call, count in counts.items()]


def weights(job: Job, stage: Stage) -> list[Collective]:
    """Gathering what is sharded."""
    layout, shards = job.layout, job.shards
    if shards == 1 or layout.zero == 0:
        return []
    if layout.zero == 1:
        mine = stage.parameters(job.model)
        stored = [p.stored(layout.tp, shards) * FLOAT for p in mine]
        numbers = [p.here(layout.tp) for p in mine]
        return [Collective("all_gather", "data", shards, sent, 1) for sent in in_buckets(numbers, stored)]
    times = 2 * job.rows if layout.zero == 3 else 1
    blocks, rest = together(stage.sizes(job), stage)
    sent = [(one * job.width_bytes, True) for one in blocks] + [(rest * FLOAT, False)]
    return [Collective("all_gather", "shard", shards, size, times, hidden=hidden) for size, hidden in sent]


def gradients(job: Job, stage: Stage, place: int) -> list[Collective]:
    """Summing them, over those who see other tokens, the tensor group and the pipeline."""
    layout, shards, tp = job.layout, job.shards, job.layout.tp
    sizes, fsdp, mine = stage.sizes(job), layout.zero >= 2, stage.parameters(job.model)
    found = []
    if fsdp and shards > 1:
        blocks, rest = together(sizes, stage)
        for stored in (*blocks, rest):
            found.append(Collective("reduce_scatter", "shard", shards, stored * shards * FLOAT, 1, hidden=True))
            if layout.dp_replicate > 1:
                found.append(Collective("all_reduce", "replicate", layout.dp_replicate, stored * FLOAT, 1, hidden=True))
    elif job.ddp:
        found.append(
            Collective(
                "all_reduce", "data", job.replicas, FLOAT * sum(one.here for one in sizes.values()), 1, hidden=True
            )
        )
    elif layout.zero < 2 and job.replicas * shards > 1:
        numbers = [p.here(tp) for p in mine]
        kind, parts = "all_reduce", [FLOAT * here for here in numbers]
        if layout.zero == 1:
            kind, parts = "reduce_scatter", [FLOAT * shards * p.stored(tp, shards) for p in mine]
        found += [Collective(kind, "data", job.replicas * shards, sent, 1) for sent in in_buckets(numbers, parts)]
    whole = [p for p in mine if p.split is None] if tp > 1 else []
    shared = [p for p in sorted(mine, key=lambda p: p.name) if p.block is None and stage.shares(p.module)]
    for axis, ranks, some in (("tp", tp, whole), ("pp", layout.pp, shared if layout.pp > 1 else [])):
        numbers = [p.owned(tp, shards, place) if fsdp else p.here(tp) for p in some]
        sent_together = in_buckets(numbers, [FLOAT * n for n in numbers])
        found += [Collective("all_reduce", axis, ranks, sent, 1) for sent in sent_together]
    return found


def orthogonalised(job: Job, stage: Stage) -> list[Collective]:
    """What Muon gathers, over one axis and then over the other what both divide, by the order of its placements; and what it
    hands round."""
    tp, shards, axis = job.layout.tp, job.shards, "data" if job.layout.zero == 1 else "shard"
    peers = job.layout.world // job.layout.pp
    found = []
    for p in stage.parameters(job.model) if job.optim.name == "muon" else ():
        if not p.is_hidden_matrix:
            continue
        mine = p.stored(tp, shards) * FLOAT
        over_tp = tp if p.split is not None else 1
        first = shards if p.split == 0 else 1  # gathered before the tensor group does
        if shards > 1:
            found.append(Collective("all_gather", axis, shards, mine * (1 if first > 1 else over_tp), 1))
        if over_tp > 1:
            found.append(Collective("all_gather", "tp", tp, mine * first, 1))
        if peers > 1:
            found.append(Collective("broadcast", "peers", peers, p.count * FLOAT, 1))
    return found


def between_stages(job: Job, stage: Stage) -> list[Collective]:
    """What goes to the next stage, and gradients to the one before."""
    if job.layout.pp == 1:
        return []
    place = job.place()
    sent = (place.tokens + place.own_text) * job.model.width * job.width_bytes
    chunks = CHUNKS[job.layout.schedule]
    times = 2 * chunks - stage.first - stage.last  # of each row, forward and backward
    return [Collective("send", "pp", job.layout.pp, sent, times * job.rows, hidden=True)]


def together(sizes: dict[int | str, Sizes], stage: Stage) -> tuple[list[int], int]:
    """What FSDP gathers and reduces together: numbers that a rank stores of each block, and of the rest."""
    return [sizes[number].stored for number in stage.blocks], sum(
        one.stored for key, one in sizes.items() if isinstance(key, str)
    )


def in_buckets(numbers: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Bytes of what travels together: `BUCKET` numbers at most, or a single tensor of more."""
    found, together = list[int](), 0
    for here, size in zip(numbers, sizes, strict=True):
        if not found or together + here > BUCKET:
            found.append(0)
            together = 0
        found[-1] += size
        together += here
    return found
