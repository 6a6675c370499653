"""The launcher with small workers: exit codes, signals, deaths, several nodes, and no process left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megasora.cluster.agent import Ending, root_cause

ROOT = Path(__file__).resolve().parents[2]

# argv: a directory for notes, then for each rank what it does, as words joined by ":".
WORKER = """
import os, signal, subprocess, sys, time
from pathlib import Path

rank, notes = int(os.environ["RANK"]), Path(sys.argv[1])
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])

def note(name, value=""):
    (notes / f".{name}.{rank}").write_text(str(value))
    (notes / f".{name}.{rank}").rename(notes / f"{name}.{rank}")

note(f"attempt{attempt}")
note("pid", os.getpid())
note("last", sys.argv[-1])
what, *details = sys.argv[2 + rank].split(":")
if what == "exit":  # after so many seconds, with so many codes, one for each attempt
    time.sleep(float(details[0]))
    sys.stderr.write(f"worker {rank} has spoken\\n")  # in one piece, unlike print
    sys.exit(int(details[1:][attempt]))
if what == "bug":
    from megasora import cli
    cli.run_verb = lambda argv: {}["weight"]
    cli.main(["train"])
if what == "sleep":
    child = subprocess.Popen(["sleep", "600"])
    note("child", child.pid)
    time.sleep(600)
if what == "collective":  # the one with a code leaves; the other waits for it
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    dist.barrier()
    if details:
        sys.exit(int(details[0]))
    note("waiting")
    dist.all_reduce(torch.ones(1))
if what == "again":  # they meet; one dies; they meet again
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    if attempt == 0 and rank == 1:
        os._exit(1)
    dist.barrier()
    dist.destroy_process_group()
if what == "hang":  # the first time the second rank does not come to the collective
    import torch, torch.distributed as dist
    from megasora.cluster.heartbeat import heartbeat
    dist.init_process_group("gloo")
    dist.barrier()
    with heartbeat(rank) as beat:
        beat.keep_stacks(notes / f"rank-{rank:05d}.stacks")
        beat.enter(7, "agree" if rank == 0 else "data", "4x8x8")
        if attempt == 0 and rank == 1:
            time.sleep(600)
        dist.all_reduce(torch.ones(3, 5))
    dist.destroy_process_group()
if what == "train":  # stops at a signal, slowly
    time.sleep(float(details[0]))
    stop = []
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stop.append(number))
    note("listening")
    while not stop:
        time.sleep(0.02)
    note("stopping", stop[0])
    time.sleep(float(details[1]))
    note("saved")
    sys.exit(75)
"""

# argv: a JSON list of keyword arguments for launch_local, `command` among them. Prints the codes, ends with the last.
DRIVER = """
import json, sys
from pathlib import Path
from megasora.cluster.local import launch_local

codes = []
for case in json.loads(sys.argv[1]):
    log_dir = Path(case.pop("log_dir")) if "log_dir" in case else None
    codes.append(launch_local(log_dir=log_dir, **case))
print(json.dumps(codes))
sys.exit(codes[-1])
"""


@pytest.fixture
def notes(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "notes"
    directory.mkdir()
    yield directory
    left = [path.name for path in _pid_notes(directory) if _runs(int(path.read_text()))]
    for path in _pid_notes(directory):
        if _runs(int(path.read_text())):
            os.kill(int(path.read_text()), signal.SIGKILL)
    assert not left, f"processes left behind: {left}"


def _pid_notes(notes: Path) -> list[Path]:
    return [*notes.rglob("pid.*"), *notes.rglob("child.*")]


def _runs(pid: int) -> bool:
    """Whether the process exists and is no zombie; an orphan that was just killed may need a moment to go."""
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return False
        if state == "Z":
            return False
        time.sleep(0.02)
    return True


def _case(notes: Path, *what: str, **options: Any) -> dict[str, Any]:
    # Without site-packages Python starts in a tenth of the time; only one of the workers needs torch.
    flags = "-c" if {"collective", "again", "hang"} & set(what) else "-Sc"
    return {"command": [sys.executable, flags, WORKER, str(notes), *what], "nproc": len(what), **options}


def _start(cases: list[dict[str, Any]]) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, json.dumps(cases)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _await(launcher: subprocess.Popen[str], *files: Path) -> None:
    deadline = time.monotonic() + 40
    while not all(file.exists() for file in files):
        assert launcher.poll() is None, launcher.communicate()[1]
        assert time.monotonic() < deadline, f"{[file.name for file in files if not file.exists()]} never came"
        time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    "codes, expected",
    [
        ([0, 0], 0),
        ([75, 0], 75),
        ([75, 1], 1),
        ([1, -9], 137),
        ([-6, 1, 3], 3),
        ([4, 2], 4),  # equals: the first in time
        ([1, 7], 1),
    ],
)
def test_the_root_cause_of_several_codes(codes: list[int], expected: int) -> None:
    endings = [Ending(rank=9 - i, pid=1, code=code, time=float(i)) for i, code in enumerate(codes)]
    root = root_cause(endings)
    assert (root.exit_code if root else 0) == expected


def test_codes_are_kept_and_only_the_workers_speak(notes: Path) -> None:
    cases = {
        ("exit:0:0", "exit:0:0"): 0,
        ("exit:0:2", "exit:0:2"): 2,
        ("exit:0:0", "exit:0:3"): 3,
        ("exit:0:4", "exit:0:0"): 4,
        ("exit:0:75", "exit:1:75"): 75,
        ("exit:0:1", "exit:1:3"): 3,  # the cause may end after its consequence
        ("sleep", "exit:0:4"): 4,  # what the launcher stops does not count
        ("exit:0:7", "exit:0:0"): 7,
    }
    launcher = _start([_case(notes, *what) for what in cases])
    out, err = launcher.communicate(timeout=60)
    assert json.loads(out) == list(cases.values())
    lines = err.splitlines()
    assert sum("has spoken" in line for line in lines) == 15, err
    others = [line for line in lines if "has spoken" not in line]
    assert len(others) == 1, err
    assert others[0].startswith("megasora: rank 0 (process ")
    assert others[0].endswith("ended with exit code 7")


def test_restarts_are_for_what_they_can_mend(notes: Path) -> None:
    mended, hopeless = notes / "mended", notes / "hopeless"
    mended.mkdir()
    hopeless.mkdir()
    cases = [
        _case(mended, "exit:0:1:0", "exit:0:0:0", max_restarts=2),
        _case(hopeless, "exit:0:3:0", "exit:0:0:0", max_restarts=2),
    ]
    out, err = _start(cases).communicate(timeout=60)
    assert json.loads(out) == [0, 3], err
    assert (mended / "attempt1.1").exists()
    assert not (mended / "attempt2.1").exists()
    assert not (hopeless / "attempt1.0").exists()


def test_restarted_workers_meet_again(notes: Path) -> None:
    launcher = _start([_case(notes, "again", "again", max_restarts=1)])
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, err
    assert (notes / "attempt1.1").exists()


def test_a_rank_that_hangs_is_named_and_restarted(notes: Path) -> None:
    launcher = _start([_case(notes, "hang", "hang", max_restarts=1, stall=20, log_dir=str(notes))])
    _, err = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, err
    (line,) = (line for line in err.splitlines() if "megasora:" in line)
    assert "no progress for 20 s: rank 1 (process " in line
    assert "hangs in phase data of step 7, bucket 4x8x8, for " in line
    assert "; rank 0 (process " in line
    assert "waits for it in all_reduce of 3x5 in default_pg" in line
    waiting, hanging = ((notes / f"rank-0000{rank}.stacks").read_text() for rank in (0, 1))
    assert " in all_reduce" in waiting
    assert " in <module>" in hanging
    assert "in all_reduce" not in hanging
    (report,) = notes.glob("stall-*.json")
    assert [beat["phase"] for beat in json.loads(report.read_text())] == ["agree", "data"]


def test_arguments_arrive_as_they_are(notes: Path) -> None:
    case = _case(notes, "exit:0:0")
    case["command"].append("--a.b=$$ '${local_rank}'")
    _, err = _start([case]).communicate(timeout=60)
    assert (notes / "last.0").read_text() == case["command"][-1], err


def test_one_rank_fails_while_the_other_waits_in_a_collective(notes: Path) -> None:
    launcher = _start([_case(notes, "collective", "collective:3")])
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 3, err
    assert (notes / "waiting.0").exists()
    assert "ChildFailedError" not in err
    assert "torch.distributed.elastic" not in err


def test_a_killed_worker_is_named(notes: Path) -> None:
    log = notes / "rank-00001.log"
    log.write_text("")
    launcher = _start([_case(notes, "sleep", "sleep", log_dir=str(notes))])
    _await(launcher, notes / "child.0", notes / "child.1")
    pid = int((notes / "pid.1").read_text())
    os.kill(pid, signal.SIGKILL)
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 137
    (line,) = err.splitlines()
    assert line.startswith(f"megasora: rank 1 (process {pid} on ")
    assert line.endswith(f"was killed by signal 9 (SIGKILL); its log is {log}")


def test_the_error_of_any_rank_is_named_at_the_end(notes: Path) -> None:
    launcher = _start([_case(notes, "sleep", "bug")])
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    pid = (notes / "pid.1").read_text()
    last = err.splitlines()[-1]
    assert last.startswith(f"megasora: rank 1 (process {pid} on ")
    assert last.endswith("ended with exit code 1, KeyError: 'weight'")


def test_usr1_while_the_workers_still_start(notes: Path) -> None:
    launcher = _start([_case(notes, "train:2:0.5", "train:2.5:0")])
    _await(launcher, notes / "pid.0", notes / "pid.1")
    assert not (notes / "listening.0").exists()
    launcher.send_signal(signal.SIGUSR1)
    os.kill(int((notes / "pid.0").read_text()), signal.SIGUSR1)  # as a scheduler that signals every process does
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 75, err
    assert [(notes / f"stopping.{rank}").read_text() for rank in (0, 1)] == [str(int(signal.SIGUSR1))] * 2
    assert (notes / "saved.0").exists()  # it saves for longer than the other one
    assert err == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_kills(notes: Path, number: signal.Signals) -> None:
    launcher = _start([_case(notes, "train:0:600", "train:0:600")])
    _await(launcher, notes / "listening.0", notes / "listening.1")
    launcher.send_signal(number)
    _await(launcher, notes / "stopping.0", notes / "stopping.1")
    assert (notes / "stopping.0").read_text() == str(int(number))
    launcher.send_signal(number)
    launcher.communicate(timeout=20)
    assert launcher.returncode == 128 + number
    assert not (notes / "saved.0").exists()


def test_workers_die_with_the_launcher(notes: Path) -> None:
    launcher = _start([_case(notes, "train:0:0", "train:0:0")])
    _await(launcher, notes / "listening.0", notes / "listening.1")
    launcher.kill()
    launcher.communicate(timeout=20)
    workers = [int(path.read_text()) for path in _pid_notes(notes)]
    assert len(workers) == 2
    assert not any(_runs(pid) for pid in workers)


def test_two_nodes_end_with_the_same_code(notes: Path) -> None:
    cases: dict[tuple[str, str], int] = {
        ("exit:0:0", "exit:1:0"): 0,
        ("sleep", "exit:0.5:3"): 3,
    }
    nodes: list[list[dict[str, Any]]] = [[], []]
    for what in cases:
        endpoint = f"127.0.0.1:{_free_port()}"
        for node in nodes:
            shared = {"nproc": 1, "nnodes": 2, "rdzv_endpoint": endpoint, "local_addr": "127.0.0.1"}
            node.append(_case(notes, *what) | shared)
    launchers = [_start(node) for node in nodes]
    for launcher in launchers:
        out, err = launcher.communicate(timeout=90)
        assert json.loads(out) == list(cases.values()), err
        assert [line for line in err.splitlines() if "has spoken" not in line] == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["local", "--nproc", "2", "tarin", "--config", "x.yaml"], "tarin"),
        (["local", "--nproc", "0", "train", "--config", "x.yaml"], "--nproc=0"),
        (["local", "--nproc", "2", "--run.steps=3", "train", "--config", "x.yaml"], "--run.steps=3"),
        (["local", "--nproc", "2", "train", "--config", "x.yaml"], "x.yaml"),
        (["local", "--nproc", "2", "--nnodes", "2", "train", "--config", "good.yaml"], "--rdzv-endpoint"),
    ],
)
def test_a_wrong_command_ends_before_any_worker(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "good.yaml").write_text("run: {steps: 1}\n")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-m", "megasora", "launch", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["good.yaml"]
