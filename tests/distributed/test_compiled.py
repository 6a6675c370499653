"""Compiled blocks compute what plain ones do, on every kind of layout, with few graphs for rows of all lengths.

Graphs are run by torch as they were taken (`aot_eager`), and by inductor in a long test."""

from dataclasses import replace
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from megasora.parallel.compiled import compile_blocks
from megasora.parallel.layout import parse_layout
from megasora.parallel.mesh import AXES, Processes
from megasora.parity import Outcome, compare, run
from tests.distributed.test_layouts import config_of, outcomes
from tests.harness import run_distributed


class Compiled(NamedTuple):
    outcome: Outcome
    graphs: int
    breaks: dict[str, int]  # why graphs were cut, and how often


def compiled(cases: list[tuple[str, str]], backend: str = "aot_eager") -> list[Compiled]:
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
        config = replace(config, parallel=replace(config.parallel, compile=True))
        with patch("megasora.engines.torch_native.compile_blocks", partial(compile_blocks, backend=backend)):
            outcome = run(config, group)
        found.append(Compiled(outcome, counters["stats"]["unique_graphs"], dict(counters["graph_break"])))
    return found


@pytest.fixture(scope="module")
def reference() -> dict[str, Outcome]:
    families = sorted({family for cases in CASES.values() for family, _ in cases})
    (found,) = run_distributed(outcomes, 1, [(family, "dp1") for family in families])
    return dict(zip(families, found, strict=True))


# Family, layout and after @ what blocks compute again -> graphs at most. The rows of `parity` have one to three samples, clips
# and pictures, given frames and none; MMDiT has two kinds of blocks, and rows of one sample need no order.
CASES: dict[int, dict[tuple[str, str], int]] = {
    1: {("video_dit", "dp1"): 1, ("video_dit", "dp1@selective"): 1, ("mmdit", "dp1@full"): 4, ("stdit", "dp1"): 1,
        ("dit", "dp1"): 1, ("chunks", "dp1"): 1},
}  # fmt: skip


@pytest.mark.parametrize("world", CASES)
def test_compiled_blocks_compute_the_same_with_few_graphs(world: int, reference: dict[str, Outcome]) -> None:
    cases = CASES[world]
    for found in run_distributed(compiled, world, list(cases), timeout=280):
        for ((family, layout), most), each in zip(cases.items(), found, strict=True):
            difference = compare(reference[family], each.outcome)
            assert difference.worst <= 1e-5, f"{family} on {layout}: {difference}"
            assert each.breaks == {}, (family, layout)
            assert each.graphs <= most, (family, layout)
