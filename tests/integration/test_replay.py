"""Spikes and the way back to what made them: recorded, skipped, rolled back; replayed sample by sample."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from megasora.checkpoint.directory import list_checkpoints
from megasora.checkpoint.load import load
from megasora.cli import main
from megasora.observe.metrics import history, read_lines
from tests.integration.conftest import identical
from tests.integration.fault_storm import draw_latents, write_config

WILD, NAN = 5, 17  # samples


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("replay")
    draw_latents(directory / "latents", {WILD: 60.0, NAN: math.nan})
    return write_config(directory)


def train(config: Path, name: str, policy: str, steps: int = 30, **more: Any) -> Path:
    run = config.parent / name
    keys = [f"--run.dir={run}", f"--run.steps={steps}", f"--spikes.policy={policy}", "--spikes.window=8",
            "--checkpoint.keep_last=40", *(f"--{key}={value}" for key, value in more.items())]  # fmt: skip
    assert main(["train", "--config", str(config), *keys]) == 0
    return run


@pytest.fixture(scope="module")
def recorded(config: Path) -> Path:
    return train(config, "record", "record")


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_lines(run / "events.jsonl") if line["event"] == kind]


def replayed(run: Path, step: int, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    assert main(["replay", str(run), "--step", str(step), "--json", *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_a_replay_is_the_step_that_was(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skipped = {event["step"] for event in events(recorded, "skipped")}
    assert skipped
    step = next(s for s in range(24, 30) if s not in skipped)  # behind skipped ones, between two checkpoints
    capsys.readouterr()
    found = replayed(recorded, step, capsys)
    original = next(line for line in history(recorded) if line["step"] == step)
    assert found["start"] == step - 1 - (step - 1) % 5
    assert found["loss"] == pytest.approx(original["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(original["grad_norm"], rel=1e-5)
    samples = sorted(found["samples"], key=lambda sample: int(sample["position"]))
    assert xxhash.xxh3_64_hexdigest("\n".join(s["key"] for s in samples).encode()) == original["order"]
    assert sum(s["loss"] for s in samples) / len(samples) == pytest.approx(original["loss"], rel=1e-5)
    assert [s["position"] for s in samples] == list(range((step - 1) * 12, step * 12))
    assert all(s["caption"] in ("a red wall", "a blue wall") and s["seeds"] == [3, 0, s["position"]] for s in samples)
    assert all(s["thumbnail"] and s["timesteps"] for s in samples)
    page = recorded / "replay" / f"step-{step:08d}" / "index.html"
    assert all(s["key"] in page.read_text() for s in samples)
    assert json.loads(page.with_name("replay.json").read_text()) == found


def test_the_sample_behind_a_spike_and_the_one_behind_a_nan_are_named(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spikes = events(recorded, "spike")
    assert spikes
    assert all(f"s{WILD:03d}" in spike["samples"] for spike in spikes)
    for step, name in ((spikes[0]["step"], WILD), (events(recorded, "skipped")[-1]["step"], NAN)):
        capsys.readouterr()
        samples = replayed(recorded, step, capsys)["samples"]
        assert samples[0]["key"] == f"s{name:03d}"
        assert {s["key"] for s in samples if s["suspect"]} <= {f"s{WILD:03d}", f"s{NAN:03d}"}
        assert samples[0]["suspect"]


def test_what_cannot_be_replayed_is_one_line(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--step", "31"], "has no such step; it has 1 to 30"),
        (["--step", "0"], "has no such step"),
        (["--step", "3", "--layout", "dp2"], "valid here"),
    ):
        capsys.readouterr()
        assert main(["replay", str(recorded), *arguments]) == 2
        assert said in capsys.readouterr().err
    assert main(["replay", str(recorded.parent), "--step", "1"]) == 2


def test_skip_spares_the_weights_and_resumes_alike(config: Path, recorded: Path) -> None:
    run = train(config, "skip", "skip")
    spike = events(run, "spike")[0]["step"]
    assert spike in {event["step"] for event in events(run, "skipped")}
    assert spike not in {event["step"] for event in events(recorded, "skipped")}
    before = [(m["loss"], m["grad_norm"]) for m in history(recorded)[:spike]]
    assert [(m["loss"], m["grad_norm"]) for m in history(run)[:spike]] == before
    again = train(config, "skip-resumed", "skip", steps=spike - 1)
    train(config, "skip-resumed", "skip")
    assert identical(again) == identical(run)  # what is a spike follows from the steps before, kept in the checkpoint


def test_rollback_takes_back_and_goes_on_behind(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(config, "rollback", "rollback", **{"checkpoint.every": 1})
    first = events(run, "rollback")[0]
    spike = first["step"]
    assert first["to"] == spike - 1
    assert events(run, "spike")[0]["step"] == spike
    weights = []
    for step in (spike - 1, spike):
        info = next(info for info in list_checkpoints(run / "checkpoints") if info.step == step)
        tensors = {"model/head.out.bias": torch.zeros(48)}
        load(info.path, tensors, prefix="model/head.out.bias")
        weights.append(tensors["model/head.out.bias"])
    assert torch.equal(*weights)
    assert [m["step"] for m in history(run)] == list(range(1, 31))
    last = events(run, "rollback")[-1]["step"]
    step = next(s for s in range(last + 1, 31) if history(run)[s - 1]["loss"] is not None)
    capsys.readouterr()
    assert replayed(run, step, capsys)["loss"] == pytest.approx(history(run)[step - 1]["loss"], rel=1e-5)
