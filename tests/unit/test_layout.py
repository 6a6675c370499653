import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megasora.cli import main
from megasora.errors import ConfigError
from megasora.models.dit import DiTConfig
from megasora.models.mmdit import MMDiTConfig
from megasora.models.stdit import STDiTConfig
from megasora.models.video_dit import VideoDiTConfig
from megasora.models.vit import ViTConfig
from megasora.parallel.layout import parse_layout
from megasora.parallel.mesh import node_report
from megasora.parallel.plan import check_layout


@pytest.mark.parametrize(
    ("text", "world", "meaning", "written"),
    [
        ("auto", 1, (1, 1, 0), "dp1"),
        ("auto", 4, (1, 4, 2), "dp4,zero2"),
        ("dp2", 2, (2, 1, 0), "dp2"),
        ("zero0,dp2", 2, (2, 1, 0), "dp2"),
        ("zero3", 2, (1, 2, 3), "dp2,zero3"),
        ("dp4,zero2", 4, (1, 4, 2), "dp4,zero2"),
        ("hsdp2x2", 4, (2, 2, 3), "hsdp2x2,zero3"),
        ("zero2,hsdp2x4", 8, (2, 4, 2), "hsdp2x4,zero2"),
    ],
)
def test_layouts(text: str, world: int, meaning: tuple[int, int, int], written: str) -> None:
    layout = parse_layout(text, world)
    assert (layout.dp_replicate, layout.dp_shard, layout.zero) == meaning
    assert str(layout) == written
    assert parse_layout(written, world) == layout
    assert parse_layout(written) == layout


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("tp2", "dp1,tp2"),
        ("tp2:nosp,zero2", "dp2,tp2:nosp,zero2"),
        ("cp2", "dp1,cp2x1"),
        ("cp2x3,tp2,zero3,dp4", "dp4,cp2x3,tp2,zero3"),
        ("hsdp2x2,cp4", "hsdp2x2,cp4x1,zero3"),
    ],
)
def test_terms_in_any_order(text: str, written: str) -> None:
    assert str(parse_layout(text)) == written


MODEL = VideoDiTConfig(width=96, heads=12, ffn=200)


@pytest.mark.parametrize(
    ("model", "text", "said"),
    [
        (MODEL, "tp8", "12 heads do not divide by tp x Ulysses = 8; nearest is"),
        (MODEL, "cp5", "12 heads do not divide by tp x Ulysses = 5; nearest is dp5"),
        (replace(MODEL, ffn=202), "tp4", "ffn=202 does not divide by tp4; nearest is dp4"),
        (replace(MODEL, temporal="chunk_causal"), "cp2x2", "no ring; nearest is dp1,cp4x1"),
        (STDiTConfig(), "cp1x4,zero2,dp1", "no ring; nearest is dp1,cp4x1,zero2"),
        (MMDiTConfig(), "tp8", "4 heads do not divide by tp x Ulysses = 8; nearest is"),
        (ViTConfig(classes=3), "cp2", "model.family=vit keeps whole rows: no cp, no tp; nearest is dp2"),
        (DiTConfig(design="in_context"), "tp2", "model.design=in_context keeps whole rows: no cp, no tp; nearest is dp2"),
    ],
)  # fmt: skip
def test_layouts_that_a_model_cannot_be_spread_over(model: Any, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"parallel.layout=.*{said}"):
        check_layout(model, parse_layout(text))


@pytest.mark.parametrize(
    ("model", "text", "said"),
    [
        (MODEL, "tp4", "goes beyond nodes of 2 processes (parallel.across_nodes=true allows it); nearest is dp2,tp2"),
        (MODEL, "dp1,cp4,zero3", "nearest is dp1,cp2x2,zero3"),
        (MODEL, "tp2,cp2", "tp x Ulysses = 4 .* nearest is dp1,cp1x2,tp2"),
        (STDiTConfig(), "cp4", "nearest is dp2,cp2x1"),
        (MODEL, "cp1x4:dynamic", "tp x cp:dynamic = 4 .* nearest is dp1,cp1x4$"),
        (MODEL, "cp3,dp2", "tp x Ulysses = 3 .* nearest is dp2,cp1x3"),
    ],
)  # fmt: skip
def test_what_speaks_in_every_block_stays_in_a_node(model: Any, text: str, said: str) -> None:
    layout = parse_layout(text)
    with pytest.raises(
        ConfigError, match=f"^parallel.layout={layout}: .*{re.escape(said) if '(' in said else said}"
    ) as refused:
        check_layout(model, layout, node=2)
    check_layout(model, layout)
    nearest = parse_layout(str(refused.value).rpartition("nearest is ")[2])
    check_layout(model, nearest, node=2)
    assert nearest.world == layout.world


@pytest.mark.parametrize("text", ["tp2,dp4", "cp2x4", "tp2,cp1x4", "pp4,dp2,tp2", "hsdp2x4", "cp2:dynamic,dp2"])
def test_layouts_whose_groups_fit_a_node(text: str) -> None:
    check_layout(MODEL, parse_layout(text), node=2)


def test_ranks_and_their_nodes() -> None:
    layout = parse_layout("pp2,dp2,cp2x2,tp2,zero3")
    assert layout.world == 32
    nodes = {"a": list(range(8)), "b": list(range(8, 24)), "c": list(range(24, 32))}
    assert node_report(layout, nodes) == "ranks 0-7 -> a, 8-23 -> b, 24-31 -> c; between nodes: dp_shard, pp"
    turns = {"a": [0, 2], "b": [1, 3]}
    assert node_report(parse_layout("tp2,dp2"), turns) == "ranks 0 2 -> a, 1 3 -> b; between nodes: tp"
    assert node_report(parse_layout("tp2"), {"a": [0, 1]}) == "ranks 0-1 -> a; between nodes: nothing"


@pytest.mark.parametrize("text", ["tp2", "tp4,cp3", "cp12", "cp1x5", "dp3,zero3"])
def test_layouts_that_fit(text: str) -> None:
    check_layout(MODEL, parse_layout(text))


@pytest.mark.parametrize(
    ("text", "world"),
    [
        ("dp3", 2),
        ("dq2", 2),
        ("dp2,dp2", 4),
        ("dp2,hsdp1x2", 4),
        ("tp2,cp2", 2),
        ("pp2:zbv", 2),
    ],
)
def test_impossible_layouts_name_the_key_and_one_that_works(text: str, world: int) -> None:
    with pytest.raises(ConfigError, match=rf"parallel.layout={text}.*valid here: dp{world},zero2"):
        parse_layout(text, world)


def test_parity_may_be_asked_for_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tolerance of 0 is one, and not the default."""
    found = SimpleNamespace(worst=1e-9, where="head.weight", without=[])

    def start(args: Namespace, layout: str, file: Path, *overrides: str) -> None:
        file.touch()

    for name, stub in (("start", start), ("load", lambda file: None), ("compare", lambda reference, other: found)):
        monkeypatch.setattr(f"megasora.verbs.parity.{name}", stub)
    words = ["parity", "--config", str(Path(__file__).parents[2] / "configs/demo.yaml"), "--layout=dp2"]
    assert main(words) == 0
    assert main([*words, "--tolerance=0"]) == 1
    assert "head.weight is off by 1.00e-09, above 0e+00" in capsys.readouterr().err
