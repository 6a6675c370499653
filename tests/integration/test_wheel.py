"""The built wheel, installed elsewhere, runs and carries launch/ and configs/."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_runs_elsewhere(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "data", "runs", "build", "*.egg-info", "__pycache__")
    )
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run([*pip, *build], check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
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
