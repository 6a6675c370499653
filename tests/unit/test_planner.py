"""The planner against this project itself: what blocks keep, what a rank has, what the command says."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megasora.cli import main
from megasora.models.families import PRESETS, build_model, chunk_of, parameter_count
from megasora.models.packing import Item, pack
from megasora.parallel.layout import parse_layout
from megasora.planner.blocks import block_kinds, run_tape
from megasora.planner.job import Job, Row
from megasora.planner.memory import memory
from megasora.planner.parameters import model_parameters
from megasora.planner.stages import stages
from tests.distributed.test_layouts import config_of

SHAPE, TEXT = (3, 4, 6), 13


def bytes_kept(family: str, precision: str, samples: int) -> dict[int, int]:
    """Bytes that autograd really keeps of each block of one row, weights excepted but for the copies that autocast makes."""
    model = build_model(config_of(family).model)
    model.init_weights()
    config = model.config
    tokens = SHAPE[0] * SHAPE[1] * SHAPE[2]
    timesteps = torch.tensor([0.3, 0.5, 0.7]) if chunk_of(config) else torch.full((3,), 0.5)
    items = [
        Item(torch.randn(tokens, config.patch_values), SHAPE, timesteps, torch.randn(TEXT, config.text_width),
             torch.randn(config.pooled_width), label=1 if config.classes else -1)
        for _ in range(samples)
    ]  # fmt: skip
    seen = {p.untyped_storage().data_ptr(): (None, 0, p.untyped_storage()) for p in model.parameters()}
    here: list[int | None] = [None]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen.setdefault(storage.data_ptr(), (here[0], storage.nbytes(), storage))
        return tensor

    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, number=number: here.__setitem__(0, number))
        block.register_forward_hook(lambda *_: here.__setitem__(0, None))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        model(pack(items))
    found: dict[int, int] = {}
    for number, size, _ in seen.values():
        if number is not None:
            found[number] = found.get(number, 0) + size
    return found


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["video_dit", "chunks", "mmdit", "stdit", "dit"])
def test_what_a_block_keeps(family: str, precision: Any, samples: int) -> None:
    """Within 3 %: tables of modulation, a few numbers a run, are left out."""
    config = config_of(family).model
    text = TEXT if config.text_width else 0
    row = Row(((SHAPE, text),) * samples, 72 * samples)
    job = Job(model=config, layout=parse_layout("dp1"), row=row, rows=1, precision=precision, kernels=False)
    kinds = [tape for block, count in block_kinds(config) for tape in [run_tape(block, config, job.place())] * count]
    for number, size in bytes_kept(family, precision, samples).items():
        assert kinds[number].saved + kinds[number].cast_weights == pytest.approx(size, rel=0.03), number


def test_parameters_are_the_models_own() -> None:
    for name in ("Wan2.1-14B", "Open-Sora-2.0", "STDiT3-XL/2"):
        assert sum(p.count for p in model_parameters(PRESETS[name])) == parameter_count(PRESETS[name])


def test_stages_have_every_parameter_and_share_the_conditions() -> None:
    model = PRESETS["Wan2.1-1.3B"]
    job = Job(model=model, layout=parse_layout("pp4:interleaved,tp2"), row=Row((), 128), rows=8)
    every = {p.name: sum(p in stage.parameters(model) for stage in stages(job)) for p in model_parameters(model)}
    assert {count for name, count in every.items() if name.startswith("blocks.")} == {1}
    assert {every["patch_embed.weight"], every["head.out.weight"]} == {1}
    assert every["time_embed.0.weight"] == 4


def test_more_of_everything_needs_more() -> None:
    """A seeded error in a part's sign or divisor shows as a wrong order."""
    model = PRESETS["Wan2.1-1.3B"]

    def needs(layout: str, tokens: int = 8192, rows: int = 1, **more: Any) -> float:
        row = Row((((tokens // 256, 16, 16), 128),), tokens)
        return memory(Job(model=model, layout=parse_layout(layout), row=row, rows=rows, **more)).total

    assert needs("dp8,zero3") < needs("dp8,zero2") < needs("dp8")
    assert needs("dp8,zero1") < needs("dp8")
    assert needs("tp4") < needs("tp2") < needs("dp1")
    assert needs("cp4") < needs("cp2") < needs("dp1")
    assert needs("dp1", tokens=16384) > 1.4 * needs("dp1")
    assert needs("dp1", recompute="full") < needs("dp1", recompute="full", every=2) < needs("dp1")
    assert needs("dp8,zero2") < needs("dp8,zero2", rows=2)  # gradients stay whole until the last row


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


CONFIG = str(Path(__file__).parents[2] / "configs" / "wan-1.3b.yaml")


def test_command_says_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(
        capsys,
        "--config",
        CONFIG,
        "--world",
        "8",
        "--parallel.layout=tp4,dp2,zero3",
        "--parallel.recompute=full",
        "--json",
    )
    found = json.loads(out)
    assert (code, found["fits"], found["world"]) == (0, True, 8)
    assert 0 < found["mfu"] < 1
    assert found["memory_bytes"] == pytest.approx(sum(found["memory_by_part"].values()))
    assert found["step_time_s"] == pytest.approx(sum(found["step_time_by_part"].values()))


def test_command_refuses_with_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = plan(capsys, "--config", CONFIG, "--world", "8", "--parallel.layout=dp8,zero0")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "parallel.layout=dp8" in err
    layout, _, recompute = err.strip().rpartition("nearest that fits is ")[2].partition(" parallel.recompute=")
    again = [f"--parallel.recompute={recompute}"] if recompute else []
    code, _, err = plan(capsys, "--config", CONFIG, "--world", "8", f"--parallel.layout={layout}", *again)
    assert code == 0, err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--world", "0"],
        ["--gpu", "h101"],
        ["--stage", "nope"],
        ["--parallel.recompute=some"],
        ["--world", "3", "--parallel.layout=dp2"],
    ],
)
def test_command_refuses_nonsense_in_a_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = plan(capsys, "--config", CONFIG, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_dry_run_agrees_and_sees_a_missing_collective(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    small = ["--model.preset=MegaSora-10M", "--model.depth=2", "--text-tokens=16", "--dry-run", "--json"]
    arguments = ["--config", CONFIG, *small, "--world", "64", "--parallel.layout=dp16,cp2x2,zero3", "--rank", "37"]
    code, out, err = plan(capsys, *arguments)
    assert (code, json.loads(out)["differences"]) == (0, []), err
    monkeypatch.setattr("megasora.planner.dry_run.communication", lambda *_: [])
    code, _, err = plan(capsys, *arguments)
    assert (code, "all_to_all over ranks" in err) == (1, True)


# Ranks in the middle and at the end, every kind of sharding; the weights that such a rank has less of, or none.
HUGE = [
    ("Wan2.1-14B", 1024, "dp64,cp1x2,tp8,zero3", 517),
    ("Wan2.1-14B", 8192, "dp512,cp1x2,tp8,zero1", 8191),
    ("MegaSora-30B", 1024, "dp64,tp8,pp2,zero1", 1023),
    ("MegaSora-30B", 8192, "hsdp128x8,tp8,zero3", 4099),
]


def dry_run_of(
    capsys: pytest.CaptureFixture[str], preset: str, world: int, layout: str, rank: int, *more: str
) -> dict[str, Any]:
    code, out, err = plan(
        capsys, "--config", CONFIG, f"--model.preset={preset}", "--world", str(world), f"--parallel.layout={layout}",
        "--parallel.recompute=full", f"--data.global_batch={world}", "--dry-run", "--rank", str(rank), "--json", *more,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(out)
    assert (code, found["differences"]) == (0, []), err
    return found


@pytest.mark.parametrize(("preset", "world", "layout", "rank"), HUGE[::2])
def test_dry_run_of_a_few_blocks_among_thousands(
    preset: str, world: int, layout: str, rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run_of(capsys, preset, world, layout, rank, "--model.depth=2", "--rows=2")


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("preset", "world", "layout", "rank"), HUGE)
def test_dry_run_among_thousands_takes_less_than_a_minute(
    preset: str, world: int, layout: str, rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = time.process_time()
    found = dry_run_of(capsys, preset, world, layout, rank)
    seconds = time.process_time() - begin
    with capsys.disabled():
        print(f"{preset} {world} {layout}: {seconds:.1f} s, {len(found['compared'])} figures as planned")
    assert seconds < 60
