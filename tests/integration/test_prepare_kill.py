"""`prepare` killed at any instant and continued, and on several machines at once: always the bytes of an undisturbed run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset  # noqa: F401 - forked children then need not import it, which takes longer than their work

from data_pipelines.prepare.run import PrepareConfig, prepare
from tests.clips import noise, write_clip

ROOT = Path(__file__).resolve().parents[2]
KILLS = 20


def make_input(directory: Path, clips: int) -> None:
    for number in range(clips):
        frames = noise(12, 32, 48, seed=number)
        write_clip(directory / f"clip-{number}.mp4", frames, f"clip {number}")
    write_clip(directory / "clip-9.mp4", noise(12, 32, 48, seed=1), "clip 1 again")
    (directory / "broken.mp4").write_bytes(b"\0" * 100)
    (directory / "broken.txt").write_text("broken")


def start(config: PrepareConfig) -> int:
    """`prepare` in a child of this process, which begins at once; its number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            prepare(config, lambda *_: None)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def state(output: Path) -> str:
    """How far a killed run came."""
    if output.exists():
        return "done"
    work = next(output.parent.glob(f".{output.name}.*.partial"), None)
    if work is None:
        return "not begun"
    try:
        if any((work / "shards").iterdir()):
            return "shards"
        return "pieces" if any((work / "pieces").iterdir()) else "begun"
    except FileNotFoundError:  # it is being made, or was renamed at this very instant
        return "done" if output.exists() else "begun"


def kill_and_go_on(directory: Path) -> str:
    """What test_killed_at_random_instants checks, without pytest's threads around the forks."""
    make_input(directory / "in", 5)
    config = PrepareConfig(
        input=str(directory / "in"), output=str(directory / "whole"), shot_threshold=250.0, min_frames=1,
        part_files=1, samples_per_shard=2,
    )  # fmt: skip
    assert end(start(config)) == 0
    whole = content(directory / "whole")
    begin = time.monotonic()
    assert end(start(replace(config, output=str(directory / "again")))) == 0
    seconds = time.monotonic() - begin
    assert content(directory / "again") == whole
    rng, states = random.Random(4), Counter()
    output = directory / "killed"
    for number in range(KILLS):
        while True:  # killed once at least, and as long as dice say
            child = start(replace(config, output=str(output)))
            wait = time.monotonic() + rng.uniform(0, seconds)
            aimed = number % 4 == 0  # the last part is short: at that, too
            while state(output) != "shards" if aimed else time.monotonic() < wait:
                if aimed and state(output) == "done":
                    break
                time.sleep(0.0005)
            os.kill(child, signal.SIGKILL)
            end(child)
            states[state(output)] += 1
            if rng.random() < 0.6:
                break
        assert end(start(replace(config, output=str(output)))) == 0
        assert content(output) == whole
        assert [path.name for path in directory.iterdir() if path.name.startswith(".")] == []
        shutil.rmtree(output)
    return json.dumps(states)


def kill_at_every_rename(directory: Path) -> str:
    """Nothing is only half there: whatever appears, appears by renaming, so these are the instants between which to stop."""
    make_input(directory / "in", 2)
    config = PrepareConfig(
        input=str(directory / "in"), output=str(directory / "whole"), shot_threshold=250.0, min_frames=1,
        part_files=2, samples_per_shard=1,
    )  # fmt: skip
    rename, renames = Path.replace, 0

    def counting(path: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    limit = -1
    Path.replace = counting  # type: ignore[method-assign]
    prepare(config, lambda *_: None)
    whole, total, renames = content(directory / "whole"), renames, 0
    for limit in range(1, total + 1):
        output = directory / f"killed-{limit}"
        assert end(start(replace(config, output=str(output)))) == -signal.SIGKILL
        assert not output.exists()
        limit = -1
        assert end(start(replace(config, output=str(output)))) == 0
        assert content(output) == whole
        assert [path.name for path in directory.iterdir() if path.name.startswith(".")] == []
    return str(total)


def several_at_once(directory: Path) -> str:
    """Machines that end at the same time, one that is killed and begun again, and one part begun twice."""
    make_input(directory / "in", 5)
    config = PrepareConfig(
        input=str(directory / "in"), output=str(directory / "whole"), shot_threshold=250.0, min_frames=1,
        part_files=1, samples_per_shard=2,
    )  # fmt: skip
    assert end(start(config)) == 0
    whole = content(directory / "whole")
    rng = random.Random(1)
    for number, parts in enumerate(
        [["0/2", "1/2"]] * 6 + [["0/2", "1/2", "1/2"], ["0/1", "0/1", "0/1"], ["0/3", "1/3", "2/3"]]
    ):
        many = replace(config, output=str(directory / f"many-{number}"))
        machines = [start(replace(many, part=part)) for part in parts]
        if number % 2:
            time.sleep(rng.uniform(0, 0.3))
            os.kill(machines[0], signal.SIGKILL)
            assert end(machines[0]) in (0, -signal.SIGKILL)
            machines[0] = start(replace(many, part=parts[0]))
        assert [end(machine) for machine in machines] == [0] * len(machines)
        assert content(directory / f"many-{number}") == whole
        assert [path.name for path in directory.iterdir() if path.name.startswith(".")] == []
    return str(len(list(directory.glob("many-*"))))


def in_a_process_of_its_own(function: str, directory: Path) -> str:
    module = "tests.integration.test_prepare_kill"
    script = f"from pathlib import Path; import {module} as m; print(m.{function}(Path({str(directory)!r})))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_killed_at_random_instants(tmp_path: Path) -> None:
    states = json.loads(in_a_process_of_its_own("kill_and_go_on", tmp_path))
    assert sum(states.values()) >= KILLS
    assert states["pieces"] >= KILLS // 4
    assert states["shards"] >= 1


def test_killed_at_every_rename(tmp_path: Path) -> None:
    assert int(in_a_process_of_its_own("kill_at_every_rename", tmp_path)) > 20


def test_several_machines_at_once(tmp_path: Path) -> None:
    assert int(in_a_process_of_its_own("several_at_once", tmp_path)) == 9


def children(process: int) -> list[int]:
    """Living descendants, by /proc."""
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *children(child)]
    return found


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_the_command_with_processes_is_killed_and_leaves_none_behind(tmp_path: Path) -> None:
    for number in range(6):
        write_clip(tmp_path / "in" / f"{number}.mp4", noise(40, 128, 192, seed=number), f"clip {number}")
    (tmp_path / "config.yaml").write_text("prepare: {shot_threshold: 250.0, part_files: 1, workers: 2}\n")
    command = [
        sys.executable, "-m", "megasora", "prepare", "--config", str(tmp_path / "config.yaml"),
        f"--prepare.input={tmp_path / 'in'}", f"--prepare.output={tmp_path / 'out'}",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*.partial/pieces/*.tar")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    while any(
        Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text() for worker in workers
    ):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not (tmp_path / "out").exists()
    alone = PrepareConfig(input=str(tmp_path / "in"), output=str(tmp_path / "alone"), shot_threshold=250.0)
    assert prepare(replace(alone, output=str(tmp_path / "out"), part_files=1), lambda *_: None)["kept"] == 6
    prepare(alone, lambda *_: None)
    assert content(tmp_path / "out") == content(tmp_path / "alone")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
