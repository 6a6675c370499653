"""Jobs on a real SLURM cluster of four nodes, all on this machine: trained, preempted, swept, chained, shared out."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megasora.observe.metrics import history, read_lines
from tests.integration.conftest import Road, environment, identical
from tests.slurm import Cluster, unavailable


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why := unavailable():
        pytest.skip(why)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


@pytest.fixture(autouse=True)
def idle(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.command("scancel", "--user=root")
    cluster.wait_until_idle()


@pytest.fixture
def launch(road: Road, cluster: Cluster) -> Callable[..., str]:
    def call(verb: str, *words: str, nodes: int = 1, nproc: int = 2) -> str:
        """Submits a job and returns its id."""
        command = [sys.executable, "-m", "megasora", "launch", "slurm", verb, "--config", str(road.config)]
        options = ["--nodes", str(nodes), "--gpus-per-node", str(nproc)]
        done = subprocess.run([*command, *options, *words], cwd=road.directory, text=True, capture_output=True,
                              env=cluster.environment | environment(), timeout=60, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        job, _, _ = done.stdout.removeprefix("job ").partition(":")
        return job

    return call


@pytest.fixture(scope="session")
def four(road: Road) -> Path:
    """The 40 steps on four processes of one launcher."""
    run = road.directory / "four"
    road.run("train", f"--run.dir={run}", nproc=4)
    return run


def output(run: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((run / "logs").glob("slurm-*.out")))


def wait_for_step(cluster: Cluster, job: str, run: Path, step: int, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while not any(m["step"] >= step for m in history(run)):
        assert cluster.job(job)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), output(run)
        assert time.monotonic() < deadline, output(run)
        time.sleep(0.02)


def test_two_nodes_train_as_one_machine_does(
    road: Road, cluster: Cluster, launch: Callable[..., str], four: Path
) -> None:
    run = road.directory / "slurm"
    job = launch("train", f"--run.dir={run}", nodes=2)
    ended = cluster.wait(job)
    assert ended["JobState"] == "COMPLETED", output(run)
    assert ended["NumNodes"] == "2"
    assert identical(run) == identical(four)
    assert {m["layout"] for m in history(run)} == {"dp4,zero2"}
    assert "done: 40 steps" in output(run)
    assert sorted(path.name for path in (run / "logs").glob("rank-*.log")) == [f"rank-0000{i}.log" for i in range(4)]


def test_preempted_requeued_and_resumed_is_identical(
    road: Road, cluster: Cluster, launch: Callable[..., str], four: Path
) -> None:
    run = road.directory / "preempted"
    job = launch("train", f"--run.dir={run}", nodes=2)
    wait_for_step(cluster, job, run, 13)
    cluster.command("scancel", "--signal=USR1", "--batch", job)
    ended = cluster.wait(job)
    assert ended["JobState"] == "COMPLETED", output(run)
    assert ended["Restarts"] == "1"
    assert "back into the queue" in output(run)
    starts = [event for event in read_lines(run / "events.jsonl") if event["event"] == "start"]
    first, second = starts
    assert (first["step"], first["slurm_restarts"], second["slurm_restarts"]) == (0, 0, 1)
    assert 13 <= second["step"] < 20
    assert identical(run) == identical(four)
    attempts = [line["attempt"] for line in read_lines(run / "metrics.jsonl")]
    assert len(attempts) == 40  # nothing was done twice
