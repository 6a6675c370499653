"""The ladder: every layout against one process, for every family; each parameter's gradient, the norm, three steps of SGD."""

import json
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megasora.config import load_config
from megasora.engines.torch_native import TorchNative
from megasora.parallel.layout import parse_layout
from megasora.parallel.mesh import AXES, Processes
from megasora.parallel.tensor import AllReduce, is_split
from megasora.parity import Outcome, compare, run
from megasora.schema import Config
from tests.harness import run_distributed

FAMILIES: dict[str, dict[str, Any]] = {
    "video_dit": {"width": 48, "depth": 2, "heads": 4, "ffn": 96, "text_width": 24, "channels": 4},
    "deep": {"width": 48, "depth": 4, "heads": 4, "ffn": 96, "text_width": 24, "channels": 4},
    "mmdit": {"family": "mmdit", "width": 48, "depth": 1, "single_depth": 1, "heads": 4, "ffn": 96, "text_width": 24,
              "pooled_width": 8, "channels": 4, "axes": [4, 4, 4]},
    "refiner": {"family": "mmdit", "width": 48, "depth": 1, "single_depth": 1, "heads": 4, "ffn": 96, "text_width": 24,
                "pooled_width": 8, "channels": 4, "axes": [4, 4, 4], "text": "refiner", "refiner_depth": 1},
    "stdit": {"family": "stdit", "width": 48, "depth": 2, "heads": 4, "ffn": 96, "text_width": 24, "channels": 4},
    "dit": {"family": "dit", "width": 48, "depth": 2, "heads": 4, "ffn": 96, "classes": 5, "channels": 4},
    "chunks": {"width": 48, "depth": 2, "heads": 4, "ffn": 96, "text_width": 24, "channels": 4,
               "temporal": "chunk_causal", "chunk": 1, "window": 2},
}  # fmt: skip


def config_of(family: str, recompute: str = "none", precision: str = "fp32") -> Config:
    model = [
        f"--model.{key}={json.dumps(value) if isinstance(value, list) else value}"
        for key, value in FAMILIES[family].items()
    ]
    return load_config(
        None, [*model, "--run.seed=3", f"--parallel.recompute={recompute}", f"--precision.precision={precision}"]
    )


def outcomes(cases: list[tuple[str, str]], precision: str = "fp32") -> list[Outcome]:
    """Of (family, layout) pairs, in one set of processes."""
    found = []
    for family, layout in cases:
        world, rank = dist.get_world_size(), dist.get_rank()
        layout, _, recompute = layout.partition("@")
        parsed = parse_layout(layout, world)
        shape = (parsed.pp, parsed.dp_replicate, parsed.dp_shard, parsed.cp, parsed.tp)
        mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=AXES)
        group = Processes(rank, world, torch.device("cpu"), parsed, mesh)
        found.append(run(config_of(family, recompute or "none", precision), group))
    return found


@pytest.fixture(scope="module")
def reference() -> dict[str, Outcome]:
    (found,) = run_distributed(outcomes, 1, [(family, "dp1") for family in FAMILIES])
    return dict(zip(FAMILIES, found, strict=True))


# By the number of processes, family: layouts, and after @ what blocks recompute. Those of a number share their processes.
CASES = {
    2: {
        "video_dit": "dp2 dp2,zero1 dp2,zero2 dp2,zero3@full cp2x1@full cp1x2@selective dp1,cp2,zero3 cp2:dynamic"
        " tp2 tp2@selective tp2:nosp pp2@full tp2,dp1,zero1",
        "stdit": "tp2@full pp2 cp2x1", "dit": "tp2 pp2@every2 cp1x2", "chunks": "tp2 pp2 cp2x1",
        "mmdit": "tp2 pp2 cp1x2", "refiner": "tp2 pp2 cp2x1 tp2:nosp", "deep": "pp2:interleaved pp2:gpipe",
    },
    4: {
        "video_dit": "hsdp2x2 cp2x2 dp2,cp2,zero3 tp4 dp2,tp2,zero1 tp2,cp2 dp1,tp2,cp1x2,zero3 cp2x2:dynamic",
        "deep": "pp4 pp2:interleaved,dp2,zero2 pp2,tp2 pp2,dp2,zero3",
        "mmdit": "tp2,cp2@selective dp1,cp4:dynamic,zero3", "refiner": "tp4", "stdit": "tp2,cp2 pp2,cp2,dp1,zero1",
    },
    8: {"deep": "pp2,tp2,dp2@full dp2,cp2,tp2,zero3@selective"},
}  # fmt: skip
MORE = {
    2: {"video_dit": "pp2:gpipe pp2,dp1,zero2", "stdit": "dp2,zero1 tp2:nosp", "dit": "dp2,zero1 tp2:nosp",
        "mmdit": "tp2:nosp cp2x1", "chunks": "tp2:nosp", "refiner": "cp1x2"},
    4: {
        "video_dit": "cp4 dp2,cp1x2 dp1,cp1x4,zero2 dp2,tp2 dp2,tp2,zero3 hsdp2x2,zero1 dp4,zero1 dp2,cp2,zero1 dp2,cp2,zero2"
        " pp2,dp2,zero1 dp2,tp2:nosp,zero3 tp2:nosp,cp2 pp2,tp2:nosp",
        "deep": "pp4:gpipe pp2,cp2 pp2:interleaved,tp2 pp2,cp1x2 pp2:interleaved,dp2,zero3",
        "mmdit": "cp2x2 dp2,cp2,zero3 pp2,cp2 tp4 tp2,cp1x2 dp2,tp2,zero3 pp2,tp2 tp2:nosp,cp1x2 dp2,tp2:nosp",
        "refiner": "tp2,cp2 tp2,cp1x2 dp2,tp2,zero3", "stdit": "cp4 tp4:nosp", "dit": "dp2,tp2,zero2 pp2,tp2",
    },
    8: {
        "deep": "pp2:interleaved,tp2,cp2 hsdp2x2,tp2 pp4,dp2,zero1", "video_dit": "dp2,cp4:dynamic,zero2",
        "dit": "tp2,cp1x4:dynamic", "stdit": "dp2,tp2,cp2,zero1", "mmdit": "pp2,cp2,dp2,zero2",
    },
}  # fmt: skip


def check(layouts: dict[str, str], world: int, reference: dict[str, Outcome]) -> None:
    cases = [(family, layout) for family, several in layouts.items() for layout in several.split()]
    for rank, found in enumerate(run_distributed(outcomes, world, cases, timeout=600)):
        for (family, layout), outcome in zip(cases, found, strict=True):
            difference = compare(reference[family], outcome)
            assert difference.worst <= 1e-5, f"{family} on {layout}, rank {rank}: {difference}"


@pytest.mark.parametrize("world", CASES)
def test_every_layout_computes_what_one_process_does(world: int, reference: dict[str, Outcome]) -> None:
    check(CASES[world], world, reference)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", MORE)
def test_more_layouts(world: int, reference: dict[str, Outcome]) -> None:
    check(MORE[world], world, reference)


def test_bf16_is_the_same_on_every_layout() -> None:
    """As near as its rounding lets it be: products of other sizes, sums in another order."""
    cases = [("video_dit", layout) for layout in ("pp2", "tp2", "cp1x2", "dp2,zero3")] + [("mmdit", "pp2@selective")]
    (alone,) = run_distributed(outcomes, 1, [("video_dit", "dp1"), ("mmdit", "dp1")], "bf16")
    for found in run_distributed(outcomes, 2, cases, "bf16"):
        for (family, layout), outcome in zip(cases, found, strict=True):
            difference = compare(alone[family == "mmdit"], outcome)
            assert difference.worst < 0.1, (family, layout, difference)


def forgotten_bias() -> Any:
    """One bias of what modulates is taken for split, so it is not summed over the tensor group."""
    return patch("megasora.engines.torch_native.is_split", lambda p: is_split(p) or p.shape == (6 * 48,))


def forgotten_backward_sum() -> Any:
    """The squares of a split norm are summed, their gradients are not."""
    return patch.object(AllReduce, "backward", staticmethod(lambda ctx, grad: (grad, None)))


def forgotten_embedder() -> Any:
    """Of what all stages of a pipeline share, one weight alone is summed over them."""
    return patch("megasora.parallel.pipeline.shared_parameters", lambda model: {"time_embed.0.weight"})


def norm_once_a_stage() -> Any:
    """The norm has what all stages share once a stage."""
    plain = TorchNative._counts
    return patch.object(
        TorchNative, "_counts", lambda engine, name: plain(engine, name) or name in engine.pipeline.stages.shared
    )


def forgotten_qk_norm() -> Any:
    """The weight of one kind of QK-norm, which sees its rank's heads alone, is taken for split."""
    return patch("megasora.engines.torch_native.is_split", lambda p: is_split(p) or p.shape == (48 // 4,))


def nothing_summed() -> Any:
    """What is not split is not summed over the tensor group."""
    return patch.object(TorchNative, "_reduce", lambda engine: None)


BUGS = {
    forgotten_bias: ("video_dit", "tp2"), forgotten_backward_sum: ("video_dit", "tp2"), nothing_summed: ("dit", "tp2"),
    forgotten_qk_norm: ("stdit", "tp2"), forgotten_embedder: ("video_dit", "pp2"), norm_once_a_stage: ("video_dit", "pp2"),
}  # fmt: skip


def with_bugs() -> list[Outcome]:
    found = []
    for bug, case in BUGS.items():
        with bug():
            found += outcomes([case])
    return found


def test_a_missing_reduction_is_seen(reference: dict[str, Outcome]) -> None:
    for found in run_distributed(with_bugs, 2):
        for (bug, (family, _)), outcome in zip(BUGS.items(), found, strict=True):
            assert compare(reference[family], outcome).worst > 1e-3, bug.__name__


def test_no_gradient_is_missing(reference: dict[str, Outcome]) -> None:
    for family, outcome in reference.items():
        missing = [name for name, gradient in outcome.gradients.items() if not gradient.norm() > 0]
        assert missing == [], family
