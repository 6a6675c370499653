"""Video and image files to uint8 RGB arrays [T, H, W, 3], and back.

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
from typing import Any, BinaryIO, Literal, Self

import av
import numpy as np
from av.codec.context import Flags
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from PIL import Image, ImageDraw, ImageFont, ImageOps

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".ogv", ".gif"}
)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
SIDE_MAX = 16384  # pixels: a header that claims more is refused
PIXELS_MAX = 1 << 26

# Playlist formats (HLS, concat, DASH) are left out on purpose: they make FFmpeg open other files and addresses.
CONTAINERS = "mov,matroska,webm,avi,mpeg,mpegts,flv,ogg,gif,h264,hevc,ivf,yuv4mpegpipe"
SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
BT709 = 1  # the code of ITU-T H.273 for matrix, primaries and transfer alike


class Undecodable(ValueError):
    """The bytes are no video or image that can be used. The message is the reason, without the file's name."""


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


def decode(source: Path | bytes, *, start: int = 0, frames: int, height: int, width: int) -> np.ndarray:
    """Exactly the frames [start, start + frames) as uint8 [T, H, W, 3], resized to cover (height, width) and cropped.

    The crop is the centre. Decodes from the first frame, so that frame numbers are exact in every container: this is
    for clips of seconds.
    Raises `Undecodable`, also where the file has fewer frames.
    """
    clip = np.empty((frames, height, width, 3), np.uint8)
    if is_image(source):
        if start != 0 or frames != 1:
            raise Undecodable(f"an image has one frame, asked for {start}..{start + frames}")
        clip[0] = np.asarray(ImageOps.fit(load_image(source), (width, height), method=Image.Resampling.BICUBIC))
        return clip
    with VideoReader(source) as reader:
        ratio = max(height / reader.height, width / reader.width)
        cover_height, cover_width = max(height, round(reader.height * ratio)), max(width, round(reader.width * ratio))
        top, left = (cover_height - height) // 2, (cover_width - width) // 2
        scale = Scaler(reader, cover_height, cover_width)
        found = 0
        for frame in islice(reader, start, start + frames):
            clip[found] = scale(frame)[top : top + height, left : left + width]
            found += 1
    if found < frames:
        raise Undecodable(f"too few frames: {found} of {frames} from frame {start} on")
    return clip


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
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return picture.convert("RGB")
    except Undecodable:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Undecodable(f"no readable image ({str(error).splitlines()[0]})") from error


def check_size(height: int, width: int) -> None:
    if not (0 < height <= SIDE_MAX and 0 < width <= SIDE_MAX and height * width <= PIXELS_MAX):
        raise Undecodable(f"{width}x{height} pixels (at most {SIDE_MAX} a side and {PIXELS_MAX} in all)")


class VideoReader:
    """One pass over the good frames of a video, in display order, one frame in memory at a time.

    What cannot be decoded before the first good frame is skipped. After it, the first damage ends the video, and
    `damage` says what it was, so a truncated file yields its beginning; up to a few B frames before the damage may show
    it. Raises `Undecodable` if there is no good frame.
    """

    height: int  # as shown
    width: int
    fps: float
    damage: str | None

    def __init__(self, source: Path | bytes) -> None:
        self.damage = None
        limits = {"max_pixels": str(PIXELS_MAX)}
        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file", **limits}
        try:
            file = BytesIO(source) if isinstance(source, bytes) else f"file:{source}"
            self._container = av.open(file, "r", options=options, metadata_errors="replace")
        except FFmpegError as error:
            raise Undecodable(f"no readable video ({error.strerror})") from error
        try:
            if not self._container.streams.video:
                raise Undecodable("no video stream")
            self._stream = self._container.streams.video[0]
            if self._stream.codec_context is None:
                raise Undecodable("no decoder for its codec")
            check_size(self._stream.height, self._stream.width)
            self._stream.codec_context.options = limits  # holds for a size that changes midway too
            self._stream.thread_count = 1
            rate = self._stream.average_rate or self._stream.guessed_rate
            if not rate:
                raise Undecodable("no frame rate")
            self.fps = float(rate)
            self._frames = self._good_frames()
            first = next(self._frames, None)
            if first is None:
                raise Undecodable("no frame can be decoded")
            self._first = first
            self.turn = Turn.of(first)
            shown_width = round(first.width * (self._stream.sample_aspect_ratio or 1))
            check_size(first.height, shown_width)
            self.height, self.width = (shown_width, first.height) if self.turn.swap else (first.height, shown_width)
        except BaseException:
            self._container.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[av.VideoFrame]:
        yield self._first
        yield from self._frames

    def _good_frames(self) -> Iterator[av.VideoFrame]:
        packets = self._container.demux(self._stream)
        whole_packets, started = 0, False
        while self.damage is None:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                if packet.is_corrupt:
                    raise Undecodable("a packet is cut short")
                frames = packet.decode()
                if packet.size or packet.dts is not None:
                    whole_packets += 1
                elif whole_packets < self._claimed_frames():
                    # The last, empty packet flushes the decoder. In a cut-off file, some of what it gives belongs after
                    # frames that were cut off.
                    raise Undecodable("the file ends before its header says")
            except (FFmpegError, Undecodable) as error:
                if started:
                    self.damage = error.strerror if isinstance(error, FFmpegError) else str(error)
                continue
            for frame in frames:
                if frame.is_corrupt and started:
                    self.damage = "a damaged frame"
                    return
                if not frame.is_corrupt:
                    started = True
                    yield frame

    def _claimed_frames(self) -> float:
        """At least so many packets are there if the file is whole; 0 where its header does not say."""
        if self._stream.frames:
            return self._stream.frames
        if (
            self._container.duration is None or len(self._container.streams) > 1
        ):  # the sound may be what lasts that long
            return 0
        return 0.95 * self._container.duration / av.time_base * self.fps


@dataclass(frozen=True)
class Turn:
    """One of the eight ways in which a stored frame is shown: rows and columns swapped first, then mirrored."""

    swap: bool
    flip_rows: bool
    flip_columns: bool

    @classmethod
    def of(cls, frame: av.VideoFrame) -> Turn:
        """From the display matrix (ISO/IEC 14496-12, 8.2.2): x shown = a·x + c·y, y shown = b·x + d·y, fixed point."""
        data: Any = frame.side_data.get("DISPLAYMATRIX")
        if data is None:
            return cls(False, False, False)
        a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(data), np.int32)[:5])
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(True, b < 0, c < 0)
        return cls(False, d < 0, a < 0)

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """[H, W, 3] as stored -> [H, W, 3] as shown."""
        if self.swap:
            picture = picture.transpose(1, 0, 2)
        return picture[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


class Scaler:
    """Frames of `reader` as RGB of (height, width) as shown; keeps the state of FFmpeg's scaler from frame to frame."""

    def __init__(self, reader: VideoReader, height: int, width: int) -> None:
        self._turn = reader.turn
        self._stored = (width, height) if self._turn.swap else (height, width)
        self._scaler = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        height, width = self._stored
        try:
            picture = self._scaler.reformat(
                frame, width=width, height=height, format="rgb24", interpolation=SCALING, threads=1
            )
        except (FFmpegError, ValueError) as error:
            raise Undecodable(f"no way from {frame.format.name} to RGB") from error
        return self._turn(picture.to_ndarray())


class Mp4Writer:
    """H.264 in MP4, frame by frame; the same frames give the same bytes (one thread, no dates or version strings).

    fps in frames a second; height and width even (4:2:0 colour). Colours are BT.709 and say so.
    """

    def __init__(self, target: Path | BinaryIO, *, fps: float, height: int, width: int, crf: int = 18) -> None:
        if height % 2 or width % 2:
            raise ValueError(f"mp4 needs an even height and width, not {height}x{width}")
        self.frames = 0
        self._scaler = VideoReformatter()
        self._container = av.open(
            str(target) if isinstance(target, Path) else target, "w", format="mp4", options={"fflags": "+bitexact"}
        )
        rate = Fraction(fps).limit_denominator(1001)
        # With x264's macroblock tree the same frames give other bytes now and then, depending on what memory held before
        # (seen with libx264 of PyAV 18; its assembly is to blame, for without that, too, the bytes are the same).
        options = {"preset": "veryfast", "crf": str(crf), "mbtree": "0"}
        self._stream: Any = self._container.add_stream("libx264", rate=rate, options=options)
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        context = self._stream.codec_context
        context.thread_count = 1
        context.flags |= int(Flags.bitexact)
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = int(ColorRange.MPEG)

    def add(self, frame: np.ndarray) -> None:
        """uint8 [H, W, 3]."""
        picture = self._scaler.reformat(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"),
            format="yuv420p",
            interpolation=SCALING,
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )
        picture.pts = self.frames
        picture.time_base = 1 / self._stream.codec_context.framerate
        self._container.mux(self._stream.encode(picture))
        self.frames += 1

    def close(self) -> None:
        self._container.mux(self._stream.encode())
        self._container.close()


def encode_mp4(frames: np.ndarray, fps: float, target: Path | BinaryIO, *, crf: int = 18) -> None:
    """uint8 [T, H, W, 3] with even H and W -> H.264 in MP4, deterministic bytes."""
    _, height, width, _ = frames.shape
    writer = Mp4Writer(target, fps=fps, height=height, width=width, crf=crf)
    for frame in frames:
        writer.add(frame)
    writer.close()


def encode_image(frame: np.ndarray, target: Path | BinaryIO, quality: int = 95) -> None:
    """uint8 [H, W, 3] -> JPEG."""
    Image.fromarray(frame).save(target, format="JPEG", quality=quality)


def encode_gif(frames: np.ndarray, fps: float) -> bytes:
    """uint8 [T, H, W, 3] -> an endless animated GIF (for TensorBoard). Viewers do not go beyond 50 frames a second."""
    pictures = [Image.fromarray(frame) for frame in frames]
    target = BytesIO()
    pictures[0].save(
        target, "GIF", save_all=True, append_images=pictures[1:], duration=max(20, round(1000 / fps)), loop=0
    )
    return target.getvalue()


def contact_sheet(
    videos: list[np.ndarray], captions: list[str], path: Path, columns: int = 6, *, cell: int = 160, gap: int = 8
) -> None:
    """A PNG with one row a video: at most `columns` evenly spaced frames, `cell` pixels high, and the caption beneath.

    videos: uint8 [T, H, W, 3] each, of any size. Captions are cut to the sheet's width.
    """
    text_height = 22
    rows = [_row_of_frames(video, columns, cell) for video in videos]
    width = max(640, gap + max(sum(frame.width + gap for frame in row) for row in rows))  # room for a caption
    sheet = Image.new("RGB", (width, gap + len(rows) * (cell + text_height + gap)), (24, 24, 27))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=14)
    top = gap
    for row, caption in zip(rows, captions, strict=True):
        left = gap
        for frame in row:
            sheet.paste(frame, (left, top))
            left += frame.width + gap
        draw.text((gap, top + cell + 3), _cut_to(caption, width - 2 * gap, font), font=font, fill=(228, 228, 231))
        top += cell + text_height + gap
    sheet.save(path, format="PNG")


def _row_of_frames(video: np.ndarray, columns: int, cell: int) -> list[Image.Image]:
    count, height, width, _ = video.shape
    chosen = np.linspace(0, count - 1, min(columns, count)).round().astype(int)
    method = Image.Resampling.BICUBIC if height < cell else Image.Resampling.LANCZOS
    return [Image.fromarray(video[index]).resize((round(width * cell / height), cell), method) for index in chosen]


def _cut_to(text: str, width: int, font: Any) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
