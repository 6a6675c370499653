"""The steps of a stage as the loader will make them: its own order, buckets and balance, without reading a sample."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from data_pipelines.batches.balance import assign
from data_pipelines.batches.loader import Item, Loader
from data_pipelines.batches.pools import assign_pools
from data_pipelines.buckets import Bucket, buckets_of
from megasora.microbatch import patches_of
from megasora.parallel.layout import Layout, check_share
from megasora.parallel.mesh import Processes
from megasora.planner.job import Row
from megasora.planner.step_time import Step
from megasora.schema import Config, Stage
from megasora.training_data import UNKNOWN_TEXT, TrainingData, build_loader, meeting, synthetic_data

MOST = 8192  # samples that are looked at


class OnPaper(Processes):
    """The first process of a layout that nobody has started."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(0, layout.world, torch.device("cpu"), layout, None)  # type: ignore[arg-type]

    @property
    def data_rank(self) -> int:
        return 0


@dataclass(frozen=True)
class Mixture:
    """Samples of some global batches of a stage, each with what it costs."""

    batches: list[list[tuple[Any, int, int, float]]]  # shape in patches, caption's tokens, tokens, cost
    capacity: int
    multiple: int
    expected: dict[Bucket, float]
    empty: list[Bucket]  # buckets that no sample falls into
    real: bool  # of the run's own data; else all buckets alike
    known: dict[tuple[Any, ...], list[Step]] = field(default_factory=dict)

    @property
    def global_batch(self) -> int:
        return len(self.batches[0])

    def steps(self, layout: Layout) -> list[Step]:
        """As ranks of a layout get them. Raises ConfigError where they cannot share a batch evenly."""
        check_share(self.global_batch, layout)
        key = layout.dp, meeting(layout), tuple(layout.widths) if layout.dynamic else ()
        if key not in self.known:
            self.known[key] = [self._spread(batch, layout) for batch in self.batches]
        return self.known[key]

    def _spread(self, batch: Sequence[tuple[Any, int, int, float]], layout: Layout) -> Step:
        tokens, costs = [tokens for _, _, tokens, _ in batch], [cost for _, _, _, cost in batch]
        if layout.dynamic:
            found = assign_pools(tokens, costs, layout.dp, layout.widths, self.capacity, self.multiple)
        else:
            found = assign(tokens, costs, layout.dp, self.capacity, meeting(layout), self.multiple)
        widths = found.widths or [0] * len(found.lengths)
        return Step(
            tuple(
                tuple(
                    Row(tuple((batch[i][0], batch[i][1]) for i in row), length, width)
                    for row, length, width in zip(rows, found.lengths, widths, strict=True)
                )
                for rows in found.rows
            )
        )


def find_mixture(config: Config, stage: Stage, text_tokens: int | None, data: TrainingData | None = None) -> Mixture:
    """Of the run's data, or (without any) as if every bucket of the stage were as frequent."""
    paper, real = OnPaper(Layout()), data is not None
    if data is None:
        data = synthetic_data(config, text_tokens or UNKNOWN_TEXT)
    loader = build_loader(config, paper, data, stage, 0, {})
    expected = loader.expected()
    wanted = buckets_of(stage.buckets)
    size = config.data.global_batch
    batches = [
        [sample(config, loader, data, loader.item_at(position), text_tokens) for position in range(first, first + size)]
        for first in range(0, max(size, min(2 * size, MOST // size * size)), size)
    ]
    return Mixture(
        batches, config.data.capacity, config.data.row_multiple, expected,
        [bucket for bucket in wanted if bucket not in expected], real,
    )  # fmt: skip


def sample(
    config: Config, loader: Loader, data: TrainingData, item: Item, text_tokens: int | None
) -> tuple[Any, int, int, float]:
    shape = patches_of(item.bucket, data.facts.compression, config.model.patch)
    found = UNKNOWN_TEXT if item.text_tokens < 0 else item.text_tokens
    text = (text_tokens or found) if config.model.text_width else 0
    return shape, text, loader.tokens_of(item.bucket), loader.cost_of(item.bucket, item.text_tokens)
