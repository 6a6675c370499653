"""A warning that leaves no time for a save: none is begun, and the last one is gone on from."""

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megasora.checkpoint.directory import list_checkpoints
from megasora.observe.metrics import read_lines
from tests.integration.conftest import Road, identical


def test_a_save_that_would_not_be_done_in_time_is_not_begun(
    road: Road,
    straight: Path,
    wait_for_step: Callable[[Path, int, "subprocess.Popen[str]"], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MEGASORA_WARNING", "0.001")  # seconds; a save takes longer
    run = road.directory / "warned"
    # In the foreground, so that step 10 is saved before step 11, on however slow a disk.
    process = road.start("train", f"--run.dir={run}", "--checkpoint.background=false", nproc=1)
    wait_for_step(run, 11, process)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "with no time left to save it" in err
    assert [checkpoint.step for checkpoint in list_checkpoints(run / "checkpoints")][-1] in (10, 20)
    assert not list((run / "checkpoints").glob(".*"))
    monkeypatch.delenv("MEGASORA_WARNING")
    road.run("train", f"--run.dir={run}", nproc=1)
    assert {line["attempt"] for line in read_lines(run / "metrics.jsonl")} == {0, 1}
    assert identical(run) == identical(straight)
