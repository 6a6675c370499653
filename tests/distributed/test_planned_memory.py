"""The most that lives at once in a step of the real engine, on fake tensors, against the planner: layouts, families, policies."""

from typing import Any

import pytest

from megasora.config import load_config
from megasora.parallel.layout import parse_layout
from megasora.planner.dry_run import DryRun, dry_run
from megasora.planner.job import Job, Row

SHARED = ["--model.width=512", "--model.heads=8", "--model.ffn=2048", "--model.text_width=64"]
FAMILIES: dict[str, list[str]] = {
    "video_dit": ["--model.depth=8"],
    "mmdit": ["--model.family=mmdit", "--model.depth=3", "--model.single_depth=5", "--model.pooled_width=64",
              "--model.axes=[16,24,24]"],
    "stdit": ["--model.family=stdit", "--model.depth=12"],
}  # fmt: skip
LAYOUTS = [
    "dp1@none", "dp2,zero1@none", "dp4,zero2@none", "dp8,zero3@none", "hsdp2x2,zero3@full", "dp1,tp2@none",
    "tp4,dp2,zero1@selective", "dp1,cp2,zero1@none", "dp2,cp4,zero3@full", "pp2@none", "pp4:interleaved@every2",
    "pp2,tp2,dp2,zero1@none",
]  # fmt: skip


def step(family: str, layout: str) -> DryRun:
    layout, _, policy = layout.partition("@")
    config = load_config(None, [*SHARED, *FAMILIES[family]])
    recompute: Any = "full" if policy.startswith("every") else policy
    job = Job(model=config.model, layout=parse_layout(layout), row=Row((((4, 16, 32), 64),), 2048), rows=4, precision="bf16",
              optim=config.optim, recompute=recompute, every=2 if policy == "every2" else 1)  # fmt: skip
    return dry_run(config, job)


def off(found: DryRun) -> float:
    """Of all that lives: weights and the optimizer's state too."""
    state = found.compared["weights"][0] + found.compared["optimizer"][0]
    peak, planned = found.compared["peak of what comes and goes"]
    return (peak + state) / (planned + state) - 1


@pytest.mark.parametrize(("family", "layout"), [("video_dit", "dp8,zero3@none"), ("mmdit", "pp2,tp2,dp2,zero1@none")])
def test_a_step_keeps_what_is_planned(family: str, layout: str) -> None:
    found = step(family, layout)
    assert found.differences == []
    assert abs(off(found)) < 0.15


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_keeps_what_is_planned(family: str) -> None:
    worst = {}
    for layout in LAYOUTS:
        found = step(family, layout)
        peak, planned = found.compared["peak of what comes and goes"]
        print(f"{family:10} {layout:24} activations and the like {peak / planned - 1:+.1%}, all {off(found):+.1%}")
        worst[layout] = (abs(peak / planned - 1), [line for line in found.differences if not line.startswith("peak")])
    assert max(off for off, _ in worst.values()) < 0.15, worst
    assert not any(differences for _, differences in worst.values()), worst
