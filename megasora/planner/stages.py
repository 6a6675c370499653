"""Which blocks, parameters and rows in flight each process of a pipeline has: by the engine's own schedule and division."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megasora.models.families import MODELS
from megasora.parallel.schedule import CHUNKS, schedule, split_blocks
from megasora.planner.job import Job
from megasora.planner.parameters import Parameter, Sizes, model_parameters, sizes


@dataclass(frozen=True)
class Stage:
    """A process of a pipeline: its blocks, and the most rows that it holds at once between forward and backward, in passes
    through a whole process."""

    number: int
    blocks: tuple[int, ...]
    first: bool
    last: bool
    held: float
    entry: tuple[str, ...]  # modules that only the first needs
    exit: tuple[str, ...]

    def has(self, key: int | str) -> bool:
        """Whether a block or a module around them lies here. What conditions the blocks lies on every stage."""
        if isinstance(key, int):
            return key in self.blocks
        return (self.first or key not in self.entry) and (self.last or key not in self.exit)

    def shares(self, key: int | str) -> bool:
        """Whether every stage has it."""
        return isinstance(key, str) and key not in (*self.entry, *self.exit)

    def parameters(self, config: Any) -> list[Parameter]:
        """Those that lie here."""
        return [p for p in model_parameters(config) if self.has(p.module if p.block is None else p.block)]

    def sizes(self, job: Job) -> dict[int | str, Sizes]:
        """Of what lies here."""
        return {key: found for key, found in sizes(job.model, job.layout.tp, job.shards).items() if self.has(key)}


@lru_cache(maxsize=1024)
def divide(config: Any, pp: int, name: str) -> tuple[tuple[int, ...], ...]:
    """The blocks of each process."""
    if pp == 1:
        return (tuple(range(blocks_of(config))),)
    family = MODELS[config.family]
    costs = [0.0] * blocks_of(config)
    for parameter in model_parameters(config):
        if len(parameter.shape) == 2:
            at = parameter.block
            if at is None and parameter.module in family.ENTRY:
                at = 0
            if at is None and parameter.module in family.EXIT:
                at = -1
            if at is not None:
                costs[at] += parameter.count
    chunks = CHUNKS[name]
    ranges = split_blocks(costs, chunks * pp)
    return tuple(tuple(b for chunk in range(chunks) for b in ranges[chunk * pp + process]) for process in range(pp))


def blocks_of(config: Any) -> int:
    return config.depth + (config.single_depth if config.family == "mmdit" else 0)


@lru_cache(maxsize=1024)
def held(name: str, pp: int, rows: int) -> tuple[float, ...]:
    """The most rows that each process holds at once, a chunk counting as its share."""
    found = []
    for actions in schedule(name, pp, rows):
        now = most = 0
        for action in actions:
            now += 1 if action.kind == "forward" else -1
            most = max(most, now)
        found.append(most / CHUNKS[name])
    return tuple(found)


def stages(job: Job) -> list[Stage]:
    """One a process of the pipeline; without one, the whole model."""
    layout, family = job.layout, MODELS[job.model.family]
    rows = held(layout.schedule, layout.pp, job.rows) if layout.pp > 1 else (1.0,)
    return [
        Stage(number, blocks, number == 0, number == layout.pp - 1, rows[number], family.ENTRY, family.EXIT)
        for number, blocks in enumerate(divide(job.model, layout.pp, layout.schedule))
    ]
