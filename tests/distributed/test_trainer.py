"""What the trainer's ranks agree on, and what a stage counts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megasora import trainer as module
from megasora.cluster.heartbeat import Heartbeat
from megasora.observe.profiler import ProfileConfig, StepProfiler
from megasora.schema import Config, Stage
from megasora.segments import Segment
from megasora.trainer import Trainer
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
    trainer = bare(stop=dist.get_rank() == 1)
    return trainer.next_batch(iter([SimpleNamespace(replacements=[], buckets={})]), 0)[1]


def test_all_stop_when_one_is_asked_to() -> None:
    assert run_distributed(asked_on_rank_one, 2) == [True, True]


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
    trainer = bare(config=Config(), data=SimpleNamespace(facts=None), obey={}, step=20)
    monkeypatch.setattr(
        trainer, "next_batch", lambda batches, segment: (next(batches) or SimpleNamespace(buckets={}), False)
    )
    monkeypatch.setattr(trainer, "train_step", stop_here)
    with pytest.raises(FarEnoughError):
        trainer.run_segment(Segment(1, Stage(steps=25), stage_first=10, first=15, end=40))
    assert asked == [5]  # of the segment
    assert rates == [10]  # of the stage
