"""What is planned: a model, a layout, and the packed rows that each data-parallel rank has in a step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from megasora.engines.optim import OptimConfig
from megasora.models.families import chunk_of
from megasora.models.packing import Shape, stretch
from megasora.parallel.layout import Layout
from megasora.planner.tape import Place

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Row:
    """A packed row: its samples, each a shape in patches and the tokens of its caption, and its length with padding. `width`:
    how many of the context-parallel ranks share it, 0 for all."""

    samples: tuple[tuple[Shape, int], ...]
    length: int
    width: int = 0

    @property
    def counts(self) -> float:
        """Its part in a sum over the rows of all ranks: each of those that share a narrower row has it in its list."""
        return 1 / max(1, self.width)

    @property
    def padding(self) -> int:
        return self.length - sum(T * H * W for (T, H, W), _ in self.samples)

    @property
    def padded(self) -> list[tuple[Shape, int]]:
        """The samples and, where there is any, padding as one more."""
        return [*self.samples, *([((1, 1, self.padding), 0)] if self.padding else [])]

    @property
    def text(self) -> int:
        return sum(text for _, text in self.samples)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One step: `rows` micro-batches on every data-parallel rank, the largest of them being `row`."""

    model: Any
    layout: Layout
    row: Row
    rows: int
    precision: Literal["fp32", "bf16"] = "bf16"
    optim: OptimConfig = field(default_factory=OptimConfig)
    recompute: Recompute = "none"
    every: int = 1  # of so many blocks one is computed again
    kernels: bool = True  # Triton's, as on a GPU; False: their references, as on a CPU
    encoders: float = 0.0  # bytes of frozen encoders on the device

    @property
    def shards(self) -> int:
        """Ranks over which ZeRO shards: the optimizer's state alone over all that see other tokens."""
        layout = self.layout
        return {0: 1, 1: layout.dp * layout.cp}.get(layout.zero, layout.dp_shard * layout.cp)

    @property
    def replicas(self) -> int:
        """Ranks that have the same parameters, or the same shard of them."""
        return self.layout.dp * self.layout.cp // self.shards

    @property
    def policy(self) -> str:
        """`recompute` and `every` as parallel.recompute has them."""
        return f"every{self.every}" if self.every > 1 else self.recompute

    @property
    def ddp(self) -> bool:
        """Whether DDP reduces the gradients."""
        layout = self.layout
        return layout.zero == 0 and self.replicas > 1 and layout.tp * layout.pp == 1

    @property
    def width_bytes(self) -> int:
        return 2 if self.precision == "bf16" else 4

    def place(self) -> Place:
        """Of the rank with the longest stretch of the row."""
        layout, model, padded = self.layout, self.model, self.row.padded
        together = layout.tp if layout.sequence_parallel else 1  # ranks of a tensor group that have other tokens
        sharing = self.row.width or layout.cp
        ulysses, ring = layout.context(sharing)
        parts = sharing * together
        begin, end = stretch(self.row.length, 0, parts)
        tokens = end - begin
        joint = model.family == "mmdit"
        own_text = stretch(self.row.text, 0, parts)[1] if joint else 0
        chunk = chunk_of(model)
        lengths = [T * H * W for (T, H, W), _ in padded]
        carried = [n + (text if joint else 0) for n, (_, text) in zip(lengths, padded, strict=True)]
        chunks = sum(-(-T // chunk) for (T, _, _), _ in padded) if chunk else 0
        runs = chunks or len(padded)
        per_ulysses = tokens + own_text if joint else tokens
        return Place(
            tokens=tokens, attended=tokens * together, ring_tokens=per_ulysses * together * ulysses,
            text=self.row.text, own_text=own_text, samples=len(padded), runs=runs,
            pieces=chunks or neighbours(carried),
            text_pieces=neighbours([(n, text) for n, (_, text) in zip(lengths, padded, strict=True)]),
            sizes=max(1, neighbours([(T, H * W) for (T, H, W), _ in padded])),
            moving=any(T > 1 for (T, _, _), _ in padded),
            apart=ulysses > 1 and len(padded) > 1,
            joint=(tokens + own_text) * together,
            tp=layout.tp, sequence=layout.sequence_parallel, ulysses=ulysses, ring=ring,
            width_bytes=self.width_bytes,
            cast=self.precision == "bf16" and layout.zero < 2, kernels=self.kernels,
        )  # fmt: skip


def neighbours(sizes: Sequence[Any]) -> int:
    """Stretches of equal ones."""
    return sum(1 for _ in groupby(sizes))
