"""uint8 RGB arrays [T, H, W, 3] to files: H.264 in MP4, JPEG, GIF, and sheets of frames."""

from __future__ import annotations

from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.codec.context import Flags
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from PIL import Image, ImageDraw, ImageFont

SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
BT709 = 1  # the code of ITU-T H.273 for matrix, primaries and transfer alike


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
