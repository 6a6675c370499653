"""Checkpoints on one process: what is saved comes back, every damage is found, every instant of death is survived."""

import argparse
import errno
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata

from megasora.checkpoint import manifest
from megasora.checkpoint.directory import CheckpointConfig, latest, list_checkpoints
from megasora.checkpoint.load import answered, load, read_facts, resume_path, verify
from megasora.checkpoint.manifest import FileSum, Manifest, read_manifest, write_manifest
from megasora.checkpoint.metadata import SavedTensor, read_metadata, saved_tensors
from megasora.checkpoint.save import prune, save
from megasora.errors import CheckpointError
from megasora.resume import gone_on, is_restart
from megasora.verbs import ckpt

FACTS = {"step": 5, "layout": "dp1", "schedule": {"warm": 0.1, "name": "Köln"}, "order": [1, None, True]}
KINDS = [".metadata", "__0_0.distcp", "facts.json", "manifest.json"]


def make(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 4, generator=generator)
    return {
        "model/a.weight": weight,
        "model/a.view": torch.randn(8, 8, generator=generator)[1:5, ::2].t(),  # strided, part of a larger storage
        "model/bf16": torch.randn(7, generator=generator).bfloat16(),
        "model/empty": torch.empty(0, 3),
        "ema/a.weight": weight + seed,
        "optim/a.weight/step": torch.tensor(float(seed)),
        "optim/count": torch.tensor([seed, 2**40 + 1]),
    }


def blank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, 77) for name, tensor in tensors.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def reseal(path: Path) -> None:
    """Gives a manipulated checkpoint a manifest that agrees with it, as an attacker would."""
    old = read_manifest(path)
    files = {}
    for name in old.files:
        data = (path / name).read_bytes()
        files[name] = FileSum(len(data), xxhash.xxh3_64_hexdigest(data))
    write_manifest(path, Manifest(old.step, old.time, files))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoints", 5, make(5), FACTS)


def test_what_was_saved_comes_back(saved: Path) -> None:
    tensors = blank(make(5))
    storage = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    assert load(saved, tensors) == FACTS == read_facts(saved)
    assert equal(tensors, make(5))
    assert {name: tensor.data_ptr() for name, tensor in tensors.items()} == storage
    expected = {name: SavedTensor(tuple(tensor.shape), tensor.dtype) for name, tensor in make(5).items()}
    assert saved_tensors(read_metadata(saved)) == expected


def test_the_manifest_describes_the_bytes_on_disk(saved: Path) -> None:
    files = json.loads((saved / "manifest.json").read_text())["files"]
    assert sorted(files) == [".metadata", "__0_0.distcp", "facts.json"]
    for name, entry in files.items():
        data = (saved / name).read_bytes()
        assert entry == {"size": len(data), "xxh3": xxhash.xxh3_64(data).hexdigest()}
    assert sorted(entry.name for entry in saved.parent.iterdir()) == ["latest", "step-00000005"]
    assert (saved.parent / "latest").read_text() == "step-00000005\n"


@pytest.mark.parametrize("kind", KINDS)
def test_every_changed_byte_is_found(saved: Path, kind: str) -> None:
    chance = random.Random(kind)
    good = (saved / kind).read_bytes()
    for _ in range(15):
        data = bytearray(good)
        data[chance.randrange(len(data))] ^= chance.choice([1 << chance.randrange(8), chance.randrange(1, 256)])
        (saved / kind).write_bytes(data)
        assert [problem.file for problem in verify(saved)] == [kind]
        tensors = blank(make(5))
        with pytest.raises(CheckpointError, match=kind.replace(".", r"\.")):
            load(saved, tensors)
        assert equal(tensors, blank(make(5)))
        if kind != "__0_0.distcp":
            with pytest.raises(CheckpointError, match=kind.replace(".", r"\.")):
                _ = (read_facts(saved), saved_tensors(read_metadata(saved)))
    (saved / kind).write_bytes(good)
    assert verify(saved) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_torn_or_missing_file_is_named(saved: Path, kind: str) -> None:
    good = (saved / kind).read_bytes()
    for torn in (b"", good[:-1], good[: len(good) // 2], good + b"\n", b"\0" * len(good)):
        (saved / kind).write_bytes(torn)
        assert [problem.file for problem in verify(saved)] == [kind]
    (saved / kind).unlink()
    assert [problem.file for problem in verify(saved)] == [kind]
    assert not list_checkpoints(saved.parent)[0].complete
    (saved / kind).mkdir()
    assert [problem.file for problem in verify(saved)] == [kind]


def test_a_manifest_must_be_its_own_bytes(saved: Path) -> None:
    text = (saved / "manifest.json").read_text()
    respelled = json.dumps(json.loads(text))  # the same values
    for other in (respelled, text.replace("\n ", "\n\t"), "[" * 100_000, "[]", "{}", '{"xxh3": 1}', "\xff"):
        (saved / "manifest.json").write_text(other)
        assert [problem.file for problem in verify(saved)] == ["manifest.json"]


def test_a_foreign_file_and_a_wrong_name_are_found(saved: Path) -> None:
    (saved / "__7_0.distcp").write_bytes(b"of another save")
    assert [problem.file for problem in verify(saved)] == ["__7_0.distcp"]
    (saved / "__7_0.distcp").unlink()
    renamed = saved.rename(saved.with_name("step-00000006"))
    assert [problem.file for problem in verify(renamed)] == ["manifest.json"]
    assert latest(renamed.parent) is None
    assert verify(renamed.rename(renamed.with_name("best"))) == []


def test_damage_behind_a_right_checksum_never_crashes(saved: Path) -> None:
    """What passes the checksums is still only data: reading it ends in tensors or in a CheckpointError."""
    chance, refusals = random.Random(1), []
    for kind in (".metadata", "__0_0.distcp", "facts.json"):
        good = (saved / kind).read_bytes()
        for _ in range(20):
            data = bytearray(good)
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            (saved / kind).write_bytes(data)
            reseal(saved)
            try:
                load(saved, blank(make(5)))
            except CheckpointError as error:
                refusals.append(str(error))
        (saved / kind).write_bytes(good)
    assert len(refusals) > 20
    assert not any("\n" in refusal for refusal in refusals)


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_hostile_metadata_file_runs_nothing(saved: Path, tmp_path: Path) -> None:
    metadata = FileSystemReader(saved).read_metadata()
    metadata.planner_data = Payload(tmp_path / "executed")
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(saved)
    assert verify(saved) == []
    for read in (lambda: load(saved, make(5)), lambda: saved_tensors(read_metadata(saved))):
        with pytest.raises(CheckpointError, match=r"\.metadata: refused: it asks for posix\.mkdir"):
            read()
    assert not (tmp_path / "executed").exists()
    FileSystemReader(saved).read_metadata()  # torch's own reader does run it
    assert (tmp_path / "executed").exists()


def test_metadata_with_bytes_or_with_files_elsewhere_is_refused(saved: Path) -> None:
    metadata = FileSystemReader(saved).read_metadata()
    metadata.storage_meta = None
    metadata.state_dict_metadata["model/pickled"] = BytesStorageMetadata()
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(saved)
    with pytest.raises(CheckpointError, match="BytesStorageMetadata"):
        saved_tensors(read_metadata(saved))
    metadata.state_dict_metadata["model/pickled"] = ChunkStorageMetadata(  # type: ignore[assignment]
        torch.Size([1]), torch.Size([1])
    )
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(saved)
    with pytest.raises(CheckpointError, match="model/pickled is not a tensor"):
        saved_tensors(read_metadata(saved))
    del metadata.state_dict_metadata["model/pickled"]
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere"
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(saved)
    with pytest.raises(CheckpointError, match=r"lies in \.\./elsewhere"):
        saved_tensors(read_metadata(saved))


def test_a_manifest_cannot_name_files_elsewhere(saved: Path) -> None:
    old = read_manifest(saved)
    write_manifest(saved, Manifest(old.step, old.time, {**old.files, "../latest": FileSum(1, "0")}))
    assert [(p.file, "../latest" in p.reason) for p in verify(saved)] == [("manifest.json", True)]


def test_what_does_not_fit_is_named_and_nothing_changes(saved: Path) -> None:
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        ({"model/new": torch.zeros(1)}, "model/new: not in the checkpoint"),
        ({"model/a.weight": torch.zeros(4, 6)}, r"model/a\.weight: \[6, 4\] in the checkpoint, \[4, 6\] wanted"),
        ({"optim/count": torch.zeros(2)}, r"optim/count: torch\.int64 in the checkpoint"),
        ({"model/bf16": torch.zeros(7, device="meta")}, "model/bf16: is on the meta device"),
    ]
    for change, message in cases:
        tensors = blank(make(5)) | change
        before = {name: tensor.clone() for name, tensor in tensors.items() if not tensor.is_meta}
        with pytest.raises(CheckpointError, match=message):
            load(saved, tensors)
        assert all(torch.equal(tensors[name], before[name]) for name in before)
    tensors = blank(make(5))
    del tensors["ema/a.weight"]
    with pytest.raises(CheckpointError, match=r"ema/a\.weight: in the checkpoint but not wanted"):
        load(saved, tensors)
    assert torch.equal(tensors["model/a.weight"], torch.full((6, 4), 77.0))


def test_a_part_can_be_loaded_into_another_type(saved: Path) -> None:
    tensors = {"ema/a.weight": torch.zeros(6, 4, dtype=torch.bfloat16)}
    assert load(saved, tensors, prefix="ema/")["step"] == 5
    assert torch.equal(tensors["ema/a.weight"], make(5)["ema/a.weight"].bfloat16())
    with pytest.raises(CheckpointError, match="in the checkpoint but not wanted"):
        load(saved, tensors, prefix=("ema/", "model/"))


def test_only_tensors_and_json_are_saved(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    with pytest.raises(CheckpointError, match="optim/step is a int"):
        save(root, 1, {"optim/step": 3}, {})  # type: ignore[dict-item]
    for facts in ({"loss": float("nan")}, {"weight": torch.zeros(1)}):
        with pytest.raises(CheckpointError, match="saving step 1"):
            save(root, 1, make(1), facts)
        assert list(root.iterdir()) == []


def test_a_full_disk_leaves_what_was_there(saved: Path) -> None:
    """The kernel's own refusal: no file of this process may grow beyond 3000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in (5, 6):
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
        try:
            with pytest.raises(CheckpointError, match=os.strerror(errno.EFBIG)):
                save(saved.parent, step, make(6), FACTS)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(entry.name for entry in saved.parent.iterdir()) == ["latest", "step-00000005"]
    assert verify(saved) == []
    tensors = blank(make(5))
    load(saved, tensors)
    assert equal(tensors, make(5))


def test_a_step_is_replaced_and_leftovers_go(saved: Path) -> None:
    root = saved.parent
    ours = [root / ".step-00000009.tmp-0123abcd", root / ".step-00000005.old-0123abcd"]
    theirs = [root / ".step-00000009.tmp", root / "step-00000009.tmp-0123abcd", root / ".step-9.old-0123abcd"]
    for left in ours + theirs:
        shutil.copytree(saved, left)
    assert save(root, 5, make(6), FACTS | {"step": 6}) == saved
    tensors = blank(make(6))
    assert load(saved, tensors)["step"] == 6
    assert equal(tensors, make(6))
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in theirs)


def test_a_replaced_checkpoint_counts_until_its_successor_is_there(saved: Path) -> None:
    aside = saved.rename(saved.with_name(".step-00000005.old-0123abcd"))
    assert [(info.step, info.path, info.complete) for info in list_checkpoints(saved.parent)] == [(5, aside, True)]
    assert resume_path(saved.parent, "auto").path == aside
    save(saved.parent, 6, make(6), FACTS)
    assert not aside.exists()
    assert verify(saved) == []


def test_retention(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for step in (100, 150, 200, 250, 300, 350):
        save(root, step, {"model/x": torch.tensor([step])}, {"step": step})
    (root / "step-00000350" / "facts.json").unlink()  # incomplete: neither counted nor removed
    removed = prune(root, CheckpointConfig(keep_last=2, keep_every=200))
    assert [path.name for path in removed] == ["step-00000100", "step-00000150"]
    assert [info.step for info in list_checkpoints(root)] == [200, 250, 300, 350]
    assert latest(root) == root / "step-00000300"
    assert prune(root, CheckpointConfig(keep_last=2, keep_every=200)) == []
    assert verify(root / "step-00000200") == []
    with pytest.raises(ValueError, match="keep_last"):
        CheckpointConfig(keep_last=0)


def test_a_run_that_went_back_goes_on_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps above belong to a continuation that was left; also if this node's clock is an hour behind."""
    root = tmp_path / "checkpoints"
    for step in (100, 200, 300):
        save(root, step, {"model/x": torch.tensor([step])}, {})
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.0)
    save(root, 150, {"model/x": torch.tensor([150])}, {})
    (root / "latest").write_text("step-00000999\n")  # a hint for people; nothing depends on it
    assert latest(root) == root / "step-00000150"
    assert resume_path(root, "auto").path == root / "step-00000150"
    prune(root, CheckpointConfig(keep_last=1))
    assert [info.step for info in list_checkpoints(root)] == [150]


def test_resume(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert resume_path(root, "auto").path is None
    paths = [save(root, step, make(step), FACTS) for step in (1, 2, 3)]
    assert resume_path(root, "none").path is None
    for path, position in ((paths[2], 900), (paths[1], 0)):
        data = bytearray((path / "__0_0.distcp").read_bytes())
        data[position] ^= 1
        (path / "__0_0.distcp").write_bytes(data)
    found = resume_path(root, "auto")
    assert found.path == paths[0]
    assert {path: [problem.file for problem in problems] for path, problems in found.rejected.items()} == {
        paths[2]: ["__0_0.distcp"],
        paths[1]: ["__0_0.distcp"],
    }
    assert resume_path(root, str(paths[0])).path == paths[0]
    for damaged in (paths[1], root, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match=str(damaged)):
            resume_path(root, str(damaged))
    # Every rank says so.
    assert [p.reason for p in manifest.verify(tmp_path / "gone", rank=1, world=2)] == ["no such directory"]
    (paths[0] / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no good checkpoint"):
        resume_path(root, "auto")


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power may fail at any rename: what a new name shows must have been synced before, and the name itself after."""
    synced: set[int] = set()
    named: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def watched_rename(source: Path, target: Path, move: Any = rename) -> None:
        source, target = Path(source), Path(target)
        shown = [source, *source.iterdir()] if source.is_dir() else [source]
        assert all(path.stat().st_ino in synced for path in shown), f"{target.name} shows what is not on disk"
        if target.name == "latest":
            assert tmp_path.stat().st_ino in synced, f"{target.name} may become visible before {named[-1]}"
        move(source, target)
        synced.discard(target.parent.stat().st_ino)
        named.append(target.name)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    monkeypatch.setattr(os, "replace", lambda source, target: watched_rename(source, target, replace))
    save(tmp_path, 1, make(1), FACTS)
    assert named == [".metadata", "step-00000001", "latest"]
    assert tmp_path.stat().st_ino in synced


KILLER = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from megasora.checkpoint.directory import CheckpointConfig, latest, list_checkpoints
from megasora.checkpoint.load import load, verify
from megasora.checkpoint.save import prune, save

torch.set_num_threads(1)
base, root = Path(sys.argv[1]) / "base", Path(sys.argv[1]) / "root"

def put(root, step, value):
    save(root, step, {"model/x": torch.full((999,), value), "ema/x": torch.full((5,), value)}, {"value": value})

def look():
    state = {}
    for info in list_checkpoints(root):
        x = {"model/x": torch.zeros(999), "ema/x": torch.zeros(5)}
        facts = load(info.path, x)  # raises if anything is damaged
        assert info.complete and x["model/x"].unique().tolist() == x["ema/x"].unique().tolist() == [facts["value"]]
        state[info.step] = facts["value"]
    assert verify(latest(root)) == []
    return state

def child(work):
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(error, file=sys.stderr)
        os._exit(1)

def killed_at(point):
    seen = 0
    def hook(event, args):
        nonlocal seen
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            if seen == point:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
    def work():
        sys.addaudithook(hook)
        put(root, 2, 20.0)
        put(root, 3, 30.0)
        prune(root, CheckpointConfig(keep_last=1))
    return work

def endless():
    for value in range(100, 10000):
        put(root, 2 + value % 3, float(value))
        prune(root, CheckpointConfig(keep_last=2))

put(base, 1, 1.0)
put(base, 2, 2.0)
states = []
for point in range(1000):
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(base, root)
    _, status = os.waitpid(child(killed_at(point)), 0)
    assert status in (0, signal.SIGKILL), status
    states.append(look())
    put(root, 9, 9.0)
    assert not [name for name in os.listdir(root) if name.startswith(".")], os.listdir(root)
    if status == 0:
        break
chance = random.Random(0)
for _ in range(25):
    pid = child(endless)
    time.sleep(chance.uniform(0.0, 0.1))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    look()
print(json.dumps(states))
"""


def test_kill_at_any_instant_leaves_the_old_or_the_new() -> None:
    """Kills a writer that replaces step 2, saves step 3 and prunes, before each of its file operations; then at random.

    In memory where that can be: a kill, unlike a power failure, does not ask what is on disk, and fsync takes long.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as directory:
        command = [sys.executable, "-c", KILLER, directory]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    states = [{int(step): value for step, value in state.items()} for state in json.loads(done.stdout)]
    assert len(states) > 40
    changes = [state for previous, state in zip([{}, *states], states, strict=False) if state != previous]
    assert changes == [{1: 1, 2: 2}, {1: 1, 2: 20}, {1: 1, 2: 20, 3: 30}, {2: 20, 3: 30}, {3: 30}]


def call(*words: str) -> None:
    parser = argparse.ArgumentParser()
    ckpt.add_arguments(parser)
    args = parser.parse_args(words)
    args.overrides = []
    ckpt.run(args)


def test_ckpt_verbs(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = saved.parent.parent
    save(saved.parent, 10, make(10), {"layout": "dp2,zero3"})
    for path, steps in ((run, [5, 10]), (saved.parent, [5, 10]), (saved, [5])):
        call("ls", str(path), "--json")
        listed = json.loads(capsys.readouterr().out)["checkpoints"]
        assert [(entry["step"], entry["complete"]) for entry in listed] == [(step, True) for step in steps]
        assert listed[0]["bytes"] == sum(file.stat().st_size for file in saved.iterdir())
        call("verify", str(path), "--json")
        report = json.loads(capsys.readouterr().out)
        assert report["ok"]
        assert [entry["verified"] for entry in report["checkpoints"]] == [True] * len(steps)
    data = bytearray((saved / "__0_0.distcp").read_bytes())
    data[1000] ^= 16
    (saved / "__0_0.distcp").write_bytes(data)
    call("ls", str(run))
    assert "complete" in capsys.readouterr().out.splitlines()[1]
    call("ls", str(run), "--verify")
    table = capsys.readouterr().out.splitlines()
    assert table[1].split()[0] == "5"
    assert "__0_0.distcp" in table[1]
    assert table[2].split()[0] == "10"
    assert table[2].endswith("verified")
    with pytest.raises(CheckpointError, match=r"step-00000005: not a good checkpoint: __0_0\.distcp"):
        call("verify", str(run), "--json")
    assert not json.loads(capsys.readouterr().out)["ok"]
    (saved / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000005: not a good checkpoint: manifest\.json: missing"):
        call("verify", str(saved))
    for nothing in (run / "absent", Path(__file__).parent):
        with pytest.raises(CheckpointError, match=str(nothing)):
            call("verify", str(nothing))


def test_ckpt_verbs_do_not_need_torch() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    program = "import sys, megasora.verbs.ckpt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0


def test_a_restart_goes_on_from_what_was_saved_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With run.resume=PATH, which is older than all and need not be there any more; `none` is for the first start alone."""
    for step, begun in ((1, ""), (2, "old/step"), (3, "old/step"), (4, "other/step"), (5, "")):
        save(tmp_path, step, make(step), {"resumed_from": begun})
    newest = tmp_path / "step-00000003"
    assert gone_on(tmp_path, "old/step") == str(newest)
    (newest / "__0_0.distcp").write_bytes(b"cut")
    assert gone_on(tmp_path, "old/step") == str(tmp_path / "step-00000002")
    assert gone_on(tmp_path, "new/step") == "new/step"
    assert gone_on(tmp_path, "none") == "auto"
    for variable, value, again in (("SLURM_RESTART_COUNT", "0", False), ("SLURM_RESTART_COUNT", "1", True),
                                   ("TORCHELASTIC_RESTART_COUNT", "2", True)):  # fmt: skip
        monkeypatch.setenv(variable, value)
        assert is_restart() is again
        monkeypatch.delenv(variable)


def test_a_store_that_does_not_answer_is_not_waited_for() -> None:
    with pytest.raises(TimeoutError, match="no answer after 0 s"):
        answered(threading.Event().wait, 0.05)
    assert answered(lambda: 3) == 3
