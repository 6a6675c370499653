"""The steps of a stage as the loader will make them: its own order, buckets and balance, without reading a sample."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from data_pipelines.balance import assign
from data_pipelines.buckets import Bucket, buckets_of
from data_pipelines.loader import Item, Loader
from megasora.errors import ConfigError
from megasora.microbatch import patches_of
from megasora.parallel.layout import Layout
from megasora.parallel.mesh import Processes
from megasora.planner.job import Row
from megasora.planner.step_time import Step
from megasora.schema import Config, Stage
from megasora.training_data import UNKNOWN_TEXT, TrainingData, build_loader, open_data, synthetic_data

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
    known: dict[tuple[int, str], list[Step]] = field(default_factory=dict)

    @property
    def global_batch(self) -> int:
        return len(self.batches[0])

    def steps(self, layout: Layout) -> list[Step]:
        """As ranks of a layout get them. Raises ConfigError where they cannot share a batch evenly."""
        if self.global_batch % layout.dp:
            nearest = max(1, round(self.global_batch / layout.dp)) * layout.dp
            raise ConfigError(
                f"data.global_batch={self.global_batch}: {layout.dp} data-parallel ranks share it evenly; nearest is {nearest}"
            )
        meet = "micro" if layout.zero == 3 or layout.pp > 1 else "step"
        key = layout.dp, meet
        if key not in self.known:
            self.known[key] = [self._spread(batch, layout.dp, meet) for batch in self.batches]
        return self.known[key]

    def _spread(self, batch: Sequence[tuple[Any, int, int, float]], ranks: int, meet: Any) -> Step:
        tokens, costs = [tokens for _, _, tokens, _ in batch], [cost for _, _, _, cost in batch]
        found = assign(tokens, costs, ranks, self.capacity, meet, self.multiple)
        return Step(
            tuple(
                tuple(
                    Row(tuple((batch[i][0], batch[i][1]) for i in row), length)
                    for row, length in zip(rows, found.lengths, strict=True)
                )
                for rows in found.rows
            )
        )


def find_mixture(config: Config, stage: Stage, text_tokens: int | None, real: bool) -> Mixture:
    """Of the data of data.path, or (`real` false) as if every bucket of the stage were as frequent."""
    device = torch.device("cpu")
    data = open_data(config, device) if real else synthetic_data(config, text_tokens or UNKNOWN_TEXT)
    return mixture_of(config, stage, data, text_tokens, real)


def mixture_of(
    config: Config, stage: Stage, data: TrainingData, text_tokens: int | None = None, real: bool = True
) -> Mixture:
    """Of data that is open already."""
    paper = OnPaper(Layout())
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
