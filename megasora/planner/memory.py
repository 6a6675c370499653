"""Memory of one rank at the fullest moment of a step, by part.

What stays the whole step follows from the parameters: weights, the optimizer's state, the average (Rajbhandari et al. 2020,
section 3). What comes and goes is followed block by block through a backward pass: activations fall, gradients rise, gathered
weights and buffers are a few blocks' worth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megasora.parallel.zero import BUCKET
from megasora.planner.blocks import block_kinds, enter, leave, run_tape
from megasora.planner.job import Job
from megasora.planner.parameters import Parameter
from megasora.planner.stages import Stage, stages
from megasora.planner.tape import FLOAT, Tape


@dataclass(frozen=True)
class StateBytes:
    """Bytes of weights, gradients and what the optimizer owns, on each rank of a group that shards them."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def state_bytes(
    parameters: float, ranks: int, stage: int, weight: int = 2, gradient: int = 2, optimizer: int = 12
) -> StateBytes:
    """ZeRO's own arithmetic (section 3.1): 2 bytes a weight, 2 a gradient and K = 12 for mixed-precision Adam by default; stage
    1 shards the optimizer's, 2 the gradients too, 3 the weights too. MegaSora has 4, 4 and 12 with the average, 8 without."""
    shares = [ranks if stage >= least else 1 for least in (3, 2, 1)]
    return StateBytes(*(parameters * b / n for b, n in zip((weight, gradient, optimizer), shares, strict=True)))


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


def again(job: Job, number: int) -> bool:
    """Whether this block's forward pass is computed again in backward."""
    return job.recompute != "none" and number % job.every == 0


def kept(job: Job, tape: Tape, number: int) -> int:
    """Bytes of a block that stay until its backward pass."""
    if not again(job, number):
        return tape.saved + tape.cast_weights
    entry = (tape.place.tokens + tape.place.own_text) * job.model.width * job.width_bytes
    return entry + (tape.saved_selective if job.recompute == "selective" else 0)


def transient(job: Job, tape: Tape) -> int:
    """The most that a block's backward pass has besides: gradients on their way through the MLP, the widest place."""
    place, model = tape.place, job.model
    wide = (place.attended + place.own_text) * model.ffn // place.tp
    narrow = (place.tokens + place.own_text) * model.width
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
    during = backward_moment(job, stage, of_block, whole)
    gathered, buffers = fsdp_buffers(job, of_block, whole) if fsdp else (0.0, 0.0)
    if job.ddp:
        buffers = float(whole)  # its buckets hold every gradient once more
    moving = {"gathered weights": gathered, **during, "buffers": buffers}
    # After the last row there are all gradients and the buffers of our own reductions: where that is more, it is the peak.
    reduced = float(own if fsdp else whole)
    closing = 0.0 if fsdp or job.ddp else 2.0 * min(whole, FLOAT * BUCKET)
    if reduced + closing > sum(moving.values()):
        moving = {"gathered weights": 0.0, "activations": 0.0, "gradients": reduced, "buffers": closing}
    return Memory(stage.number, steady | moving)


def backward_moment(job: Job, stage: Stage, of_block: dict[int, int], whole: int) -> dict[str, float]:
    """Activations and gradients at the fullest moment of the backward passes."""
    fsdp, several = job.layout.zero >= 2, job.rows > 1
    blocks = dict(zip(stage.blocks, tapes(job, stage), strict=True))
    saved = {number: kept(job, tape, number) for number, tape in blocks.items()}
    place = job.place()
    around = 0
    if stage.first:
        around += enter(job.model, place).saved + place.text * job.model.width * job.width_bytes
    if stage.last:
        around += leave(job.model, place).saved
    one_row = float(sum(saved.values()) + around)
    live = one_row * stage.held  # rows in flight
    # Gradients of rows before stay whole until the last row's are there to be reduced; of a first row they come block by block.
    gradients = float(whole) if several else 0.0
    each = 0.0 if several else FLOAT / (job.shards if fsdp else 1)
    most = live, gradients
    for number in reversed(stage.blocks):
        inside = blocks[number].saved - saved[number] if again(job, number) else 0
        most = max(most, (live + max(inside, 0) + transient(job, blocks[number]), gradients), key=sum)
        live -= saved[number]
        gradients += of_block[number] * each
    return {"activations": most[0], "gradients": most[1]}


def fsdp_buffers(job: Job, of_block: dict[int, int], whole: int) -> tuple[float, float]:
    """Weights that are gathered, and what is on its way: zero3 has one block and the next, zero2 all. A gathered block is copied
    out of its buffer once; its gradients are whole once in the computing type and once in fp32."""
    blocks, largest = sum(of_block.values()), max(of_block.values(), default=0)
    ends = whole - FLOAT * blocks  # always in fp32
    gathered = ends + job.width_bytes * (blocks if job.layout.zero == 2 else min(2 * largest, blocks))
    return float(gathered), float((2 * job.width_bytes + FLOAT) * largest)


def batch_bytes(job: Job) -> int:
    """The step's rows, which are built together: patches, clean data and noise in fp32, coordinates, captions."""
    token = 3 * job.model.patch_values * FLOAT + 3 * 8 + FLOAT
    return job.rows * (job.row.length * token + job.row.text * job.model.text_width * FLOAT)
