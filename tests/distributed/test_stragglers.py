"""The slow rank is named by the others' steps, not by its own."""

from megasora.cluster.stragglers import WINDOW, StepTimes
from tests.harness import run_distributed


def _steps(slow: int) -> list[list[tuple[int, float]]]:
    import torch.distributed as dist

    times = StepTimes(dist.get_world_size())
    own = 0.35 if dist.get_rank() == slow else 0.1
    found = [times.add(0.01, own + (step == 3)) for step in range(2 * WINDOW)]  # one slow step is no slow rank
    return [[(straggler.rank, straggler.typical_s) for straggler in stragglers] for stragglers in found]


def test_one_process_keeps_no_steps() -> None:
    alone = StepTimes(1)
    assert not any(alone.add(0.1, 0.1) for _ in range(2 * WINDOW))
    assert not alone.steps


def test_a_slow_rank_is_named_at_the_end_of_each_window() -> None:
    nothing: list[tuple[int, float]] = []
    for slow, expected in ((1, [(1, 0.11)]), (-1, nothing)):
        for found in run_distributed(_steps, 3, slow):
            assert [step for step, stragglers in enumerate(found) if stragglers] == (
                [WINDOW - 1, 2 * WINDOW - 1] if expected else []
            )
            assert [[(rank, round(s, 6)) for rank, s in found[WINDOW - 1]]] == [expected]
