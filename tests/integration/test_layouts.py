"""The trainer on other layouts than data parallelism, and `megasora parity`."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.video.files import decode
from megasora.observe.compare import check, read_runs
from megasora.observe.metrics import EVENTS, history
from tests.integration.conftest import Road, environment
from tests.unit.test_boards import read_board


def losses(road: Road, run: str) -> list[float]:
    return [line["loss"] for line in history(road.directory / run)]


def evaluation(road: Road, run: str) -> dict[str, float]:
    """The last of a run: losses by name."""
    lines = (road.directory / run / EVENTS).read_text().splitlines()
    *_, last = (event for event in map(json.loads, lines) if event["event"] == "eval")
    return {name: value for name, value in last.items() if name.startswith("loss")}


def points(road: Road, run: str) -> dict[tuple[str, int], float]:
    """What only TensorBoard has of losses and weights: by curve and step."""
    board = read_board(road.directory / run)
    tags = [tag for tag in board.Tags()["scalars"] if tag.startswith(("loss/q", "loss/bucket", "optim/"))]
    return {(tag, point.step): point.value for tag in tags for point in board.Scalars(tag)}


def frames(file: Path) -> np.ndarray:
    return decode(file, frames=5, height=48, width=80).astype(float)


# A row that ranks share in several ways wants a capacity for each of them.
STEPS = (
    "--data.capacity=256",
    "--data.row_multiple=256",
    "--run.steps=8",
    "--stages.0.steps=4",
    "--checkpoint.every=4",
    "--eval.every=8",
    "--eval.loss_every=8",
)


@pytest.fixture(scope="module")
def alone(road: Road) -> list[float]:
    road.run("train", f"--run.dir={road.directory / 'layout-alone'}", *STEPS)
    return losses(road, "layout-alone")


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param("tp2", "dp1,tp2", marks=pytest.mark.long),
        ("cp2", "dp1,cp2:dynamic,zero2"),
        ("pp2", "pp2,dp1"),
    ],
)
def test_training_on_another_layout_and_back(name: str, layout: str, road: Road, alone: list[float]) -> None:
    run = road.directory / f"layout-{name}"
    road.run("train", f"--run.dir={run}", f"--parallel.layout={layout}", *STEPS, nproc=2)
    assert losses(road, run.name) == pytest.approx(alone, rel=1e-4)
    assert evaluation(road, run.name) == pytest.approx(evaluation(road, "layout-alone"), rel=1e-4)
    assert points(road, run.name) == pytest.approx(points(road, "layout-alone"), rel=1e-3)
    here, there = (frames(road.directory / of / "samples/step-00000008/00.mp4") for of in (run.name, "layout-alone"))
    assert np.abs(here - there).mean() < 0.1 < there.std()
    road.run("train", f"--run.dir={run}", f"--run.resume={run / 'checkpoints' / 'step-00000004'}", *STEPS)
    assert losses(road, run.name) == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("layout", ["tp2", pytest.param("dp2,zero2", marks=pytest.mark.long)])
@pytest.mark.usefixtures("alone")
def test_samples_of_several_processes(layout: str, road: Road) -> None:
    run, made = f"--run.dir={road.directory / 'layout-alone'}", {}
    for nproc in (1, 2):
        output = road.directory / f"made-{layout}-{nproc}"
        prompts = '--sample.prompts=["a red circle", "a blue square", "a car"]'
        road.run("sample", run, f"--parallel.layout={layout}", prompts, f"--sample.output={output}", nproc=nproc)
        assert (output / "contact-sheet.png").exists()
        made[nproc] = [frames(output / f"{i:02d}.mp4") for i in range(3)]
    for alone, together in zip(made[1], made[2], strict=True):
        assert np.abs(alone - together).mean() < 0.1 < alone.std()
    assert np.abs(made[1][0] - made[1][1]).mean() > 1


def on_two_nodes(road: Road, *overrides: str) -> list[tuple[int, str]]:
    """Exit code and stderr of each of two launchers with one process, which take themselves for nodes of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        sys.executable, "-m", "megasora", "launch", "local", "--nproc", "1", "--nnodes", "2", "--rdzv-endpoint", endpoint,
        "--local-addr", "127.0.0.1", "train", "--config", str(road.config), "--parallel.layout=tp2", *STEPS, *overrides,
    ]  # fmt: skip
    nodes = [
        subprocess.Popen(
            command, cwd=road.directory, text=True, env=environment() | {"SLURMD_NODENAME": name},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for name in ("a", "b")
    ]  # fmt: skip
    said = [node.communicate(timeout=200)[1] for node in nodes]
    return [(node.returncode, err) for node, err in zip(nodes, said, strict=True)]


def test_a_tensor_group_stays_in_a_node_unless_told(road: Road) -> None:
    run = road.directory / "layout-nodes"
    (code, one), (other_code, other) = on_two_nodes(road, f"--run.dir={run}")
    assert (code, other_code, run.exists()) == (2, 2, False)
    assert "goes beyond nodes of 1 processes (parallel.across_nodes=true allows it); nearest is dp2" in one + other
    (code, one), (other_code, other) = on_two_nodes(
        road,
        f"--run.dir={run}",
        "--parallel.across_nodes=true",
        "--run.steps=2",
        "--stages.0.steps=2",
        "--eval.every=0",
    )
    assert (code, other_code) == (0, 0), one + other
    started = json.loads((run / EVENTS).read_text().splitlines()[0])
    assert sorted(started["nodes"].items()) in ([("a", "0"), ("b", "1")], [("a", "1"), ("b", "0")])
    assert "between nodes: tp" in one + other


HUNDRED = (
    "--data.capacity=256",
    "--data.row_multiple=256",
    "--stages.0.steps=30",
    "--stages.1.steps=70",
    "--run.steps=100",
)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_hundred_steps_on_four_processes(road: Road) -> None:
    alone = ("--checkpoint.every=100", "--eval.every=0", *HUNDRED)
    road.run("train", f"--run.dir={road.directory / 'hundred-alone'}", *alone)
    for name, layout in (("stages", "pp2,dp1,tp2"), ("contexts", "dp2,cp2,zero2")):
        run = road.directory / f"hundred-{name}"
        road.run("train", f"--run.dir={run}", f"--parallel.layout={layout}", *alone, nproc=4)
        assert check(read_runs([road.directory / "hundred-alone", run]), 1e-4)[run.name] <= 1e-4


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
