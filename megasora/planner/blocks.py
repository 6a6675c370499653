"""The forward pass of one block of each family, operation by operation, on a `Tape`. Compare with the family's own file.

Every function returns the tape of one block; a model with two kinds of blocks has two. `ends` is what comes before and after.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from megasora.models.dit import DiTConfig
from megasora.models.mmdit import MMDiTConfig
from megasora.models.stdit import STDiTConfig
from megasora.models.video_dit import VideoDiTConfig
from megasora.models.vit import ClassifierConfig
from megasora.planner.tape import FLOAT, Place, Tape, Value


def video_dit_block(config: VideoDiTConfig, place: Place, shared: Value) -> Tape:
    """`shared`: the caption's tokens [M, D], which every block keeps, and which are counted once."""
    tape, D, tp = Tape(place), config.width, place.tp
    heads = config.heads // tp
    x = tape.value(place.tokens, D)

    y = tape.gather(tape.modulated(x))
    q, k, v = (tape.linear(y, D // tp) for _ in range(3))
    q, k = (tape.rotate(tape.rms(z, over_group=True)) for z in (q, k))
    y = tape.context_attention(q, k, v, heads, place.pieces)
    x = tape.gated(x, tape.row_linear(y, D, place.tokens))

    q = tape.rms(tape.linear(tape.gather(tape.layernorm(x)), D // tp), over_group=True)
    k = tape.rms(tape.linear(shared, D // tp), over_group=True)
    v = tape.linear(shared, D // tp)
    x = tape.add(x, tape.row_linear(tape.attention(q, k, v, heads, place.text_pieces), D, place.tokens))

    x = tape.gated(x, mlp(tape, tape.gather(tape.modulated(x)), config.ffn // tp, D, place.tokens))
    return tape


def mlp(tape: Tape, x: Value, hidden: int, width: int, rows: int) -> Value:
    return tape.row_linear(tape.activation(tape.linear(x, hidden)), width, rows)


def double_block(config: MMDiTConfig, place: Place, shared: Value) -> Tape:
    """Text and video each with weights of their own; attention is over both."""
    tape, D, tp = Tape(place), config.width, place.tp
    heads = config.heads // tp
    streams = [tape.value(rows, D) for rows in (place.own_text, place.tokens)]
    for x, conditions in zip(streams, (place.samples, place.runs), strict=True):
        y = tape.gather(tape.modulated(x, conditions))
        q, k, _ = (tape.linear(y, D // tp) for _ in range(3))
        for z in (q, k):
            tape.rotate(tape.rms(z, heads))
    q, k, v = (tape.value(place.joint, D // tp) for _ in range(3))  # side by side, in the order of samples
    tape.touch(*(4 * [q, k, v]))
    y = tape.context_attention(q, k, v, heads, place.pieces)
    for x, conditions in zip(streams, (place.samples, place.runs), strict=True):
        rows = x.rows * tp if place.sequence else x.rows
        seen = y if place.samples == 1 else tape.value(rows, D // tp)  # one sample's text and video are stretches of y
        x = tape.gated(x, tape.row_linear(seen, D, x.rows, rows), conditions)
        y_mlp = mlp(tape, tape.gather(tape.modulated(x, conditions)), config.ffn // tp, D, x.rows)
        x = tape.gated(x, y_mlp, conditions)
    tape.touch(*(4 * [y]))
    return tape


def single_block(config: MMDiTConfig, place: Place, shared: Value) -> Tape:
    """Text and video with the same weights, attention and MLP side by side."""
    tape, D, tp = Tape(place), config.width, place.tp
    heads, parts = config.heads // tp, place.samples + place.runs  # each sample's text, and the runs
    x = tape.value(place.own_text + place.tokens, D)
    y = tape.gather(tape.modulated(x, parts))
    q, k, v = (tape.linear(y, D // tp) for _ in range(3))
    q, k = (tape.rotate(tape.rms(z, heads)) for z in (q, k))
    if place.samples > 1:  # put in the order of samples
        q, k, v = (tape.value(z.rows, z.width) for z in (q, k, v))
        tape.touch(q, k, v)
    tape.context_attention(q, k, v, heads, place.pieces)
    hidden = tape.activation(tape.linear(y, config.ffn // tp))
    both = tape.value(place.joint, (D + config.ffn) // tp)
    tape.touch(hidden, both, both)
    tape.gated(x, tape.row_linear(both, D, x.rows), parts)
    return tape


def stdit_pair(config: STDiTConfig, place: Place, shared: Value) -> Tape:
    """A spatial block, then a temporal one."""
    tape, D, tp = Tape(place), config.width, place.tp
    heads = config.heads // tp
    x = tape.value(place.tokens, D)
    for time in (False, True):
        y = tape.gather(tape.modulated(x))
        q, k, v = (tape.linear(y, D // tp) for _ in range(3))
        if config.qk_norm:
            q, k = tape.rms(q, heads), tape.rms(k, heads)
        if time and config.time_position == "rope":
            q, k = tape.rotate(q, config.qk_norm), tape.rotate(k, config.qk_norm)
        y = tape.context_attention(q, k, v, heads, place.sizes, copies=time and place.moving)
        x = tape.gated(x, tape.row_linear(y, D, place.tokens))
        if not time or config.time_text:
            q = tape.linear(tape.gather(x), D // tp)
            k, v = tape.linear(shared, D // tp), tape.linear(shared, D // tp)
            x = tape.add(x, tape.row_linear(tape.attention(q, k, v, heads, place.text_pieces), D, place.tokens))
        x = tape.gated(x, mlp(tape, tape.gather(tape.modulated(x)), config.ffn // tp, D, place.tokens))
    return tape


def dit_block(config: DiTConfig, place: Place, shared: Value) -> Tape:
    """adaLN and adaLN-zero; the other two designs are ViT's block, with more tokens or one attention more."""
    tape, D, tp = Tape(place), config.width, place.tp
    heads = config.heads // tp
    if not config.adaptive:
        rows = place.tokens + place.samples + place.runs if config.design == "in_context" else place.tokens
        return vit_layers(tape, rows, D, config.heads, config.ffn, place, cross=config.design == "cross_attention")
    x = tape.value(place.tokens, D)
    y = tape.gather(tape.modulated(x))
    q, k, v = (tape.linear(y, D // tp) for _ in range(3))
    y = tape.row_linear(tape.context_attention(q, k, v, heads, place.pieces), D, place.tokens)
    zero = config.design == "adaln_zero"
    x = tape.gated(x, y) if zero else tape.add(x, y)
    y = mlp(tape, tape.gather(tape.modulated(x)), config.ffn // tp, D, place.tokens)
    x = tape.gated(x, y) if zero else tape.add(x, y)
    return tape


def vit_block(config: ClassifierConfig, place: Place, shared: Value) -> Tape:
    return vit_layers(Tape(place), place.tokens + place.samples, config.width, config.heads, config.ffn, place, False)


def vit_layers(tape: Tape, rows: int, D: int, heads: int, ffn: int, place: Place, cross: bool) -> Tape:
    x = tape.value(rows, D)
    y = tape.layernorm(x)
    q, k, v = (tape.linear(y, D) for _ in range(3))
    x = tape.add(x, tape.linear(tape.attention(q, k, v, heads, place.pieces), D))
    if cross:
        q = tape.linear(tape.layernorm(x), D)
        context = tape.value(place.samples + place.runs, D)
        k, v = tape.linear(context, D), tape.linear(context, D)
        x = tape.add(x, tape.linear(tape.attention(q, k, v, heads, place.pieces), D))
    tape.add(x, mlp(tape, tape.layernorm(x), ffn, D, rows))
    return tape


Block = Callable[[Any, Place, Value], Tape]
BLOCKS: dict[str, list[Block]] = {
    "video_dit": [video_dit_block],
    "mmdit": [double_block, single_block],
    "stdit": [stdit_pair],
    "dit": [dit_block],
    "vit": [vit_block],
    "vivit": [vit_block],
}


def block_kinds(config: Any) -> list[tuple[Block, int]]:
    """The kinds of blocks of a model, and how many it has of each, in their order."""
    counts = [config.depth, config.single_depth] if config.family == "mmdit" else [config.depth]
    return list(zip(BLOCKS[config.family], counts, strict=True))


def enter(config: Any, place: Place) -> Tape:
    """Patches and text to the model's width."""
    tape, D = Tape(place), config.width
    tape.linear(tape.value(place.tokens, config.patch_values), D)
    if config.text_width:
        text = tape.linear(tape.value(place.text, config.text_width), D)
        if config.family != "mmdit":
            tape.linear(tape.activation(text), D)
        elif config.text == "refiner":
            for _ in range(config.refiner_depth):
                x = tape.value(place.text, D)
                q, k, v = (tape.linear(tape.layernorm(x), D) for _ in range(3))
                x = tape.gated(x, tape.linear(tape.attention(q, k, v, config.heads, place.samples), D))
                tape.gated(x, mlp(tape, tape.layernorm(x), 4 * D, D, place.text))
    return tape


def leave(config: Any, place: Place) -> Tape:
    """The last norm, the projection to patches, the loss."""
    tape, D = Tape(place), config.width
    x = tape.value(place.tokens, D)
    out = tape.linear(tape.modulated(x), config.output_values)
    difference = Value(out.rows, out.width, FLOAT)
    tape.keep("loss", difference)
    tape.touch(out, *(6 * [difference]))
    return tape


@lru_cache(maxsize=4096)
def run_tape(block: Block, config: Any, place: Place) -> Tape:
    """A block's tape without the caption's tokens, which all blocks keep as one."""
    shared = Value(place.text, config.width, place.width_bytes)
    tape = block(config, place, shared)
    tape.kept.pop(shared, None)
    return tape
