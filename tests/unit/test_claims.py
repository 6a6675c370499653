"""Claims: one worker has a piece of work, and another takes over when that one is gone."""

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.claims import Claims


def test_one_of_many_takers_wins_and_gives_back(tmp_path: Path) -> None:
    takers = [Claims(tmp_path, seconds=60) for _ in range(16)]
    for _ in range(20):
        together = threading.Barrier(len(takers))
        won: list[Any] = []

        def take(claims: Claims, together: threading.Barrier = together, won: list[Any] = won) -> None:
            together.wait()
            if claim := claims.take("shard"):
                won.append(claim)

        threads = [threading.Thread(target=take, args=(claims,)) for claims in takers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        with won[0] as claim:
            assert claim.held
            assert takers[0].take("shard") is None
        assert not any(tmp_path.iterdir())


def race_for_a_stale_claim(directory: str, together: Any, winners: Any) -> None:
    claims = Claims(Path(directory), seconds=60)
    together.wait()
    claim = claims.take("shard")
    winners.put(claim is not None)
    together.wait()  # the winner lives on: else the next to look would be right to take over


def test_one_of_many_processes_takes_over_a_stale_claim(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        stale = Claims(tmp_path, seconds=60).take("shard")
        assert stale is not None
        os.utime(stale.path, (0, 0))  # nobody touches it
        together, winners = context.Barrier(4), context.Queue()
        racers = [
            context.Process(target=race_for_a_stale_claim, args=(str(tmp_path), together, winners)) for _ in range(4)
        ]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert sorted(winners.get() for _ in racers) == [False, False, False, True]
        for file in tmp_path.iterdir():
            file.unlink()


def test_a_living_claim_is_kept_and_a_stopped_one_is_lost(tmp_path: Path) -> None:
    first, second = Claims(tmp_path, seconds=0.4), Claims(tmp_path, seconds=0.4)
    claim = first.take("shard")
    assert claim is not None
    with claim:
        time.sleep(0.8)
        assert second.take("shard") is None  # it was touched
        assert second.take("another") is not None
    stopped = first.take("shard")
    assert stopped is not None  # as if its process had been stopped: no thread touches it
    time.sleep(0.5)
    taken = second.take("shard")
    assert taken is not None
    assert taken.held
    assert not stopped.held
    with stopped:  # it goes on and finds out
        assert stopped.lost
    assert taken.held  # and does not give back what is not its own
    with taken:
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["another.0"]


def test_ages_are_by_the_clock_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = Claims(tmp_path, seconds=60).take("shard")
    assert claim is not None
    monkeypatch.setattr(time, "time", lambda: 1e12)  # of a machine whose clock is wrong
    assert Claims(tmp_path, seconds=60).take("shard") is None
    os.utime(claim.path, (0, 0))
    assert Claims(tmp_path, seconds=60).take("shard") is not None


def take_and_die(directory: str) -> None:
    claim = Claims(Path(directory), seconds=1000).take("shard")
    assert claim is not None
    claim.__enter__()
    os._exit(9)


def test_the_claim_of_a_process_that_is_gone_is_taken_at_once(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=take_and_die, args=(str(tmp_path),))
    process.start()
    process.join()
    (file,) = tmp_path.iterdir()
    owner = json.loads(file.read_text())
    claims = Claims(tmp_path, seconds=1000)
    file.write_text(json.dumps({**owner, "machine": "another"}))  # of which nothing is known
    assert claims.take("shard") is None
    file.write_text(json.dumps(owner))
    assert claims.take("shard") is not None
