"""`megasora bench` as a command: what it measures, what it refuses, sweeps and pages."""

import json
from pathlib import Path

import pytest

from megasora.observe.metrics import StepMetrics
from tests.integration.conftest import Road

QUICK = ("--data=synthetic", "--bench.warmup=1", "--bench.steps=5")
STEADY = ("--data=synthetic", "--bench.warmup=1", "--bench.steps=25", "--bench.rounds=5")  # while other tests run


def test_every_part_of_a_step_is_measured_and_a_slower_one_is_seen(road: Road) -> None:
    old, page = road.directory / "bench.json", road.directory / "bench.html"
    arguments = (f"--bench.checkpoint={road.directory / 'stall'}", f"--bench.output={old}", f"--html={page}")
    result = json.loads(road.run("bench", "--json", *STEADY, *arguments).stdout)
    assert json.loads(old.read_text()) == result
    names = [
        "step_time_s",
        "tokens_per_s",
        "tflops_per_device",
        "mfu",
        "imbalance",
        "peak_memory_bytes",
        "layout",
        "data_wait_s",
    ]
    assert set(names) <= set(StepMetrics.__dataclass_fields__) & set(result)
    assert sum(result["parts"].values()) == pytest.approx(result["step_time_s"], rel=0.2)
    profiled = result["profiled"]
    assert sum(profiled["parts"].values()) == pytest.approx(profiled["step_time_s"], rel=0.05)
    assert all(profiled["parts"][part] > 0 for part in ("forward", "backward", "optimizer", "ema"))
    assert (result["schema"], result["steps"], len(result["rounds"])) == (2, 25, 5)
    assert 6 <= result["warmup"]["steps"] <= 13
    assert 0 < result["checkpoint"]["blocked_s"] < result["checkpoint"]["seconds"]
    assert not list((road.directory / "stall").iterdir())
    memory = result["memory_by_part"]
    assert memory["weights"] == memory["ema"] == memory["gradients"] == pytest.approx(memory["optimizer"] / 2, rel=0.01)
    assert memory["activations"] > 0
    assert result["copy_bytes_per_s"] > 1e8
    assert page.read_text().count("<svg") >= 4

    faster = json.loads(old.read_text())  # as if the same step had once taken a tenth
    for one in faster["rounds"]:
        one["cost"] /= 10
    old.write_text(json.dumps(faster))
    done = road.run("bench", *STEADY, f"--bench.against={old}", code=1)
    assert "megasora: step_time_s: " in done.stderr.splitlines()[-1]
    assert "slower than" in done.stderr.splitlines()[-1]
    done = road.run("bench", *QUICK, f"--bench.against={old}", "--bench.rounds=2", code=2)
    assert "bench.rounds=2: too few" in done.stderr


def test_each_kind_of_communication_is_told(road: Road) -> None:
    result = json.loads(
        road.run(
            "bench", "--json", "--bench.warmup=1", "--bench.steps=2", "--parallel.layout=dp2,zero2", nproc=2
        ).stdout
    )
    found = result["profiled"]["communication"]
    assert {"all_gather", "reduce_scatter", "all_reduce"} <= set(found)
    assert all(0 <= of["hidden_s"] <= of["seconds"] for of in found.values())
    assert result["bytes_by_kind"]["all_gather"] > 0
    assert sum(result["bytes_by_kind"].values()) == result["bytes_sent"]
    assert result["world"] == 2


@pytest.mark.long
def test_the_other_engine_tells_its_parts_too(road: Road) -> None:
    arguments = ("--bench.warmup=1", "--bench.steps=2", "--engine=deepspeed", "--parallel.layout=dp2,zero2")
    result = json.loads(road.run("bench", "--json", "--optim.name=adamw", *arguments, nproc=2).stdout)
    assert all(result["profiled"]["parts"][part] > 0 for part in ("forward", "backward", "optimizer", "ema"))
    memory = result["memory_by_part"]
    assert memory["optimizer"] == pytest.approx(2 * memory["ema"], rel=0.01)  # a half of each, whatever the whole is
    assert memory["gradients"] > 0


def test_a_sweep_goes_on_when_a_point_fails(road: Road, tmp_path: Path) -> None:
    page, output = tmp_path / "sweep.html", tmp_path / "sweep.json"
    sweep = ("--sweep", "parallel.layout=dp1;tp3", "--sweep", "model.depth=1")
    done = road.run("bench", "--json", *QUICK, "--bench.warmup=0", *sweep, f"--html={page}", f"--bench.output={output}")
    good, bad = json.loads(done.stdout)["points"]
    assert json.loads(output.read_text()) == json.loads(done.stdout)
    assert good["result"]["config"]["model"]["depth"] == 1
    assert good["result"]["warmup"] == {"steps": 0, "steady": None}
    assert "heads do not divide by tp" in bad["result"]["error"]
    assert bad["result"]["error"] in page.read_text()
    trend = tmp_path / "trend.html"
    road.run("bench", "--trend", str(tmp_path), f"--html={trend}")
    assert "sweep dp1" in trend.read_text()
    done = road.run("bench", *QUICK, "--sweep", "parallel.layout=tp3", code=1)
    assert "heads do not divide" in done.stderr.splitlines()[-1]
    assert "--sweep=x: KEY=VALUE;VALUE" in road.run("bench", "--sweep", "x", code=2).stderr
