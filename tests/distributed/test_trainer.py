"""What the trainer's ranks agree on, and what a stage counts."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data_pipelines.batches.loader import Replacement
from megasora import trainer as module
from megasora.cluster.heartbeat import Heartbeat
from megasora.cluster.signals import StopRequest
from megasora.observe.profiler import ProfileConfig, StepProfiler
from megasora.observe.spikes import SpikeConfig, SpikeWatch
from megasora.schema import Config, Stage
from megasora.segments import Segment
from megasora.trainer import Trainer
from megasora.training_data import settle_replacements
from tests.harness import run_distributed


def bare(**facts: Any) -> Trainer:
    """A trainer that has only what the method under test asks for."""
    made = object.__new__(Trainer)
    vars(made).update(
        {
            "journal": None,
            "bad_samples": 0,
            "group": SimpleNamespace(device=torch.device("cpu"), world=2),
            "saver": SimpleNamespace(done=False),
            "beat": Heartbeat(0),
            "step": 0,
            "profiler": StepProfiler(ProfileConfig(), Path(), torch.device("cpu"), 0),
            **facts,
        }
    )
    return made


def asked_on_rank_one() -> bool:
    stop = StopRequest()
    if dist.get_rank() == 1:
        stop.ask(signal.SIGTERM)
    trainer = bare(stop=stop)
    return trainer.next_batch(iter([SimpleNamespace(replacements=[], buckets={})]), 0)[1]


def test_all_stop_when_one_is_asked_to() -> None:
    assert run_distributed(asked_on_rank_one, 2) == [True, True]


def read_differently() -> tuple[int, list[dict[str, Any]], str]:
    """Ranks 0 and 1 share one row, ranks 2 and 3 another: both of the latter had to replace a sample, of the former rank 1."""
    rank = dist.get_rank()
    bad = Replacement(rank // 2, "torn", "0.tar", "truncated", "whole")
    keys = {rank // 2: "torn" if rank == 0 else "whole"}
    events: list[dict[str, Any]] = []
    group = SimpleNamespace(device=torch.device("cpu"), world=4)
    trainer = bare(stop=StopRequest(), group=group, event=lambda kind, **facts: events.append(facts))
    batch = SimpleNamespace(replacements=[bad] * (rank > 0), buckets={}, own=keys)
    try:
        trainer.next_batch(iter([batch]), 0)
    except RuntimeError as error:
        return trainer.bad_samples, events, str(error)
    return trainer.bad_samples, events, ""


def test_ranks_that_share_a_row_do_not_train_on_different_samples() -> None:
    for _, events, error in run_distributed(read_differently, 4):
        assert [(e["position"], e["by"]) for e in events] == [(0, "whole"), (1, "whole")]  # each once, before the end
        assert "ranks that share a row read torn and whole" in error


def test_a_replacement_counts_once() -> None:
    one = Replacement(7, "torn", "0.tar", "truncated", "whole")
    two = Replacement(3, "gone", "1.tar", "missing", "other")
    own = [{7: "whole"}, {7: "whole", 3: "other"}]
    assert settle_replacements([[one], [one, two]], own) == ([two, one], "")


class FarEnoughError(Exception):
    pass


def test_a_stage_counts_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    rates: list[int] = []

    def stop_here(*_: Any) -> None:
        raise FarEnoughError

    loader = SimpleNamespace(
        samples=0, unfit=0, expected=dict, batches=lambda step: iter([asked.append(step)])
    )  # fmt: skip
    monkeypatch.setattr(module, "build_loader", lambda *_: loader)
    monkeypatch.setattr(module, "build_recipe", lambda *_: None)
    monkeypatch.setattr(module, "learning_rate", lambda config, peak, step, steps: rates.append(step))
    watch = SpikeWatch(SpikeConfig(), [(1.0, 1.0)])
    trainer = bare(config=Config(), data=SimpleNamespace(facts=None), obey={}, step=20, watch=watch)
    monkeypatch.setattr(
        trainer, "next_batch", lambda batches, segment: (next(batches) or SimpleNamespace(buckets={}), False)
    )
    monkeypatch.setattr(trainer, "train_step", stop_here)
    with pytest.raises(FarEnoughError):
        trainer.run_segment(Segment(1, Stage(steps=25), stage_first=10, first=15, end=40))
    assert asked == [5]  # of the segment
    assert rates == [10]  # of the stage
    assert trainer.watch is watch
    with pytest.raises(FarEnoughError):
        trainer.run_segment(Segment(1, Stage(steps=25), stage_first=20, first=20, end=40))
    assert not trainer.watch.recent  # a new stage has its own level


@pytest.mark.parametrize(("saved", "forgotten", "expected"), [(25, False, 3.0), (20, False, 7.0), (25, True, None)])
def test_a_rollback_brings_back_the_level_of_its_stage(
    saved: int, forgotten: bool, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 is what the checkpoint has, 7 what the stage has had of late."""
    monkeypatch.setattr(module, "verify", lambda path: "")
    monkeypatch.setattr(module, "load_from", lambda path, engine: None)
    monkeypatch.setattr(module, "read_facts", lambda path: {"step": saved, "recent": [(3.0, 1.0)]})
    watch = SpikeWatch(SpikeConfig(), [] if forgotten else [(7.0, 1.0)], in_a_row=2)
    segments = [Segment(0, Stage(), 0, 0, 20), Segment(1, Stage(), 20, 20, 40)]
    saver = SimpleNamespace(step=None)
    trainer = bare(config=Config(), step=30, watch=watch, segments=segments, saver=saver, good=Path(), engine=None)
    trainer.roll_back()
    assert [loss for loss, _ in trainer.watch.recent] == ([] if expected is None else [expected])
    assert trainer.watch.in_a_row == 2
