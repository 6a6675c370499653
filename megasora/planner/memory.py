"""Memory of one rank at the fullest moment of a step, by part.

What stays the whole step follows from the parameters: weights, the optimizer's state, the average (Rajbhandari et al. 2020,
section 3). What comes and goes is followed block by block through a backward pass: activations fall, gradients rise, gathered
weights and buffers are a few blocks' worth.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megasora.parallel.zero import BUCKET
from megasora.planner.blocks import block_kinds, enter, leave, run_tape
from megasora.planner.job import Job
from megasora.planner.parameters import Parameter
from megasora.planner.stages import Stage, stages
from megasora.planner.tape import FLOAT, Tape


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by part. `stage` is its place in the pipeline."""

    stage: int
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def optimizer_bytes(job: Job, parameters: Sequence[Parameter], owned: Sequence[int]) -> int:
    """AdamW's two moments and a counter of steps a parameter; of the matrices of blocks under Muon, one momentum."""
    muon = job.optim.name == "muon"
    return FLOAT * sum(
        own if muon and p.is_hidden_matrix else 2 * own + 1 for p, own in zip(parameters, owned, strict=True)
    )


def tapes(job: Job, stage: Stage) -> list[Tape]:
    """Of the stage's blocks, in order."""
    place = job.place()
    kinds = [(run_tape(block, job.model, place), count) for block, count in block_kinds(job.model)]
    every = [tape for tape, count in kinds for _ in range(count)]
    return [every[block] for block in stage.blocks]


def again(job: Job, stage: Stage, number: int) -> bool:
    """Whether this block's forward pass is computed again in backward: of so many of a stage's own one."""
    return job.recompute != "none" and stage.blocks.index(number) % job.every == 0


def kept(job: Job, stage: Stage, tape: Tape, number: int) -> int:
    """Bytes of a block that stay until its backward pass."""
    if not again(job, stage, number):
        return tape.saved + tape.cast_weights
    entry = (tape.place.tokens + tape.place.own_text) * job.model.width * job.width_bytes
    return entry + (tape.saved_selective if job.recompute == "selective" else 0)


def transient(job: Job, tape: Tape) -> int:
    """The most that a block's backward pass has besides: gradients on their way through the MLP, the widest place."""
    place, model = tape.place, job.model
    wide = (place.attended + place.own_text) * model.ffn // place.tp
    # Under sequence parallelism gradients are whole rows on both sides of a split layer: gathered, or not yet scattered.
    narrow = ((place.attended if place.sequence else place.tokens) + place.own_text) * model.width
    return 2 * (wide + narrow) * job.width_bytes


def memory(job: Job, stage: Stage | None = None) -> Memory:
    """Of a rank of that stage; without one, of the fullest stage."""
    if stage is None:
        return max((memory(job, one) for one in stages(job)), key=lambda found: found.total)
    fsdp = job.layout.zero >= 2
    mine = stage.sizes(job)
    whole, own = (FLOAT * sum(getattr(one, name) for one in mine.values()) for name in ("here", "owned"))
    of_block = {number: mine[number].here for number in stage.blocks}
    steady = {
        "weights": float(FLOAT * sum(one.stored for one in mine.values()) if fsdp else whole),
        "optimizer": float(sum(one.muon if job.optim.name == "muon" else one.adamw for one in mine.values()) * FLOAT),
        "ema": float(own if job.optim.ema else 0),
        "batch": float(batch_bytes(job)),
        "encoders": job.encoders,
    }
    moving = backward_moment(job, stage, of_block, whole)
    # After the last row there are all gradients and the buffer of our own reductions: where that is more, it is the peak.
    reduced, closing = float(own if fsdp else whole), closing_bytes(job, stage)
    if reduced + closing > sum(moving.values()):
        moving = {"gathered weights": 0.0, "activations": 0.0, "gradients": reduced, "buffers": closing}
    return Memory(stage.number, steady | moving)


def closing_bytes(job: Job, stage: Stage) -> float:
    """What gradients are put together in to be summed (parallel/zero.py): `BUCKET` numbers, or the largest one alone."""
    layout, mine = job.layout, stage.parameters(job.model)
    own = layout.zero < 2 and not job.ddp and job.replicas * job.shards > 1
    if not own:
        mine = [p for p in mine if (layout.tp > 1 and p.split is None) or (layout.pp > 1 and p.block is None)]
    numbers = [p.here(layout.tp) // (job.shards if layout.zero >= 2 else 1) for p in mine]
    if not numbers or (not own and layout.tp * layout.pp == 1):
        return 0.0
    share = 1 / job.shards if layout.zero == 1 else 0.0  # what comes out of a reduce-scatter
    return FLOAT * max(min(sum(numbers), BUCKET), *numbers, 0) * (1 + share)


def backward_moment(job: Job, stage: Stage, of_block: dict[int, int], whole: int) -> dict[str, float]:
    """What comes and goes at the fullest moment of the backward passes."""
    blocks = dict(zip(stage.blocks, tapes(job, stage), strict=True))
    place = job.place()
    around = 0
    if stage.first:
        around += enter(job.model, place).saved + place.text * job.model.width * job.width_bytes
    head = leave(job.model, place).saved if stage.last else 0  # gone when the blocks' turn comes
    one_row = float(sum(kept(job, stage, tape, number) for number, tape in blocks.items()) + around + head)
    # Gradients of rows before stay whole until the last row's are there to be reduced; those of a first row come block by block,
    # and only the rows that are left are held beside what others have given.
    full = one_row * stage.held
    if job.rows > stage.held:
        begins = [(full, float(whole))]
    else:
        begins = [(full, 0.0), (full - one_row, float(whole))] if job.rows > 1 else [(full, 0.0)]
    moments = [
        moment
        for live, gradients in begins
        for moment in backward(job, stage, blocks, of_block, whole, live, gradients, head)
    ]
    return max(moments, key=lambda parts: sum(parts.values()))


def backward(
    job: Job, stage: Stage, blocks: dict[int, Tape], of_block: dict[int, int], whole: int, live: float, gradients: float,
    head: int,
) -> Iterator[dict[str, float]]:  # fmt: skip
    """One row's backward pass, from so many bytes of activations and gradients on: in the head, whose tensors are then gone, and
    block by block: while a block is in its backward pass, and when it is through and its gradients are on their way to be
    reduced. Those of FSDP are then put together in fp32; DDP's buckets hold every gradient once more."""
    fsdp, rising, shards = job.layout.zero >= 2, gradients == 0.0, job.shards
    buffers = float(whole) if job.ddp else 0.0
    order = [*reversed(stage.blocks)]
    yield parts(gathered_then(job, of_block, whole, order[0], None), live, gradients, buffers)
    live -= head
    for number, following in zip(order, [*order[1:], None], strict=True):
        own, held = of_block[number], kept(job, stage, blocks[number], number)
        inside = max(0, blocks[number].saved - held) if again(job, stage, number) else 0
        gathered = gathered_then(job, of_block, whole, number, following)
        during = live + inside + transient(job, blocks[number])
        yield parts(gathered, during, gradients, buffers)
        live -= held
        if not fsdp:
            gradients += FLOAT * own if rising else 0.0
            continue
        last = not rising or job.rows == 1  # of this rank's rows: it is reduced
        mine = job.width_bytes * own if rising else 0
        buffers = float(FLOAT * own) if last else 0.0
        yield parts(gathered, live, gradients + mine, buffers)
        if not rising:
            gradients -= FLOAT * own * (1 - 1 / shards)
        else:
            gradients += FLOAT * own / (shards if last else 1)


def parts(gathered: float, activations: float, gradients: float, buffers: float) -> dict[str, float]:
    return {"gathered weights": gathered, "activations": activations, "gradients": gradients, "buffers": buffers}


def gathered_then(job: Job, of_block: dict[int, int], whole: int, number: int, following: int | None) -> float:
    """Bytes of gathered weights while a block is in its backward pass: zero3 has the block and the next one, zero2 all blocks."""
    if job.layout.zero < 2:
        return 0.0
    ends = whole - FLOAT * sum(of_block.values())  # always in fp32
    if job.layout.zero == 2:
        return float(ends + job.width_bytes * sum(of_block.values()))
    coming = of_block[following] if following is not None else 0
    return float(ends + job.width_bytes * (of_block[number] + coming))


def batch_bytes(job: Job) -> int:
    """The step's rows, which are built together: patches, clean data and noise in fp32, coordinates, captions."""
    token = 3 * job.model.patch_values * FLOAT + 3 * 8 + FLOAT
    return job.rows * (job.row.length * token + job.row.text * job.model.text_width * FLOAT)
