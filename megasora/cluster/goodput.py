"""Where the wall time of a run went, over all its attempts: from metrics.jsonl and events.jsonl alone."""

import math
from dataclasses import asdict, dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from megasora.errors import ConfigError
from megasora.observe.metrics import EVENTS, METRICS, read_lines, read_steps

# Every second of the wall time belongs to exactly one of them, in this order in pictures.
PARTS = {
    "productive": "#2a9d5c",  # steps that count, without their waiting for data
    "data": "#e9b44c",  # waiting for data in them
    "checkpoint": "#4c7be9",
    "evaluate": "#8e6bd1",  # losses and samples for people
    "start_up": "#9aa5b1",  # from the start of the process to its first step
    "lost": "#d1495b",  # steps from before which a later attempt went on
    "restart": "#5b6470",  # from the last word of an attempt to the start of the next process: dying, the queue
    "other": "#c8cdd3",
}


@dataclass
class Attempt:
    """One start of the run. Seconds; `began` and `ended` since the epoch, `steps` those that count."""

    attempt: int
    began: float
    ended: float
    job: str = ""
    world: int = 0
    steps: int = 0
    repeated: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))


def attempts_of(run: Path) -> list[Attempt]:
    """The attempts of a run, in order. Raises ConfigError if there is none."""
    found: dict[int, Attempt] = {}
    for event in read_lines(run / EVENTS):
        own = _attempt(found, event)
        if event["event"] == "start":
            own.began = min(own.began, event.get("began", own.began))
            own.job, own.world = event.get("job", ""), event.get("world", 0)
        part = {"save": "checkpoint", "eval": "evaluate", "show": "evaluate"}.get(event["event"])
        if part:
            own.seconds[part] += event.get("blocked_s", event.get("seconds", 0.0))  # a save may go on in the background
    first: dict[int, float] = {}  # attempt -> when its first step began
    for line, counts in read_steps(run):
        own = _attempt(found, line)
        first[own.attempt] = min(first.get(own.attempt, math.inf), line["time"] - line["step_time_s"])
        own.steps += counts
        own.repeated += not counts
        if counts:
            own.seconds["data"] += line["data_wait_s"]
            own.seconds["productive"] += line["step_time_s"] - line["data_wait_s"]
        else:
            own.seconds["lost"] += line["step_time_s"]
    if not found:
        raise ConfigError(f"{run}: no run here, {EVENTS} and {METRICS} are empty or missing")
    attempts = [found[number] for number in sorted(found)]
    for own in attempts:
        own.seconds["start_up"] = max(0.0, first.get(own.attempt, own.ended) - own.began)
        own.seconds["other"] = max(0.0, own.ended - own.began - sum(own.seconds.values()))
    for before, own in pairwise(attempts):
        own.seconds["restart"] = max(0.0, own.began - before.ended)
    return attempts


def _attempt(found: dict[int, Attempt], line: dict[str, Any]) -> Attempt:
    """The attempt that wrote a line, which was alive then."""
    own = found.setdefault(line["attempt"], Attempt(line["attempt"], line["time"], line["time"]))
    own.began, own.ended = min(own.began, line["time"]), max(own.ended, line["time"])
    return own


def goodput(run: Path) -> dict[str, Any]:
    """`goodput`: the productive share of the wall time, and the parts in seconds, of the run and of each attempt."""
    attempts = attempts_of(run)
    total = {part: round(sum(attempt.seconds[part] for attempt in attempts), 3) for part in PARTS}
    wall = attempts[-1].ended - attempts[0].began
    return {
        "run": str(run), "wall_s": round(wall, 3), "goodput": round(total["productive"] / wall, 4) if wall else 0.0,
        "steps": sum(attempt.steps for attempt in attempts), "repeated": sum(a.repeated for a in attempts),
        "seconds": total,
        "attempts": [asdict(a) | {"seconds": {k: round(v, 3) for k, v in a.seconds.items()}} for a in attempts],
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """For people: a line an attempt, the shares of the whole at the end."""
    lines = [f"{'attempt':>7} {'job':>9} {'steps':>7} {'again':>6}" + "".join(f"{part:>11}" for part in PARTS)]
    for attempt in result["attempts"]:
        lines.append(
            f"{attempt['attempt']:>7} {attempt['job'] or '-':>9} {attempt['steps']:>7} {attempt['repeated']:>6}"
            + "".join(f"{attempt['seconds'][part]:>10.1f}s" for part in PARTS)
        )
    shares = "".join(f"{100 * seconds / max(result['wall_s'], 1e-9):>10.1f}%" for seconds in result["seconds"].values())
    lines.append(f"{'all':>7} {'':>9} {result['steps']:>7} {result['repeated']:>6}{shares}")
    lines.append(f"goodput {100 * result['goodput']:.1f} % of {result['wall_s']:.0f} s")
    return "\n".join(lines)


def drawing(result: dict[str, Any]) -> str:
    """The same as SVG: a bar for the run and one an attempt, each as long as its time."""
    rows = [("all", result["seconds"])] + [(f"attempt {a['attempt']}", a["seconds"]) for a in result["attempts"]]
    scale = 760 / max(result["wall_s"], 1e-9)
    parts, height = [], 28
    for row, (name, seconds) in enumerate(rows):
        x, y = 100.0, 50 + row * height
        parts.append(f'<text x="92" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        for part, colour in PARTS.items():
            width = seconds[part] * scale
            title = f"<title>{part}: {seconds[part]:.1f} s</title>"
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="20" fill="{colour}">{title}</rect>')
            x += width
    for i, (part, colour) in enumerate(PARTS.items()):
        parts.append(f'<rect x="{100 + 95 * i}" y="26" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{114 + 95 * i}" y="35">{part}</text>')
    title = f"{result['run']}: goodput {100 * result['goodput']:.1f} % of {result['wall_s']:.0f} s"
    size = f'width="880" height="{60 + len(rows) * height}"'
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
        f'<text x="100" y="16" font-weight="bold">{escape(title)}</text>', *parts, "</svg>\n",
    ])  # fmt: skip
