"""Memory of one rank at the fullest moment of a step, by part.

What stays the whole step follows from the parameters alone: weights, gradients, the optimizer's state, the average (Rajbhandari
et al. 2020, section 3). What comes and goes is followed block by block through the backward pass of the last row: activations
fall, gradients rise, and gathered weights and buffers are a few blocks' worth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megasora.planner.blocks import block_kinds, enter, leave, run_tape
from megasora.planner.job import Job
from megasora.planner.parameters import Parameter, model_parameters
from megasora.planner.stages import Stage, stages
from megasora.planner.tape import FLOAT, Tape

BUCKET = 32 * 2**20 * FLOAT  # bytes that our own reductions put together (parallel/zero.py)


@dataclass(frozen=True)
class StateBytes:
    """Bytes of a parameter's weight, gradient and of what the optimizer owns, on each rank of a group that shards them."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def state_bytes(
    parameters: int, ranks: int, stage: int, weight: int = 2, gradient: int = 2, optimizer: int = 12
) -> StateBytes:
    """ZeRO's own arithmetic (section 3.1): 2 bytes a weight, 2 a gradient and K = 12 for mixed-precision Adam by default; stage
    1 shards the optimizer's, 2 the gradients too, 3 the weights too."""
    shares = [ranks if stage >= least else 1 for least in (3, 2, 1)]
    return StateBytes(*(parameters * b / n for b, n in zip((weight, gradient, optimizer), shares, strict=True)))


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by part. `stage` is its pipeline stage."""

    stage: int
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def optimizer_numbers(job: Job, parameters: Sequence[Parameter], place: int = 0) -> tuple[int, int]:
    """fp32 numbers that the optimizer keeps, and parameters that have a counter of steps, on one rank."""
    numbers = counters = 0
    for parameter in parameters:
        own = parameter.owned(job.layout.tp, job.shards, place)
        hidden = job.optim.name == "muon" and len(parameter.shape) == 2 and parameter.block is not None
        momentum = hidden and parameter.name.endswith("weight")
        numbers += own if momentum else 2 * own
        counters += not momentum
    return numbers, counters


def tapes(job: Job, stage: Stage) -> list[Tape]:
    """Of the stage's blocks, in order."""
    place = job.place()
    kinds = [run_tape(block, job.model, place) for block, _ in block_kinds(job.model)]
    every = [tape for tape, (_, count) in zip(kinds, block_kinds(job.model), strict=True) for _ in range(count)]
    return [every[block] for block in stage.blocks]


def again(job: Job, number: int) -> bool:
    """Whether this block's forward pass is computed again in backward."""
    return job.recompute != "none" and number % job.every == 0


def kept(job: Job, tape: Tape, number: int) -> int:
    """Bytes of a block that stay until its backward pass."""
    if not again(job, number):
        return tape.saved + tape.cast_weights
    place = tape.place
    entry = (place.tokens + place.own_text) * job.model.width * job.width_bytes
    return entry + (tape.saved_selective if job.recompute == "selective" else 0)


def transient(job: Job, tape: Tape) -> int:
    """The most that a block's backward pass has besides: gradients on their way through the MLP, the widest place."""
    place, model = tape.place, job.model
    joint = place.attended + place.own_text
    wide = joint * model.ffn // place.tp * job.width_bytes
    narrow = (place.tokens + place.own_text) * model.width * job.width_bytes
    return 2 * wide + 2 * narrow


def memory(job: Job, stage: Stage | None = None) -> Memory:
    """Of a rank of that stage; without one, of the fullest stage."""
    if stage is None:
        return max((memory(job, one) for one in stages(job)), key=lambda found: found.total)
    layout, tp, shards = job.layout, job.layout.tp, job.shards
    mine = [p for p in model_parameters(job.model) if stage.has(p)]
    whole = FLOAT * sum(p.here(tp) for p in mine)
    sharded = FLOAT * sum(p.stored(tp, shards) for p in mine)
    own = FLOAT * sum(p.owned(tp, shards) for p in mine)
    numbers, counters = optimizer_numbers(job, mine)
    fsdp = layout.zero >= 2

    of_block = {n: sum(p.here(tp) for p in mine if p.block == n) for n in stage.blocks}
    ends = sum(p.here(tp) for p in mine if p.block is None)
    largest = max(of_block.values(), default=0)
    gathered = buffers = 0.0
    if fsdp:  # a block's weights beside its gathered ones; its gradients whole, and in fp32 on their way
        gathered = ends * FLOAT + job.width_bytes * (sum(of_block.values()) if layout.zero == 2 else 2 * largest)
        buffers = job.width_bytes * largest + (FLOAT + job.width_bytes) * largest
    accumulated = fsdp and job.rows > 1  # gradients stay whole until the last row
    if layout.zero == 0 and job.replicas > 1 and tp == 1 and layout.pp == 1:
        buffers = whole  # DDP's buckets

    # Backward through the blocks, the last one first: what is left of the activations, and the gradients by then.
    blocks = tapes(job, stage)
    saved = [kept(job, tape, number) for number, tape in zip(stage.blocks, blocks, strict=True)]
    first, last = enter(job.model, job.place()), leave(job.model, job.place())
    text = job.place().text * job.model.width * job.width_bytes
    around = (first.saved + text if stage.first else 0) + (last.saved if stage.last else 0)
    # Rows in flight: whole ones wait, one is on its way back.
    waiting = (stage.held - 1) * (sum(saved) + around)
    per_gradient = 0.0 if accumulated else FLOAT / (shards if fsdp else 1)
    moments = []
    live, gradients = float(sum(saved) + around), 0.0
    for number, tape, size in reversed(list(zip(stage.blocks, blocks, saved, strict=True))):
        inside = tape.saved - size if again(job, number) else 0.0
        moments.append((live + max(inside, 0) + transient(job, tape), gradients))
        live -= size
        gradients += of_block[number] * per_gradient
    activations, gradients = max(moments, key=sum, default=(live, 0.0))
    if accumulated or job.rows > 1 or stage.held > 1:
        gradients = float(sum(of_block.values())) * (FLOAT if not fsdp or accumulated else FLOAT / shards)
    if accumulated:
        gradients = float(whole)
    parts = {
        "weights": float(sharded if fsdp else whole),
        "gathered weights": gathered,
        "gradients": max(gradients, float(own if fsdp and not accumulated else whole)) if job.rows > 1 else gradients,
        "optimizer": float(FLOAT * (numbers + counters)),
        "ema": float((own if fsdp else whole) if job.optim.ema else 0),
        "activations": waiting + activations,
        "buffers": buffers,
        "batch": float(batch_bytes(job)),
    }
    # After the last row all gradients are there, and nothing else; where that is more, it is the peak.
    final = whole if not fsdp else own
    rest = sum(parts[name] for name in ("gradients", "activations", "gathered weights", "buffers"))
    closing = final + (2 * min(whole, BUCKET) if not fsdp else 0)
    if closing > rest:
        parts |= {"gradients": float(final), "activations": 0.0, "gathered weights": 0.0, "buffers": float(closing - final)}
    return Memory(stage.number, parts)


def batch_bytes(job: Job) -> int:
    """The step's rows as they are built: patches, clean data and noise in fp32, coordinates, captions."""
    model = job.model
    token = 3 * model.patch_values * FLOAT + 3 * 8 + FLOAT
    return job.rows * (job.row.length * token + job.row.text * model.text_width * FLOAT)
