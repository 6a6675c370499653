"""Runs held against each other, from what they wrote down: a summary of each, their curves, and whether their losses agree."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megasora.errors import CheckFailed, ConfigError
from megasora.observe.charts import curves, page, table
from megasora.observe.metrics import EVENTS, METRICS, history, read_lines

FIELDS = (
    "attempt", "step", "loss", "grad_norm", "lr", "samples", "order", "step_time_s", "data_wait_s", "tokens_per_s", "mfu",
    "imbalance", "peak_memory_bytes", "world", "layout",
)  # fmt: skip
FAULTS = ("skipped", "spike", "rollback", "save_failed", "bad_sample", "slow_rank")


@dataclass(frozen=True)
class Run:
    """What a run directory tells of its steps (`FIELDS` of those that count) and of what happened."""

    name: str
    steps: list[dict[str, Any]]
    events: list[dict[str, Any]]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Raises ConfigError for a directory without a step. Names are as short as tells them apart."""
    names = [path.name for path in paths]
    runs = []
    for path in paths:
        steps = history(path, FIELDS)
        if not steps:
            raise ConfigError(f"{path}: no run here with a step, its {METRICS} is missing or empty")
        name = path.name if names.count(path.name) == 1 else str(path)
        runs.append(Run(name, steps, list(read_lines(path / EVENTS))))
    return runs


def summary(run: Run) -> dict[str, Any]:
    """Of the steps' times, the medians; of `faults`, how many of each kind."""
    last = run.steps[-1]
    losses = [event["loss"] for event in run.events if event["event"] == "eval"]
    kinds = [event["event"] for event in run.events]
    return {
        "run": run.name, "steps": last["step"], "samples": sum(step["samples"] for step in run.steps),
        "loss": last["loss"], "eval_loss": losses[-1] if losses else None, "grad_norm": last["grad_norm"],
        **{name: median(step[name] for step in run.steps) for name in ("step_time_s", "data_wait_s", "tokens_per_s", "mfu")},
        "peak_memory_bytes": max(step["peak_memory_bytes"] for step in run.steps), "layout": last["layout"],
        "world": last["world"], "attempts": 1 + max(step["attempt"] for step in run.steps),
        "faults": {kind: kinds.count(kind) for kind in FAULTS if kind in kinds},
    }  # fmt: skip


def check(runs: Sequence[Run], tolerance: float) -> dict[str, float]:
    """The largest relative difference of each run's losses to the first one's, over the steps that both have.

    Raises CheckFailed at the first step that had other samples, or whose loss is off by more than `tolerance`; 0 means the same
    bits. A step without a finite loss agrees with another such step only.
    """
    first = {step["step"]: step for step in runs[0].steps}
    worst = {}
    for run in runs[1:]:
        shared = [(step, first[step["step"]]) for step in run.steps if step["step"] in first]
        if not shared:
            raise CheckFailed(f"{run.name} has no step in common with {runs[0].name}")
        worst[run.name] = 0.0
        for found, expected in shared:
            where = f"step {found['step']} of {run.name}"
            if found["order"] != expected["order"]:
                raise CheckFailed(f"{where} had other samples than that of {runs[0].name}")
            off = difference(found["loss"], expected["loss"])
            if off > tolerance:
                raise CheckFailed(f"{where}: loss {found['loss']}, {expected['loss']} in {runs[0].name}: "
                                  f"{off:.2g} apart, above {tolerance:g}")  # fmt: skip
            worst[run.name] = max(worst[run.name], off)
    return worst


def difference(found: float | None, expected: float | None) -> float:
    """Relative to what is expected; None, which stands for what is not finite, is infinitely far from any number."""
    if found == expected:
        return 0.0
    if found is None or expected is None:
        return float("inf")
    return abs(found - expected) / max(abs(expected), 1e-30)


ROWS = {
    "steps": "{:,}", "samples": "{:,}", "loss": "{:.5g}", "eval_loss": "{:.5g}", "grad_norm": "{:.4g}", "step_time_s": "{:.4f}",
    "data_wait_s": "{:.4f}", "tokens_per_s": "{:,.0f}", "mfu": "{:.1%}", "peak_memory_bytes": "{:,}", "layout": "{}",
    "world": "{}", "attempts": "{}",
}  # fmt: skip


def cells(found: dict[str, Any]) -> list[str]:
    shown = ["-" if found[name] is None else form.format(found[name]) for name, form in ROWS.items()]
    return [*shown, ", ".join(f"{count} {kind}" for kind, count in found["faults"].items()) or "none"]


def side_by_side(found: Sequence[dict[str, Any]]) -> str:
    """Summaries for people: a column a run."""
    columns = [["", *ROWS, "faults"], *([one["run"], *cells(one)] for one in found)]
    lines: list[list[str]] = [[] for _ in columns[0]]
    for number, column in enumerate(columns):
        width = max(map(len, column))
        for line, text in zip(lines, column, strict=True):
            line.append(text.rjust(width) if number else text.ljust(width))
    return "\n".join("  ".join(line) for line in lines)


CURVES = {
    "Loss": "loss", "Gradient norm": "grad_norm", "Learning rate": "lr", "Seconds a step": "step_time_s",
    "Seconds of waiting for data": "data_wait_s", "Imbalance of the ranks": "imbalance",
}  # fmt: skip


def comparison(runs: Sequence[Run], found: Sequence[dict[str, Any]]) -> str:
    """The same as an HTML page, with the curves."""
    sections: list[tuple[str, list[str]]] = [
        ("", [table(["", *(one["run"] for one in found)],
                    [list(row) for row in zip([*ROWS, "faults"], *map(cells, found), strict=True)])])
    ]  # fmt: skip
    for title, key in CURVES.items():
        series = {
            run.name: [(float(step["step"]), step[key]) for step in run.steps if step[key] is not None] for run in runs
        }
        sections.append((title, [curves(series, "step")]))
    return page("Runs compared", sections)
