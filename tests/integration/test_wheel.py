"""The built wheel, installed elsewhere, runs and carries launch/ and configs/."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    ignore = shutil.ignore_patterns(".*", "data", "runs", "build", "dist", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=ignore))


def test_the_source_distribution_is_enough_to_begin(source: Path, tmp_path: Path) -> None:
    build = "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, timeout=120, capture_output=True
    )
    (made,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(made) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {
        "LICENSE",
        "README.md",
        "constraints.txt",
        "Makefile",
        "docs/slurm.md",
        "launch/slurm.sbatch",
        "configs/demo.yaml",
    }
    assert wanted <= inside
    assert not any(name.startswith(("tests", "benchmarks/reports")) for name in inside)
    assert made.stat().st_size < 2e6


def test_the_wheel_runs_elsewhere(source: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run([*pip, *build], check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    inside = zipfile.ZipFile(wheel).namelist()
    packages = {"megasora", "data_pipelines", "megasora_kernels"}
    assert {f"{package}/py.typed" for package in packages} <= set(inside)
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in inside)
    assert {name.split("/")[0] for name in inside if not name.startswith("megasora-")} == packages
    assert wheel.stat().st_size < 2e6
    place = tmp_path / "place"
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(place), str(wheel)], check=True, timeout=120
    )
    assert {p.name for p in (place / "share/megasora/configs").iterdir()} >= {"demo.yaml", "base.yaml"}
    assert {p.name for p in (place / "share/megasora/launch").iterdir()} >= {"slurm.sbatch", "local.sh", "env.sh"}
    command = [sys.executable, "-m", "megasora", "train", "--config", str(place / "share/megasora/configs/demo.yaml")]
    env = {**os.environ, "PYTHONPATH": str(place)}
    done = subprocess.run(
        [*command, "--optim.lrr=1"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "optim.lr?" in done.stderr
    where = "import megasora as a, data_pipelines as b, megasora_kernels.layernorm_modulate as c; "
    where += "print(a.__file__, b.__file__, c.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=True
    )
    assert all(path.startswith(str(place)) for path in done.stdout.split())
