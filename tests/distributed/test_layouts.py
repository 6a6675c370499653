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


def config_of(family: str) -> Config:
    model = [
        f"--model.{key}={json.dumps(value) if isinstance(value, list) else value}"
        for key, value in FAMILIES[family].items()
    ]
    return load_config(None, [*model, "--run.seed=3"])


def outcomes(cases: list[tuple[str, str]]) -> list[Outcome]:
    """Of (family, layout) pairs, in one set of processes."""
    found = []
    for family, layout in cases:
        world, rank = dist.get_world_size(), dist.get_rank()
        parsed = parse_layout(layout, world)
        shape = (parsed.pp, parsed.dp_replicate, parsed.dp_shard, parsed.cp, parsed.tp)
        mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=AXES)
        group = Processes(rank, world, torch.device("cpu"), parsed, mesh)
        found.append(run(config_of(family), group))
    return found


@pytest.fixture(scope="module")
def reference() -> dict[str, Outcome]:
    (found,) = run_distributed(outcomes, 1, [(family, "dp1") for family in FAMILIES])
    return dict(zip(FAMILIES, found, strict=True))


# (family, layout) by the number of processes; those of a number share their processes.
CASES = {
    2: [("video_dit", layout) for layout in ("dp2", "dp2,zero1", "dp2,zero2", "dp2,zero3", "cp2x1", "cp1x2", "dp1,cp2,zero3")]
    + [(family, layout) for family in ("video_dit", "stdit", "dit", "chunks") for layout in ("tp2", "pp2", "cp2x1")]
    + [(family, layout) for family in ("mmdit", "refiner") for layout in ("pp2", "cp2x1", "cp1x2")]
    + [("dit", "cp1x2"), ("video_dit", "tp2,dp1,zero1"), ("deep", "pp2:interleaved"), ("deep", "pp2:gpipe")],
    4: [("video_dit", layout) for layout in ("hsdp2x2", "cp2x2", "dp2,cp2,zero3", "tp4", "dp2,tp2,zero1", "dp1,tp2,cp1x2,zero3")]
    + [("deep", layout) for layout in ("pp4", "pp2:interleaved,dp2,zero2", "pp2,tp2", "pp2,dp2,zero3")]
    + [("mmdit", "cp2x2"), ("stdit", "tp2,cp2"), ("stdit", "pp2,cp2,dp1,zero1")],
}  # fmt: skip
MORE = {
    2: [("video_dit", "pp2:gpipe"), ("video_dit", "pp2,dp1,zero2"), ("stdit", "dp2,zero1"), ("dit", "dp2,zero1")],
    4: [("video_dit", layout) for layout in ("cp4", "dp2,cp1x2", "dp1,cp1x4,zero2", "dp2,tp2", "dp2,tp2,zero3", "tp2,cp2")]
    + [("video_dit", layout) for layout in ("hsdp2x2,zero1", "dp4,zero1", "dp2,cp2,zero1", "dp2,cp2,zero2", "pp2,dp2,zero1")]
    + [("deep", layout) for layout in ("pp4:gpipe", "pp2,cp2", "pp2:interleaved,tp2", "pp2,cp1x2", "pp2:interleaved,dp2,zero3")]
    + [("mmdit", "dp2,cp2,zero3"), ("mmdit", "pp2,cp2"), ("stdit", "cp4"), ("dit", "dp2,tp2,zero2"), ("dit", "pp2,tp2")],
    8: [("deep", layout) for layout in ("pp2,tp2,dp2", "dp2,cp2,tp2,zero3", "pp2:interleaved,tp2,cp2", "hsdp2x2,tp2")]
    + [("deep", "pp4,dp2,zero1"), ("stdit", "dp2,tp2,cp2,zero1"), ("mmdit", "pp2,cp2,dp2,zero2")],
}  # fmt: skip


def check(cases: list[tuple[str, str]], world: int, reference: dict[str, Outcome]) -> None:
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


def broken_norm(cases: list[tuple[str, str]]) -> list[Outcome]:
    """A seeded bug: the squares of a split norm are summed, their gradients are not."""
    with patch.object(AllReduce, "backward", staticmethod(lambda ctx, grad: (grad, None))):
        return outcomes(cases)


def broken_sum(cases: list[tuple[str, str]]) -> list[Outcome]:
    """A seeded bug: what is not split is not summed over the tensor group."""
    with patch.object(TorchNative, "_reduce", lambda engine: None):
        return outcomes(cases)


def broken_embedder(cases: list[tuple[str, str]]) -> list[Outcome]:
    """A seeded bug: what all stages of a pipeline share is not summed over them."""
    with patch("megasora.parallel.pipeline.shared_parameters", lambda model: {"time_embed.0.weight"}):
        return outcomes(cases)


def broken_count(cases: list[tuple[str, str]]) -> list[Outcome]:
    """A seeded bug: the norm has what all stages share once a stage."""
    counts = TorchNative._counts

    def every(engine: TorchNative, name: str) -> bool:
        return counts(engine, name) or name in engine.pipeline.stages.shared  # type: ignore[union-attr]

    with patch.object(TorchNative, "_counts", every):
        return outcomes(cases)


def broken_modulation(cases: list[tuple[str, str]]) -> list[Outcome]:
    """A seeded bug: one bias of what modulates is not summed over the tensor group."""
    plain = is_split

    def forgotten(parameter: torch.Tensor) -> bool:
        return plain(parameter) or parameter.shape == (6 * 48,)

    with patch("megasora.engines.torch_native.is_split", forgotten):
        return outcomes(cases)


@pytest.mark.parametrize(
    ("bug", "layout"),
    [(broken_norm, "tp2"), (broken_sum, "tp2"), (broken_modulation, "tp2"), (broken_embedder, "pp2"), (broken_count, "pp2")],
)  # fmt: skip
def test_a_missing_reduction_is_seen(bug: Any, layout: str, reference: dict[str, Outcome]) -> None:
    for (outcome,) in run_distributed(bug, 2, [("video_dit", layout)]):
        assert compare(reference["video_dit"], outcome).worst > 1e-3


def test_no_gradient_is_missing(reference: dict[str, Outcome]) -> None:
    for family, outcome in reference.items():
        missing = [name for name, gradient in outcome.gradients.items() if not gradient.norm() > 0]
        assert missing == [], family
