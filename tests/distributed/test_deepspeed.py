"""The second engine against one process of the first: each parameter's gradient, the norm, three clipped steps of SGD."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megasora.engines import deepspeed_config
from megasora.engines.deepspeed_config import DeepSpeedConfig
from megasora.parallel.layout import parse_layout
from megasora.parallel.mesh import AXES, Processes
from megasora.parity import Outcome, compare, run
from tests.distributed.test_layouts import FAMILIES, config_of
from tests.harness import forget_groups, run_distributed
from tests.megatron_cpu import megatron_on_cpu

pytest.importorskip("deepspeed", reason="pip install -c constraints.txt 'megasora[deepspeed]'")
pytest.importorskip("megatron.core", reason="pip install -c constraints.txt 'megasora[deepspeed]'")

CLIP = 0.05  # about a sixth of the gradients' norm


def outcome(json_file: str, engine: str, family: str, layout: str, precision: str = "fp32") -> Outcome:
    """`layout` may end with @ and what blocks recompute, or + and what is offloaded."""
    world, rank = dist.get_world_size(), dist.get_rank()
    layout, _, offload = layout.partition("+")
    layout, _, recompute = layout.partition("@")
    parsed = parse_layout(layout, world)
    shape = (parsed.pp, parsed.dp_replicate, parsed.dp_shard, parsed.cp, parsed.tp)
    mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=AXES)
    group = Processes(rank, world, torch.device("cpu"), parsed, mesh)
    config = config_of(family, recompute or "none", precision)
    section = DeepSpeedConfig(json=json_file, offload=offload or "none")  # type: ignore[arg-type]
    config = replace(config, engine=engine, optim=replace(config.optim, clip=CLIP), deepspeed=section)
    with megatron_on_cpu():
        found = run(config, group)
    forget_groups()
    return found


def outcomes(json_file: str, cases: list[tuple[str, ...]]) -> list[Outcome]:
    """Of (engine, family, layout, precision), in one set of processes."""
    return [outcome(json_file, *case) for case in cases]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A DeepSpeed JSON by which ZeRO-3 shares out small parameters too: by default it leaves those of a tiny model whole."""
    file: Path = tmp_path_factory.mktemp("deepspeed") / "small.json"
    file.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    return str(file)


@pytest.fixture(scope="module")
def reference(small: str) -> Callable[[str, str], Outcome]:
    """What one process of the default engine computes, by family and precision."""
    found: dict[tuple[str, str], Outcome] = {}

    def of(family: str, precision: str) -> Outcome:
        if (family, precision) not in found:
            case = ("torch_native", family, "dp1", precision)
            ((found[family, precision],),) = run_distributed(outcomes, 1, small, [case])
        return found[family, precision]

    return of


# By the number of processes, family: layouts.
CASES = {
    2: {"video_dit": "dp2,zero1 dp2,zero2 dp2,zero3@full dp1,cp1x2,zero2 tp2 tp2:nosp,dp1,zero1"},
}  # fmt: skip
MORE = {
    2: {
        "video_dit": "dp2 dp2@every2 dp2,zero1+optimizer dp2,zero2+optimizer dp2,zero3+all cp2x1 cp2:dynamic dp1,cp2x1,zero3"
        " tp2:nosp tp2@full tp2,dp1,zero2 tp2,dp1,zero3 tp2,dp1,zero2+optimizer tp2:nosp,dp1,zero3",
        "mmdit": "tp2 tp2:nosp dp2,zero3", "stdit": "tp2:nosp tp2,dp1,zero3", "dit": "tp2,dp1,zero1 tp2:nosp",
        "refiner": "tp2,dp1,zero3 tp2:nosp", "chunks": "tp2:nosp dp2,zero3",
    },
    4: {
        "video_dit": "dp2,tp2,zero1 dp2,tp2,zero2 dp2,tp2,zero3 dp2,tp2:nosp,zero1 dp2,tp2:nosp,zero2 dp2,tp2:nosp,zero3 dp2,tp2"
        " tp4 dp4,zero3 dp2,cp2,zero1 dp1,tp2,cp2,zero3 dp2,tp2,zero3@full",
        "mmdit": "dp2,tp2,zero3 tp2,cp1x2,dp1,zero1", "stdit": "dp2,tp2:nosp,zero2", "refiner": "dp2,tp2,zero1",
    },
}  # fmt: skip


def check(
    layouts: dict[str, str],
    world: int,
    small: str,
    reference: Callable[[str, str], Outcome],
    precision: str,
    most: float,
) -> None:
    cases = [
        ("deepspeed", family, layout, precision) for family, several in layouts.items() for layout in several.split()
    ]
    for rank, found in enumerate(run_distributed(outcomes, world, small, cases, timeout=1500)):
        for (_, family, layout, _), computed in zip(cases, found, strict=True):
            difference = compare(reference(family, precision), computed)
            assert difference.worst <= most, f"{family} on {layout}, rank {rank}: {difference}"


def test_one_of_each_computes_what_one_process_does(small: str, reference: Callable[[str, str], Outcome]) -> None:
    assert reference("video_dit", "fp32").norm > 2 * CLIP  # so that clipping is seen
    for world, layouts in CASES.items():
        check(layouts, world, small, reference, "fp32", 1e-5)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", MORE)
def test_more_layouts(world: int, small: str, reference: Callable[[str, str], Outcome]) -> None:
    check(MORE[world], world, small, reference, "fp32", 1e-5)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_bf16_is_as_near_as_its_rounding(small: str, reference: Callable[[str, str], Outcome]) -> None:
    layouts = {"video_dit": "dp2,zero1 dp2,zero2 dp2,zero3 tp2,dp1,zero1 tp2:nosp,dp1,zero2 dp1,cp1x2,zero3"}
    check(layouts, 2, small, reference, "bf16", 0.1)


def unmarked() -> AbstractContextManager[Any]:
    """Split parameters are not marked, and nobody looks: the norm has one rank's share of them."""
    return patch.multiple("megasora.engines.megatron_layers", mark_splits=lambda *_: None, check_marks=lambda *_: None)


def not_summed() -> AbstractContextManager[Any]:
    """What is not split is not summed over the tensor group."""
    return patch("megasora.engines.deepspeed_zero.all_reduce_together", lambda *_: None)


def unclipped() -> AbstractContextManager[Any]:
    """DeepSpeed is not told to clip."""
    plain = deepspeed_config.build_json
    return patch("megasora.engines.deepspeed_zero.build_json", lambda *args: plain(*args) | {"gradient_clipping": 0.0})


BUGS = [
    (unmarked, "video_dit", "tp2,dp1,zero1"), (not_summed, "video_dit", "tp2,dp1,zero2"), (not_summed, "stdit", "tp2:nosp"),
    (unclipped, "video_dit", "dp2,zero2"),
]  # fmt: skip


def with_bugs(json_file: str) -> list[Outcome]:
    found = []
    for bug, family, layout in BUGS:
        with bug():
            found.append(outcome(json_file, "deepspeed", family, layout))
    return found


@pytest.mark.long
def test_a_seeded_bug_is_seen(small: str, reference: Callable[[str, str], Outcome]) -> None:
    for found in run_distributed(with_bugs, 2, small, timeout=300):
        for (bug, family, layout), computed in zip(BUGS, found, strict=True):
            assert compare(reference(family, "fp32"), computed).worst > 1e-3, f"{bug.__name__} on {layout}"


def unmarked_and_looked_at() -> str:
    with patch("megasora.engines.megatron_layers.mark_splits", lambda *_: None), pytest.raises(RuntimeError) as caught:
        outcome("", "deepspeed", "video_dit", "tp2:nosp")
    return str(caught.value)


@pytest.mark.long
def test_a_split_parameter_without_its_mark_is_refused() -> None:
    for said in run_distributed(unmarked_and_looked_at, 2):
        assert "is split, but tensor_model_parallel=False" in said


def test_every_family_is_in_the_ladder() -> None:
    assert set(FAMILIES) - {"deep"} == set(MORE[2])
