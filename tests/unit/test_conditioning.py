"""The tasks of joint training: which frames they give, how often, and what a config may say."""

import math
from collections import Counter

import pytest

from megasora.diffusion.conditioning import TASKS, check_tasks, draw_mask, task_mask


def picture(mask: list[bool]) -> str:
    return "".join("x" if given else "." for given in mask)


@pytest.mark.parametrize(
    "task, frames, masks",
    [
        ("text", 5, {"....."}),
        ("image", 5, {"x...."}),
        ("first_last", 5, {"x...x"}),
        ("loop", 5, {"x...x"}),
        ("extend", 5, {"xx...", "xxx..", "xxxx."}),
        ("interpolate", 7, {"x.x.x.x", "x..x..x", "x...x..", "x....x.", "x.....x"}),
        ("extend", 3, {"xx."}),
        ("first_last", 3, {"x.x"}),
        ("interpolate", 3, {"x.x"}),
        ("extend", 2, {"x."}),
        ("first_last", 2, {"x."}),
        ("loop", 2, {"x."}),
        ("interpolate", 2, {"x."}),
    ],
)
def test_masks_of_a_task(task: str, frames: int, masks: set[str]) -> None:
    drawn = Counter(picture(task_mask(task, frames, u / 120)) for u in range(120))
    assert set(drawn) == masks
    assert set(drawn.values()) == {120 // len(masks)}, "not each as likely"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("frames", range(1, 9))
def test_something_is_always_left_to_learn(task: str, frames: int) -> None:
    for u in (0.0, 0.3, 0.7, 1 - 2**-24, 1.0):
        mask = task_mask(task, frames, u)
        assert len(mask) == frames
        assert not all(mask)
        assert any(mask) == (task != "text" and frames > 1)


def test_tasks_are_drawn_by_their_weights() -> None:
    tasks = {"extend": 0.0, "text": 1.0, "image": 2.0, "loop": 0.0, "first_last": 5.0, "interpolate": 0.0}
    drawn = Counter(picture(draw_mask(tasks, 4, (i / 800, 0.5))) for i in range(800))
    assert drawn == {"....": 100, "x...": 200, "x..x": 500}
    assert picture(draw_mask({"text": 1.0}, 4, (0.99, 0.5))) == "...."
    assert picture(draw_mask({"image": 0.1, "loop": 0.0}, 4, (1.0, 0.5))) == "x..."


def test_one_frame_is_always_drawn_from_text() -> None:
    assert all(draw_mask({"image": 1.0, "extend": 1.0}, 1, (u / 10, u / 10)) == [False] for u in range(10))


@pytest.mark.parametrize(
    "tasks, message",
    [
        ({"text": 1.0, "imge": 1.0}, r"^tasks\.imge: .*nearest is image"),
        ({"text": 1.0, "image": -0.5}, r"^tasks\.image=-0\.5"),
        ({"text": math.nan}, r"^tasks\.text=nan"),
        ({"text": math.inf}, r"^tasks\.text=inf"),
        ({"text": 0.0, "image": 0.0}, r"^tasks: "),
        ({}, r"^tasks: "),
    ],
)
def test_wrong_tasks_are_named(tasks: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tasks(tasks)


def test_right_tasks_pass() -> None:
    check_tasks({"text": 1.0})
    check_tasks(dict.fromkeys(TASKS, 0.1))
