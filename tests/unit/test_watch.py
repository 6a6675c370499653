"""Who holds up a run, where its time went, and which node is not fit: the judgements, on what is known of the answer."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from megasora.checkpoint.fence import is_requeued
from megasora.cli import main
from megasora.cluster import doctor
from megasora.cluster.agent import sweep_heartbeats
from megasora.cluster.doctor import Finding, Limits, examine, gpu_findings, site_check
from megasora.cluster.goodput import PARTS, goodput
from megasora.cluster.heartbeat import Beat, Heartbeat, heartbeat, read_beats, verdict
from megasora.cluster.links import Link, judge_links, rounds
from megasora.cluster.signals import WARNING, StopRequest

BEAT = Beat(rank=0, pid=10, host="a", step=7, phase="train", bucket="1x2x3", collective="all_reduce of 8 in dp", number=40,
            stopped=False, idle=60.0, silent=0.5)  # fmt: skip


def crew(**culprit: object) -> list[Beat]:
    """Four ranks, of which number 2 differs."""
    return [replace(BEAT, rank=i, pid=10 + i, **(culprit if i == 2 else {})) for i in range(4)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "culprit, words",
    [
        (
            {"stopped": True, "silent": 61.0},
            "rank 2 (process 12 on a) is stopped in phase train of step 7, bucket 1x2x3",
        ),
        ({"silent": 61.0}, "gives no sign of life"),
        ({"collective": "", "number": 0, "phase": "data"}, "rank 2 (process 12 on a) hangs in phase data of step 7"),
        ({"step": 6, "collective": "", "number": 0, "phase": "save"}, "hangs in phase save of step 6"),
        ({"number": 39}, "is at another collective than the others"),
        ({"collective": "all_gather of 2 in dp"}, "all_gather"),
    ],
)
def test_the_rank_that_holds_up_the_others_is_named(culprit: dict[str, object], words: str) -> None:
    found, why = verdict(crew(**culprit))
    assert words in why
    assert found is not None
    assert found.rank == 2
    assert "waits for it in all_reduce of 8" in why or culprit.keys() & {"stopped", "silent"}


def test_no_rank_is_named_when_all_wait_alike() -> None:
    found, why = verdict(crew())
    assert found is None
    assert "all_reduce of 8 in dp, number 40" in why


def test_a_phase_that_takes_long_is_no_stall() -> None:
    assert not replace(BEAT, idle=29.0).is_stalled(30)
    assert replace(BEAT, idle=31.0).is_stalled(30)
    assert not replace(BEAT, idle=110.0, phase="save").is_stalled(30)
    assert replace(BEAT, idle=130.0, phase="save").is_stalled(30)
    assert replace(BEAT, idle=31.0, silent=31.0, phase="save").is_stalled(30)  # it does not even tick


def test_heartbeats_tell_a_stopped_process_from_a_waiting_one(tmp_path: Path) -> None:
    code = (
        "import sys, time; from megasora.cluster.heartbeat import Heartbeat; beat = Heartbeat(int(sys.argv[1]));"
        "beat.enter(3, 'train', '1x2x3'); print(flush=True); time.sleep(60)"
    )
    environment = os.environ | {"MEGASORA_HEARTBEATS": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], env=environment, stdout=subprocess.PIPE)
        for rank in (0, 1)
    ]
    try:
        for process in both:
            assert process.stdout
            process.stdout.readline()
        both[1].send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 20
        while True:
            waiting, stopped = read_beats(tmp_path, "a")
            if waiting.step == 3 and stopped.silent > 2.5:
                break
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert (stopped.rank, stopped.pid, stopped.stopped) == (1, both[1].pid, True)
        assert (waiting.step, waiting.phase, waiting.bucket, waiting.stopped) == (3, "train", "1x2x3", False)
        assert waiting.idle > 2.0
    finally:
        for process in both:
            process.kill()
            process.communicate()


def test_a_step_of_the_clock_stalls_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASORA_HEARTBEATS", str(tmp_path))
    with heartbeat(0):
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 3600)
        (beat,) = read_beats(tmp_path, "a")
    assert not beat.is_stalled(60)


def test_without_a_launcher_there_are_no_heartbeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGASORA_HEARTBEATS", raising=False)
    beat = Heartbeat(0)
    beat.enter(1, "train")
    beat.keep_stacks(tmp_path / "stacks")
    beat.close()
    assert list(tmp_path.iterdir()) == []


def test_a_warning_has_a_deadline_and_a_cancellation_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WARNING, "30")
    request = StopRequest()
    assert request.seconds_left == float("inf")
    request.ask(signal.SIGTERM)
    assert request.seconds_left == float("inf")
    request.ask(signal.SIGUSR1)
    assert 29 < request.seconds_left <= 30


def test_a_later_start_of_the_same_job_or_launcher_takes_over() -> None:
    owner = {"job": "7", "restart": 1, "launcher": "n1-5", "attempt": 1}
    alone = owner | {"job": ""}
    assert is_requeued(owner, owner | {"restart": 2, "attempt": 0, "launcher": "n2-6"})
    assert is_requeued(owner, owner | {"attempt": 2, "launcher": "n2-6"})
    assert is_requeued(alone, alone | {"attempt": 2})
    assert not is_requeued(owner, owner)
    assert not is_requeued(owner, owner | {"attempt": 0})
    assert not is_requeued(owner, {"job": "8", "restart": 2, "launcher": "n2-6", "attempt": 0})
    assert not is_requeued(alone, alone | {"launcher": "n2-6", "attempt": 2})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two attempts: 4 steps of 2 s, of which the last is lost; 3 s to start, a save of 1 s; 10 s in the queue; 2 steps."""
    metrics = [
        {"attempt": 0, "step": step, "time": 100.0 + 3 + 2 * step + (step > 2), "step_time_s": 2.0, "data_wait_s": 0.5}
        for step in (1, 2, 3, 4)
    ] + [
        {"attempt": 1, "step": step, "time": 126.0 + 2 * (step - 3), "step_time_s": 2.0, "data_wait_s": 0.0}
        for step in (4, 5)
    ]  # fmt: skip
    events = [
        {"attempt": 0, "event": "start", "step": 0, "time": 102.0, "began": 100.0, "job": "17", "world": 4},
        {"attempt": 0, "event": "save", "time": 108.0, "seconds": 9.0, "blocked_s": 1.0},
        {"attempt": 1, "event": "start", "step": 3, "time": 125.0, "began": 122.0, "job": "17", "world": 4},
    ]
    for name, lines in (("metrics", metrics), ("events", events)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_every_second_of_a_run_is_accounted_for(run: Path) -> None:
    found = goodput(run)
    assert found["wall_s"] == 30.0
    assert found["seconds"] == {
        "productive": 8.5, "data": 1.5, "checkpoint": 1.0, "evaluate": 0.0, "start_up": 7.0, "lost": 2.0, "restart": 10.0,
        "other": 0.0,
    }  # fmt: skip
    assert sum(found["seconds"].values()) == found["wall_s"]
    assert found["goodput"] == pytest.approx(8.5 / 30, abs=1e-4)
    assert [(a["steps"], a["repeated"], a["job"]) for a in found["attempts"]] == [(3, 1, "17"), (2, 0, "17")]


def test_steps_from_before_which_a_run_went_on_are_lost(run: Path) -> None:
    """The second attempt goes on from step 1 and dies before it has done a step: all that came after was in vain."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:4]))
    (run / "events.jsonl").write_text((run / "events.jsonl").read_text().replace('"step": 3', '"step": 1'))
    found = goodput(run)
    assert (found["steps"], found["repeated"], found["seconds"]["productive"]) == (1, 3, 1.5)
    assert found["seconds"]["lost"] == 6.0


def test_goodput_prints_and_draws(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["goodput", str(run)]) == 0
    assert "goodput 28.3 % of 30 s" in capsys.readouterr().out
    picture = ElementTree.parse(run / "goodput.svg").getroot()
    bars = [rect for rect in picture.iter("{http://www.w3.org/2000/svg}rect") if rect.get("height") == "20"]
    assert len(bars) == 3 * len(PARTS)
    assert sum(float(bar.get("width", 0)) for bar in bars[: len(PARTS)]) == pytest.approx(760, abs=1)
    assert main(["goodput", str(run / "none")]) == 2


@pytest.mark.parametrize("world", [2, 3, 4, 7, 8])
def test_rounds_are_all_pairs_with_nobody_twice(world: int) -> None:
    found = rounds(world)
    assert sorted(pair for pairs in found for pair in pairs) == sorted(combinations(range(world), 2))
    assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in found)
    assert len(found) == world - 1 + world % 2


def test_only_the_node_with_slow_links_is_blamed() -> None:
    names = "abcd"
    links = [
        Link((i, j), (names[i], names[j]), 0.5 if "c" in (names[i], names[j]) else 40.0)
        for i, j in combinations(range(4), 2)
    ]
    found = judge_links(links, {"a": 0.0, "b": 5.0, "c": 0.1, "d": 0.0}, Limits())
    assert {node: [finding.ok for finding in findings] for node, findings in found.items()} == {
        "a": [True, True], "b": [True, False], "c": [False, True], "d": [True, True]
    }  # fmt: skip
    assert "0.50 GB/s" in found["c"][0].found


# What `nvidia-smi --query-gpu=... --format=csv,noheader,nounits` prints, with one card that is not well.
SMI = """#!/bin/sh
echo '575.57.08, 1980, 1980, 0, 0'
echo '575.57.08, 345, 1980, 2, Yes'
"""


def test_gpus_by_the_drivers_own_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = {f.check: f.ok for f in gpu_findings(Limits(driver="575.57.08", clock_share=0.9))}
    assert found == {
        "gpus": True, "gpu0_driver": True, "gpu0_memory_errors": True, "gpu0_pending_rows": True, "gpu0_clock": True,
        "gpu1_driver": True, "gpu1_memory_errors": False, "gpu1_pending_rows": False, "gpu1_clock": False,
    }  # fmt: skip
    tool.write_text("#!/bin/sh\necho 'Unable to determine the device handle for GPU0'; exit 15\n")
    (_, health) = gpu_findings(Limits())
    assert health == Finding("gpu_health", "Unable to determine the device handle for GPU0", "nvidia-smi works", False)


def test_clocks_are_those_of_gpus_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool finds the clock up only while a product runs, and nothing runs afterwards."""
    tool, product = tmp_path / "nvidia-smi", tmp_path / "product"
    tool.write_text(f'#!/bin/sh\ntest -e {product} && clock=1980 || clock=345\necho "575.57.08, $clock, 1980, 0, 0"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def multiply(device: torch.device, precision: str) -> float:
        product.touch()
        time.sleep(0.01)
        return 1.0

    monkeypatch.setattr(doctor, "gemm_peak", multiply)
    monkeypatch.setattr(doctor, "on_gpu", lambda device: True)
    monkeypatch.setattr(doctor, "devices_here", lambda: [torch.device("cpu")])
    monkeypatch.setattr(doctor, "RAMP", 0.2)
    assert [f.ok for f in gpu_findings(Limits(clock_share=0.9)) if f.check == "gpu0_clock"] == [True]
    product.unlink()
    time.sleep(0.1)
    assert not product.exists()
    assert not [f for f in gpu_findings(Limits()) if f.check == "gpu0_clock"]
    assert not product.exists()  # nobody asked


def test_what_is_asked_for_is_held_against_the_node(tmp_path: Path) -> None:
    limits = Limits(
        gpus=9, cpus=1, memory_gib=1e6, free_gb=1e9, disk_mbs=0.001, site="sh -c 'echo no such mount; exit 3'"
    )
    found = {finding.check: finding for finding in examine(limits, tmp_path)}
    bad = {name for name, finding in found.items() if finding.ok is False}
    assert bad == {"gpus", "memory_gib", "run_free_gb", "tmp_free_gb", "site"}
    assert found["site"].found == "exit code 3 no such mount"
    (tmp_path / "my check.sh").write_text('#!/bin/sh\necho "$1 ok"')
    (tmp_path / "my check.sh").chmod(0o755)
    for command, said, ok in (
        (f"'{tmp_path}/my check.sh' '$HOME;'", "exit code 0 $HOME; ok", True),  # no shell reads it
        ("/no/such/check.sh", "No such file or directory: '/no/such/check.sh'", False),
        ("check 'it", "No closing quotation", False),
    ):
        finding = site_check(command)
        assert said in finding.found
        assert finding.ok is ok
    gone = {finding.check: finding.ok for finding in examine(Limits(), tmp_path / "gone")}
    assert gone["run_disk"] is False


def test_doctor_names_the_node_and_exits_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    assert main(["doctor", "--cpus", "100000", "--json"]) == 1
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert report["fit"] is False
    assert report["nodes"]["n7"]["fit"] is False
    assert said.err.startswith("megasora: not fit: n7: cpus ")
    assert main(["doctor", "--cpu", "1"]) == 2


def test_what_killed_launchers_leave_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megasora.cluster.agent.memory_directory", lambda: str(tmp_path))
    for name, age in (("megasora-dead", 90_000), ("megasora-suspended", 4000), ("other", 90_000)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    sweep_heartbeats()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megasora-suspended", "other"]
