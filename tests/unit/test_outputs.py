"""A disk that is full or closed, a place that is not there: one line with the key, exit code 2, and before the long work."""

import errno
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data_pipelines.errors import MissingData
from data_pipelines.prepare import demo_clips
from data_pipelines.shards.tars import ShardSet
from megasora.cli import main
from megasora.errors import NotWritable, check_writable, made_by, writing
from megasora.observe.logs import log, start_logging
from megasora.observe.progress import Progress

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs/demo.yaml")
FULL = Path("/dev/full")  # every write to it finds no space


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A directory in which nothing can be made, not even by root."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file"


def fails(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """The last line on stderr of a command that ends with 2 and without a traceback."""
    assert main(list(words)) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


def test_a_full_disk_is_named_by_the_key(tmp_path: Path) -> None:
    with pytest.raises(NotWritable, match=r"^x=y: No space left on device"), writing("x=y"), FULL.open("w") as file:
        file.write("a")
    with pytest.raises(NotWritable, match=r"^x=y: .*Is a directory"), writing("x=y"):
        save_file({"a": torch.zeros(1)}, tmp_path)
    with pytest.raises(FileNotFoundError), writing("x=y"):  # not about the output: a bug stays one
        (tmp_path / "none").read_text()


def test_outputs_are_checked_before_the_work(capfd: pytest.CaptureFixture[str], tmp_path: Path, closed: Path) -> None:
    with pytest.raises(NotWritable, match="there is no directory"):
        check_writable("k", tmp_path / "none" / "x.json")
    with pytest.raises(NotWritable, match="cannot be written"):
        check_writable("k", tmp_path)
    check_writable("k", tmp_path / "x.json")
    bench = ("bench", "--config", DEMO, "--data=synthetic", f"--bench.output={closed}/b.json")
    assert fails(capfd, *bench).startswith(f"megasora: bench.output={closed}/b.json: there is no directory")
    assert "bench.output" in fails(capfd, *bench, "--sweep", "parallel.layout=dp1")


def test_a_sweep_with_a_misspelt_key_measures_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    bench = ("bench", "--config", DEMO, "--data=synthetic", "--sweep")
    assert "did you mean parallel.layout?" in fails(capfd, *bench, "parallel.layot=dp1;dp2")
    assert "banana" in fails(capfd, *bench, "parallel.layout=dp1;banana")
    assert "--rounds=0" in fails(capfd, *bench, "parallel.layout=dp1", "--rounds", "0")


def test_a_sweep_keeps_what_it_has_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first point prints a line of a library's behind its result, the second nothing, and at the third the power fails."""
    file = tmp_path / "sweep.json"
    prints = iter(['{"step_time_s": 2.0}\nnode: NCCL INFO [0] done\n17', "[3]"])

    def words(*_: str, nproc: int) -> list[str]:
        return [sys.executable, "-c", f"print({next(prints)!r})"]

    monkeypatch.setattr("megasora.verbs.bench.megasora", words)
    sweep = ("bench", "--config", DEMO, "--data=synthetic", "--sweep", "parallel.layout=dp1;dp2;dp1,tp2")
    with pytest.raises(StopIteration):
        main([*sweep, f"--bench.output={file}"])
    assert [point["result"] for point in json.loads(file.read_text())["points"]] == [
        {"step_time_s": 2.0}, {"error": "it ended well and printed no result"},
    ]  # fmt: skip


def test_prepare_says_where_it_cannot_write(capfd: pytest.CaptureFixture[str], tmp_path: Path, closed: Path) -> None:
    (tmp_path / "raw").mkdir()
    demo_clips.draw_clips(tmp_path / "raw", frames=2)
    said = fails(
        capfd, "prepare", "--config", DEMO, f"--prepare.input={tmp_path}/raw", f"--prepare.output={closed}/out"
    )
    assert said.startswith(f"megasora: prepare.output={closed}/out: ")
    assert said.endswith("Not a directory")


def test_what_is_missing_comes_with_the_verb_that_makes_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    missing = r"^data.path: .*none: no such directory; `megasora encode` makes it$"
    with pytest.raises(MissingData, match=missing), made_by("encode", "data.path"):
        ShardSet.open(tmp_path / "none")
    assert main(["train", "--config", DEMO, f"--data.path={tmp_path}/none", f"--run.dir={tmp_path}/run"]) == 3
    assert "`megasora encode` makes it" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_disk_that_fails_a_worker_is_no_verdict(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its launcher restarts it, perhaps elsewhere, as after any other death: 2 would end the run for good."""

    def full(argv: list[str]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl")

    monkeypatch.setattr("megasora.cli.run_verb", full)
    monkeypatch.delenv("RANK", raising=False)
    assert fails(capfd, "train") == "megasora: runs/a/metrics.jsonl: No space left on device"
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(OSError, match="No space"):
        main(["train"])


def test_a_full_disk_does_not_flood_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank-00000.log").symlink_to(FULL)
    start_logging(tmp_path, rank=0)
    log.info("a word")
    assert capfd.readouterr().err == "a word\n"
    start_logging(None, rank=0)


@pytest.mark.parametrize(
    ("time", "known"), [("90", True), ("1-00:00:00", True), ("12:00:00", True), ("banana", False), ("1 day", False)]
)
def test_the_time_of_a_job_is_one(time: str, known: bool, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["launch", "slurm", "train", "--config", DEMO, "--gpus-per-node", "1", "--dry-run", "--time", time]
    assert main(words) == (0 if known else 2)
    assert known or f"--time={time}" in capfd.readouterr().err


def test_the_demo_clips_take_no_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["demo_clips", "--help"])
    assert demo_clips.main() == 2
    assert list(tmp_path.iterdir()) == []


def test_what_was_done_before_takes_no_time_now(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """90 of 100 are there; the next two take a minute, so that the other eight will take four."""
    clock = iter([0.0, 5.0, 65.0, 300.0])
    monkeypatch.setattr("megasora.observe.progress.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    progress = Progress("encode")
    for done in (90, 92, 100):
        progress(done, 100, "samples")
    assert capsys.readouterr().err.splitlines() == [
        "encode: 92/100 samples (about 240 s left)", "encode: 100/100 samples (300 s)",
    ]  # fmt: skip


def test_an_option_without_a_verb_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert fails(capfd, "--verison") == "megasora: --verison: unknown option; `megasora --help` lists the verbs"
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
