"""The shell scripts and the Dockerfile: linted, and what they decide by themselves."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
BIN = Path(sys.executable).parent


def _tool(name: str) -> str:
    found = shutil.which(name, path=f"{BIN}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed: pip install -e .[dev]")
    return found


def _executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_shellcheck() -> None:
    scripts: list[Path] = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), ROOT / ".ci/run"]
    assert len(scripts) >= 4
    done = subprocess.run([_tool("shellcheck"), "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_hadolint() -> None:
    done = subprocess.run([_tool("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_env_exports_what_it_sets_and_leaves_what_is_set() -> None:
    names = set(re.findall(r'^: "\$\{(\w+):=', (LAUNCH / "env.sh").read_text(), flags=re.MULTILINE))
    assert {"NCCL_DEBUG", "TRITON_CACHE_DIR"} <= names
    base = {key: value for key, value in os.environ.items() if key not in names}
    shown = subprocess.check_output(["bash", "-c", f"source {LAUNCH}/env.sh; env"], env=base, text=True)
    assert names <= {line.partition("=")[0] for line in shown.splitlines()}
    mine = dict.fromkeys(names, "mine")
    kept = subprocess.check_output(["bash", "-c", f"source {LAUNCH}/env.sh; env"], env=base | mine, text=True)
    assert {f"{name}=mine" for name in names} <= set(kept.splitlines())


def test_local_passes_arguments_and_the_exit_code(tmp_path: Path) -> None:
    python = _executable(tmp_path / "python", '#!/bin/sh\nprintf "%s\\n" "$@"\nexit 75\n')
    command = [str(LAUNCH / "local.sh"), "2", "train", "--config", "a b.yaml", "--x.y=$z"]
    done = subprocess.run(command, env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True)
    assert done.returncode == 75
    expected = ["-m", "megasora", "launch", "local", "--nproc", "2", "train", "--config", "a b.yaml", "--x.y=$z"]
    assert done.stdout.splitlines() == expected
    usage = subprocess.run([LAUNCH / "local.sh", "2"], capture_output=True, text=True)
    assert usage.returncode == 2
    assert len(usage.stderr.splitlines()) == 1


def test_the_prolog_fails_on_a_node_that_is_not_fit(tmp_path: Path) -> None:
    settings = tmp_path / "prolog"
    environment = os.environ | {"MEGASORA_PROLOG": str(settings), "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    for cpus, code in (("1", 0), ("100000", 1)):
        settings.write_text(f"PYTHON='{sys.executable}'\nDOCTOR=(--cpus {cpus})\n")
        done = subprocess.run([LAUNCH / "prolog.sh"], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        assert done.stdout == ""
        assert ("megasora: not fit: " in done.stderr) == (code == 1)


# Stand-ins for SLURM's commands. The real ones are the business of the integration tests.
SCONTROL = """#!/bin/bash
case "$1 $2" in
"show hostnames") printf 'n1\\nn2\\n' ;;
"--oneliner show") for n in 1 2; do echo "NodeName=n$n Arch=x NodeAddr=10.0.0.$n NodeHostName=n$n"; done ;;
*) echo "$@" >> "$NOTES/requeued" ;;
esac
"""
SRUN = """#!/bin/bash
trap 'exit 75' USR1
touch "$NOTES/running"
[ -z "$WAIT" ] || { for _ in {1..100}; do sleep 0.02; done; }
while [[ $1 == --* ]]; do shift; done
SLURMD_NODENAME=n2 "$@"
"""


def _batch(tmp_path: Path, code: int, wait: str = "") -> subprocess.Popen[str]:
    _executable(tmp_path / "scontrol", SCONTROL)
    _executable(tmp_path / "srun", SRUN)
    python = _executable(tmp_path / "python", f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\nexit {code}\n')
    job = {"SLURM_SUBMIT_DIR": ROOT, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    own = {"CONFIG": "x.yaml", "GPUS_PER_NODE": "8", "PYTHON": python, "NOTES": tmp_path, "WAIT": wait}
    environment = os.environ | {key: str(value) for key, value in (job | own).items()}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    return subprocess.Popen(["bash", LAUNCH / "slurm.sbatch", "--run.steps=3"], env=environment, text=True)


def _await_step(batch: subprocess.Popen[str], notes: Path) -> None:
    while not (notes / "running").exists():
        assert batch.poll() is None
        time.sleep(0.02)


@pytest.mark.parametrize("code, requeued", [(0, False), (3, False), (75, True)])
def test_the_batch_script_keeps_the_code_and_requeues_at_75(tmp_path: Path, code: int, requeued: bool) -> None:
    assert _batch(tmp_path, code).wait(timeout=20) == code
    assert (tmp_path / "requeued").exists() == requeued
    assert (tmp_path / "arguments").read_text().split() == [
        *["-m", "megasora", "launch", "local", "--local-addr", "10.0.0.2", "--rdzv-endpoint", "10.0.0.1:20007"],
        *["--nnodes", "2", "--rdzv-id", "7-0", "--nproc", "8", "train", "--config", "x.yaml", "--run.steps=3"],
    ]


@pytest.mark.parametrize("signals", [[signal.SIGUSR1], [signal.SIGTERM, signal.SIGUSR1]])
def test_the_batch_script_outlives_a_warning(tmp_path: Path, signals: list[signal.Signals]) -> None:
    batch = _batch(tmp_path, 0, wait="yes")
    _await_step(batch, tmp_path)
    for number in signals:
        batch.send_signal(number)
        time.sleep(0.2)
    assert batch.wait(timeout=20) == 75
    assert (tmp_path / "requeued").exists()


def test_what_a_user_cancels_is_not_requeued(tmp_path: Path) -> None:
    batch = _batch(tmp_path, 75, wait="yes")
    _await_step(batch, tmp_path)
    batch.send_signal(signal.SIGTERM)  # SLURM tells the step, too: here it ends by itself
    assert batch.wait(timeout=40) == 75
    assert not (tmp_path / "requeued").exists()
