"""Raw videos and images with captions -> shards: cut at shot changes, bounded in length and size, captions attached."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from PIL import Image

from data_pipelines.errors import DataError
from data_pipelines.index import describe, sync_directory
from data_pipelines.shards import ShardWriter
from data_pipelines.video import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Mp4Writer,
    Scaler,
    Undecodable,
    VideoReader,
    encode_image,
    is_image,
    load_image,
)

CAPTIONS = "captions.jsonl"
PLAN, REPORT = "prepare.json", "report.json"
THUMBNAIL = (36, 64)  # pixels, height and width, of the pictures in which shot changes are looked for
SIDE_MIN = 16  # pixels
EXAMPLES = 5  # names kept for each reason of dropping


@dataclass(kw_only=True, frozen=True)
class PrepareConfig:
    """Raw videos and images -> shards."""

    input: str = ""  # a directory tree of videos and images, or one file; captions in NAME.txt or captions.jsonl
    output: str = ""  # a directory that does not exist yet, is empty, or holds the result of the same prepare
    clip_seconds: float = 4.0  # a longer shot is cut into pieces of this length
    min_frames: int = 17  # a shorter piece is dropped
    shot_threshold: float = 27.0  # a larger change from frame to frame begins a new shot (0 to 255)
    height_max: int = 720  # the shorter side is scaled down to this many pixels
    crf: int = 18  # H.264 quality; lower is better and larger
    samples_per_shard: int = 1000

    def __post_init__(self) -> None:
        if not self.clip_seconds > 0:
            raise ValueError(f"clip_seconds must be above 0, not {self.clip_seconds}")
        if self.height_max < SIDE_MIN:
            raise ValueError(f"height_max must be at least {SIDE_MIN}, not {self.height_max}")
        if self.min_frames < 1 or self.samples_per_shard < 1:
            raise ValueError("min_frames and samples_per_shard must be at least 1")


@dataclass(frozen=True)
class Source:
    path: Path
    name: str  # relative to the input
    slug: str  # the beginning of its keys, unlike any other source's


@dataclass
class Tally:
    """What became of the input; `report.json`."""

    sources: int = 0
    samples: Counter[str] = field(default_factory=Counter)  # by kind
    sizes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, what: str) -> None:
        self.dropped[reason] += 1
        named = self.examples.setdefault(reason, [])
        if len(named) < EXAMPLES:
            named.append(what)

    def report(self, shards: int) -> dict[str, Any]:
        return {
            "sources": self.sources,
            "kept": self.samples.total(),
            "videos": self.samples["video"],
            "images": self.samples["image"],
            "seconds": round(self.seconds, 3),
            "shards": shards,
            "sizes": dict(sorted(self.sizes.items())),
            "dropped": dict(sorted(self.dropped.items())),
            "examples": dict(sorted(self.examples.items())),
        }


def prepare(config: PrepareConfig, progress: Callable[[int, int, str], None]) -> dict[str, Any]:
    """Writes `config.output` completely or not at all, and returns the report; progress(done, all, name of a source).

    The same input and config give the same bytes. When they made the output that is there, nothing is done and the report
    has `already_done`. Dropped files and pieces are counted by reason. Raises `DataError` when the input is missing or has
    no usable sample, and when the output holds anything else.
    """
    if not config.input or not config.output:
        raise DataError("prepare.input and prepare.output must be set")
    root, output = Path(config.input), Path(config.output).resolve()
    if not root.exists():
        raise DataError(f"{root}: no such file or directory")
    if output.is_mount():
        raise DataError(f"{output}: is a mount point; name a directory below it")  # it appears by renaming
    tally = Tally()
    sources = list_sources(root, tally)
    captions = Captions(root if root.is_dir() else root.parent, sources, tally)
    plan = {"config": _what_matters(config), "input": _fingerprint(sources, captions)}
    if _is_done(output, plan):
        progress(len(sources), len(sources), "already prepared")
        return {**json.loads((output / REPORT).read_text(encoding="utf-8")), "already_done": True}
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        with ShardWriter(partial, config.samples_per_shard) as writer:
            for done, source in enumerate(sources):
                progress(done, len(sources), source.name)
                for sample in _samples(source, captions, config, tally):
                    writer.write(sample)
        progress(len(sources), len(sources), "")
        if not writer.samples:
            raise DataError(f"{root}: no usable sample in {tally.sources} files ({describe(tally.dropped)})")
        report = tally.report(writer.shards)
        for name, content in ((REPORT, report), (PLAN, plan)):
            text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
            (partial / name).write_text(text + "\n", encoding="utf-8")
        sync_directory(partial)
        partial.replace(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {**report, "already_done": False}


def _what_matters(config: PrepareConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name not in ("input", "output")}


def _is_done(output: Path, plan: dict[str, Any]) -> bool:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        found = json.loads((output / PLAN).read_text(encoding="utf-8"))
        changed = [f"{name} {found['config'].get(name)} -> {value}" for name, value in plan["config"].items()
                   if found["config"].get(name) != value]  # fmt: skip
        changed += ["the input's files or captions"] * (found["input"] != plan["input"])
    except (OSError, ValueError, KeyError, AttributeError):
        raise DataError(f"{output}: is there and not made by prepare; choose another output") from None
    if changed:
        raise DataError(
            f"{output}: made from something else ({', '.join(changed)}); choose another output or delete it"
        )
    return True


def list_sources(root: Path, tally: Tally) -> list[Source]:
    """Videos and images by their suffix, in the order of their names; hidden files are passed over."""
    if root.is_dir():
        files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    else:
        files = {root.name: root}
    slugs: dict[str, str] = {}
    for name, path in sorted(files.items()):
        if any(part.startswith(".") for part in name.split("/")) or name == CAPTIONS or path.suffix.lower() == ".txt":
            continue
        tally.sources += 1
        if not name.isprintable():
            tally.drop("not a printable UTF-8 name", ascii(name))
        elif path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
            slugs[name] = re.sub(r"[^A-Za-z0-9_-]+", "-", name.rsplit(".", 1)[0]).strip("-")
        else:
            tally.drop("not a video or image by its name", name)
    uses = Counter(slugs.values())
    for name, slug in slugs.items():
        if uses[slug] > 1 or not 0 < len(slug) <= 60:  # a key must fit into a tar header
            slugs[name] = f"{slug[:50]}-{xxhash.xxh3_64_hexdigest(name.encode())[:8]}".strip("-")
    return [Source(files[name], name, slug) for name, slug in slugs.items()]


class Captions:
    """The caption of a source: NAME.txt beside it, or lines {"file", "caption"} of captions.jsonl in the input directory.

    A line may have "start" and "end" in seconds: it then describes that part of the video, before any other caption. It may
    have "label", the number of the file's class, for models that are conditioned on one.
    """

    def __init__(self, root: Path, sources: list[Source], tally: Tally) -> None:
        self.labels: dict[str, int] = {}
        self._whole: dict[str, str] = {}
        self._parts: dict[str, list[tuple[float, float, str]]] = {}
        names = {source.name for source in sources}
        path = root / CAPTIONS
        lines = path.read_bytes().splitlines() if path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                name, text = str(entry["file"]), " ".join(entry["caption"].split())
                start, end = float(entry.get("start", 0)), float(entry.get("end", float("inf")))
                label = int(entry.get("label", -1))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                tally.drop(f"unreadable line of {CAPTIONS}", f"line {number}")
                continue
            if name in names and label >= 0:
                self.labels[name] = label
            if name not in names:
                tally.drop("caption without file", name)
            elif "start" in entry or "end" in entry:
                self._parts.setdefault(name, []).append((start, end, text))
            else:
                self._whole[name] = text
        for source in sources:
            sidecar = source.path.with_suffix(".txt")
            if sidecar.is_file():
                try:
                    self._whole[source.name] = " ".join(sidecar.read_text(encoding="utf-8").split())
                except ValueError:
                    tally.drop("caption is not UTF-8", source.name)

    def has(self, source: Source) -> bool:
        return bool(self._whole.get(source.name) or self._parts.get(source.name))

    def at(self, source: Source, seconds: float) -> str:
        """For what happens at that time; empty where nothing is known."""
        for start, end, text in self._parts.get(source.name, []):
            if start <= seconds < end:
                return text
        return self._whole.get(source.name, "")

    def of(self, source: Source) -> str:
        """All that is known of a source, for comparing."""
        label = [self.labels[source.name]] if source.name in self.labels else []
        return json.dumps([self._whole.get(source.name), self._parts.get(source.name), *label])


def _fingerprint(sources: list[Source], captions: Captions) -> str:
    """Of names, captions, sizes, and the first and last 64 KiB: whoever copies the input elsewhere finds the same."""
    state = xxhash.xxh3_64()
    for source in sources:
        state.update(f"{source.name}\0{captions.of(source)}\0".encode())
        try:
            with source.path.open("rb") as file:
                state.update(file.read(1 << 16))
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - (1 << 16)))
                state.update(file.read() + f"\0{size}\0".encode())
        except OSError:
            state.update(b"unreadable\0")
    return state.hexdigest()


def _samples(source: Source, captions: Captions, config: PrepareConfig, tally: Tally) -> Iterator[dict[str, Any]]:
    """The samples of one file, for `ShardWriter.write`."""
    if not captions.has(source):
        tally.drop("no caption", source.name)
        return
    try:
        pieces = _picture(source, config) if is_image(source.path) else _clips(source, config, tally)
        for start, content, about in pieces:
            what = f"{source.name} at frame {start}"
            caption = captions.at(source, (start + about["frames"] / 2) / (about["fps"] or 1))
            if about["kind"] == "video" and about["frames"] < config.min_frames:
                tally.drop("too short", what)
            elif not caption:
                tally.drop("no caption", what)
            else:
                tally.samples[about["kind"]] += 1
                tally.sizes[f"{about['width']}x{about['height']}"] += 1
                tally.seconds += about["frames"] / about["fps"] if about["fps"] else 0
                yield {
                    "__key__": f"{source.slug}-{start:06d}",
                    "jpg" if about["kind"] == "image" else "mp4": content,
                    "txt": caption,
                    **({"cls": str(captions.labels[source.name])} if source.name in captions.labels else {}),
                    "json": {**about, "source": source.name, "start": start},
                }
    except Undecodable as error:
        tally.drop("undecodable", f"{source.name} ({error})")
    except OSError as error:
        tally.drop("unreadable file", f"{source.name} ({error.strerror})")


def _picture(source: Source, config: PrepareConfig) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    picture = load_image(source.path)
    height, width = bounded_size(picture.height, picture.width, config.height_max)
    content = BytesIO()
    encode_image(np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS)), content)
    yield 0, content.getvalue(), {"kind": "image", "frames": 1, "fps": 0.0, "height": height, "width": width}


def _clips(source: Source, config: PrepareConfig, tally: Tally) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """One pass: (first frame, mp4, metadata) of each piece, a piece ending at a shot change or after clip_seconds.

    Holds one frame and the encoder's few, however long the video.
    """
    with VideoReader(source.path) as reader:
        height, width = bounded_size(reader.height, reader.width, config.height_max)
        about = {"kind": "video", "fps": reader.fps, "height": height, "width": width}
        longest = max(1, int(config.clip_seconds * reader.fps + 1e-6))
        picture, thumbnail = Scaler(reader, height, width), Scaler(reader, *THUMBNAIL)
        content, previous, start = BytesIO(), None, 0
        clip = Mp4Writer(content, fps=reader.fps, height=height, width=width, crf=config.crf)
        for number, frame in enumerate(reader):
            colours = to_hsv(thumbnail(frame))
            new_shot = previous is not None and content_change(previous, colours) > config.shot_threshold
            previous = colours
            if new_shot or clip.frames == longest:
                clip.close()
                yield start, content.getvalue(), {**about, "frames": clip.frames}
                content, start = BytesIO(), number
                clip = Mp4Writer(content, fps=reader.fps, height=height, width=width, crf=config.crf)
            clip.add(picture(frame))
        clip.close()
        yield start, content.getvalue(), {**about, "frames": clip.frames}
        if reader.damage:
            tally.drop("truncated or damaged", f"{source.name} ({reader.damage})")


def bounded_size(height: int, width: int, side: int) -> tuple[int, int]:
    """The same shape with the shorter side at most `side`, rounded to even numbers. Raises `Undecodable` if too small."""
    if min(height, width) < SIDE_MIN:
        raise Undecodable(f"{width}x{height} pixels")
    ratio = min(1.0, side / min(height, width))
    return 2 * round(height * ratio / 2), 2 * round(width * ratio / 2)


def to_hsv(picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] RGB -> float32 [H, W, 3] hue (0 to 180), saturation, value (0 to 255)."""
    return np.asarray(Image.fromarray(picture).convert("HSV"), np.float32) * np.array([180 / 255, 1, 1], np.float32)


def content_change(before: np.ndarray, after: np.ndarray) -> float:
    """Mean absolute difference of two HSV pictures, the measure of PySceneDetect's ContentDetector (threshold there: 27)."""
    return float(np.abs(after - before).mean())
