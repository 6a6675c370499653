"""Batch scripts: golden files, lint, and nothing that a name or a path could smuggle in.

Write the golden files anew with `python -m tests.unit.test_slurm_script`.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megasora.cli import main, parse_verb
from megasora.cluster.command import choices
from megasora.cluster.elastic import layouts_by_nodes, shrunken_layout
from megasora.cluster.slurm import Job, render
from megasora.errors import ConfigError
from megasora.parallel.layout import parse_layout
from megasora.verbs.launch_slurm import next_free, read_command

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/data/slurm"
TRAIN = Job(
    name="train-first-1a2b3c", verb="train", arguments=(), config=Path("/project/runs/first/launch/0000/config.yaml"),
    layouts={16: ""}, gpus_per_node=8, nproc=8, python="/project/.venv/bin/python", directory=Path("/project"),
    log=Path("/project/runs/first/logs/slurm-%j.out"), cache=Path("/project/.cache"), time="12:00:00", partition="h100",
    account="video", max_restarts=3, stall=480,
)  # fmt: skip
JOBS = {
    "train": TRAIN,
    "elastic": replace(
        TRAIN, layouts={4: "hsdp4x8,zero3", 3: "hsdp3x8,zero3"}, doctor=("--gpus", "8", "--site", "/site/check it.sh"),
        reports=Path("/project/runs/first/launch/0000/doctor"),
    ),
    "container": replace(
        TRAIN, container="nvcr.io#org/megasora:1", mounts="/project:/project,/data:/data", python="python", qos="high"
    ),
    "sweep": replace(TRAIN, array=4, sweep=True, log=Path("/project/runs/first/logs/slurm-%A_%a.out"), layouts={1: ""}),
    "encode": replace(
        TRAIN, name="encode-first-1a2b3c", verb="encode", arguments=("--json",), array=32, layouts={1: ""},
        dependency="afterok:17", log=Path("/project/runs/first/logs/slurm-%A_%a.out"), options=("--nice=100",),
    ),
}  # fmt: skip
NASTY = [
    "a b",
    "it's",
    'say "no"',
    "a;touch gone",
    "$(touch gone)",
    "`touch gone`",
    "a#b",
    "a&b|c",
    "100%",
    "*",
    "-n",
    "ü",
]


@pytest.mark.parametrize("name", JOBS)
def test_the_script_is_the_golden_one(name: str) -> None:
    assert render(JOBS[name]) == (GOLDEN / f"{name}.sbatch").read_text()


def test_golden_files_pass_shellcheck() -> None:
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if tool is None:
        pytest.skip("shellcheck is not installed: pip install -e .[dev]")
    files = sorted(GOLDEN.glob("*.sbatch"))
    assert [file.stem for file in files] == sorted(JOBS)
    done = subprocess.run([tool, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("nasty", NASTY)
def test_what_the_shell_reads_is_quoted(nasty: str, tmp_path: Path) -> None:
    """The settings of the script, run by bash, are again what went in; and nothing else has run."""
    job = replace(
        TRAIN, arguments=(f"--x.y={nasty}", nasty), config=Path(f"/p/{nasty}/config.yaml"), python=f"/p/{nasty}/python",
        cache=Path(f"/p/{nasty}"), container=nasty, mounts=nasty, directory=Path(f"/p/{nasty}"), doctor=("--site", nasty),
        reports=Path(f"/p/{nasty}"), layouts={2: ""},
    )  # fmt: skip
    script = render(job).partition("# ---- the job")[0]
    show = 'printf "%s\\0" "$PYTHON" "$MEGASORA_CACHE" "${command[@]}" "${container[@]}" "${doctor[@]}" "$reports"'
    clean = {"PATH": os.environ["PATH"]}
    out = subprocess.check_output(["bash", "-c", f"{script}\n{show}"], cwd=tmp_path, env=clean, text=True)
    assert out.split("\0")[:-1] == [
        f"/p/{nasty}/python", f"/p/{nasty}", "train", "--config", f"/p/{nasty}/config.yaml", f"--x.y={nasty}", nasty,
        f"--container-image={nasty}", f"--container-workdir=/p/{nasty}", f"--container-mounts={nasty}",
        "--site", nasty, f"/p/{nasty}",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", ["name", "partition", "account", "qos", "exclude", "time", "dependency"])
@pytest.mark.parametrize("value", ["a b", "a;b", "$(b)", 'a"b', "a\n#SBATCH --wrap=b"])
def test_what_slurm_reads_is_refused(field: str, value: str) -> None:
    with pytest.raises(ConfigError, match="SLURM"):
        render(replace(TRAIN, **{field: value}))


@pytest.mark.parametrize("value", ["/p/a\nb", "/p/a\\b"])
def test_paths_that_slurm_cannot_read_are_refused(value: str) -> None:
    for field in ("directory", "log"):
        with pytest.raises(ConfigError, match=r"--chdir|--output"):
            render(replace(TRAIN, **{field: Path(value)}))
    with pytest.raises(ConfigError, match="sbatch"):
        render(replace(TRAIN, options=("--wrap=a b",)))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"run": {"dir": "runs/it's"}, "data": {"global_batch": 8}}))
    return file


def test_a_dry_run_prints_and_creates_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", "slurm", "train", "--config", str(config), "--nodes", "4", "--gpus-per-node", "2"]
    assert main([*words, "--optim.lr=3e-4", "--min-nodes", "2", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --nodes=2-4\n" in script
    assert "node_counts=(4 2)" in script  # three nodes would not divide the global batch
    assert "layouts=('dp8,zero2' 'dp4,zero2')" in script
    assert [path.name for path in config.parent.iterdir()] == ["c.yaml"]


def test_the_doctor_asks_for_the_gpus_of_the_job(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def script(verb: str, *words: str) -> str:
        assert main(["launch", "slurm", verb, "--config", str(config), "--dry-run", *words]) == 0
        return capsys.readouterr().out

    assert "\ndoctor=(--gpus 4 --gpus 2 --cpus 9) #" in script(
        "train", "--gpus-per-node", "4", "--doctor=--gpus 2 --cpus 9"
    )
    assert "\ndoctor=(--gpus 8) #" in script("train", "--doctor")
    assert re.search(r"command=\(accept --config \S+ --gpus 8\)", script("accept"))
    assert main(["launch", "slurm", "doctor", "--gpus-per-node", "2", "--dry-run"]) == 0
    assert "command=(doctor --links --gpus 2)" in capsys.readouterr().out


def test_what_fails_by_finding_something_is_not_tried_again(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb, times in (("bench", 0), ("parity", 0), ("accept", 0), ("train", 3)):
        words = ["--max-restarts", "3", "--gpus-per-node", "1", "--dry-run"]
        assert main(["launch", "slurm", verb, "--config", str(config), *words]) == 0
        assert f"--max-restarts {times} " in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["tarin"], "tarin"),
        (["train", "--nodes", "0"], "--nodes=0"),
        (["train", "--nodes", "2", "--gpus-per-node", "2", "--parallel.layout=dp3"], "4 started"),
        (["train", "--nodes", "3", "--gpus-per-node", "1"], "data.global_batch=8: 3 data-parallel ranks"),
        (["train", "--partition", "a b"], "--partition=a b"),
        (["train", "--optim.lrr=1"], "optim.lr?"),
        (["train", "--array", "3"], "--array=3"),
        (["encode", "--nodes", "2"], "--array"),
        (["train", "--sweep", "optim.lr"], "--sweep=optim.lr"),
        (["train", "--sweep", "optim.lrr=1;2"], "optim.lr?"),
        (["train", "--doctor=--wrong"], "--wrong"),
        (["train", "--chain", "2", "--run.resume=runs/a/checkpoints/step-00000004"], "give auto"),
        (
            [
                "train",
                "--sweep",
                "parallel.layout=dp4,zero2;dp4,zero3",
                "--nodes",
                "4",
                "--min-nodes",
                "2",
                "--gpus-per-node",
                "1",
            ],
            "one layout",
        ),
        (["train", "--min-nodes", "1", "--nodes", "3", "--gpus-per-node", "2"], "data.global_batch=8"),
    ],
)
def test_a_wrong_command_is_one_line(
    config: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "slurm", *words, "--config", str(config)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert [path.name for path in config.parent.iterdir()] == ["c.yaml"]


def test_tasks_of_a_sweep_share_no_store(config: Path) -> None:
    words = ["launch", "slurm", "train", "--config", str(config), "--sweep", "optim.lr=1e-4;2e-4"]
    found, _ = read_command(parse_verb([*words, "--checkpoint.durable=s3://bucket/run/"]))
    assert [(c.run.dir, c.checkpoint.durable) for c in found] == [
        ("runs/it's/0000", "s3://bucket/run/0000"), ("runs/it's/0001", "s3://bucket/run/0001"),
    ]  # fmt: skip


def test_of_a_chain_that_slurm_takes_in_part_that_part_is_named(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = iter(["7", "8"])

    def submit(script: Path) -> str:
        if (job := next(taken, None)) is None:
            raise ConfigError("launch: sbatch: too many jobs")
        return job

    monkeypatch.setattr("megasora.verbs.launch_slurm.submit", submit)
    assert main(["launch", "slurm", "train", "--config", str(config), "--chain", "3"]) == 2
    assert "too many jobs; submitted before that and queued: job 7 8" in capsys.readouterr().err
    assert list(config.parent.glob("runs/*/launch/0000/config.yaml"))  # which they will read


def test_the_choices_of_a_sweep() -> None:
    assert choices(["a=1;2", "parallel.layout=dp2,zero3;tp2"]) == [
        ("--a=1", "--parallel.layout=dp2,zero3"), ("--a=1", "--parallel.layout=tp2"),
        ("--a=2", "--parallel.layout=dp2,zero3"), ("--a=2", "--parallel.layout=tp2"),
    ]  # fmt: skip


def test_directories_are_numbered_on(tmp_path: Path) -> None:
    assert next_free(tmp_path).name == "0000"
    (tmp_path / "0007").mkdir()
    assert next_free(tmp_path).name == "0008"


@pytest.mark.parametrize(
    "layout, world, batch, expected",
    [
        ("dp8", 4, 8, "dp4"),
        ("dp4,zero2", 3, 12, "dp3,zero2"),
        ("dp4,zero2", 3, 8, None),  # the global batch does not divide
        ("dp4,tp2,zero3", 6, 12, "dp3,tp2,zero3"),
        ("dp4,tp2", 5, 40, None),  # half a tensor group
        ("hsdp4x2,zero3", 6, 12, "hsdp3x2,zero3"),
        ("hsdp4x2,zero3", 2, 8, "dp2,zero3"),
        ("hsdp2x4,zero3", 6, 12, "dp6,zero3"),
        ("dp2,cp2x2", 4, 8, "dp1,cp2x2"),
    ],
)
def test_the_layout_of_fewer_processes(layout: str, world: int, batch: int, expected: str | None) -> None:
    found = shrunken_layout(parse_layout(layout), world, batch)
    assert (str(found) if found else None) == expected
    if found:
        assert parse_layout(str(found), world) == found


def test_node_counts_without_a_layout_are_left_out() -> None:
    assert layouts_by_nodes(parse_layout("auto", 8), 4, 1, 2, 8) == {4: "dp8,zero2", 2: "dp4,zero2", 1: "dp2,zero2"}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    GOLDEN.mkdir(exist_ok=True)
    for name, job in JOBS.items():
        (GOLDEN / f"{name}.sbatch").write_text(render(job))
