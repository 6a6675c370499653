"""What is measured of a piece of video or of an image, to keep or drop it by.

Sums are taken in integers, so that every machine finds the same number.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from data_pipelines.errors import DataError
from data_pipelines.prepare.config import Limits

# What FFmpeg's blackdetect calls black: this share of the pixels at most a tenth of white.
BLACK_SHARE, BLACK_LEVEL = 0.98, 25
STILL = 0.255  # mean change of a pixel (of 255) up to which FFmpeg's freezedetect sees the same frame
SHARPNESS_EVERY = 8  # frames
HASH_FRAMES = 4
HASH_BITS = 63  # of a frame
DIGITS = 4


class Meter:
    """Takes the frames of one piece, one by one; holds their thumbnails only."""

    def __init__(self) -> None:
        self._thumbnails: list[np.ndarray] = []
        self._sharpness: list[float] = []

    def add(self, thumbnail: np.ndarray, picture: np.ndarray) -> None:
        """uint8 [h, w, 3] of one size for all pieces, and [H, W, 3] as it will be stored."""
        if len(self._thumbnails) % SHARPNESS_EVERY == 0:
            self._sharpness.append(sharpness(to_grey(picture)))
        self._thumbnails.append(thumbnail)

    def scores(self, fps: float) -> dict[str, float]:
        """fps: 0 for an image, which has sharpness only."""
        clear = {"sharpness": round(sum(self._sharpness) / len(self._sharpness), DIGITS)}
        if not fps:
            return clear
        grey = np.stack([to_grey(thumbnail) for thumbnail in self._thumbnails])
        found = {
            "seconds": len(grey) / fps,
            "black": black_share(grey),
            "static": static_share(grey),
            "motion": motion(grey, fps),
        }
        return {name: round(value, DIGITS) for name, value in found.items()} | clear

    def signature(self) -> list[int]:
        """Perceptual hashes of frames spread over the piece, and its mean colour as one number, see `duplicates`."""
        count = len(self._thumbnails)
        chosen = [self._thumbnails[(2 * i + 1) * count // (2 * HASH_FRAMES)] for i in range(HASH_FRAMES)]
        red, green, blue = (int(np.stack(chosen)[..., i].mean(dtype=np.float64)) for i in range(3))
        return [*(perceptual_hash(to_grey(thumbnail)) for thumbnail in chosen), red << 16 | green << 8 | blue]


def to_grey(picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] RGB -> uint8 [H, W] by ITU-R BT.601."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(picture)).convert("L"))


def black_share(grey: np.ndarray) -> float:
    """uint8 [T, H, W] -> the share of black frames."""
    dark = (grey <= BLACK_LEVEL).sum((1, 2), dtype=np.int64)
    return float((dark >= BLACK_SHARE * grey[0].size).sum()) / len(grey)


def static_share(grey: np.ndarray) -> float:
    """uint8 [T, H, W] -> the share of steps from frame to frame that change nothing; 1 where there is no step."""
    changes = _changes(grey)
    return float((changes <= STILL * grey[0].size).sum()) / len(changes) if len(changes) else 1.0


def motion(grey: np.ndarray, fps: float) -> float:
    """uint8 [T, H, W] -> mean speed in picture widths a second, by the normal flow: Σ|change in time| / Σ|slope in space|.

    The slope is |d/dx| + |d/dy|, and only motion along it is seen: upright stripes that move sideways have their true speed,
    a picture with as many level edges half of it. Source: Horn & Schunck 1981, the constraint I_x u + I_y v + I_t = 0.
    """
    middle = grey[:, 1:-1, 1:-1]
    change = int(_changes(middle).sum())
    wide = grey[:-1].astype(np.int16)
    slope = np.abs(wide[:, 1:-1, 2:] - wide[:, 1:-1, :-2]).sum(dtype=np.int64)
    slope += np.abs(wide[:, 2:, 1:-1] - wide[:, :-2, 1:-1]).sum(dtype=np.int64)
    return 2 * change / int(slope) * fps / grey.shape[2] if slope else 0.0


def _changes(grey: np.ndarray) -> np.ndarray:
    """uint8 [T, H, W] -> int64 [T - 1], sums of absolute differences from frame to frame."""
    return np.abs(np.diff(grey.astype(np.int16), axis=0)).sum((1, 2), dtype=np.int64)


def sharpness(grey: np.ndarray) -> float:
    """uint8 [H, W] -> the variance of its Laplacian (Pech-Pacheco et al. 2000)."""
    wide = grey.astype(np.int16)
    laplacian = 4 * wide[1:-1, 1:-1] - wide[:-2, 1:-1] - wide[2:, 1:-1] - wide[1:-1, :-2] - wide[1:-1, 2:]
    total, squares = int(laplacian.sum(dtype=np.int64)), int(np.square(laplacian, dtype=np.int64).sum())
    return (laplacian.size * squares - total**2) / laplacian.size**2


def perceptual_hash(grey: np.ndarray) -> int:
    """uint8 [H, W] -> the signs of its lowest 8 x 8 cosine waves but the constant, as an integer of 63 bits.

    Scaling, recompression, brightness and contrast change few of them. Source: the DCT hash of pHash (Zauner 2010), with
    zero for the median.
    """
    waves = _cosines(grey.shape[0]) @ grey.astype(np.int64) @ _cosines(grey.shape[1]).T
    bits = (waves.ravel()[1:] > 0).astype(np.uint64) << np.arange(HASH_BITS, dtype=np.uint64)
    return int(bits.sum())


def _cosines(count: int) -> np.ndarray:
    """int64 [8, count], 1024 times the first waves of the DCT-II."""
    angles = np.pi * (np.arange(count) + 0.5) * np.arange(8)[:, None] / count
    return np.rint(1024 * np.cos(angles)).astype(np.int64)


def out_of_limits(scores: dict[str, float], limits: Limits) -> str | None:
    """The first reason to drop what has these scores, such as "motion too low"; a score that is not there has no limit."""
    for name, (least, largest) in limits.items():
        if name in scores and least is not None and scores[name] < least:
            return f"{name} too low"
        if name in scores and largest is not None and scores[name] > largest:
            return f"{name} too high"
    return None


class Scorer:
    """Somebody's model (aesthetics, text in the picture, ...) as a TorchScript file, run on the CPU.

    It takes float32 [F, 3, H, W], frames of a piece in RGB from 0 to 1 at the size they are stored in, and gives one number,
    or one a frame, of which the mean is taken. Raises `DataError` where it does not.
    """

    FRAMES = 3

    def __init__(self, name: str, path: str) -> None:
        import torch  # only who has a scorer pays for it

        torch.set_num_threads(1)
        self.name, self.path = name, path
        try:
            self._model = torch.jit.load(path, map_location="cpu").eval()
        except (OSError, RuntimeError, ValueError) as error:
            raise DataError(f"prepare.scorers.{name}={path}: {_first_line(error)}") from None

    def __call__(self, frames: np.ndarray) -> float:
        """uint8 [F, H, W, 3]."""
        import torch

        try:
            with torch.inference_mode():
                pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255  # [F, 3, H, W]
                score = float(torch.as_tensor(self._model(pixels)).double().mean())
        except (RuntimeError, ValueError, TypeError) as error:
            raise DataError(f"prepare.scorers.{self.name}={self.path}: {_first_line(error)}") from None
        if not np.isfinite(score):
            raise DataError(f"prepare.scorers.{self.name}={self.path}: gives {score}")
        return round(score, DIGITS)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
