"""A run as segments: the stretches of its history in which the order of the data is one function of the position."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from megasora.errors import ConfigError
from megasora.schema import Config, Stage


@dataclass(frozen=True)
class Segment:
    """Steps `first` to `end` of the run. A stage is one segment, or several where the data changed on purpose."""

    number: int
    stage: Stage
    stage_first: int  # the step at which its stage begins: the learning rate counts from there
    first: int
    end: int


def segments_of(config: Config, breaks: Sequence[int] = ()) -> list[Segment]:
    """The segments that `run.steps` reaches; the last stage goes on if it asks for more. At each of `breaks` a new one begins."""
    segments: list[Segment] = []
    first = 0
    last = config.run.steps or sum(stage.steps for stage in config.stages)
    for number, stage in enumerate(config.stages):
        end = last if number == len(config.stages) - 1 else min(first + stage.steps, last)
        edges = [first, *(step for step in sorted(breaks) if first < step < end), end]
        for begin, stop in pairwise(edges):
            if begin < stop:
                segments.append(Segment(len(segments), stage, first, begin, stop))
        first += stage.steps
    return segments


def find_stage(config: Config, key: str, name: str) -> Stage:
    """The stage of that name. Raises ConfigError, naming the key that asked for it."""
    for stage in config.stages:
        if stage.name == name:
            return stage
    raise ConfigError(f"{key}={name}: the config has {', '.join(stage.name for stage in config.stages)}")
