"""A small road, built once: drawn clips -> shards -> VAE -> latents, by the commands themselves."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from data_pipelines.prepare.demo_clips import draw_clips
from megasora.observe.metrics import history
from tests.slurm import Cluster, unavailable

ROOT = Path(__file__).parents[2]

CONFIG = {
    "run": {"seed": 3},
    "prepare": {"clip_seconds": 1.0, "min_frames": 5, "height_max": 64, "samples_per_shard": 8},
    "vae": {},
    "train_vae": {"steps": 8, "batch": 1, "lr": 5e-4},
    "data": {"global_batch": 4, "capacity": 128},
    "model": {"width": 48, "depth": 2, "heads": 4, "ffn": 96, "text_width": 32},
    "optim": {"lr": 4e-3, "warmup": 4, "ema": 0.9},
    "stages": [
        {"name": "image", "steps": 15, "buckets": {"resolutions": [64], "frames": [1]}},
        {"name": "video", "steps": 25, "shift": 2.0, "buckets": {"resolutions": [64], "frames": [1, 5, 9]}},
    ],
    "checkpoint": {"every": 10},
    "sample": {"prompts": ["a red circle"], "frames": 5, "height": 48, "width": 80, "steps": 3},
}


@dataclass(frozen=True)
class Road:
    """The directories of a finished road, and a way to run a verb on them."""

    directory: Path

    @property
    def config(self) -> Path:
        return self.directory / "road.yaml"

    def command(self, verb: str, *overrides: str, nproc: int = 0) -> list[str]:
        launcher = ["launch", "local", "--nproc", str(nproc)] if nproc else []
        return [sys.executable, "-m", "megasora", *launcher, verb, "--config", str(self.config), *overrides]

    def start(self, verb: str, *overrides: str, nproc: int = 0) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(verb, *overrides, nproc=nproc), cwd=self.directory, text=True, env=environment(),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def run(self, verb: str, *overrides: str, nproc: int = 0, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Runs to the end and checks the exit code."""
        done = subprocess.run(
            self.command(verb, *overrides, nproc=nproc), cwd=self.directory, text=True, env=environment(),
            capture_output=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == code, f"exit {done.returncode}, wanted {code}\n{done.stdout}\n{done.stderr}"
        return done


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}


def identical(run: Path) -> list[tuple[object, ...]]:
    """What two runs must agree in to be called identical."""
    return [(m["step"], m["loss"], m["grad_norm"], m["lr"], m["samples"], m["order"]) for m in history(run)]


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> Road:
    directory = tmp_path_factory.mktemp("road")
    (directory / "raw").mkdir()
    draw_clips(directory / "raw")
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    config["prepare"] |= {"input": str(directory / "raw"), "output": str(directory / "shards")}
    config["encode"] = {
        "input": str(directory / "shards"), "output": str(directory / "latents"), "vae": str(directory / "vae")
    }  # fmt: skip
    config["data"]["path"] = str(directory / "latents")
    config["run"]["dir"] = str(directory / "run")
    made = Road(directory)
    made.config.write_text(yaml.safe_dump(config))
    for verb in ("prepare", "train-vae", "encode"):
        made.run(verb)
    return made


@pytest.fixture(scope="session")
def straight(road: Road) -> Path:
    """The 40 steps of the config, undisturbed, on one process."""
    run = road.directory / "straight"
    road.run("train", f"--run.dir={run}", "--eval.every=40")
    return run


@pytest.fixture
def wait_for_step() -> Callable[[Path, int, "subprocess.Popen[str]"], None]:
    import time

    def wait(run: Path, step: int, process: "subprocess.Popen[str]") -> None:
        deadline = time.monotonic() + 120
        while not any(m["step"] >= step for m in history(run)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    return wait


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why := unavailable():
        pytest.skip(why)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()
