"""Other people's models and formulas, for holding the planner against what they published.

A GPT as Megatron-LM trains it: no family of ours, but the same tape, communication and device make its step.
"""

from dataclasses import dataclass, replace

from megasora.observe.hardware import Device
from megasora.parallel.layout import Layout
from megasora.planner.step_time import NOTHING, Work, parts, spoken
from megasora.planner.tape import Collective, Place, Tape

# Korthikanti et al. 2022, section 4: bytes that a layer keeps of each token and channel with tensor and sequence parallelism and
# selective recomputation, which leaves softmax and its dropout out: all of it is divided by the tensor group.
KEPT = {
    "input of the first norm": 2, "input of queries, keys and values": 2, "queries and keys": 4, "values": 2,
    "input of the projection": 2, "dropout mask after attention": 1, "input of the second norm": 2,
    "input of the first linear": 2, "input of GeLU": 8, "input of the second linear": 8, "dropout mask after the MLP": 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GPT:
    """A GPT and how it is trained. `batch` are a data-parallel rank's samples of a step, `micro` those of a micro-batch."""

    width: int
    layers: int
    heads: int
    sequence: int
    batch: int
    micro: int = 1
    vocabulary: int = 51200
    tensor: int = 1
    pipeline: int = 1
    interleaving: int = 1
    recompute: bool = False  # all of every layer
    sequence_parallel: bool = True
    flash: bool = True  # else the scores of attention go over memory, and are computed again in any case (section 5)

    @property
    def rows(self) -> int:
        return self.batch // self.micro


def activation_bytes(model: GPT) -> float:
    """Of the first stage, which holds as many layers' worth as the model has (Korthikanti et al. 2022, equation 6 and section
    4.2.3): 34·s·b·h·L/t, and interleaving keeps 1 + (p - 1)/(p·m) of it."""
    factor = 1 + (model.pipeline - 1) / (model.pipeline * model.interleaving) if model.interleaving > 1 else 1
    each = sum(KEPT.values()) * model.sequence * model.micro * model.width / model.tensor
    return each * model.layers * factor


def flops(model: GPT) -> float:
    """Of a step of one data-parallel rank, forward and backward, nothing repeated (Narayanan et al. 2021, equation 3 without
    its fourth pass): attention over all pairs, and the logits."""
    tokens = model.batch * model.sequence
    layer = 24 * tokens * model.width**2 + 4 * tokens * model.sequence * model.width
    return 3.0 * (model.layers * layer + 2 * tokens * model.width * model.vocabulary)


def layer_tape(model: GPT) -> Tape:
    """A layer's forward pass of one micro-batch with fused norms, GeLU and dropout."""
    whole = model.sequence * model.micro
    tokens = whole // model.tensor if model.sequence_parallel else whole
    place = Place(tokens=tokens, attended=whole, ring_tokens=whole, text=0, own_text=0, samples=model.micro, runs=1, pieces=1,
                  text_pieces=1, sizes=1, moving=False, apart=False, tp=model.tensor, width_bytes=2, kernels=True)  # fmt: skip
    tape, t = Tape(place), model.tensor
    x = tape.value(tokens, model.width)
    for hidden, outputs in ((model.width // t, 3 * model.width // t), (4 * model.width // t, 4 * model.width // t)):
        tape.touch(x, x)  # norm
        tape.linear(tape.value(whole, model.width), outputs)
        inner = tape.value(whole, hidden)
        tape.touch(inner, inner)  # GeLU, or what attention reads and writes
        tape.linear(inner, model.width)
        tape.touch(x, x, x)  # bias, dropout and residual
    return tape


def said_by_layer(model: GPT) -> list[Collective]:
    """Attention and MLP sum over the tensor group, forward and backward: all-reduces, or with sequence parallelism the two halves
    of one at either end, which are as many bytes."""
    whole = model.sequence * model.micro * model.width * 2
    passes = 3 if model.recompute else 2
    if not model.sequence_parallel:
        return [Collective("all_reduce", "tp", model.tensor, whole, 2 * passes)]
    return [Collective("all_gather", "tp", model.tensor, whole // model.tensor, 2 * passes),
            Collective("reduce_scatter", "tp", model.tensor, whole, 2 * passes)]  # fmt: skip


def step_work(model: GPT, device: Device) -> Work:
    """What a rank of a stage does for one micro-batch."""
    tape, passes = layer_tape(model), 4 if model.recompute else 3
    tokens = model.sequence * model.micro
    layers = model.layers / model.pipeline
    linear = layers * 24 * tokens * model.width**2 * passes
    linear += 6.0 * tokens * model.width * model.vocabulary / model.pipeline
    attention = layers * 4 * tokens * model.sequence * model.width * passes
    one = spoken(said_by_layer(model), Layout(tp=model.tensor), device)
    scaled = Work(*(value * layers for value in vars(one).values()))
    traffic = tape.traffic * passes
    if not model.flash:  # written, softmaxed, dropped out with a mask, read: of every head and pair
        traffic += 4 * 13 * model.heads // model.tensor * model.sequence**2 * model.micro
        attention *= 4 / passes
    share = {"linear": linear / model.tensor, "attention": attention / model.tensor,
             "traffic": traffic * layers}  # fmt: skip
    return replace(NOTHING, **share) + scaled


def step_seconds(model: GPT, device: Device) -> float:
    """Of a step: micro-batches one after the other, and the bubble of the (interleaved) pipeline."""
    each = sum(parts(step_work(model, device), device, "bf16").values())
    return each * (model.rows + (model.pipeline - 1) / model.interleaving)


def with_gemm(device: Device, efficiency: float) -> Device:
    """One efficiency for all products."""
    return replace(device, efficiency=replace(device.efficiency, gemm=efficiency, attention=efficiency))
