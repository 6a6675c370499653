"""Video and image files to uint8 RGB arrays [T, H, W, 3].

A frame is given as a player shows it: turned and mirrored by the file's display matrix (EXIF for images), with square
pixels. Files are not trusted: only the containers named here are opened, and sizes are checked before decoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from PIL import Image, ImageOps

from data_pipelines.video.reader import Undecodable, VideoReader, check_size

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".ogv", ".gif"}
)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
# Colours in full, on any CPU.
EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
UNSPECIFIED = 2  # the code of ITU-T H.273 for a matrix
LINES_709 = 720  # frames with so many, if they do not say, are BT.709, as players take them


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds. height and width are those shown (turned, square pixels); an image has one frame and fps 0."""

    kind: Literal["video", "image"]
    frames: int
    fps: float
    height: int
    width: int


def probe(source: Path | bytes) -> VideoInfo:
    """Kind, size and rate, with the frames counted by decoding them: a header may be wrong.

    Raises `Undecodable`.
    """
    if is_image(source):
        picture = load_image(source)
        return VideoInfo("image", 1, 0.0, picture.height, picture.width)
    with VideoReader(source) as reader:
        return VideoInfo("video", sum(1 for _ in reader), reader.fps, reader.height, reader.width)


def decode(
    source: Path | bytes,
    *,
    start: int = 0,
    seconds: float | None = None,
    frames: int,
    height: int,
    width: int,
    fps: float | None = None,
) -> np.ndarray:
    """The frames of `iter_frames` as one uint8 [T, H, W, 3]. Raises `Undecodable`, also where the file has fewer."""
    clip = np.empty((0, height, width, 3), np.uint8)
    chosen = iter_frames(source, start=start, seconds=seconds, frames=frames, height=height, width=width, fps=fps)
    for number, frame in enumerate(chosen):
        if number == 0:  # what cannot be decoded costs no memory
            clip = np.empty((frames, height, width, 3), np.uint8)
        clip[number] = frame
    return clip


def iter_frames(
    source: Path | bytes,
    *,
    start: int = 0,
    seconds: float | None = None,
    frames: int,
    height: int,
    width: int,
    fps: float | None = None,
) -> Iterator[np.ndarray]:
    """Exactly `frames` frames as uint8 [H, W, 3] of the centre, cropped and resized to cover (height, width).

    They are the file's own from its frame `start` on, or with `fps` those shown at the times start / fps, (start + 1) / fps,
    ...: the last one at or before each. `seconds` gives the first time instead of `start`. Times are the file's, also where
    its rate varies, from its beginning on. One frame is in memory at a time.
    Raises `Undecodable`, also where the file has fewer frames, then after the last of them.
    """
    begin = f"frame {start}" if seconds is None else f"second {seconds}"
    if is_image(source):
        if start or seconds or frames != 1:
            raise Undecodable(f"an image has one frame, asked for {frames} from {begin} on")
        yield np.asarray(ImageOps.fit(load_image(source), (width, height), method=Image.Resampling.BICUBIC))
        return
    rate = None if fps is None else Fraction(fps).limit_denominator(1001)
    time = None if seconds is None else Fraction(seconds)
    if rate and time is None:
        start, time = 0, start / rate
    found = 0
    with VideoReader(source, start=start, seconds=time) as reader:
        scale = Scaler(reader, height, width, crop=True)
        for frame in islice(reader.at_rate(time or Fraction(0), rate) if rate else reader, frames):
            yield scale(frame)
            found += 1
    if found < frames:
        raise Undecodable(f"too few frames: {found} of {frames} from {begin} on")


def is_image(source: Path | bytes) -> bool:
    """By its first bytes (JPEG, PNG, WebP), not by its name."""
    if isinstance(source, bytes):
        head = source[:12]
    else:
        with source.open("rb") as file:
            head = file.read(12)
    return head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n")) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


def load_image(source: Path | bytes) -> Image.Image:
    """The picture in RGB, turned by its EXIF orientation; transparent parts are white. Raises `Undecodable`."""
    try:
        with Image.open(
            BytesIO(source) if isinstance(source, bytes) else source, formats=("JPEG", "PNG", "WEBP")
        ) as file:
            check_size(file.height, file.width)
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I"):
                return eight_bits(picture).convert("RGB")
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return picture.convert("RGB")
    except Undecodable:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Undecodable(f"no readable image ({str(error).splitlines()[0]})") from error


def eight_bits(picture: Image.Image) -> Image.Image:
    """Of a grey picture with 16 bits a pixel the upper eight (Pillow would clip them to white); white where it is transparent."""
    grey = np.asarray(picture).astype(np.int64)
    shown = np.where(grey == picture.info.get("transparency"), 255, grey.clip(0, 65_535) >> 8)
    return Image.fromarray(shown.astype(np.uint8))


class Scaler:
    """Frames of `reader` as RGB uint8 [height, width, 3] as shown; keeps the state of FFmpeg's scaler from frame to frame.

    crop: the largest part of the centre that has the target's shape; else all of it, whatever becomes of its shape.
    """

    def __init__(self, reader: VideoReader, height: int, width: int, *, crop: bool = False) -> None:
        self._turn = reader.turn
        self._stored = (width, height) if self._turn.swap else (height, width)
        down, across = reader.height * width, reader.width * height
        kept = (Fraction(min(across, down), down), Fraction(min(across, down), across)) if crop else (Fraction(1),) * 2
        self._kept = kept[::-1] if self._turn.swap else kept  # of the stored height and width
        self._cutter = Cutter()
        self._scaler = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        height, width = self._stored
        try:
            part = self._cutter(frame, *self._kept)
            kernel = Interpolation.BICUBIC
            if (part.height, part.width) == (height, width):  # only the colour is interpolated
                kernel = Interpolation.BILINEAR
            picture = self._scaler.reformat(
                part, width=width, height=height, format="rgb24", interpolation=kernel | EXACT, threads=1,
                src_colorspace=matrix_of(frame),
            )  # fmt: skip
        except (FFmpegError, ValueError) as error:
            raise Undecodable(f"no way from {frame.format.name} to RGB") from error
        return self._turn(picture.to_ndarray())


def matrix_of(frame: av.VideoFrame) -> Colorspace | None:
    """BT.709 for large frames that name no matrix; None: what the frame names, or BT.601, as JPEG's frames (yuvj) always are."""
    large = frame.height >= LINES_709 and not frame.format.name.startswith("yuvj")
    return Colorspace.ITU709 if large and frame.colorspace == UNSPECIFIED else None


class Cutter:
    """The centre of frames, without a copy. Sides and offsets are even, since colours have half the resolution."""

    def __init__(self) -> None:
        self._graph, self._made_for = av.filter.Graph(), ""

    def __call__(self, frame: av.VideoFrame, down: Fraction, across: Fraction) -> av.VideoFrame:
        height = _even(frame.height * down) if down < 1 else frame.height
        width = _even(frame.width * across) if across < 1 else frame.width
        if (height, width) == (frame.height, frame.width):
            return frame
        source = f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1"
        source += f":colorspace={int(frame.colorspace)}:range={int(frame.color_range)}"
        if source != self._made_for:  # sizes may change midway
            self._graph, self._made_for = av.filter.Graph(), source
            self._graph.threads = 1
            top, left = (frame.height - height) // 4 * 2, (frame.width - width) // 4 * 2
            self._graph.link_nodes(
                self._graph.add("buffer", source),
                self._graph.add("crop", f"{width}:{height}:{left}:{top}"),
                self._graph.add("buffersink"),
            ).configure()
        self._graph.vpush(frame)
        return self._graph.vpull()


def _even(size: Fraction) -> int:
    return max(2, 2 * round(size / 2))
