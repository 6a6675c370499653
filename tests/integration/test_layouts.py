"""The trainer on other layouts than data parallelism, and `megasora parity`."""

import json

import pytest

from megasora.observe.metrics import history
from tests.integration.conftest import Road


def losses(road: Road, run: str) -> list[float]:
    return [line["loss"] for line in history(road.directory / run)]


# A row that ranks share in several ways wants a capacity for each of them.
STEPS = (
    "--data.capacity=256",
    "--data.row_multiple=256",
    "--run.steps=8",
    "--stages.0.steps=4",
    "--checkpoint.every=4",
    "--eval.every=0",
)


@pytest.fixture(scope="module")
def alone(road: Road) -> list[float]:
    road.run("train", f"--run.dir={road.directory / 'layout-alone'}", *STEPS)
    return losses(road, "layout-alone")


@pytest.mark.parametrize(("name", "layout"), [("tp2", "dp1,tp2"), ("cp2", "dp1,cp2:dynamic,zero2"), ("pp2", "pp2,dp1")])
def test_training_on_another_layout_and_back(name: str, layout: str, road: Road, alone: list[float]) -> None:
    run = road.directory / f"layout-{name}"
    road.run("train", f"--run.dir={run}", f"--parallel.layout={layout}", *STEPS, nproc=2)
    assert losses(road, run.name) == pytest.approx(alone, rel=1e-4)
    road.run("train", f"--run.dir={run}", f"--run.resume={run / 'checkpoints' / 'step-00000004'}", *STEPS)
    assert losses(road, run.name) == pytest.approx(alone, rel=1e-4)


def test_parity_is_one_command(road: Road) -> None:
    done = road.run("parity", "--layout=dp1,tp2", "--layout=cp1x2", "--json")
    found = json.loads(done.stdout)["layouts"]
    assert [result["layout"] for result in found] == ["dp1,tp2", "cp1x2"]
    assert all(result["ok"] and 0 < result["worst"] <= 1e-5 for result in found)
    done = road.run("parity", "--layout=tp2", "--tolerance=1e-12", code=1)
    assert "tp2" in done.stderr
    assert "above 1e-12" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("--layout=tp3",), "4 heads do not divide by tp x Ulysses = 3; nearest is"),
        (("--layout=cp1x2", "--model.temporal=chunk_causal"), "no ring; nearest is dp1,cp2x1"),
        (("--layout=pp4",), "4 stages are more than the model's 2 blocks; nearest is pp2:1f1b,dp2"),
        ((), "give at least one --layout"),
    ],
)
def test_impossible_layouts_are_one_line(road: Road, overrides: tuple[str, ...], said: str) -> None:
    done = road.run("parity", *overrides, code=2)
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
