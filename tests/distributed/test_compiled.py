"""Compiled blocks compute what plain ones do, on every kind of layout, with few graphs for rows of all lengths.

Graphs are run by torch as they were taken (`aot_eager`), and by inductor in a long test."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from megasora.engines.torch_native import EngineConfig
from megasora.parallel.compiled import compile_blocks
from megasora.parallel.layout import parse_layout
from megasora.parallel.mesh import AXES, Processes
from megasora.parity import Outcome, compare, run
from tests.distributed.test_layouts import config_of, outcomes
from tests.harness import run_distributed

FP32 = EngineConfig()


class Compiled(NamedTuple):
    outcome: Outcome
    graphs: int
    breaks: dict[str, int]  # why graphs were cut, and how often


def compiled(
    cases: list[tuple[str, str]], backend: str = "aot_eager", precision: EngineConfig = FP32
) -> list[Compiled]:
    """Of (family, layout@recompute) pairs, as `outcomes` has them."""
    found = []
    for family, layout in cases:
        torch._dynamo.reset()
        counters.clear()
        world, rank = dist.get_world_size(), dist.get_rank()
        layout, _, recompute = layout.partition("@")
        parsed = parse_layout(layout, world)
        shape = (parsed.pp, parsed.dp_replicate, parsed.dp_shard, parsed.cp, parsed.tp)
        mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=AXES)
        group = Processes(rank, world, torch.device("cpu"), parsed, mesh)
        config = config_of(family, recompute or "none")
        config = replace(config, precision=precision, parallel=replace(config.parallel, compile=True))
        with patch("megasora.engines.torch_native.compile_blocks", partial(compile_blocks, backend=backend)):
            outcome = run(config, group)
        found.append(Compiled(outcome, counters["stats"]["unique_graphs"], dict(counters["graph_break"])))
    return found


@pytest.fixture(scope="module")
def reference() -> dict[str, Outcome]:
    families = ("video_dit", "deep", "mmdit", "refiner", "stdit", "dit", "chunks")
    (found,) = run_distributed(outcomes, 1, [(family, "dp1") for family in families])
    return dict(zip(families, found, strict=True))


# By processes: family, layout and after @ what blocks compute again -> graphs at most. The rows of `parity` have one to three
# samples, clips and pictures, given frames and none. MMDiT has two kinds of blocks, each of which has another graph for rows of
# one sample, which need no order; every2 makes two kinds of any; a pool's rows of one rank are no exchange.
Cases = dict[tuple[str, str], int]
CASES: dict[int, Cases] = {
    1: {("video_dit", "dp1@selective"): 1, ("mmdit", "dp1"): 4},
    2: {("video_dit", "dp2,zero3@full"): 1, ("video_dit", "tp2"): 1},
}
MORE: dict[int, Cases] = {
    1: {("stdit", "dp1"): 1, ("dit", "dp1"): 1, ("chunks", "dp1@full"): 1, ("refiner", "dp1@selective"): 4,
        ("video_dit", "dp1@every2"): 2},
    2: {("video_dit", "dp2"): 1, ("video_dit", "cp2x1"): 1, ("video_dit", "tp2@selective"): 1,
        ("video_dit", "cp1x2@full"): 1,
        ("video_dit", "cp2:dynamic"): 2, ("video_dit", "tp2:nosp"): 1, ("mmdit", "tp2@full"): 4, ("stdit", "tp2@full"): 1,
        ("stdit", "cp2x1"): 1, ("chunks", "cp2x1"): 1, ("refiner", "cp2x1"): 4, ("dit", "dp2,zero1"): 1,
        ("deep", "pp2:interleaved"): 1},
    4: {("video_dit", "tp2,cp2"): 1, ("video_dit", "dp2,tp2,zero3@selective"): 1, ("mmdit", "tp2,cp2@selective"): 4,
        ("stdit", "tp2,cp2"): 1, ("video_dit", "dp1,tp2,cp1x2,zero3"): 1, ("deep", "pp2,tp2"): 1},
}  # fmt: skip


def check(cases: Cases, world: int, reference: dict[str, Outcome], backend: str = "aot_eager") -> None:
    for found in run_distributed(compiled, world, list(cases), backend, timeout=850):
        for ((family, layout), most), each in zip(cases.items(), found, strict=True):
            difference = compare(reference[family], each.outcome)
            assert difference.worst <= 1e-5, f"{family} on {layout}: {difference}"
            assert each.breaks == {}, (family, layout)
            assert 0 < each.graphs <= most, (family, layout, each.graphs)


@pytest.mark.parametrize("world", CASES)
def test_compiled_blocks_compute_the_same_with_few_graphs(world: int, reference: dict[str, Outcome]) -> None:
    check(CASES[world], world, reference)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", MORE)
def test_more_layouts(world: int, reference: dict[str, Outcome]) -> None:
    check(MORE[world], world, reference)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world, layout", [(1, "dp1@selective"), (2, "dp2,zero3@full")])
def test_inductors_code_computes_the_same(world: int, layout: str, reference: dict[str, Outcome]) -> None:
    check({("video_dit", layout): 1}, world, reference, "inductor")


def in_fp8(world: int) -> list[tuple[str, Outcome, Compiled]]:
    """Plain and compiled blocks, by recipe."""
    found = []
    for recipe, gather in (("tensor", world > 1), ("row", False), ("block", False)):
        precision = EngineConfig(precision="bf16", fp8=recipe, fp8_gather=gather)
        layout = "dp2,zero3" if world > 1 else "dp1@selective"
        with patch("megasora.engines.torch_native.compile_blocks"):
            ((plain, *_),) = compiled([("video_dit", layout)], precision=precision)
        found += [(recipe, plain, each) for each in compiled([("video_dit", layout)], precision=precision)]
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_compiled_blocks_in_fp8(world: int) -> None:
    for found in run_distributed(in_fp8, world, world):
        for recipe, plain, each in found:
            difference = compare(plain, each.outcome)
            assert difference.worst <= 1e-5, f"{recipe}: {difference}"
            assert each.breaks == {}, recipe
            assert 0 < each.graphs <= 2, (recipe, each.graphs)


def lengths_in_the_graph() -> Any:
    """Attention as it is, which looks at lengths."""
    return patch("megasora.engines.torch_native.as_operator", lambda attention: attention)


def with_lengths_in_the_graph() -> list[Compiled]:
    with lengths_in_the_graph():
        return compiled([("video_dit", "dp1")])


@pytest.mark.long
def test_a_graph_for_every_row_is_seen() -> None:
    ((found,),) = run_distributed(with_lengths_in_the_graph, 1)
    assert found.graphs > 1
