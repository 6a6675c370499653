"""Charts as inline SVG, and pages of them: one HTML file that opens in any browser without a network."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

# Okabe and Ito's colours, which most colour-blind people tell apart, and lighter ones of the same hues.
COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b5a900", "#7a6fb0", "#8c8c8c", "#88c9b5",
    "#e8b9d3", "#a9cfe6",
)  # fmt: skip
WIDTH, LEFT, RIGHT, BAR, STEP = 960, 250, 90, 18, 26
FEW = 40  # points of a line that are drawn as such
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2733; background: #fff; max-width: 1000px }
body { margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em; margin-bottom: .2em } h2 { font-size: 1.15em; margin: 2em 0 .4em } p { margin: .3em 0 }
.good { color: #00714f } .bad { color: #b03a00 } .note { color: #5b6875 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6em 0 }
th, td { padding: .22em 1.2em .22em .2em; border-bottom: 1px solid #e3e8ec; text-align: left }
.number { text-align: right; white-space: nowrap }
svg { width: 100%; height: auto; display: block; margin: 1em 0 }
svg text { font: 13px system-ui, sans-serif; fill: #1c2733; paint-order: stroke; stroke: #fff; stroke-width: 3px }
svg .faint { fill: #5b6875 } svg line { stroke: #dfe5ea } svg .limit { stroke: #b03a00; stroke-width: 2; stroke-dasharray: 5 3 }
"""


@dataclass(frozen=True)
class Bar:
    """A line of a chart: its parts in the chart's unit, and a word at its end."""

    name: str
    parts: Mapping[str, float]
    note: str = ""

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def stacked_bars(
    bars: Sequence[Bar], unit: str, limit: float | None = None, limit_name: str = "limit", order: Sequence[str] = ()
) -> str:
    """Horizontal bars of parts laid end to end on one scale from zero; `limit` is a line. Parts come in `order`, which also gives
    their colours, so that charts of a page agree; what it lacks follows, the largest first."""
    names = [*order, *(name for name in parts_of(bars) if name not in order)]
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    most = max([bar.total for bar in bars] + [limit or 0.0]) or 1.0
    ticks = round_ticks(most)
    scale = (WIDTH - LEFT - RIGHT) / max(most, ticks[-1])
    legend, top = legend_of([name for name in names if name in parts_of(bars)], colour)
    top += 34 if limit else 18
    bottom = top + STEP * len(bars)
    drawn = [*legend]
    for tick in ticks:
        x = LEFT + tick * scale
        drawn.append(f'<line x1="{x:.1f}" y1="{top - 6}" x2="{x:.1f}" y2="{bottom}"/>')
        drawn.append(f'<text class="faint" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    drawn.append(
        f'<text class="faint" x="{LEFT + (ticks[-1]) * scale + 26:.1f}" y="{bottom + 16}">{escape(unit)}</text>'
    )
    if limit:
        x = LEFT + limit * scale
        drawn.append(f'<line class="limit" x1="{x:.1f}" y1="{top - 8}" x2="{x:.1f}" y2="{bottom}"/>')
        drawn.append(
            f'<text class="faint" x="{x:.1f}" y="{top - 13}" text-anchor="middle">{escape(limit_name)} {limit:.4g}</text>'
        )
    for row, bar in enumerate(bars):
        x, y = float(LEFT), top + STEP * row + (STEP - BAR) / 2
        drawn.append(f'<text x="{LEFT - 8}" y="{y + 13.5}" text-anchor="end">{escape(shortened(bar.name))}</text>')
        for name in names:
            width = bar.parts.get(name, 0.0) * scale
            if width > 0:
                title = f"{bar.name}: {name} {bar.parts[name]:.4g} {unit}, {100 * bar.parts[name] / bar.total:.1f} %"
                drawn.append(
                    f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{BAR}" fill="{colour[name]}">'
                    f"<title>{escape(title)}</title></rect>"
                )
                x += width
        drawn.append(f'<text x="{x + 6:.1f}" y="{y + 13.5}">{escape(bar.note or f"{bar.total:.3g}")}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 24}" role="img">'
    return "\n".join([head, *drawn, "</svg>"])


def curves(series: Mapping[str, Sequence[tuple[float, float]]], unit: str, height: int = 260) -> str:
    """Lines through (x, y) points, one a name, on one scale whose vertical axis spans what there is; `unit` is that of x."""
    points = [point for line in series.values() for point in line]
    if not points:
        return paragraph("Nothing to draw.", "note")
    colour = dict(zip(series, itertools.cycle(COLOURS)))
    left, (x_low, x_high), (y_low, y_high) = 90, *(spread(values) for values in zip(*points, strict=True))
    drawn, top = legend_of(list(series), colour)
    top += 10
    bottom = top + height
    across, up = (WIDTH - left - 20) / (x_high - x_low), height / (y_high - y_low)
    for tick in ticks_between(y_low, y_high):
        y = bottom - (tick - y_low) * up
        drawn.append(f'<line x1="{left}" y1="{y:.1f}" x2="{WIDTH - 20}" y2="{y:.1f}"/>')
        drawn.append(f'<text class="faint" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in ticks_between(x_low, x_high):
        x = left + (tick - x_low) * across
        drawn.append(f'<line x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 5}"/>')
        drawn.append(f'<text class="faint" x="{x:.1f}" y="{bottom + 19}" text-anchor="middle">{tick:g}</text>')
    drawn.append(f'<text class="faint" x="{left - 8}" y="{bottom + 19}" text-anchor="end">{escape(unit)}</text>')
    for name, line in series.items():
        places = [(left + (x - x_low) * across, bottom - (y - y_low) * up) for x, y in line]
        if len(places) <= FEW:
            drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{colour[name]}"/>' for x, y in places]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in thinned(places))
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour[name]}" stroke-width="1.6">'
                     f"<title>{escape(name)}</title></polyline>")  # fmt: skip
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 26}" role="img">'
    return "\n".join([head, *drawn, "</svg>"])


def thinned(places: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Of the points of a line, from left to right, the lowest and the highest of each pixel's column: it looks the same."""
    for _, column in itertools.groupby(places, lambda place: int(place[0])):
        points = list(column)
        ends = {extreme(range(len(points)), key=lambda i: points[i][1]) for extreme in (min, max)}
        yield from (points[i] for i in sorted(ends))


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The least and the most, never the same."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0))


def parts_of(bars: Sequence[Bar]) -> list[str]:
    """The parts that any bar has, those first that take most."""
    sums: dict[str, float] = {}
    for bar in bars:
        for name, value in bar.parts.items():
            if value > 0:
                sums[name] = sums.get(name, 0.0) + value
    return sorted(sums, key=lambda name: -sums[name])


def legend_of(names: Sequence[str], colour: Mapping[str, str]) -> tuple[list[str], int]:
    """Squares with names, in as many rows as they need, and the height of them."""
    drawn, x, y = [], 0.0, 6
    for name in names:
        width = 26 + 7.2 * len(name)
        if x + width > WIDTH:
            x, y = 0.0, y + 20
        drawn.append(f'<rect x="{x:.1f}" y="{y}" width="12" height="12" fill="{colour[name]}"/>')
        drawn.append(f'<text x="{x + 17:.1f}" y="{y + 11}">{escape(name)}</text>')
        x += width + 8
    return drawn, y + 20


def round_ticks(most: float) -> list[float]:
    """From zero in steps of 1, 2 or 5 times a power of ten, four to nine of them, the last not beyond `most`."""
    power = 10.0 ** math.floor(math.log10(most))
    step = next(step for step in (power / 5, power / 2, power, 2 * power) if most / step <= 9)
    return [i * step for i in range(int(most / step + 1e-9) + 1)]


def ticks_between(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, three to nine of them: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(step for step in (power / 5, power / 2, power, 2 * power) if (high - low) / step <= 8)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def shortened(name: str, most: int = 34) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in cells; columns that begin with a number to the right. Without `head` there is none."""
    right = [cell[:1].isdigit() and column > 0 for column, cell in enumerate(rows[0])] if rows else [False] * len(head)
    lines = [line("th", head, right)] if head else []
    return "<table>\n" + "\n".join([*lines, *(line("td", row, right) for row in rows)]) + "\n</table>"


def line(kind: str, cells: Sequence[str], right: Sequence[bool]) -> str:
    marks = [' class="number"' if number else "" for number in right]
    return (
        "<tr>" + "".join(f"<{kind}{m}>{escape(cell)}</{kind}>" for m, cell in zip(marks, cells, strict=True)) + "</tr>"
    )


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def page(title: str, sections: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A whole HTML file: sections of a heading (none if empty) and what `stacked_bars`, `table` and `paragraph` gave."""
    body = [f"<h1>{escape(title)}</h1>"]
    for heading, parts in sections:
        body += ([f"<h2>{escape(heading)}</h2>"] if heading else []) + list(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n</head>\n<body>\n'
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )
