"""Runs on the second engine: they change engine and layout in the middle and go on as if nothing had happened."""

import json
from pathlib import Path

import pytest
import torch

from megasora.checkpoint.contents import open_checkpoint
from megasora.checkpoint.convert import differences
from megasora.cli import main
from megasora.observe.metrics import history
from tests.integration.conftest import Road
from tests.unit.test_boards import read_board

pytest.importorskip("deepspeed", reason="pip install -c constraints.txt 'megasora[deepspeed]'")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the processes would share a GPU")


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in history(run)]


def on(road: Road, run: Path, engine: str, layout: str, steps: int, *overrides: str) -> None:
    """Goes on to `steps`, which are saved."""
    nproc = {"dp1": 1, "dp4,zero1": 4}.get(layout, 2)
    road.run(
        "train", f"--run.dir={run}", f"--engine={engine}", f"--parallel.layout={layout}", f"--run.steps={steps}",
        "--checkpoint.every=100", *overrides, nproc=nproc,
    )  # fmt: skip


def norm_of(checkpoint: Path) -> float:
    """Of all its weights."""
    found = open_checkpoint(checkpoint)
    return float(
        torch.cat([found.read(name).flatten() for name in found.tensors if name.startswith("model/")]).double().norm()
    )


def small(road: Road) -> str:
    """The override by which ZeRO-3 shares out small parameters too."""
    file = road.directory / "small.json"
    file.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    return f"--deepspeed.json={file}"


def test_a_run_changes_its_engine_and_back(road: Road, straight: Path) -> None:
    run = road.directory / "engines"
    on(road, run, "torch_native", "dp1", 3)
    on(road, run, "deepspeed", "dp2,zero3", 6, small(road), "--deepspeed.checkpoints=true", "--eval.loss_every=6")
    on(road, run, "torch_native", "dp1", 9)
    assert losses(run) == pytest.approx(losses(straight)[:9], rel=1e-5)
    for point in read_board(run).Scalars("optim/weight_norm"):
        if point.step > 1:  # where each engine ended, which it saved
            assert point.value == pytest.approx(norm_of(run / f"checkpoints/step-{point.step:08d}"), rel=1e-5)

    native, own = run / "checkpoints/step-00000006", run / "deepspeed/step-00000006"
    for form, made in (
        ("universal", "universal/step-00000006"),
        ("safetensors", "whole"),
        ("sharded", "sharded/step-00000006"),
    ):
        output = road.directory / "forms" / Path(made).parts[0]
        convert(own, output, form)
        found = list(differences(open_checkpoint(native), open_checkpoint(road.directory / "forms" / made)))
        assert len(found) > 100, form
        assert not [d for d in found if d.reason or d.relative > 0], form


def convert(source: Path, output: Path, form: str) -> None:
    assert main(["ckpt", "convert", str(source), str(output), f"--to={form}"]) == 0


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_run_goes_on_from_universal_checkpoints_on_other_layouts(road: Road, straight: Path) -> None:
    run, source = road.directory / "universal-run", ""
    ours = ("--deepspeed.checkpoints=true", small(road))
    for layout, steps in (("dp2,zero3", 3), ("dp4,zero1", 6), ("tp2:nosp,dp1,zero1", 9), ("dp2,zero2", 12)):
        on(road, run, "deepspeed", layout, steps, *ours, *([source] if source else []))
        output = run / f"universal-{steps}"
        convert(run / f"deepspeed/step-{steps:08d}", output, "universal")
        source = f"--run.resume={output}/step-{steps:08d}"
    on(road, run, "torch_native", "dp1", 15, source)
    assert losses(run) == pytest.approx(losses(straight)[:15], rel=1e-5)


def test_parity_of_the_engine_is_one_command(road: Road) -> None:
    done = road.run("parity", "--engine", "deepspeed", "--layout=dp2,zero2", "--json")
    (found,) = json.loads(done.stdout)["layouts"]
    assert found["ok"]
    assert 0 < found["worst"] <= 1e-5
    done = road.run("parity", "--engine=deepspeed", "--layout=pp2", code=2)
    assert "pipelines belong to engine=torch_native" in done.stderr
    assert len(done.stderr.splitlines()) == 1
