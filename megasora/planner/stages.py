"""Which blocks, parameters and rows in flight each pipeline stage has."""

from dataclasses import dataclass

from megasora.models.families import MODELS
from megasora.planner.job import Job
from megasora.planner.parameters import Parameter


@dataclass(frozen=True)
class Stage:
    """A process of a pipeline: its blocks, and the most rows that it holds at once between forward and backward."""

    number: int
    blocks: tuple[int, ...]
    first: bool
    last: bool
    held: int
    entry: tuple[str, ...] = ()  # modules that only the first needs
    exit: tuple[str, ...] = ()

    def has(self, parameter: Parameter) -> bool:
        """Whether a parameter lies here. What conditions the blocks lies on every stage."""
        if parameter.block is not None:
            return parameter.block in self.blocks
        module = parameter.name.partition(".")[0]
        return (self.first or module not in self.entry) and (self.last or module not in self.exit)


def stages(job: Job) -> list[Stage]:
    """One a process of the pipeline; without one, the whole model."""
    return [Stage(0, tuple(range(job.blocks)), True, True, 1)]
