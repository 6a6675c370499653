"""Memory by storages, and energy by counters: what is counted once, and what is not there."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megasora.engines.fragments import WHOLE, in_pieces
from megasora.observe import energy
from megasora.observe.memory import living, state_by_part, storages

CPU = torch.device("cpu")


def test_views_count_once_and_pieces_by_what_is_here() -> None:
    x = torch.zeros(10, 10)
    assert sum(storages([x, x[3:], x.t()]).values()) == 400
    assert sum(storages([torch.zeros(7, device="meta")]).values()) == 0
    flat = torch.zeros(30)  # of a parameter of 100 numbers
    assert sum(storages([in_pieces((10, 10), WHOLE, 15, flat)]).values()) == 120
    assert sum(storages([in_pieces((10, 10), WHOLE, 0, None)]).values()) == 0


def test_what_lives_is_found_until_it_is_gone() -> None:
    before = living(CPU)
    kept = torch.zeros(1000, 1000)
    assert living(CPU) - before == pytest.approx(4e6, abs=1e5)
    del kept
    assert living(CPU) - before == pytest.approx(0, abs=1e5)
    with FakeTensorMode():  # as torch.compile keeps some
        fake = torch.zeros(1000, 1000)
    assert living(CPU) - before == pytest.approx(0, abs=1e5)
    del fake


def test_parts_share_nothing() -> None:
    weights = nn.Linear(10, 10, bias=False).weight
    master, moment = torch.zeros(50), torch.zeros(100)
    tensors = {"model/w": weights.detach(), "model/flat": master, "optim/w/exp_avg": moment, "ema/w": moment[:50]}
    assert state_by_part([weights], tensors) == {"weights": 600, "optimizer": 400, "ema": 0}


def test_energy_is_summed_over_packages_and_counters_begin_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(joules: dict[str, int]) -> list[energy.Counter] | None:
        for name, value in joules.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "energy_uj").write_text(f"{value}000000\n")
            (tmp_path / name / "max_energy_range_uj").write_text("100000000\n")
        return energy.energy(CPU)

    monkeypatch.setattr(energy, "RAPL", tmp_path)
    assert count({}) is None
    before = count({"intel-rapl:0": 5, "intel-rapl:1": 97, "intel-rapl:0:0": 3})  # the last is a part of the first
    after = count({"intel-rapl:0": 11, "intel-rapl:1": 4, "intel-rapl:0:0": 9})
    assert before
    assert after
    assert energy.used(before, after) == 6 + 7
