"""What `prepare` kept and dropped: report.json, and the same as a picture, report.png."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.prepare.merge import Kept
from data_pipelines.prepare.parts import Tally

SECONDS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 60)
SIDES = (0, 144, 240, 360, 480, 720, 1080, 1440, 2160)
ASPECTS = ("9:21", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "21:9")

INK, PALE, PAPER, BAR, LOST = (228, 228, 231), (140, 140, 148), (24, 24, 27), (96, 165, 250), (248, 113, 113)
WIDTH, ROW, GAP = 900, 22, 16  # pixels


def make_report(sources: int, kept: Kept, tally: Tally, shards: int) -> dict[str, Any]:
    """Counts, sizes as HEIGHTxWIDTH reversed (width first), and histograms over the kept samples."""
    video = kept.fps > 0
    seconds = kept.frames[video] / kept.fps[video]
    sizes = Counter(
        f"{width}x{height}" for height, width in zip(kept.height.tolist(), kept.width.tolist(), strict=True)
    )
    return {
        "sources": sources,
        "kept": len(kept.place),
        "videos": int(video.sum()),
        "images": int((~video).sum()),
        "seconds": round(math.fsum(seconds), 3),
        "shards": shards,
        "sizes": dict(sorted(sizes.items())),
        "dropped": dict(sorted(tally.dropped.items())),
        "examples": dict(sorted(tally.examples.items())),
        "histograms": {
            "seconds": _between(seconds, SECONDS, " s"),
            "resolution": _between(np.minimum(kept.height, kept.width), SIDES, " pixels"),
            "aspect": _nearest_aspect(kept.width / kept.height),
        },
    }


def _between(values: np.ndarray, edges: tuple[int, ...], unit: str) -> dict[str, int]:
    """Counts of the values from each edge up to the next; empty ends are left out."""
    counts = np.bincount(np.searchsorted(edges, values, side="right") - 1, minlength=len(edges)).tolist()
    names = [f"{low} to {high}{unit}" for low, high in itertools.pairwise(edges)] + [f"{edges[-1]}{unit} or more"]
    return _without_ends(dict(zip(names, counts, strict=True)))


def _nearest_aspect(ratios: np.ndarray) -> dict[str, int]:
    """Counts by the most similar of the usual shapes."""
    logs = np.log([int(width) / int(height) for width, height in (name.split(":") for name in ASPECTS)])
    nearest = np.abs(np.log(ratios)[:, None] - logs).argmin(1)
    return _without_ends(dict(zip(ASPECTS, np.bincount(nearest, minlength=len(ASPECTS)).tolist(), strict=True)))


def _without_ends(counts: dict[str, int]) -> dict[str, int]:
    filled = [number for number, count in enumerate(counts.values()) if count]
    if not filled:
        return {}
    return dict(list(counts.items())[filled[0] : filled[-1] + 1])


def draw_report(report: dict[str, Any]) -> bytes:
    """PNG: a headline, bars for each histogram, and what was dropped."""
    head = (
        f"{report['kept']} samples kept from {report['sources']} files: {report['videos']} videos of "
        f"{report['seconds']:.0f} s, {report['images']} images, {report['shards']} shards"
    )
    titles = {"seconds": "length of the videos", "resolution": "shorter side", "aspect": "shape"}
    charts = [(titles[name], counts, BAR) for name, counts in report["histograms"].items()]
    dropped = sorted(report["dropped"].items(), key=lambda item: (-item[1], item[0]))
    charts.append(("dropped", dict(dropped), LOST))
    charts = [chart for chart in charts if chart[1]]
    height = 3 * GAP + ROW + sum(ROW * (len(counts) + 1) + GAP for _, counts, _ in charts)
    picture = Image.new("RGB", (WIDTH, height), PAPER)
    draw = ImageDraw.Draw(picture)
    large, small = ImageFont.load_default(size=18), ImageFont.load_default(size=14)
    draw.text((GAP, GAP), head, INK, large)
    top = 2 * GAP + ROW
    for title, counts, colour in charts:
        draw.text((GAP, top), title, PALE, small)
        top += ROW
        largest = max(counts.values())
        for name, count in counts.items():
            draw.text((GAP, top), name[:34], INK, small)
            left, room = 290, WIDTH - 290 - 90
            length = round(room * count / largest)
            draw.rectangle((left, top + 2, left + max(length, 1), top + ROW - 5), colour)
            draw.text((left + length + 8, top), str(count), INK, small)
            top += ROW
        top += GAP
    content = BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()
