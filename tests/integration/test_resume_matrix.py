"""Any layout to any layout: saved on A, resumed on B, the run goes on as the one on B that nobody interrupted."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megasora.cluster.heartbeat import heartbeat
from megasora.cluster.signals import StopRequest
from megasora.config import load_config
from megasora.observe.metrics import history
from megasora.parallel.layout import parse_layout
from megasora.parallel.mesh import AXES, Processes
from megasora.trainer import Trainer
from tests.harness import run_distributed
from tests.integration.conftest import Road

FIRST, STEPS = 4, 24  # saved after the first, 20 more

# name -> processes, layout
LAYOUTS = {
    "one": (1, "dp1"), "dp2": (2, "dp2"), "zero2": (2, "dp2,zero2"), "zero3": (2, "dp2,zero3"), "tp2": (2, "dp1,tp2"),
    "ulysses2": (2, "cp2x1"), "ring2": (2, "dp1,cp1x2,zero3"), "dp4": (4, "dp4,zero3"), "hsdp": (4, "hsdp2x2"),
    "zero1": (2, "dp2,zero1"), "pp2": (2, "pp2,dp1"), "pp2dp2": (4, "pp2,dp2,zero1"), "pp2tp2": (4, "pp2,dp1,tp2"),
    "dp2tp2": (4, "dp2,tp2,zero3"), "cp2tp2": (4, "cp2,tp2"), "cp4": (4, "dp1,cp2x2,zero2"),
}  # fmt: skip
PAIRS = [("one", "zero3"), ("zero3", "pp2"), ("pp2", "tp2"), ("tp2", "one"), ("zero3", "zero3")]
MORE = [
    ("dp2", "ulysses2"), ("zero1", "pp2dp2"), ("pp2dp2", "zero3"), ("zero3", "pp2tp2"), ("pp2tp2", "zero1"), ("pp2", "pp2"),
    ("zero2", "hsdp"), ("hsdp", "ring2"), ("ring2", "dp2tp2"), ("dp2tp2", "cp4"), ("cp4", "zero2"),
    ("cp2tp2", "one"), ("one", "cp2tp2"), ("dp4", "zero3"), ("zero3", "dp4"), ("dp2tp2", "dp4"), ("hsdp", "tp2"),
    ("tp2", "hsdp"), ("dp2tp2", "dp2tp2"), ("one", "one"),
]  # fmt: skip

Task = tuple[str, str, int]  # run directory, layout, steps


def train_all(config: Path, tasks: Sequence[Task]) -> None:
    """Runs on different layouts, one after the other in one set of processes."""
    for run, layout, steps in tasks:
        parsed = parse_layout(layout, dist.get_world_size())
        shape = (parsed.pp, parsed.dp_replicate, parsed.dp_shard, parsed.cp, parsed.tp)
        mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=AXES)
        group = Processes(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), parsed, mesh)
        overrides = [f"--run.dir={run}", f"--parallel.layout={layout}", f"--run.steps={steps}", "--stages.0.steps=10",
                     f"--checkpoint.every={FIRST}", "--checkpoint.keep_last=9", "--observe.tensorboard=false"]  # fmt: skip
        with heartbeat(group.rank) as beat:
            trainer = Trainer(load_config(config, overrides), group, StopRequest(), beat)
            try:
                trainer.run()
            finally:
                trainer.close()


def train_by_world(config: Path, tasks: Sequence[tuple[str, str, int]]) -> None:
    """(run directory, name of a layout, steps), grouped by their number of processes."""
    for world in sorted({LAYOUTS[name][0] for _, name, _ in tasks}):
        here = [(run, LAYOUTS[name][1], steps) for run, name, steps in tasks if LAYOUTS[name][0] == world]
        run_distributed(train_all, world, config, here, timeout=280)


def check(road: Road, directory: Path, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """The largest relative difference of a loss, pair by pair."""
    whole = {name: directory / name for pair in pairs for name in pair}
    train_by_world(road.config, [(str(run), name, STEPS) for name, run in whole.items()])
    moved = {}
    for a, b in pairs:
        moved[a, b] = directory / f"{a}-{b}"
        (moved[a, b] / "checkpoints").mkdir(parents=True)
        shutil.copytree(
            whole[a] / "checkpoints" / f"step-{FIRST:08d}", moved[a, b] / "checkpoints" / f"step-{FIRST:08d}"
        )
    train_by_world(road.config, [(str(run), b, STEPS) for (_, b), run in moved.items()])
    worst = {}
    for (a, b), run in moved.items():
        expected, found = history(whole[b])[FIRST:], history(run)
        assert [(m["step"], m["order"], m["lr"], m["layout"]) for m in found] == [
            (m["step"], m["order"], m["lr"], m["layout"]) for m in expected
        ]
        worst[a, b] = max(abs(f["loss"] - e["loss"]) / abs(e["loss"]) for f, e in zip(found, expected, strict=True))
        print(f"{a:>9} -> {b:<9} {worst[a, b]:.1e}")
        if a == b:
            assert [(m["loss"], m["grad_norm"]) for m in found] == [(m["loss"], m["grad_norm"]) for m in expected]
    return worst


@pytest.mark.parametrize("pairs", [PAIRS, pytest.param(MORE, marks=[pytest.mark.long, pytest.mark.timeout(1500)])])
def test_a_run_moves(road: Road, tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    worst = check(road, tmp_path, pairs)
    assert max(worst.values()) <= 1e-5, worst
