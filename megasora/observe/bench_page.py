"""Results of `megasora bench` beside each other: a table, and pages with charts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
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

    @property
    def failed(self) -> bool:
        return "error" in self.result


HEAD = ("", "step s", "ratio", "tokens/s", "MFU", "of a GEMM", "imbalance", "memory GiB", "sent MiB", "processes")
PROFILED = ("forward", "backward", "exchange", "clip", "optimizer", "ema", "gather", "microbatch", "data_wait")
MEMORY = ("weights", "gradients", "optimizer", "ema", "activations", "other")


def rows(points: Sequence[Point]) -> list[list[str]]:
    """A row a point that did not fail; ratios are to the first of them."""
    good = [point.result for point in points if not point.failed]
    names = [point.name for point in points if not point.failed]
    return [
        [
            name, f"{r['step_time_s']:.4f}", f"{r['step_time_s'] / good[0]['step_time_s']:.3f}", f"{r['tokens_per_s']:,.0f}",
            f"{100 * r['mfu']:.1f} %", f"{100 * r['mfu_gemm']:.1f} %", f"{r['imbalance']:.3f}",
            f"{r['peak_memory_bytes'] / GIB:.2f}", f"{r.get('bytes_sent', 0) / 2**20:.2f}", str(r["world"]),
        ]
        for name, r in zip(names, good, strict=True)
    ]  # fmt: skip


def side_by_side(points: Sequence[Point]) -> str:
    """For a terminal; what failed is told below."""
    cells = [list(HEAD), *rows(points)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]  # fmt: skip
    return "\n".join([*lines, *(f"{point.name}: failed: {point.result['error']}" for point in points if point.failed)])


def bench_page(points: Sequence[Point]) -> str:
    """Throughput, scaling, the step and its profile by part, communication, memory, and everything as a table."""
    good = [point for point in points if not point.failed]
    failed = [paragraph(f"{point.name} failed: {point.result['error']}", "bad") for point in points if point.failed]
    if not good:
        return page("The training step, measured", [("", failed)])
    speed = [Bar(p.name, {"tokens/s": p.result["tokens_per_s"]}, f"{p.result['tokens_per_s']:,.0f}") for p in good]
    steps = [Bar(p.name, p.result["parts"], f"{p.result['step_time_s']:.4f} s") for p in good]
    inside = [Bar(p.name, p.result["profiled"]["parts"], f"{p.result['profiled']['step_time_s']:.4f} s") for p in good]
    memory = [Bar(p.name, memory_of(p.result)) for p in good]
    sections: list[tuple[str, list[str]]] = [
        ("", [*about(good[0].result), table(HEAD, rows(points)), *failed]),
        ("Throughput", [stacked_bars(speed, "tokens/s")]),
        *scaling(good),
        ("A step, by what can be timed from outside", [
            paragraph("Medians of the steps that count; at the right their whole.", "note"), stacked_bars(steps, "s")]),
        ("One step more, under the profiler", [
            paragraph("Longer than the others by what profiling takes. exchange: what forward and backward wait for beside their "
                      "own work; gather: what the update waits for.", "note"),
            stacked_bars(inside, "s", order=PROFILED)]),
        ("Communication of the main process", communication_of(good)),
        ("Memory of the main process, by storages", [
            paragraph("activations: the most that a step made and held at once, without gradients.", "note"),
            stacked_bars(memory, "GiB", order=MEMORY)]),
        ("Rounds", [
            paragraph("A round's step in units of its own matrix product (1 / MFU): what bench.against compares.", "note"),
            curves({p.name: [(float(i + 1), one["cost"]) for i, one in enumerate(p.result["rounds"])] for p in good}, "round")]),
    ]  # fmt: skip
    return page("The training step, measured", sections)


def about(r: dict[str, Any]) -> list[str]:
    told, warm = r["machine"], r["warmup"]
    settled = {True: "until steps were steady", False: "and they were NOT steady", None: ""}[warm["steady"]]
    stall = f"; a save holds up a step for {r['checkpoint']['blocked_s']:.3f} s" if "checkpoint" in r else ""
    energy = f"; {r['energy_joules']:.1f} J a step" if r["energy_joules"] is not None else ""
    model, precision = r["config"]["model"], r["config"]["precision"]["precision"]
    return [
        paragraph(f"{told['device']}, {told['threads']} threads a process, torch {told['torch']}, {r['date']}; data {r['data']}, "
                  f"{r['steps']} steps after {warm['steps']} of warm-up {settled}"),
        paragraph(f"{model['family']}, width {model['width']}, depth {model['depth']}; {precision}; copies "
                  f"{r['copy_bytes_per_s'] / GIB:.1f} GiB/s, products {r['gemm_flops'] / 1e12:.3f} TFLOP/s{stall}{energy}"),
    ]  # fmt: skip


def scaling(good: Sequence[Point]) -> list[tuple[str, list[str]]]:
    """The best throughput of so many processes, beside that of the fewest times their number."""
    best: dict[int, float] = {}
    for point in good:
        world = point.result["world"]
        best[world] = max(best.get(world, 0.0), point.result["tokens_per_s"])
    if len(best) < 2:
        return []
    least = min(best)
    lines = {"measured": [(float(w), best[w]) for w in sorted(best)],
             "linear": [(float(w), best[least] * w / least) for w in sorted(best)]}  # fmt: skip
    told = ", ".join(f"{w}: {100 * best[w] * least / best[least] / w:.0f} %" for w in sorted(best))
    return [("Scaling: tokens/s of the best of so many processes", [
        curves(lines, "processes"), paragraph(f"Of linear, by processes: {told}", "note")])]  # fmt: skip


def communication_of(good: Sequence[Point]) -> list[str]:
    """Exposed and hidden seconds by kind."""
    found = [(p.name, kind, of) for p in good for kind, of in p.result["profiled"]["communication"].items()]
    waits = [
        Bar(f"{name} {kind}", {"exposed": of["seconds"] - of["hidden_s"], "hidden": of["hidden_s"]}, f"{of['calls']} calls")
        for name, kind, of in found
        if of["seconds"] > 1e-4
    ]  # fmt: skip
    if not waits:
        return [paragraph("None that takes a ten-thousandth of a second.", "note")]
    return [paragraph("Hidden is what passes while this process computes.", "note"), stacked_bars(waits, "s")]


def memory_of(result: dict[str, Any]) -> dict[str, float]:
    return {part: size / GIB for part, size in result["memory_by_part"].items() if size is not None}


def read_points(paths: Sequence[Path]) -> list[Point]:
    """Results in files, those of older versions too, in order of their names; of a directory all that are results, alone or in a
    sweep. Raises ConfigError for a file that is none."""
    points = []
    for path in paths:
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            try:
                found = json.loads(file.read_text())
                these = [Point(file.stem, found)]
                if "sweep" in found:
                    these = [Point(f"{file.stem} {one['name']}", one["result"]) for one in found["points"]]
                rows(these)
                points += [point for point in these if not point.failed]
            except OSError as error:
                raise ConfigError(f"--trend={file}: {error.strerror}") from None
            except (ValueError, KeyError, TypeError, AttributeError):
                if not path.is_dir():
                    raise ConfigError(f"--trend={file}: not a result of `megasora bench`") from None
    if not points:
        raise ConfigError(f"--trend={paths[0]}: no result of `megasora bench` there")
    return sorted(points, key=lambda point: point.name)


def trend_page(points: Sequence[Point]) -> str:
    """From report to report, a line for each kind of work: what was done, and on what."""
    kinds: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for number, point in enumerate(points):
        kinds.setdefault(work(point.result), []).append((float(number + 1), point.result))
    changes = [
        [name, f"{before['date']} to {after['date']}", f"{100 * (after['mfu_gemm'] / before['mfu_gemm'] - 1):+.1f} %"]
        for name, results in kinds.items()
        for (_, before), (_, after) in pairwise(results)
        if "date" in before and "date" in after
    ]
    charts = {
        "MFU of the device's peak, %": ("mfu", 100.0), "MFU of a matrix product of the same run, %": ("mfu_gemm", 100.0),
        "Tokens/s": ("tokens_per_s", 1.0), "Memory at most, GiB": ("peak_memory_bytes", 1 / GIB),
    }  # fmt: skip
    shown = [HEAD.index(name) for name in ("step s", "tokens/s", "MFU", "of a GEMM", "memory GiB", "processes")]
    numbered = [[f"{i + 1}. {row[0]}", *(row[column] for column in shown)] for i, row in enumerate(rows(points))]
    sections = [("", [table(["", *(HEAD[column] for column in shown)], numbered)])]
    for title, (key, scale) in charts.items():
        series = {name: [(x, scale * r[key]) for x, r in results] for name, results in kinds.items()}
        sections.append((title, [curves(series, "report")]))
    if changes:
        sections.append(("Same work, next report: of a matrix product", [table(["", "", ""], changes)]))
    return page("Benchmarks over time", sections)


def work(r: dict[str, Any]) -> str:
    """What makes two results comparable, in short."""
    model, precision = r["config"]["model"], r["config"]["precision"]
    kind = precision["precision"] if precision.get("fp8", "none") == "none" else f"fp8 {precision['fp8']}"
    name = f"{model['preset'] or model['family']} {model['width']}x{model['depth']}, {r['tokens']:.0f} tokens"
    return f"{name}, {kind}, {r['layout']}, {r['machine']['device']}"
