"""What one block keeps for its backward pass, moves over memory and says to other ranks, read off its forward pass.

A `Tape` is given the operations of a forward pass in their order (`megasora.planner.blocks` has them, a family a function) and
notes the tensors that autograd saves, each storage once. It knows two ways in which norms and gates are computed: by the
Triton kernels, as on a GPU, or by their references, as on a CPU; they keep different things.

Shapes as in `megasora.models.packing`. Bytes are of one rank.
"""

from dataclasses import dataclass, field
from functools import cached_property

FLOAT = 4  # bytes of an fp32 number


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor in memory: two are the same only if they are one object."""

    rows: int
    width: int
    bytes: int

    @property
    def size(self) -> int:
        return self.rows * self.width * self.bytes


@dataclass(frozen=True)
class Collective:
    """`count` calls of one kind over one axis of the mesh. `sent` are the bytes that each call takes in on this rank: of an
    all-gather its share, of a reduce-scatter the whole; `moved` is what each rank sends over a link."""

    kind: str  # all_gather, reduce_scatter, all_reduce, all_to_all, send, broadcast, reduce, scatter
    axis: str  # tp, ulysses, ring, shard, replicate, pp, ...
    ranks: int
    sent: int
    count: int
    hidden: bool = False  # behind computing

    @property
    def moved(self) -> float:
        """Bytes that a rank sends in each call, by ring algorithms (Thakur et al. 2005)."""
        n = self.ranks
        factor = {"all_gather": n - 1, "reduce_scatter": (n - 1) / n, "all_reduce": 2 * (n - 1) / n,
                  "all_to_all": (n - 1) / n, "send": 1, "broadcast": 1, "reduce": 1, "scatter": 1}[self.kind]  # fmt: skip
        return factor * self.sent

    @property
    def total(self) -> float:
        return self.moved * self.count


Call = tuple[str, str, int, int]  # kind, axis, ranks, bytes in


@dataclass(frozen=True, kw_only=True)
class Place:
    """How a block is computed on this rank: its share of a row, and the precision."""

    tokens: int  # of the row that this rank has between attention layers
    attended: int  # that it sees together with its tensor group
    ring_tokens: int  # that attention has after the exchange of heads for tokens
    text: int  # caption tokens of the whole row
    own_text: int  # of them, this rank's where text goes through the blocks
    samples: int
    runs: int
    pieces: int  # calls that self-attention takes: neighbouring samples of one size go together
    text_pieces: int  # and attention to the captions
    sizes: int  # and attention within frames or over time
    moving: bool  # whether any sample has several frames
    apart: bool  # the row's samples lie apart after the exchange, so tokens are put in order
    joint: int = 0  # text and video tokens that the tensor group has together, where both go through the blocks
    tp: int = 1
    sequence: bool = True  # tokens are split over the tensor group between layers
    ulysses: int = 1
    ring: int = 1
    width_bytes: int = 4  # of what is computed: 2 in bf16
    cast: bool = False  # weights are cast where they are used (autocast without FSDP), and the copies kept
    kernels: bool = False


@dataclass
class Tape:
    """A block's forward pass, written down operation by operation."""

    place: Place
    kept: dict[Value, str] = field(default_factory=dict)  # what backward needs, by the operation that wants it
    products: list[Value] = field(default_factory=list)  # outputs of matrix products, attention and collectives
    cast_weights: int = 0  # bytes of weights cast for this pass
    operations: int = 0  # calls of operations, forward
    traffic: int = 0  # bytes read and written by all that is no matrix product
    calls: list[Call] = field(default_factory=list)
    backward_calls: list[Call] = field(default_factory=list)

    def value(self, rows: int, width: int, size: int | None = None) -> Value:
        return Value(rows, width, size or self.place.width_bytes)

    def keep(self, why: str, *values: Value) -> None:
        for value in values:
            self.kept.setdefault(value, why)

    def touch(self, *values: Value) -> None:
        """Reads and writes these: about one operation a pair."""
        self.operations += max(1, len(values) // 2)
        self.traffic += sum(value.size for value in values)

    def float(self, x: Value) -> Value:
        """x in fp32: itself, if it is."""
        return x if x.bytes == FLOAT else Value(x.rows, x.width, FLOAT)

    def linear(self, x: Value, outputs: int, rows: int | None = None) -> Value:
        """x [rows, inputs] -> [rows, outputs]; keeps x, and the weights where they are a copy. In bf16 from fp32, x is a copy.
        `rows`: of a stretch of x that is taken."""
        x = self.value(x.rows, x.width) if x.bytes != self.place.width_bytes else x
        self.keep("linear", x)
        if self.place.cast:
            self.cast_weights += x.width * outputs * self.place.width_bytes
        self.operations += 2 if self.place.cast else 1
        y = self.value(rows or x.rows, outputs)
        self.products.append(y)
        return y

    def gather(self, x: Value) -> Value:
        """The tokens of the tensor group: what column layers see. Backward sums and scatters."""
        if self.place.tp == 1 or not self.place.sequence:
            return x
        whole = self.value(self.place.attended if x.rows == self.place.tokens else x.rows * self.place.tp, x.width)
        self.calls.append(("all_gather", "tp", self.place.tp, x.rows * x.width * self.place.width_bytes))
        self.backward_calls.append(("reduce_scatter", "tp", self.place.tp, whole.size))
        self.products.append(whole)
        return whole

    def row_linear(self, x: Value, outputs: int, rows: int, taken: int | None = None) -> Value:
        """x [attended, inputs/tp] -> [rows, outputs]: products summed over the group, each rank keeping its tokens. `taken`: rows
        of a stretch of x."""
        y = self.linear(x, outputs, taken)
        if self.place.tp == 1:
            return y
        if not self.place.sequence:
            for calls in (self.calls, self.backward_calls):
                calls.append(("all_reduce", "tp", self.place.tp, y.size))
            summed = self.value(y.rows, outputs)
            self.products.append(summed)
            return summed
        self.calls.append(("reduce_scatter", "tp", self.place.tp, y.size))
        mine = self.value(rows, outputs)
        self.backward_calls.append(("all_gather", "tp", self.place.tp, mine.size))
        self.products.append(mine)
        return mine

    def activation(self, x: Value) -> Value:
        y = self.value(x.rows, x.width, x.bytes)
        self.keep("activation", x)
        self.touch(x, y)
        return y

    def modulated(self, x: Value, conditions: int | None = None) -> Value:
        """LayerNorm, scaled and shifted by the condition of each run, or of so many parts of the row."""
        y = Value(x.rows, x.width, x.bytes)
        statistics = [Value(x.rows, 1, FLOAT) for _ in range(2)]
        if self.place.kernels:
            self.keep("norm", x, *statistics)
            self.touch(x, y)
            return y
        wide = self.float(x)
        normed = Value(x.rows, x.width, FLOAT)
        self.keep("norm", wide, normed, *statistics)
        if (conditions or self.place.runs) > 1:
            self.keep("norm", Value(x.rows, x.width, FLOAT))  # the scale, spread to tokens
        self.touch(x, wide, wide, normed, normed, y)
        return y

    def gated(self, x: Value, y: Value, conditions: int | None = None) -> Value:
        """x + gate · y."""
        self.keep("gate", y)
        if (conditions or self.place.runs) > 1 and not self.place.kernels:
            self.keep("gate", Value(y.rows, y.width, FLOAT))  # the gate, spread to tokens
        out = Value(x.rows, x.width, x.bytes)
        self.touch(x, y, out)
        return out

    def add(self, x: Value, y: Value) -> Value:
        out = Value(x.rows, x.width, x.bytes)
        self.touch(x, y, out)
        return out

    def layernorm(self, x: Value) -> Value:
        wide = self.float(x)
        self.keep("norm", wide, Value(x.rows, 1, FLOAT), Value(x.rows, 1, FLOAT))
        y = Value(x.rows, x.width, x.bytes)
        self.touch(x, wide, wide, y)
        return y

    def rms(self, x: Value, heads: int = 1, over_group: bool = False) -> Value:
        """RMS norm over the last dimension, or of each head; of a width that is split, the squares go round the group."""
        y = Value(x.rows, x.width, x.bytes)
        split = over_group and self.place.tp > 1
        if split:
            for calls in (self.calls, self.backward_calls):
                calls.append(("all_reduce", "tp", self.place.tp, x.rows * FLOAT))
        if self.place.kernels and not split:  # with the rotation in one: the statistics are computed again
            self.keep("norm", x)
            self.touch(x, y)
            return y
        wide = self.float(x)
        normed = Value(x.rows, x.width, FLOAT)
        self.keep("norm", wide, normed, Value(x.rows, heads, FLOAT))
        self.touch(x, wide, wide, normed, y)
        return y

    def rotate(self, x: Value, normed: bool = True) -> Value:
        """Keeps the table of angles, which all blocks share; after a norm a kernel does both at once."""
        if self.place.kernels and normed:
            return x
        y = Value(x.rows, x.width, x.bytes)
        self.touch(x, y)
        return y

    def attention(self, q: Value, k: Value, v: Value, heads: int, pieces: int = 1, copies: bool = False) -> Value:
        """Each segment's queries over its keys, on one rank. Several calls put their outputs together; so does another order
        (`copies`: q, k, v and the output are put there and back)."""
        if copies:
            q, k, v = (Value(x.rows, x.width, x.bytes) for x in (q, k, v))
            self.touch(q, k, v)
        y = Value(q.rows, q.width, q.bytes)
        self.operations += pieces
        self.keep("attention", q, k, v, y, Value(q.rows, heads, FLOAT))
        self.products.append(y)
        return Value(q.rows, q.width, q.bytes) if pieces > 1 or copies else y

    def context_attention(
        self, q: Value, k: Value, v: Value, heads: int, pieces: int = 1, copies: bool = False
    ) -> Value:
        """The same where a row is cut: tokens for heads, then attention or a ring of it, and back."""
        place = self.place
        if place.ulysses * place.ring == 1:
            return self.attention(q, k, v, heads, pieces, copies)
        width = q.width // place.ulysses
        rows = place.ring_tokens
        if place.ulysses > 1:
            for calls in (self.calls, self.backward_calls):
                calls.append(("all_to_all", "ulysses", place.ulysses, 3 * q.size))
                calls.append(("all_to_all", "ulysses", place.ulysses, rows * width * q.bytes))
            self.touch(*(2 * [q, k, v]))
        stacked = Value(rows, 3 * width, q.bytes)  # q, k and v as one
        if place.ulysses > 1:
            self.products.append(stacked)
        if place.apart:
            stacked = Value(rows, 3 * width, q.bytes)
            self.keep("order", Value(2 * rows, 1, 8))
            self.touch(stacked, stacked)
        y = Value(rows, width, q.bytes)
        self.keep("attention", stacked, y, Value(rows, heads // place.ulysses, FLOAT))
        self.products.append(y)
        if place.ring > 1:
            pair = 2 * rows * width * q.bytes
            self.calls += [("send", "ring", place.ring, pair)] * (place.ring - 1)
            self.backward_calls += [("send", "ring", place.ring, pair)] * (place.ring - 1)
            self.backward_calls += [("send", "ring", place.ring, 2 * rows * width * FLOAT)] * (place.ring - 1)
        if place.ulysses > 1 or place.apart or pieces > 1 or copies:
            out = Value(q.rows, q.width, q.bytes)
            if place.ulysses > 1:
                self.products.append(out)
            self.touch(y, out)
            return out
        return y

    @cached_property
    def saved(self) -> int:
        """Bytes kept from forward to backward, weights excepted."""
        return sum(value.size for value in self.kept)

    @cached_property
    def saved_selective(self) -> int:
        """Bytes kept where all but products and collectives are computed again."""
        return sum(value.size for value in self.products)
