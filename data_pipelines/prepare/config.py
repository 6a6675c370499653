"""The config of `prepare`, beside what it may measure."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field

SIDE_MIN = 16  # pixels

Limits = dict[str, tuple[float | None, float | None]]  # a score -> its least and largest value; null is no limit

# Scores of a piece, with the limits that hold where none is given. Those of the file alone come first.
KEEP: Limits = {
    "side": (None, None),  # pixels: the shorter side of the file's picture, as shown
    "aspect": (None, None),  # width / height
    "fps": (None, None),  # frames a second; videos only, like those that follow
    "seconds": (None, None),  # length of the piece
    "black": (None, 0.9),  # share of its frames that are black
    "static": (None, None),  # share of its frames that are as the one before; 1 is a still picture
    "motion": (None, None),  # picture widths a second
    "sharpness": (None, None),  # variance of the Laplacian of its pictures; images too
}


@dataclass(kw_only=True, frozen=True)
class PrepareConfig:
    """Raw videos and images -> shards."""

    input: str = ""  # a directory tree, one file, a webdataset, or a list of files (.parquet, .csv, .jsonl)
    output: str = ""  # a directory that does not exist yet, is empty, or holds the result of the same prepare
    root: str = ""  # what the paths of a list are relative to and must lie below; empty: the list's own directory
    clip_seconds: float = 4.0  # a longer shot is cut into pieces of this length
    min_frames: int = 17  # a shorter piece is dropped
    shot_threshold: float = 27.0  # a larger change from frame to frame begins a new shot (0 to 255)
    height_max: int = 720  # the shorter side is scaled down to this many pixels
    crf: int = 18  # H.264 quality; lower is better and larger
    keep: Limits = field(default_factory=dict)  # score: [least, largest], null for no limit; the rest stays as in KEEP
    duplicates: int = 6  # a clip is dropped if it differs from an earlier one in so few of 252 bits; -1: never
    scorers: dict[str, str] = field(default_factory=dict)  # further scores: name and TorchScript file of the model
    samples_per_shard: int = 1000
    workers: int = 1  # processes on this machine
    part: str = ""  # "0/8": the first of eight machines; empty: as SLURM's array or torchrun says, else all
    part_files: int = 64  # files that are done again where a run was killed; nothing in the result depends on it

    def __post_init__(self) -> None:
        if not self.clip_seconds > 0:
            raise ValueError(f"clip_seconds must be above 0, not {self.clip_seconds}")
        if self.height_max < SIDE_MIN:
            raise ValueError(f"height_max must be at least {SIDE_MIN}, not {self.height_max}")
        if self.min_frames < 1 or self.samples_per_shard < 1:
            raise ValueError("min_frames and samples_per_shard must be at least 1")
        if self.workers < 1 or self.part_files < 1:
            raise ValueError("workers and part_files must be at least 1")
        if not -1 <= self.duplicates <= 64:
            raise ValueError(f"duplicates must be from -1 to 64, not {self.duplicates}")
        if self.part and not (found := re.fullmatch(r"(\d+)/(\d+)", self.part)):
            raise ValueError(f"part must be like 0/8, not {self.part}")
        if self.part and found and int(found[1]) >= int(found[2]):
            raise ValueError(f"part must be from 0/{found[2]} to {int(found[2]) - 1}/{found[2]}, not {self.part}")
        for name in self.scorers:
            if name in KEEP or not re.fullmatch(r"\w+", name, re.ASCII):
                raise ValueError(f"scorers.{name}: the name of a score is made of letters and digits, and a new one")
        for name, (least, largest) in self.keep.items():
            known = [*KEEP, *self.scorers]
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise ValueError(f"keep.{name}: unknown score; did you mean {nearest}?")
            if least is not None and largest is not None and least > largest:
                raise ValueError(f"keep.{name}: {least} is above {largest}")

    @property
    def limits(self) -> Limits:
        """Of every score, in the order in which they are looked at."""
        return dict.fromkeys((*KEEP, *self.scorers), (None, None)) | KEEP | self.keep
