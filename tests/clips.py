"""Small synthetic clips for tests, with what is needed to recognise a frame after it went through a codec."""

import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 6


def numbered(frames: int, height: int = 64, width: int = 96, first: int = 0) -> np.ndarray:
    """uint8 [T, H, W, 3], frame t showing first + t (< 64) as six black or white bars, most significant at the left."""
    clip = np.zeros((frames, height, width, 3), np.uint8)
    for t in range(frames):
        for bit in range(BITS):
            if (first + t) >> (BITS - 1 - bit) & 1:
                clip[t, :, bit * width // BITS : (bit + 1) * width // BITS] = 255
    return clip


def read_number(frame: np.ndarray) -> int:
    """The number that a frame of `numbered` shows, at any size."""
    middle = frame[frame.shape[0] // 2].mean(-1)
    centres = [int((bit + 0.5) * len(middle) / BITS) for bit in range(BITS)]
    return sum(int(middle[centre] > 127) << (BITS - 1 - bit) for bit, centre in enumerate(centres))


def quadrants(frames: int = 4, height: int = 64, width: int = 96) -> np.ndarray:
    """uint8 [T, H, W, 3]: red top left, green top right, blue bottom left, white bottom right."""
    clip = np.empty((frames, height, width, 3), np.uint8)
    clip[:, : height // 2, : width // 2] = (255, 0, 0)
    clip[:, : height // 2, width // 2 :] = (0, 255, 0)
    clip[:, height // 2 :, : width // 2] = (0, 0, 255)
    clip[:, height // 2 :, width // 2 :] = (255, 255, 255)
    return clip


def corner_colours(frame: np.ndarray) -> str:
    """The colours of top left, top right, bottom left, bottom right, as letters of "rgbw"."""
    height, width, _ = frame.shape
    names = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 1): "w"}
    places = [(height // 4, width // 4), (height // 4, 3 * width // 4)]
    places += [(3 * height // 4, width // 4), (3 * height // 4, 3 * width // 4)]
    return "".join(names[tuple(int(value > 127) for value in frame[y, x])] for y, x in places)


def noise(frames: int, height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray:
    """uint8 [T, H, W, 3] of smooth moving blobs: every frame differs and costs the codec something."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (frames, height // 8, width // 8, 3), dtype=np.uint8)
    return coarse.repeat(8, 1).repeat(8, 2)


def video_bytes(
    frames: np.ndarray,
    fps: int = 24,
    *,
    container: str = "mp4",
    codec: str = "libx264",
    rotation: int = 0,
    mirrored: bool = False,
    pixel_aspect: Fraction | None = None,
    settings: dict[str, str] | None = None,
    times: list[int] | None = None,
) -> bytes:
    """frames uint8 [T, H, W, 3] encoded by PyAV alone, with FFmpeg's settings. An mp4 has its header first, so a cut-off file
    still opens. times: when each is shown, in units of 1 / fps seconds; one after the other if left out."""
    options = {"movflags": "faststart"} if container == "mp4" else {}
    quality = {"crf": "10", "mbtree": "0"} if codec == "libx264" else {}  # mbtree: see Mp4Writer
    with tempfile.NamedTemporaryFile() as file, av.open(file.name, "w", format=container, options=options) as output:
        stream = output.add_stream(codec, rate=fps, options=quality | (settings or {}))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        if rotation or mirrored:
            stream.set_display_rotation(rotation, hflip=mirrored)
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = times[number] if times else None, Fraction(1, fps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
        output.close()
        return Path(file.name).read_bytes()


def write_clip(path: Path, frames: np.ndarray, caption: str | None = None, fps: int = 24) -> Path:
    """A video file, and its caption beside it where one is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(video_bytes(frames, fps))
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path
