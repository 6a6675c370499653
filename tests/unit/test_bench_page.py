"""Pages of results, made from the reports that lie in the repository and from results made by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from megasora.errors import ConfigError
from megasora.observe.bench_page import Point, bench_page, read_points, side_by_side, trend_page

REPORTS = Path(__file__).parents[2] / "benchmarks" / "reports"


def point(world: int, tokens: float, date: str = "2026-11-26") -> Point:
    r: dict[str, Any] = json.loads((REPORTS / "2026-11-26-bench-wan-1.3b-bf16-cuda.json").read_text())
    profiled = {"step_time_s": 1.0, "parts": {"forward": 0.3, "backward": 0.6, "data_wait": 0.1}, "communication": {
        "all_reduce": {"calls": 3, "seconds": 0.2, "hidden_s": 0.15}}}  # fmt: skip
    r |= {
        "schema": 2, "date": date, "tokens_per_s": tokens, "world": world, "profiled": profiled, "energy_joules": 12.0,
        "warmup": {"steps": 6, "steady": True}, "copy_bytes_per_s": 2e12, "checkpoint": {"blocked_s": 0.5, "seconds": 2.0},
        "memory_by_part": {"weights": 2**30, "activations": None}, "rounds": [{"cost": 2.0}, {"cost": 2.1}],
    }  # fmt: skip
    return Point(f"dp{world}", r)


def test_a_page_of_a_sweep_shows_its_scaling_and_what_failed() -> None:
    text = bench_page([point(1, 100.0), Point("dp3", {"error": "3 do not divide <8>"}), point(2, 150.0)])
    assert "Of linear, by processes: 1: 100 %, 2: 75 %" in text
    assert "dp3 failed: 3 do not divide &lt;8&gt;" in text
    assert "dp2: all_reduce" not in text
    assert "exposed 0.05 s, 25.0 %" in text
    assert "12.0 J a step" in text
    assert text.count("<svg") == 7
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")  # nothing is fetched
    assert "could not" not in bench_page([Point("a", {"error": "e"})])
    assert "dp3: failed: x" in side_by_side([point(1, 100.0), Point("dp3", {"error": "x"})])


def test_reports_of_all_versions_make_a_trend(tmp_path: Path) -> None:
    found = read_points([REPORTS])
    assert any(p.name == "2026-11-26-bench-wan-1.3b-bf16-cuda" for p in found)
    (tmp_path / "1.json").write_text(json.dumps(point(1, 100.0).result))
    later = point(1, 110.0, "2026-12-01").result
    sweep = {"schema": 2, "sweep": ["a=1"], "points": [{"name": "x", "result": later | {"mfu_gemm": 1.1 * later["mfu_gemm"]}},
                                                       {"name": "y", "result": {"error": "e"}}]}  # fmt: skip
    (tmp_path / "2.json").write_text(json.dumps(sweep))
    (tmp_path / "3.json").write_text("{}")
    points = read_points([tmp_path])
    assert [p.name for p in points] == ["1", "2 x"]
    text = trend_page(points)
    assert "2026-11-26 to 2026-12-01" in text
    assert "+10.0 %" in text
    assert text.count("<svg") == 4
    with pytest.raises(ConfigError, match=r"--trend=.*3\.json: not a result"):
        read_points([tmp_path / "3.json"])
