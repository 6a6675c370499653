"""Jobs on a real SLURM cluster of four nodes, all on this machine: trained, preempted, swept, chained, shared out."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from megasora.cluster.goodput import goodput
from megasora.observe.metrics import history, read_lines
from tests.integration.conftest import Road, environment, identical
from tests.slurm import Cluster


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


@pytest.fixture(scope="session")
def two(road: Road) -> Path:
    """The same on two."""
    run = road.directory / "two"
    road.run("train", f"--run.dir={run}", nproc=2)
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
    road: Road, cluster: Cluster, launch: Callable[..., str], two: Path
) -> None:
    run = road.directory / "preempted_in_slurm"
    job = launch("train", f"--run.dir={run}", nodes=2, nproc=1)
    wait_for_step(cluster, job, run, 13)
    cluster.command("scancel", "--signal=USR1", "--batch", job)
    ended = cluster.wait(job)
    assert ended["JobState"] == "COMPLETED", output(run)
    assert ended["Restarts"] == "1"
    assert "back into the queue" in output(run)
    first, second = starts(run)
    assert (first["step"], first["slurm_restarts"], second["slurm_restarts"]) == (0, 0, 1)
    assert 13 <= second["step"] < 40
    assert identical(run) == identical(two)
    attempts = [line["attempt"] for line in read_lines(run / "metrics.jsonl")]
    assert len(attempts) == 40  # nothing was done twice
    spent = goodput(run)
    assert sum(spent["seconds"].values()) == pytest.approx(spent["wall_s"], abs=0.5)
    assert spent["seconds"]["restart"] > 1  # the queue
    assert spent["seconds"]["lost"] == 0
    assert [attempt["job"] for attempt in spent["attempts"]] == [job, job]


def test_a_stopped_rank_is_named_and_the_job_restarted(
    road: Road, cluster: Cluster, launch: Callable[..., str], two: Path
) -> None:
    run = road.directory / "stopped"
    job = launch("train", f"--run.dir={run}", "--stall", "12", nodes=2, nproc=1)
    wait_for_step(cluster, job, run, 12)
    victim = worker(run, rank=1)
    os.kill(victim, signal.SIGSTOP)
    stopped = time.monotonic()
    while "no progress" not in output(run):
        assert time.monotonic() < stopped + 60, output(run)
        time.sleep(0.1)
    assert time.monotonic() - stopped < 12 + 10
    ended = cluster.wait(job)
    assert ended["JobState"] == "COMPLETED", output(run)
    assert ended["Restarts"] == "0"  # within the job
    assert [start["restarts"] for start in starts(run)] == [0, 1]
    (line,) = (line for line in output(run).splitlines() if "no progress" in line)
    assert re.search(rf"rank 1 \(process {victim} on n\d\) is stopped in phase ", line), line
    assert not Path(f"/proc/{victim}").exists()
    (report,) = (run / "logs").glob("stall-*.json")
    beats = json.loads(report.read_text())
    assert [(beat["rank"], beat["stopped"]) for beat in beats] == [(0, False), (1, True)]
    assert beats[0]["collective"]  # it waited in one, by torch's flight recorder
    assert "in train_step" in (run / "logs" / "rank-00000.stacks").read_text() or beats[0]["phase"] != "train"
    assert identical(run) == identical(two)


def test_a_sick_node_is_named_and_left_out(road: Road, cluster: Cluster, launch: Callable[..., str]) -> None:
    run = road.directory / "sick"
    doctor = """--doctor=--gpus 0 --site 'bash -c "test $SLURMD_NODENAME != n1"'"""
    job = launch("train", f"--run.dir={run}", "--run.steps=2", doctor, nodes=2, nproc=1)
    ended = cluster.wait(job, timeout=200)
    assert ended["JobState"] == "COMPLETED", output(run)
    assert (ended["Restarts"], ended["NodeList"], ended["ExcNodeList"]) == ("1", "n[2-3]", "n1")
    assert "not fit: n1;" in output(run)
    assert "back into the queue, without n1" in output(run)
    reports = run / "launch" / "0000" / "doctor"
    assert sorted(path.name for path in (reports / f"{job}-0").glob("*.fit")) == ["n2.fit"]
    assert sorted(path.name for path in (reports / f"{job}-1").glob("*.fit")) == ["n2.fit", "n3.fit"]
    checks = {check["check"]: check for check in json.loads((reports / f"{job}-1" / "n3.json").read_text())["checks"]}
    assert checks["links"]["ok"] is True
    assert [m["step"] for m in history(run)] == [1, 2]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_dead_node_is_replaced(road: Road, cluster: Cluster, launch: Callable[..., str]) -> None:
    whole, run = road.directory / "undisturbed", road.directory / "dead"
    steps = ("--run.steps=600", "--checkpoint.every=20", "--observe.every=50")  # SLURM sees the death after some 25 s
    road.run("train", f"--run.dir={whole}", *steps, nproc=2)
    job = launch("train", f"--run.dir={run}", *steps, nodes=2, nproc=1)
    wait_for_step(cluster, job, run, 12)
    lost = "n1"  # the one with the batch script, which lives on, as do its workers
    cluster.kill_node(lost)
    try:
        ended = cluster.wait(job, timeout=500)
        assert ended["JobState"] == "COMPLETED", output(run)
        assert ended["Restarts"] == "1"
        assert lost not in cluster.command("scontrol", "show", "hostnames", ended["NodeList"]).split()
        first, second = starts(run)
        assert (first["step"], first["slurm_restarts"], second["slurm_restarts"]) == (0, 0, 1)
        assert second["step"] < 600
        assert identical(run) == identical(whole)
    finally:
        for process in processes_of(job):
            os.kill(process, signal.SIGKILL)
        cluster.start_node(lost)


@pytest.mark.long
def test_with_fewer_nodes_the_job_goes_on_with_another_layout(
    road: Road, cluster: Cluster, launch: Callable[..., str], four: Path
) -> None:
    run = road.directory / "fewer"
    cluster.command("scontrol", "update", "NodeName=n[2-4]", "State=DRAIN", "Reason=test")
    try:
        job = launch("train", f"--run.dir={run}", "--min-nodes", "1", nodes=2)
        assert cluster.wait(job)["NumNodes"] == "1"
    finally:
        cluster.command("scontrol", "update", "NodeName=n[2-4]", "State=RESUME")
    assert {m["layout"] for m in history(run)} == {"dp2,zero2"}
    assert {m["samples"] for m in history(run)} == {4}
    assert [m["order"] for m in history(run)] == [m["order"] for m in history(four)]
    for ours, theirs in zip(history(run), history(four), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.long
def test_the_time_limit_saves_and_requeues(road: Road, cluster: Cluster, launch: Callable[..., str]) -> None:
    run = road.directory / "limit"
    steps = ("--run.steps=4000", "--checkpoint.every=1000", "--observe.every=200")
    job = launch("train", f"--run.dir={run}", "--time", "1", "--warning", "30", *steps, nodes=2)
    deadline = time.monotonic() + 240
    while cluster.job(job).get("Restarts") != "1" or len(starts(run)) < 2:
        assert time.monotonic() < deadline, output(run)
        time.sleep(0.5)
    cluster.command("scancel", job)
    assert "stopped after step" in output(run)
    first, second = starts(run)[:2]
    saved = [event["step"] for event in read_lines(run / "events.jsonl") if event["event"] == "save"]
    assert second["step"] in saved
    assert second["time"] - first["time"] < 150


@pytest.mark.long
def test_a_sweep_is_an_array_of_runs(road: Road, cluster: Cluster, launch: Callable[..., str]) -> None:
    run = road.directory / 'sweep $(touch gone); it\'s "one" & 100%'
    job = launch("train", f"--run.dir={run}", "--run.steps=2", "--sweep", "run.seed=3;4", nproc=1)
    wait_for_array(cluster, job)
    seeds = [yaml.safe_load((run / f"{i:04d}" / "config.yaml").read_text())["run"]["seed"] for i in range(2)]
    assert seeds == [3, 4]
    assert all([m["step"] for m in history(run / f"{i:04d}")] == [1, 2] for i in range(2))
    assert history(run / "0000")[0]["loss"] != history(run / "0001")[0]["loss"]
    assert sorted(path.name for path in (run / "logs").iterdir()) == [f"slurm-{job}_{i}.out" for i in range(2)]
    assert not list(road.directory.rglob("gone"))


@pytest.mark.long
def test_encoded_by_an_array_then_trained_on(
    road: Road, cluster: Cluster, launch: Callable[..., str], straight: Path
) -> None:
    latents, run = road.directory / "latents-array", road.directory / "chained"
    encoded = launch("encode", f"--encode.output={latents}", f"--run.dir={run}", "--array", "2", nproc=1)
    job = launch("train", f"--data.path={latents}", f"--run.dir={run}", "--after", encoded, nproc=1)
    assert cluster.wait(job)["JobState"] == "COMPLETED", output(run)
    assert cluster.job(encoded)["EndTime"] <= cluster.job(job)["StartTime"]
    ours, theirs = (sorted((road.directory / name).glob("*.tar")) for name in ("latents-array", "latents"))
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]
    assert identical(run) == identical(straight)


@pytest.mark.long
def test_a_chain_goes_on_one_after_the_other(road: Road, cluster: Cluster, launch: Callable[..., str]) -> None:
    run = road.directory / "chain"
    first, second = launch("train", f"--run.dir={run}", "--run.steps=30", "--chain", "2", nproc=1).split()
    assert cluster.wait(second)["JobState"] == "COMPLETED"
    assert cluster.job(first)["EndTime"] <= cluster.job(second)["StartTime"]
    assert [(start["step"], start["job"]) for start in starts(run)] == [(0, first), (30, second)]
    assert len(list(read_lines(run / "metrics.jsonl"))) == 30


def starts(run: Path) -> list[dict[str, Any]]:
    return [event for event in read_lines(run / "events.jsonl") if event["event"] == "start"]


def wait_for_array(cluster: Cluster, job: str) -> None:
    deadline = time.monotonic() + 120
    while cluster.command("squeue", "-h", "-j", job).strip():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def environments() -> Iterator[tuple[int, dict[str, str]]]:
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with suppress(OSError):
                words = (process / "environ").read_bytes().decode(errors="replace").split("\0")
                yield int(process.name), dict(word.split("=", 1) for word in words if "=" in word)


def worker(run: Path, rank: int) -> int:
    """The process of a rank of the job that trains in `run`."""
    job = starts(run)[-1]["job"]
    (pid,) = (
        pid for pid, env in environments()
        if env.get("RANK") == str(rank) and env.get("SLURM_JOB_ID") == job and not _is_child(pid, env)
    )  # fmt: skip
    return pid


def _is_child(pid: int, env: dict[str, str]) -> bool:
    """Whether its parent is the same rank: a worker process of the loader."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    words = Path(f"/proc/{parent}/environ").read_bytes().decode(errors="replace").split("\0")
    return f"RANK={env['RANK']}" in words


def processes_of(job: str) -> list[int]:
    return [pid for pid, env in environments() if env.get("SLURM_JOB_ID") == job]


@pytest.mark.long
def test_a_node_is_accepted(road: Road, cluster: Cluster, launch: Callable[..., str]) -> None:
    run, record = road.directory / "accepting", road.directory / "accepting.json"
    small = ["--gpus=0", "--bench.warmup=1", "--bench.steps=2", "--layout=tp2", "--processes=2", f"--output={record}"]
    job = launch("accept", f"--run.dir={run}", *small, nproc=2)
    assert cluster.wait(job, timeout=240)["JobState"] == "COMPLETED", output(run)
    found = json.loads(record.read_text())
    assert found["accepted"]
    assert found["parts"]["bench"]["result"]["world"] == 2
