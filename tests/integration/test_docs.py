"""Every command of the how-tos is run, in their order; those of the other documents are at least such as their verbs take."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megasora.cli import parse_verb
from megasora.config import load_config
from megasora.models.video_dit import VideoDiTConfig
from tests.integration.conftest import ROOT, Road, environment
from tests.slurm import Cluster

QUICK = {"bench": {"warmup": 1, "steps": 4, "rounds": 4}, "eval": {"every": 0}}


def blocks(document: str) -> list[tuple[str, str]]:
    """(what is said after ```bash, the commands) of each."""
    found = re.findall(r"^ *```bash *(\w*)\n(.*?)^ *```", (ROOT / "docs" / document).read_text(), re.M | re.S)
    assert found
    return found


def place(road: Road, tmp_path: Path) -> Path:
    """A directory in which a reader could be: configs/demo.yaml is there, with data of this machine."""
    config = yaml.safe_load(road.config.read_text()) | QUICK
    config["run"] = config["run"] | {"dir": "runs/demo"}
    demo = load_config(ROOT / "configs/demo.yaml", []).model
    assert isinstance(demo, VideoDiTConfig)
    config["model"] = config["model"] | {"position": demo.position}  # smaller, but not another model than the reader's
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/demo.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def run(commands: str, directory: Path, variables: dict[str, str]) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", commands], cwd=directory, text=True, capture_output=True,
                          env=environment() | variables | {"PATH": path}, timeout=240, check=False)  # fmt: skip
    assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    ("document", "made"),
    [
        ("benchmark.md", ("accepted.json", "layouts.html", "trend.html", "runs/profiled/profile", "mine.json")),
        ("resume.md", ("compared.html", "runs/demo/replay/step-00000012", "weights", "exported/transformer")),
    ],
)
@pytest.mark.timeout(600)
def test_a_how_to_works_from_top_to_bottom(document: str, made: tuple[str, ...], road: Road, tmp_path: Path) -> None:
    directory = place(road, tmp_path)
    for _, commands in blocks(document):
        run(commands, directory, {})
    assert [name for name in made if not (directory / name).exists()] == []


def test_the_how_to_of_slurm_works_on_a_cluster(road: Road, cluster: Cluster, tmp_path: Path) -> None:
    directory = place(road, tmp_path)
    for kind, commands in blocks("slurm.md"):
        said = run(commands, directory, {"SLURM_CONF": cluster.environment["SLURM_CONF"]})
        if kind == "slurm":
            job = said.removeprefix("job ").partition(":")[0]
            assert cluster.wait(job)["JobState"] == "COMPLETED"


@pytest.mark.parametrize(
    "document", ["README.md", "launch/README.md", "docs/slurm.md", "docs/benchmark.md", "docs/resume.md"]
)
def test_commands_are_such_as_their_verbs_take(document: str) -> None:
    lines = [
        line for line in re.findall(r"^ *(megasora [a-z].*)$", (ROOT / document).read_text(), re.M) if "..." not in line
    ]
    assert lines
    for line in lines:
        _, *words = shlex.split(line.partition(" || ")[0], comments=True)
        if words[:2] == ["launch", "slurm"]:
            continue  # those of docs/slurm.md are run
        if words[0] == "launch":
            words = words[words.index("train") :]
        args = parse_verb(words)
        if "config" in args and args.config is not None and str(args.config) != ".":
            load_config(ROOT / args.config, args.overrides)
        else:
            assert args.overrides == [], line
