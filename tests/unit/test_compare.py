"""`megasora compare` on runs written by hand."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from megasora.cli import main
from megasora.observe.charts import curves, ticks_between
from megasora.observe.compare import FIELDS, read_runs


def write_run(path: Path, losses: list[float | None], orders: str = "", layout: str = "dp1") -> str:
    path.mkdir()
    lines = [
        {"attempt": 0, "step": 1 + i, "loss": loss, "grad_norm": 1.0, "lr": 1e-3, "samples": 4,
         "order": (orders or "abcdefgh")[i],
         "step_time_s": 0.5 + 0.01 * i, "data_wait_s": 0.0, "tokens_per_s": 100.0, "mfu": 0.5, "imbalance": 1.0,
         "peak_memory_bytes": 1000 + i, "world": 1, "layout": layout}
        for i, loss in enumerate(losses)
    ]  # fmt: skip
    torn = '{"attempt": 0, "st'
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    events = [{"event": "skipped", "step": 2}, {"event": "eval", "loss": 0.25}] if None in losses else []
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return str(path)


@pytest.fixture
def first(tmp_path: Path) -> str:
    return write_run(tmp_path / "first", [2.0, None, 1.0, 0.5])


def test_a_summary_of_each_run(first: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_run(tmp_path / "other", [2.0, None, 1.00001], layout="tp2")
    assert main(["compare", first, other, "--tolerance", "1e-4", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    one, two = found["runs"]
    assert (one["run"], one["steps"], one["loss"], one["eval_loss"], one["samples"]) == ("first", 4, 0.5, 0.25, 16)
    assert (one["step_time_s"], one["peak_memory_bytes"], one["faults"]) == (0.515, 1003, {"skipped": 1})
    assert (two["layout"], two["steps"]) == ("tp2", 3)
    assert found["worst"] == {"other": pytest.approx(1e-5, rel=1e-3)}


@pytest.mark.parametrize(
    ("losses", "orders", "tolerance", "said"),
    [
        ([2.0, None, 1.001, 0.5], "", "1e-4", "step 3 of other: loss 1.001, 1.0 in first: 0.001 apart, above 0.0001"),
        ([2.0, 3.0, 1.0, 0.5], "", "1", "step 2 of other: loss 3.0, None in first: inf apart"),
        ([2.0, None, 1.0000000000000002, 0.5], "", "0", "step 3 of other"),
        ([2.0, None, 1.0, 0.5], "abxd", "1", "step 3 of other had other samples than that of first"),
    ],
)
def test_the_first_step_that_is_off_is_named(
    losses: list[float | None], orders: str, tolerance: str, said: str, first: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = write_run(tmp_path / "other", losses, orders)
    assert main(["compare", first, other]) == 0
    assert main(["compare", first, other, "--tolerance", tolerance]) == 1
    assert said in capsys.readouterr().err


def test_what_is_the_same_is_the_same_to_the_bit(
    first: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(tmp_path / "other", [2.0, None, 1.0, 0.5])
    assert main(["compare", first, other, "--tolerance", "0"]) == 0
    assert "other: losses differ from first's by 0 at most" in capsys.readouterr().out


def test_the_page_draws_every_run(first: str, tmp_path: Path) -> None:
    other, page = write_run(tmp_path / "<other>", [2.0, 1.5, 1.0]), tmp_path / "page.html"
    assert main(["compare", first, other, "--html", str(page)]) == 0
    pictures = page.read_text().split("<svg")[1:]
    assert len(pictures) == 6
    for picture in pictures:
        drawn = ElementTree.fromstring("<svg" + picture.partition("</svg>")[0] + "</svg>")
        assert len([line for line in drawn.iter() if line.tag.endswith("polyline")]) == 2
    assert "<other>" not in page.read_text()


def test_a_long_run_is_read_and_drawn_in_little(tmp_path: Path) -> None:
    """Of a line only what it reads of it is kept; of a curve not more than its pixels show, its one peak with them."""
    steps = 20000
    write_run(tmp_path / "long", [1.0 + (i == 777) for i in range(steps)], orders="a" * steps)
    (run,) = read_runs([tmp_path / "long"])
    assert len(run.steps) == steps
    assert set(run.steps[0]) == set(FIELDS)
    picture = curves({"long": [(float(step["step"]), step["loss"]) for step in run.steps]}, "step")
    points = picture.partition('points="')[2].partition('"')[0].split()
    assert len(points) < 2000
    assert min(float(point.partition(",")[2]) for point in points) == 36.0  # the top of the axis


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "nowhere: no run here"),
        (("{first}", "--tolerance", "1e-3"), "wants two runs"),
        (("{first}", "{first}", "--tolerance", "nan"), "--tolerance=nan wants two runs or more, and is not negative"),
        (("{first}", "--model.depth=3"), "--model.depth=3 is no option"),
        (("{first}", "--html", "/nowhere/page.html"), "--html=/nowhere/page.html: No such file"),
    ],
)
def test_what_cannot_be_compared(
    arguments: tuple[str, ...], said: str, first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *(argument.format(first=first) for argument in arguments)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1, 400, [50, 100, 150, 200, 250, 300, 350, 400]),
        (0.3047, 2.498, [0.5, 1, 1.5, 2]),
        (-1e-3, 1.1e-3, [-1e-3, -5e-4, 0, 5e-4, 1e-3]),
        (1.689e-6, 0.001994, [0.0005, 0.001, 0.0015]),
    ],
)
def test_axes_have_round_numbers(low: float, high: float, ticks: list[float]) -> None:
    assert ticks_between(low, high) == pytest.approx(ticks, abs=1e-12)
