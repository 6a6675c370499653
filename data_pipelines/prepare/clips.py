"""One video or image -> the pieces that may become samples: cut at shot changes, bounded in length and size, measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.prepare.captions import Known
from data_pipelines.prepare.clip_scores import Meter, Scorer, out_of_limits
from data_pipelines.prepare.config import SIDE_MIN, PrepareConfig
from data_pipelines.video.files import Scaler, is_image, load_image
from data_pipelines.video.reader import Undecodable, VideoReader
from data_pipelines.video.write import Mp4Writer, encode_image

# Pixels, height and width, of the pictures in which shot changes are looked for and motion measured.
THUMBNAIL = (36, 64)


@dataclass(frozen=True)
class Piece:
    """A clip, or a picture, that was cut out of a source and encoded."""

    start: int  # its first frame in the source, whose rate is made steady
    content: bytes  # mp4 or jpg
    about: dict[str, Any]  # kind, frames, fps, height, width
    scores: dict[str, float]
    signature: list[int]  # see `Meter.signature`


def cut(
    content: Path | bytes, known: Known, config: PrepareConfig, drop: Callable[[str, str], None]
) -> Iterator[Piece]:
    """The pieces of a source, in order. Holds one frame and the encoder's few, however long the video.

    drop(reason, where) counts a source that is out of the limits and damage that ends it early; where is empty for the whole
    of it. Raises `Undecodable` and OSError.
    """
    return _picture(content, config, drop) if is_image(content) else _clips(content, known, config, drop)


def _picture(content: Path | bytes, config: PrepareConfig, drop: Callable[[str, str], None]) -> Iterator[Piece]:
    picture = load_image(content)
    given = _shape_scores(picture.height, picture.width)
    if reason := out_of_limits(given, config.limits):
        drop(reason, "")
        return
    height, width = bounded_size(picture.height, picture.width, config.height_max)
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))
    target = BytesIO()
    encode_image(pixels, target)
    meter = Meter()
    meter.add(np.asarray(picture.resize(THUMBNAIL[::-1], Image.Resampling.BOX)), pixels)
    about = {"kind": "image", "frames": 1, "fps": 0.0, "height": height, "width": width}
    yield Piece(0, target.getvalue(), about, given | meter.scores(0), meter.signature())


def _clips(
    content: Path | bytes, known: Known, config: PrepareConfig, drop: Callable[[str, str], None]
) -> Iterator[Piece]:
    """One pass: a piece ends at a shot change, after clip_seconds, and where `known` says so. Drops HDR and interlaced video."""
    with VideoReader(content) as reader:
        if reader.unlike:
            drop(reader.unlike, "")
            return
        given = _shape_scores(reader.height, reader.width) | {"fps": round(reader.fps, 4)}
        if reason := out_of_limits(given, config.limits):
            drop(reason, "")
            return
        height, width = bounded_size(reader.height, reader.width, config.height_max)
        longest = max(1, int(config.clip_seconds * reader.fps + 1e-6))
        picture, thumbnail = Scaler(reader, height, width), Scaler(reader, *THUMBNAIL)
        edges, end, wanted = known.edges(reader.fps), known.end(reader.fps), known.wanted(0, reader.fps)
        clip, previous = None, None
        for number, frame in enumerate(reader.steadily()):
            if number >= end:
                break
            small = thumbnail(frame)
            colours = to_hsv(small)
            new_shot = previous is not None and content_change(previous, colours) > config.shot_threshold
            previous = colours
            if number in edges:
                wanted = known.wanted(number, reader.fps)
            if clip is not None and (new_shot or clip.frames == longest or number in edges):
                yield clip.finish(given)
                clip = None
            if wanted:
                clip = clip or _Clip(number, reader.fps, height, width, config.crf)
                clip.add(small, picture(frame))
        if clip is not None:
            yield clip.finish(given)
        if reader.damage:
            drop("truncated or damaged", f"({reader.damage})")


class _Clip:
    """A piece of video that is being written."""

    def __init__(self, start: int, fps: float, height: int, width: int, crf: int) -> None:
        self._start, self._fps, self._height, self._width = start, fps, height, width
        self._target, self._meter = BytesIO(), Meter()
        self._writer = Mp4Writer(self._target, fps=fps, height=height, width=width, crf=crf)

    @property
    def frames(self) -> int:
        return self._writer.frames

    def add(self, thumbnail: np.ndarray, picture: np.ndarray) -> None:
        self._writer.add(picture)
        self._meter.add(thumbnail, picture)

    def finish(self, given: dict[str, float]) -> Piece:
        self._writer.close()
        about = {"kind": "video", "frames": self.frames, "fps": self._fps, "height": self._height, "width": self._width}
        scores = given | self._meter.scores(self._fps)
        return Piece(self._start, self._target.getvalue(), about, scores, self._meter.signature())


def frames_to_score(piece: Piece) -> np.ndarray:
    """uint8 [F, H, W, 3], frames spread over a piece, for a `Scorer`."""
    if piece.about["kind"] == "image":
        return np.asarray(load_image(piece.content))[None]
    count = piece.about["frames"]
    chosen = {(2 * i + 1) * count // (2 * Scorer.FRAMES) for i in range(Scorer.FRAMES)}
    with VideoReader(piece.content) as reader:
        scale = Scaler(reader, reader.height, reader.width)
        return np.stack([scale(frame) for number, frame in enumerate(reader) if number in chosen])


def _shape_scores(height: int, width: int) -> dict[str, float]:
    return {"side": float(min(height, width)), "aspect": round(width / height, 4)}


def bounded_size(height: int, width: int, side: int) -> tuple[int, int]:
    """The same shape with the shorter side at most `side`, rounded to even numbers. Raises `Undecodable` if too small."""
    if min(height, width) < SIDE_MIN:
        raise Undecodable(f"{width}x{height} pixels")
    ratio = min(1.0, side / min(height, width))
    return 2 * round(height * ratio / 2), 2 * round(width * ratio / 2)


def to_hsv(picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] RGB -> uint8 [H, W, 3] hue, saturation, value, each from 0 to 255."""
    return np.asarray(Image.fromarray(picture).convert("HSV"))


def content_change(before: np.ndarray, after: np.ndarray) -> float:
    """The measure of PySceneDetect's ContentDetector (threshold there: 27), from two pictures of `to_hsv`.

    The mean of three mean absolute differences: of hue from 0 to 180 as in OpenCV, saturation and value from 0 to 255.
    """
    hue, saturation, value = np.abs(after.astype(np.int16) - before).sum((0, 1), dtype=np.int64).tolist()
    return (hue * 180 / 255 + saturation + value) / (3 * before[..., 0].size)
