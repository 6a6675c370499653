"""Videos made by several processes are those that one process makes, and so is the loss of an evaluation."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

from megasora.diffusion.objective import build_objective
from megasora.engines.optim import OptimConfig
from megasora.engines.torch_native import EngineConfig, TorchNative
from megasora.evaluation import sample_losses
from megasora.models.families import build_model
from megasora.models.text import Text
from megasora.parallel.layout import parse_layout
from megasora.parallel.mesh import AXES, Processes, on_main
from megasora.parallel.plan import PLANS
from megasora.parity import noisy, parity_row
from megasora.sampling import Generator, Prompt, turns
from megasora.schema import SampleConfig
from tests.distributed.test_layouts import config_of
from tests.harness import run_distributed

SHAPE = (4, 3, 6, 6)  # 27 patches, 9 a chunk: odd numbers, so that rows are padded


def differences(cases: list[tuple[str, str]]) -> list[float]:
    """The worst relative difference of videos, with guidance and without, and of losses, by layout."""
    found = []
    for family, layout in cases:
        config = config_of(family)
        parsed = parse_layout(layout, dist.get_world_size())
        shape = (parsed.pp, parsed.dp_replicate, parsed.dp_shard, parsed.cp, parsed.tp)
        mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=AXES)
        group = Processes(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), parsed, mesh)
        build = noisy(partial(build_model, config.model))
        engine = TorchNative(
            build, 5, group, config.parallel, EngineConfig(), OptimConfig(), PLANS.get(config.model.family, [])
        )
        torch.manual_seed(5)
        whole = build()
        whole.init_weights()
        objective = build_objective("flow", config.flow, config.gaussian)
        prompt = Prompt(text(1), text(2), seed=3, label=2 if family == "dit" else -1)
        worst = 0.0
        for guidance in (1.0, 3.0):
            settings = SampleConfig(steps=2, guidance=guidance)
            made = []
            for predict, multiple in ((whole, 1), (engine.predict, group.part(parsed.cp)[1])):
                one = Generator(predict, config.model, objective, "flow", settings, group.device, multiple=multiple)
                if family == "chunks":
                    made.append(torch.cat(list(one.rollout(SHAPE, prompt)), dim=1))
                else:
                    made.append(one.generate(SHAPE, prompt))
            worst = max(worst, relative(*made))
        with torch.no_grad():
            batch = parity_row(config, group, 0)
            losses = [sample_losses(predict, batch, objective) for predict in (whole, engine.predict)]
        found.append(max(worst, relative(*losses)))
    return found


def relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def text(seed: int) -> Text:
    random = torch.Generator().manual_seed(seed)
    return Text(torch.randn(2 + seed, 24, generator=random), torch.randn(8, generator=random))


CASES = {
    2: [("video_dit", layout) for layout in ("cp2:dynamic", "cp1x2", "tp2", "tp2:nosp", "pp2", "dp2,zero2")]
    + [(family, layout) for family in ("mmdit", "chunks") for layout in ("tp2", "cp2")] + [("stdit", "tp2")],
    4: [(family, "tp2,cp2") for family in ("refiner", "chunks", "stdit")]
    + [("video_dit", "tp2,cp1x2"), ("dit", "tp4"), ("mmdit", "pp2,tp2"), ("mmdit", "dp2,cp2,zero3")],
}  # fmt: skip


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
def test_several_processes_make_what_one_makes(world: int) -> None:
    for rank, found in enumerate(run_distributed(differences, world, CASES[world], timeout=500)):
        for case, difference in zip(CASES[world], found, strict=True):
            assert difference <= 1e-5, f"{case} on rank {rank}: {difference}"


def told(layouts: list[str]) -> list[tuple[dict[int, str], str]]:
    """Of each layout what every process tells the main one, as that has it, and by which backend it came."""
    found = []
    for layout in layouts:
        rank, parsed = dist.get_rank(), parse_layout(layout, dist.get_world_size())
        shape = (parsed.pp, parsed.dp_replicate, parsed.dp_shard, parsed.cp, parsed.tp)
        mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=AXES)
        group = Processes(rank, dist.get_world_size(), torch.device("cpu"), parsed, mesh)
        for number in (rank, 2 + rank):
            heard = on_main(group, {number: f"video {number}"})
            found.append((heard, dist.get_backend(group.speakers) if group.speaks else ""))
    return found


def test_videos_of_the_ranks_that_speak_reach_the_main_one_by_the_hosts() -> None:
    main, other = run_distributed(told, 2, ["dp2", "tp2"])
    videos = [{0: "video 0", 1: "video 1"}, {2: "video 2", 3: "video 3"}, {0: "video 0"}, {2: "video 2"}]
    assert main == [(seen, "gloo") for seen in videos]
    assert other == [({}, "gloo"), ({}, "gloo"), ({}, ""), ({}, "")]


@pytest.mark.parametrize(("count", "ranks"), [(1, 1), (5, 2), (6, 3), (2, 4)])
def test_every_video_is_made_once_and_ranks_make_equally_many(count: int, ranks: int) -> None:
    shares = [turns(count, index, ranks) for index in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for i in share if i < count) == list(range(count))
