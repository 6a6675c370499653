"""Results of `megasora bench` beside each other: a table, and pages with charts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasora.errors import ConfigError
from megasora.observe.charts import Bar, curves, page, paragraph, stacked_bars, table
from megasora.observe.hardware import GIB


@dataclass(frozen=True)
class Point:
    """A result and what it is called; `result` is that of `megasora bench`, or has an `error` only."""

    name: str
    result: dict[str, Any]


HEAD = ("", "step s", "ratio", "tokens/s", "MFU", "of a GEMM", "imbalance", "memory GiB", "sent MiB", "processes")


def rows(points: Sequence[Point]) -> list[list[str]]:
    """A row a point; ratios are to the first that did not fail."""
    first = next((point.result["step_time_s"] for point in points if "error" not in point.result), 1.0)
    found = []
    for point in points:
        r = point.result
        if "error" in r:
            found.append([point.name, f" failed: {r['error']}", *[""] * (len(HEAD) - 2)])
            continue
        found.append([point.name, f"{r['step_time_s']:.4f}", f"{r['step_time_s'] / first:.3f}", f"{r['tokens_per_s']:,.0f}",
                      f"{100 * r['mfu']:.1f} %", f"{100 * r['mfu_gemm']:.1f} %", f"{r['imbalance']:.3f}",
                      f"{r['peak_memory_bytes'] / GIB:.2f}", f"{r.get('bytes_sent', 0) / 2**20:.2f}",
                      str(r["world"])])  # fmt: skip
    return found


def side_by_side(points: Sequence[Point]) -> str:
    """For a terminal; what failed is told below."""
    good = [row for row, point in zip(rows(points), points, strict=True) if "error" not in point.result]
    widths = [max(len(row[column]) for row in [list(HEAD), *good]) for column in range(len(HEAD))]
    lines = [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in [list(HEAD), *good]
    ]  # fmt: skip
    return "\n".join([*lines, *(f"{p.name}: failed: {p.result['error']}" for p in points if "error" in p.result)])


def bench_page(points: Sequence[Point]) -> str:
    """Throughput, the step and its profile by part, memory, scaling, and everything as a table."""
    good = [point for point in points if "error" not in point.result]
    speed = [Bar(p.name, {"tokens/s": p.result["tokens_per_s"]}, f"{p.result['tokens_per_s']:,.0f}") for p in good]
    steps = [Bar(p.name, p.result["parts"], f"{p.result['step_time_s']:.4f} s") for p in good]
    inside = [Bar(p.name, p.result["profiled"]["parts"]) for p in good]
    memory = [Bar(p.name, memory_of(p.result), f"{p.result['peak_memory_bytes'] / GIB:.2f} GiB") for p in good]
    waits = [Bar(p.name, exposed(p.result)) for p in good]
    sections: list[tuple[str, list[str]]] = [
        ("", [machine(good), table(HEAD, rows(points))]),
        ("Throughput", [stacked_bars(speed, "tokens/s")]),
        ("A step", [stacked_bars(steps, "s")]),
        ("One step under the profiler", [stacked_bars(inside, "s"), paragraph("The exchange of gradients is in backward.")]),
        ("Communication, as far as it was exposed", [stacked_bars(waits, "s") if any(bar.total for bar in waits)
                                                     else paragraph("None.", "note")]),
        ("Memory of the main process", [stacked_bars(memory, "GiB")]),
    ]  # fmt: skip
    worlds = {p.result["world"] for p in good}
    if len(worlds) > 1:
        best = {w: max(p.result["tokens_per_s"] for p in good if p.result["world"] == w) for w in sorted(worlds)}
        least = min(worlds)
        scaling = {"measured": [(float(w), speed) for w, speed in best.items()],
                   "linear": [(float(w), best[least] * w / least) for w in best]}  # fmt: skip
        sections.insert(2, ("Scaling: the best of so many processes", [curves(scaling, "processes")]))
    return page("The training step, measured", sections)


def machine(points: Sequence[Point]) -> str:
    if not points:
        return paragraph("No point could be measured.", "bad")
    r = points[0].result
    told = r["machine"]
    return paragraph(f"{told['device']}, {told['threads']} threads a process, torch {told['torch']}, data {r['data']}, "
                     f"{r['steps']} steps, {r.get('date', '')}")  # fmt: skip


def memory_of(result: dict[str, Any]) -> dict[str, float]:
    """GiB of what stays from step to step, and the rest of the peak."""
    parts = {part: size / GIB for part, size in result["memory_by_part"].items()}
    return parts | {"all else, at most": max(0.0, result["peak_memory_bytes"] / GIB - sum(parts.values()))}


def exposed(result: dict[str, Any]) -> dict[str, float]:
    found = result["profiled"]["communication"]
    return {kind: of["seconds"] - of["hidden_s"] for kind, of in found.items()}


def read_points(files: Sequence[Path]) -> list[Point]:
    """Results in files, those of older versions too, in order of their names. Raises ConfigError for anything else."""
    points = []
    for file in sorted(files):
        try:
            result = json.loads(file.read_text())
            points.append(Point(file.stem, result))
            rows(points[-1:])
        except OSError as error:
            raise ConfigError(f"--trend={file}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"--trend={file}: not a result of `megasora bench`") from None
    return points


def trend_page(points: Sequence[Point]) -> str:
    """MFU and throughput from report to report."""
    order = [(float(number + 1), point.result) for number, point in enumerate(points)]
    return page(
        "Benchmarks over time",
        [
            ("", [table(HEAD, rows(points))]),
            ("MFU, %", [curves({"of the device's peak": [(x, 100 * r["mfu"]) for x, r in order],
                                "of a GEMM of the same run": [(x, 100 * r["mfu_gemm"]) for x, r in order]}, "report")]),
            ("Tokens/s", [curves({"tokens/s": [(x, r["tokens_per_s"]) for x, r in order]}, "report")]),
        ],
    )  # fmt: skip
