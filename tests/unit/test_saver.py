"""Saves in the background, one writer a run, and the second tier: what a step waits for, and who may publish."""

import errno
import os
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from upath import UPath

from megasora.checkpoint.directory import CheckpointConfig, list_checkpoints
from megasora.checkpoint.durable import copy, copy_file
from megasora.checkpoint.fence import WRITER, take_fence
from megasora.checkpoint.load import load, resume_path, verify
from megasora.checkpoint.manifest import MANIFEST, place_of
from megasora.checkpoint.ranks import Ranks
from megasora.checkpoint.save import save
from megasora.checkpoint.saver import Saver
from megasora.errors import CheckpointError, ConfigError, StorageFull, Superseded

CPU = torch.device("cpu")


def make(value: float) -> dict[str, torch.Tensor]:
    return {"model/x": torch.full((1000,), value), "ema/x": torch.full((5, 7), value).t()}


def values(path: Any) -> set[float]:
    tensors = make(-1)
    load(path, tensors)
    return {value for tensor in tensors.values() for value in tensor.unique().tolist()}


def saver(root: Path, check: Callable[[], None] | None = None, **keys: Any) -> Saver:
    return Saver(root, CheckpointConfig(**keys), check, CPU)


def done(made: Saver, copy: bool = True) -> Any:
    """What was saved, on however slow a disk."""
    while (saved := made.finish(copy=copy)) is None:
        pass
    return saved


def test_what_is_saved_is_what_it_was_when_the_save_began(tmp_path: Path) -> None:
    gate = threading.Event()
    made, tensors = saver(tmp_path, gate.wait), make(1)
    made.start(1, tensors, {})
    for tensor in tensors.values():
        tensor.fill_(2)
    assert not made.done
    gate.set()
    assert values(done(made).path) == {1}
    made.start(2, tensors, {})
    assert values(done(made).path) == {2}  # the same memory served again
    live = saver(tmp_path, background=False)
    live.start(3, tensors, {})
    assert values(done(live).path) == {2}


def test_a_save_that_hangs_is_given_up_and_may_still_end(tmp_path: Path) -> None:
    gate = threading.Event()
    made = saver(tmp_path, gate.wait, timeout=0.3)
    made.start(1, make(1), {})
    begin = time.monotonic()
    assert made.finish() is None
    assert 0.3 <= time.monotonic() - begin < 5
    assert made.step == 1
    gate.set()
    assert done(made).step == 1
    assert made.step is None


def test_a_failure_is_told_when_the_save_is_finished_and_the_next_may_succeed(tmp_path: Path) -> None:
    made = saver(tmp_path / "root", keep_last=1)
    made.start(1, make(1), {})
    done(made)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        made.start(2, make(2), {})
        with pytest.raises(CheckpointError, match=f"saving step 2 .*{os.strerror(errno.EFBIG)}"):
            made.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [info.step for info in list_checkpoints(tmp_path / "root")] == [1]
    made.start(3, make(3), {})
    done(made)
    assert [info.step for info in list_checkpoints(tmp_path / "root")] == [3]
    with pytest.raises(CheckpointError, match="a int"):  # before anything is written, and at once
        made.start(4, {"model/x": 3}, {})  # type: ignore[dict-item]
    assert made.step is None


def test_a_full_disk_says_what_to_do(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    made = saver(tmp_path, full)
    made.start(1, make(1), {})
    with pytest.raises(StorageFull, match=r"No space left on device; free space there, or keep fewer"):
        made.finish()


def test_intervals_follow_from_failures_and_the_time_of_a_save(tmp_path: Path) -> None:
    made = saver(tmp_path, every=0, failure_hours=10)
    assert made.interval(2.0) == pytest.approx((2 * 36000 * 2) ** 0.5)  # Young: 379 s
    assert made.due(1)  # the first measures
    made.start(1, make(1), {})
    done(made)
    assert not made.due(2)
    assert [step for step in range(1, 9) if saver(tmp_path, every=4).due(step)] == [4, 8]


def test_the_best_stay(tmp_path: Path) -> None:
    made = saver(tmp_path, keep_last=1, keep_best=2)
    for step, score in ((1, 0.5), (2, 0.9), (3, None), (4, 0.4), (5, 0.7), (6, 0.8)):
        made.start(step, make(step), {"score": score})
        done(made)
    assert [info.step for info in list_checkpoints(tmp_path)] == [1, 4, 6]


HOLDER = """
import sys, time
from pathlib import Path
from megasora.checkpoint.fence import take_fence
fence = take_fence(Path(sys.argv[1]), 2.0)
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_job_is_refused_while_the_first_lives_and_follows_when_it_is_dead(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"run\.dir={tmp_path}: process {holder.pid} on .* is writing to it"):
            take_fence(tmp_path, 2.0)
        holder.kill()
    begin = time.monotonic()
    fence = take_fence(tmp_path, 60.0)
    assert time.monotonic() - begin < 5
    fence.check()
    fence.release()
    assert list((tmp_path / WRITER).iterdir()) == []


def test_an_orphan_of_a_requeued_job_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    orphan = take_fence(tmp_path, 60.0)
    root = tmp_path / "checkpoints"
    writes = saver(root, orphan.check)
    writes.start(1, make(1), {})
    done(writes)

    gate = threading.Event()

    def late() -> None:
        gate.wait()
        orphan.check()

    late_writes = saver(root, late)
    late_writes.start(2, make(2), {})  # in flight while the job is started again
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    fence = take_fence(tmp_path, 60.0)
    gate.set()
    with pytest.raises(Superseded, match="another job writes to this run now"):
        late_writes.finish()
    assert [info.step for info in list_checkpoints(root)] == [1]
    fence.check()
    with pytest.raises(Superseded):
        orphan.check()
    orphan.release()  # takes nothing from its successor
    fence.check()
    fence.release()


@pytest.fixture
def bucket(s3: str) -> str:
    name = f"run-{random.randrange(1 << 40):x}"
    boto3.client("s3", endpoint_url=s3).create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.mark.parametrize("kind", ["s3", "memory", "directory"])
def test_the_durable_tier(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    address = {"memory": f"memory://{tmp_path.name}", "directory": str(tmp_path / "far")}.get(kind)
    address = f"{address or request.getfixturevalue('bucket')}/checkpoints"
    root = tmp_path / "near"
    made = saver(root, keep_last=2, durable=address, durable_every=2)
    for step in range(1, 7):
        made.start(step, make(step), {"step": step})
        assert done(made).durable == (place_of(address) / f"step-{step:08d}" if step % 2 == 0 else None)
    near, far = list_checkpoints(root), list_checkpoints(place_of(address))
    assert [info.step for info in near] == [5, 6]
    assert [(info.step, info.complete) for info in far] == [(4, True), (6, True)]
    assert values(far[0].path) == {4}
    assert verify(far[1].path) == []
    assert resume_path(root, "auto", address).path == near[1].path  # of two copies the nearer

    for info in near:
        (info.path / "__0_0.distcp").unlink()
    found = resume_path(root, "auto", address)
    assert found.path == far[1].path
    assert set(found.rejected) == {near[1].path}
    damaged = bytearray((far[1].path / "__0_0.distcp").read_bytes())
    damaged[700] ^= 8
    (far[1].path / "__0_0.distcp").write_bytes(damaged)
    found = resume_path(root, "auto", address)
    assert found.path == far[0].path
    assert values(found.path) == {4}
    assert values(resume_path(root, str(far[0].path)).path) == {4}


def test_copies_are_made_whatever_the_steps_of_the_saves_are(tmp_path: Path) -> None:
    """Saves whose steps follow from a clock need not fall on multiples of `durable_every`; the last one is always copied."""
    made, copied = saver(tmp_path, durable=str(tmp_path / "far"), durable_every=5), []
    for step in (3, 7, 11, 13, 14):
        made.start(step, make(step), {}, durable=True if step == 14 else None)
        copied += [step] if done(made).durable else []
    assert copied == [7, 13, 14]


def test_a_copy_that_hangs_delays_no_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr("megasora.checkpoint.durable.copy_file", lambda *args: (gate.wait(), copy_file(*args)))
    made = saver(tmp_path / "near", keep_last=1, durable=str(tmp_path / "far"), durable_every=1, timeout=1.0)
    made.start(1, make(1), {})
    first = done(made, copy=False)
    assert (first.step, first.durable, made.step) == (1, None, None)
    made.start(2, make(2), {})
    assert done(made).durable_failure == ""  # it is slow, as far as one can tell
    time.sleep(1)
    made.start(3, make(3), {})
    assert "the copy of step 1 still goes on" in done(made).durable_failure
    assert [info.step for info in list_checkpoints(tmp_path / "near")] == [1, 3]  # what is being copied stays
    assert made.copied() is None
    gate.set()
    while (copied := made.copied()) is None:
        time.sleep(0.01)
    assert (copied.step, copied.durable) == (1, tmp_path / "far/step-00000001")
    made.start(4, make(4), {})
    assert done(made).durable == tmp_path / "far/step-00000004"
    assert [info.step for info in list_checkpoints(tmp_path / "near")] == [4]


def test_whoever_has_no_time_waits_for_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr("megasora.checkpoint.durable.copy_file", lambda *_: gate.wait())
    made = saver(tmp_path / "near", durable=str(tmp_path / "far"))
    made.start(1, make(1), {})
    while not list_checkpoints(tmp_path / "near"):
        time.sleep(0.01)
    begin = time.monotonic()
    saved = made.finish(patience=1.0)
    assert saved is not None
    assert values(saved.path) == {1}
    made.start(2, make(2), {}, durable=False)
    assert done(made).durable_failure == ""
    made.close()
    assert time.monotonic() - begin < 30  # the copy would take checkpoint.timeout
    gate.set()


def test_a_copy_without_its_manifest_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the job died in the middle, also of replacing a copy that was there."""
    far = UPath(f"memory://{tmp_path.name}")
    path = save(tmp_path, 1, make(1), {})
    copy(Ranks(), path, far, lambda: None)
    assert [info.complete for info in list_checkpoints(far)] == [True]

    def dies(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("megasora.checkpoint.durable.copy_file", dies)
    with pytest.raises(CheckpointError, match=r"Input/output error; the storage fails"):
        copy(Ranks(), path, far, lambda: None)
    assert [info.complete for info in list_checkpoints(far)] == [False]
    assert not (far / path.name / MANIFEST).exists()
    made = saver(tmp_path, durable=str(far), durable_every=1)
    made.start(2, make(2), {})
    saved = done(made)  # the nearer tier has it
    assert "Input/output error" in saved.durable_failure
    assert values(saved.path) == {2}


def test_a_durable_store_that_went_away_hinders_no_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, far = save(tmp_path / "near", 1, make(1), {}), tmp_path / "far"
    far.mkdir()
    iterdir = Path.iterdir

    def stale(place: Path) -> Iterator[Path]:
        if place == far:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return iterdir(place)

    monkeypatch.setattr(Path, "iterdir", stale)
    found = resume_path(tmp_path / "near", "auto", str(far))
    assert found.path == path
    assert found.rejected[far][0].reason == "cannot be listed: Stale file handle"
    with pytest.raises(CheckpointError, match=r"no good checkpoint.*cannot be listed"):  # it may have some: not anew
        resume_path(tmp_path / "empty", "auto", str(far))
    with pytest.raises(CheckpointError, match="bogus://x"):
        resume_path(tmp_path / "near", "bogus://x")


def test_what_rots_before_it_is_copied_is_no_copy(tmp_path: Path) -> None:
    path = save(tmp_path / "near", 1, make(1), {})
    shard = path / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[500] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: damaged"):
        copy(Ranks(), path, tmp_path / "far", lambda: None)
    assert [info.complete for info in list_checkpoints(tmp_path / "far")] == [False]


LOADER = """
import resource, sys
from pathlib import Path
import torch
from megasora.checkpoint.load import load
from megasora.checkpoint.save import save
root, size, count = Path(sys.argv[1]), 4 << 20, 32  # fp32: 16 MiB each
if sys.argv[2] == "save":
    save(root, 1, {f"model/{i}": torch.full((size,), float(i)) for i in range(count)}, {})
else:
    save(root.with_name("warm"), 1, {"model/x": torch.zeros(3)}, {})
    load(root.with_name("warm") / "step-00000001", {"model/x": torch.zeros(3)})
    tensors = {f"model/{i}": torch.zeros(size) for i in range(count)}
    for tensor in tensors.values():
        tensor.fill_(9)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    load(root / "step-00000001", tensors)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_a_load_needs_few_pieces_more_than_what_it_fills(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for work in ("save", "load"):
        command = [sys.executable, "-c", LOADER, str(tmp_path / "root"), work]
        out = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=True).stdout
    assert float(out) < 192  # MiB: some pieces of 16 for each reader, and buffers; all of them are 512
