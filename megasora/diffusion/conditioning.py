"""The tasks of joint training: which latent frames of a clip are given to the model.

A given frame is clean, at timestep 0, and has no loss; the others are diffused. One model so learns to go on from an image,
to fill what is between two frames, to extend a clip (as the mask strategies of Open-Sora 1.1).
"""

import difflib
import itertools
import math
from collections.abc import Callable, Mapping


def check_tasks(tasks: Mapping[str, float]) -> None:
    """Raises ValueError, starting with `tasks`, for an unknown name, a weight that is none, or no weight at all."""
    for name, weight in tasks.items():
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0)[0]
            raise ValueError(f"tasks.{name}: no such task, the nearest is {near} (all: {', '.join(TASKS)})")
        if not 0 <= weight < math.inf:
            raise ValueError(f"tasks.{name}={weight}: at least 0")
    if sum(tasks.values()) <= 0:
        raise ValueError("tasks: at least one needs a weight above 0")


def draw_mask(tasks: Mapping[str, float], frames: int, u: tuple[float, float]) -> list[bool]:
    """Which of `frames` latent frames are given, by two uniforms in [0, 1): one for the task, one for what it leaves open.

    A task is as likely as its weight's share of all. At least one frame is never given.
    """
    bounds = list(itertools.accumulate(tasks.values()))
    task = next(
        (name for name, bound in zip(tasks, bounds, strict=True) if u[0] * bounds[-1] < bound),
        max(tasks, key=lambda name: tasks[name]),
    )
    return task_mask(task, frames, u[1])


def task_mask(task: str, frames: int, u: float) -> list[bool]:
    """The frames that `task` gives, `u` in [0, 1) deciding what it leaves open. One frame alone is always text's."""
    if frames == 1:
        return [False]
    given = TASKS[task](frames, u)
    if len(given) == frames:  # two frames, both of them ends
        given = {0}
    return [frame in given for frame in range(frames)]


def _between(frames: int, u: float) -> int:
    """2 to frames - 1, each as likely; 1 for two frames, which have nothing between."""
    return min(2 + int(u * max(1, frames - 2)), frames - 1)


# Each gives the set of given frames, of at least two.
TASKS: dict[str, Callable[[int, float], set[int]]] = {
    "text": lambda frames, u: set(),
    "image": lambda frames, u: {0},
    "first_last": lambda frames, u: {0, frames - 1},
    "loop": lambda frames, u: {0, frames - 1},  # training as first_last; sampling gives one picture twice
    "extend": lambda frames, u: set(range(_between(frames, u))),
    "interpolate": lambda frames, u: set(range(0, frames, max(2, _between(frames, u)))),  # every second, third, ...
}
