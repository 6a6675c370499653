"""The order in which the stages of a pipeline go forward and backward.

gpipe: all forward, then all backward (Huang et al. 2019). 1f1b: in turn, as soon as the first row is through (Narayanan et al.
2019). interleaved: in turn too, each process having several chunks of blocks (Narayanan et al. 2021, section 2.2).
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate, pairwise
from typing import Literal

Kind = Literal["forward", "backward"]
CHUNKS = {"gpipe": 1, "1f1b": 1, "interleaved": 2}  # of blocks a process, by the name of the schedule
COST: dict[Kind, float] = {"forward": 1.0, "backward": 2.0}  # of a chunk, in units of time


@dataclass(frozen=True)
class Action:
    """A process takes a row through one of its chunks."""

    kind: Kind
    chunk: int
    row: int


@lru_cache(maxsize=64)
def schedule(name: str, processes: int, rows: int) -> tuple[tuple[Action, ...], ...]:
    """What each process does, in order. Chunk c of process p is stage c · processes + p."""
    chunks = CHUNKS[name]
    groups = row_groups(processes, rows)
    forwards = [Action("forward", chunk, row) for group in groups for chunk in range(chunks) for row in group]
    backwards = [
        Action("backward", chunk, row) for group in groups for chunk in reversed(range(chunks)) for row in group
    ]
    return tuple(
        in_turn(forwards, backwards, warm_up(name, processes, p, max(map(len, groups)), len(forwards)))
        for p in range(processes)
    )


def row_groups(processes: int, rows: int) -> list[range]:
    """Rows that go through a chunk before the next chunk's turn: about as many as there are processes, no fewer, so that whatever
    their number no process waits for longer than it must."""
    size, more = divmod(rows, max(1, rows // processes))
    sizes = [size + (i < more) for i in range(max(1, rows // processes))]
    return [range(begin, end) for begin, end in pairwise(accumulate(sizes, initial=0))]


def warm_up(name: str, processes: int, process: int, group: int, passes: int) -> int:
    """Forward passes before the first one that is followed by a backward pass."""
    if name == "gpipe":
        return passes
    after = processes - process - 1  # stages behind this one
    return min(passes, after if name == "1f1b" else 2 * after + (CHUNKS[name] - 1) * group)


def in_turn(forwards: list[Action], backwards: list[Action], first: int) -> tuple[Action, ...]:
    """The `first` forward passes, then one of each in turn, then what is left."""
    turns = [action for pair in zip(forwards[first:], backwards, strict=False) for action in pair]
    return (*forwards[:first], *turns, *backwards[len(forwards) - first :])


def bubble(name: str, processes: int, rows: int) -> float:
    """The share of time that processes wait, if chunks cost alike and sending nothing: (p-1) / (rows·chunks + p-1) where there
    are p rows or more. Raises RuntimeError for a schedule that would block."""
    queues = [list(actions) for actions in schedule(name, processes, rows)]
    last = CHUNKS[name] * processes - 1
    ends: dict[tuple[str, int, int], float] = {}  # (kind, stage, row) -> when it was done
    free = [0.0] * processes
    while any(queues):
        done = len(ends)
        for process, queue in enumerate(queues):
            while queue:
                action = queue[0]
                stage = action.chunk * processes + process
                wanted = after(action, stage, last)
                if wanted is not None and wanted not in ends:
                    break
                begin = max(free[process], ends[wanted] if wanted is not None else 0.0)
                free[process] = ends[action.kind, stage, action.row] = begin + COST[action.kind]
                queue.pop(0)
        if len(ends) == done:
            raise RuntimeError(f"{name} blocks with {processes} processes and {rows} rows")
    return 1 - CHUNKS[name] * rows * sum(COST.values()) / max(free)


def after(action: Action, stage: int, last: int) -> tuple[str, int, int] | None:
    """What must be done before it."""
    if action.kind == "forward":
        return ("forward", stage - 1, action.row) if stage else None
    return ("backward", stage + 1, action.row) if stage < last else ("forward", stage, action.row)


def split_blocks(costs: list[float], stages: int) -> list[range]:
    """The blocks of each stage: neighbours, none empty, the dearest stage as cheap as can be."""

    @cache
    def best(first: int, left: int) -> tuple[float, tuple[int, ...]]:
        """The cost of the dearest of `left` stages from block `first` on, and where they end."""
        if left == 1:
            return sum(costs[first:]), (len(costs),)
        found: list[tuple[float, tuple[int, ...]]] = []
        for end in range(first + 1, len(costs) - left + 2):
            rest, ends = best(end, left - 1)
            found.append((max(sum(costs[first:end]), rest), (end, *ends)))
        return min(found)

    _, ends = best(0, stages)
    return [range(begin, end) for begin, end in pairwise((0, *ends))]
