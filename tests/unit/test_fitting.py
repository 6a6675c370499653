"""What is recomputed to fit a budget: the choice against the closed form, what really lives then, and what the commands say."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from megasora.cli import main
from megasora.config import load_config
from megasora.errors import ConfigError
from megasora.observe.hardware import GIB
from megasora.parallel.layout import ParallelConfig, parse_layout
from megasora.planner.dry_run import dry_run
from megasora.planner.fitting import cheapest, needed
from megasora.planner.job import Job, Row
from megasora.planner.memory import memory
from megasora.planner.search import POLICIES

CONFIG = load_config(None, ["--model.width=64", "--model.ffn=256", "--model.depth=4", "--model.heads=4"])
JOB = Job(
    model=CONFIG.model, layout=parse_layout("dp1"), row=Row((((4, 8, 8), 16),), 256), rows=1, precision="fp32", kernels=False
)  # fmt: skip


def test_as_little_as_fits() -> None:
    needs = [needed(replace(JOB, recompute=recompute, every=every)) for recompute, every in POLICIES]
    assert all(more > less for more, less in pairwise(needs) if more != needs[1])  # dearer to compute, smaller
    for number, need in enumerate(needs):
        first = next(i for i, other in enumerate(needs) if other <= need)
        assert cheapest([JOB], need, CONFIG) == POLICIES[first]
        assert first == number or number == 2  # one block in four may need more than selective
    assert cheapest([JOB], float("inf"), CONFIG) == ("none", 1)
    other = replace(CONFIG, engine="deepspeed")  # refuses selective under zero3
    of_three = replace(JOB, layout=parse_layout("dp2,zero3"))
    room = needed(replace(of_three, recompute="selective"))
    assert cheapest([of_three], room, CONFIG) == ("selective", 1)
    assert cheapest([of_three], room, other)[0] == "full"


def test_the_dearest_of_several_stages_decides() -> None:
    larger = replace(JOB, row=Row((((8, 8, 8), 16),), 512))
    room = needed(JOB)
    assert cheapest([JOB], room, CONFIG) == ("none", 1)
    assert cheapest([JOB, larger], room, CONFIG) == cheapest([larger], room, CONFIG) != ("none", 1)


@pytest.mark.parametrize("layout", ["tp2", "tp2:nosp", "dp2,zero1", "dp2,zero3"])
def test_what_is_chosen_really_fits(layout: str) -> None:
    """Counted on a step of the engine, which knows nothing of the closed form. Average and batch are not counted there."""
    several = replace(JOB, layout=parse_layout(layout), row=Row((((8, 16, 8), 16),), 1024))
    found = {}
    for recompute, every in (POLICIES[0], *POLICIES[1::2], POLICIES[-1]):
        job = replace(several, recompute=recompute, every=every)
        counted, parts = dry_run(CONFIG, job).compared, memory(job).parts
        found[job.policy] = sum(counted[name][0] for name in ("weights", "optimizer", "peak of what comes and goes"))
        assert found[job.policy] <= needed(job) - parts["ema"] - parts["batch"] < 1.2 * found[job.policy]
    assert found["none"] > found["every2"] > found["full"]
    assert found["none"] > found["selective"] > found["full"]


def test_no_policy_fits() -> None:
    config = replace(CONFIG, parallel=ParallelConfig(recompute="auto", memory=0.001))
    with pytest.raises(
        ConfigError, match=r"^parallel.memory=0.001: dp1 needs .* nearest is parallel.memory=0.0\d"
    ) as refused:
        cheapest([JOB], 0.001 * GIB, config)
    nearest = float(str(refused.value).split("nearest is parallel.memory=")[1].split(",")[0])
    assert cheapest([JOB], nearest * GIB, config)


BENCH = [
    "bench", "--config", str(Path(__file__).parents[2] / "configs" / "demo.yaml"), "--data=synthetic", "--json",
    "--model.depth=8", "--model.width=64", "--model.ffn=256", "--bench.steps=1", "--bench.warmup=0",
    "--data.global_batch=2", "--parallel.layout=dp1",
]  # fmt: skip


def test_commands_choose_and_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BENCH, "--parallel.recompute=auto", "--parallel.memory=0.001"]) == 2
    refused = capsys.readouterr().err
    assert refused.count("megasora: ") == refused.splitlines()[-1].count("megasora: ") == 1
    nearest = refused.split("nearest is parallel.memory=")[1].split(",")[0]
    for overrides, said in (([f"--parallel.memory={nearest}"], "auto: full"), ([], "auto: none")):
        assert main([*BENCH, "--parallel.recompute=auto", *overrides]) == 0
        assert f"parallel.recompute={said}" in capsys.readouterr().err
    assert main([*BENCH, "--parallel.memory=1"]) == 2
    assert "goes with recompute=auto, not none" in capsys.readouterr().err
