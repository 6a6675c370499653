"""Schedules of a pipeline: complete, never blocking, with the published bubble; and blocks divided as evenly as can be."""

from itertools import combinations, pairwise

import pytest

from megasora.parallel.pipeline import Place
from megasora.parallel.schedule import CHUNKS, bubble, schedule, split_blocks, warm_up


@pytest.mark.parametrize("name", CHUNKS)
@pytest.mark.parametrize("processes", [2, 3, 4, 5, 8, 16])
def test_every_row_goes_forward_and_then_backward_through_every_chunk(name: str, processes: int) -> None:
    for rows in (1, 2, 3, 7, 16, 33):
        for actions in schedule(name, processes, rows):
            done = [(a.kind, a.chunk, a.row) for a in actions]
            assert len(set(done)) == len(done) == 2 * rows * CHUNKS[name]
            for chunk in range(CHUNKS[name]):
                for row in range(rows):
                    assert done.index(("forward", chunk, row)) < done.index(("backward", chunk, row))


@pytest.mark.parametrize("name", CHUNKS)
def test_the_bubble_is_the_published_one(name: str) -> None:
    """(p - 1) / (m · v + p - 1) of the whole time: Narayanan et al. 2021, section 2.2, for any number of rows from p on."""
    for processes in (2, 3, 4, 8, 16):
        for rows in range(1, 50):
            found, ideal = bubble(name, processes, rows), (processes - 1) / (rows * CHUNKS[name] + processes - 1)
            if rows >= processes or CHUNKS[name] == 1:
                assert found == pytest.approx(ideal, abs=1e-9), (processes, rows)
            else:
                assert ideal < found < 1


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7])
def test_what_a_process_sends_and_receives_never_shares_a_group(count: int) -> None:
    """NCCL takes the messages of a process in a group one by one: one that waits for another process holds up the next. The last
    process sends to the first here, as `interleaved` does."""
    groups = [tuple(f"{way} {link}" for link in ("even", "odd", "closing")) for way in ("forward", "backward")]
    for index in range(count):
        place = Place(index, count, "interleaved", *groups)  # type: ignore[arg-type]
        after, before = (index + 1) % count, (index - 1) % count
        used = [place.link("forward", sender) for sender in (index, before)]
        used += [place.link("backward", sender) for sender in (index, after)]
        assert len(set(used)) == 4, (index, used)


def test_1f1b_holds_no_more_rows_than_stages_are_left() -> None:
    for process, actions in enumerate(schedule("1f1b", 4, 16)):
        held = most = 0
        for action in actions:
            held += 1 if action.kind == "forward" else -1
            most = max(most, held)
        assert most == 4 - process
    assert warm_up("gpipe", 4, 0, 4, 16) == 16


def test_a_schedule_that_would_block_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without warm-up the first stage waits for gradients of what it has not sent on."""
    monkeypatch.setattr("megasora.parallel.schedule.warm_up", lambda *args: 0)
    schedule.cache_clear()
    with pytest.raises(RuntimeError, match="blocks"):
        bubble("interleaved", 4, 8)
    schedule.cache_clear()


@pytest.mark.parametrize("costs", [[1.0] * 10, [3, 1, 1, 1, 1, 3], [1, 9, 1, 1, 4, 4, 1], [5.0, 1, 1, 1]])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_the_dearest_stage_is_as_cheap_as_can_be(costs: list[float], stages: int) -> None:
    ranges = split_blocks(costs, stages)
    assert [i for blocks in ranges for i in blocks] == list(range(len(costs)))
    assert all(len(blocks) > 0 for blocks in ranges)
    every = (
        max(sum(costs[a:b]) for a, b in pairwise((0, *ends, len(costs))))
        for ends in combinations(range(1, len(costs)), stages - 1)
    )
    assert max(sum(costs[i] for i in blocks) for blocks in ranges) == min(every)
