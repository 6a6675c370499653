"""The pieces of all parts -> the shards: duplicates left out, each shard written by one process, the same bytes by any."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.prepare.duplicates import find_duplicates
from data_pipelines.prepare.parts import Tally, move, private_directory
from data_pipelines.shards.tars import CHECKSUM, ShardFile, ShardSet

SHARD_BYTES = 1 << 30  # a shard ends with the sample that reaches it


@dataclass(frozen=True)
class Kept:
    """Columns of the samples that stay, in input order, each [N]."""

    place: np.ndarray  # in the pieces
    length: np.ndarray  # bytes in the tar
    frames: np.ndarray
    fps: np.ndarray  # 0 for an image
    height: np.ndarray
    width: np.ndarray


def choose(pieces: ShardSet, signatures: np.ndarray, distance: int, tally: Tally) -> Kept:
    """Counts duplicates as dropped; signatures: uint64 [N, 5] of all samples of the pieces, in their order."""
    names = ("length", "frames", "fps", "height", "width")
    columns = [np.concatenate(column) for column in zip(*pieces.columns(*names), strict=True)]
    original = np.full(len(signatures), -1, np.int64)
    for images in (False, True):  # a picture and a video of it are two things
        here = np.flatnonzero((columns[2] == 0) == images)
        found = find_duplicates(signatures[here], distance)
        original[here] = np.where(found < 0, -1, here[found])
    for place in np.flatnonzero(original >= 0).tolist():
        if len(tally.examples.get("duplicate", ())) < 5:
            what = f"{_where(pieces, place)} (as {_where(pieces, int(original[place]))})"
            tally.drop("duplicate", what)
        else:
            tally.dropped["duplicate"] += 1
    kept = np.flatnonzero(original < 0)
    return Kept(kept, *(column[kept] for column in columns))


def _where(pieces: ShardSet, place: int) -> str:
    about = json.loads(pieces.read(place)["json"])
    return f"{about['source']} at frame {about['start']}"


def divide(kept: Kept, samples_per_shard: int) -> list[np.ndarray]:
    """The places in the pieces of each shard's samples."""
    shards, first, size = [], 0, 0
    for number, length in enumerate(kept.length.tolist(), 1):
        size += length
        if number - first == samples_per_shard or size >= SHARD_BYTES:
            shards.append(kept.place[first:number])
            first, size = number, 0
    return [*shards, kept.place[first:]] if first < len(kept.place) else shards


def write_shard(name: str, pieces: ShardSet, places: np.ndarray, work: Path) -> None:
    """Writes work/shards/NAME.tar and its index, unless it is there."""
    if (work / "shards" / f"{name}.tar").exists():
        return
    with private_directory(work) as here:
        with ShardFile(here / f"{name}.tar") as shard:
            for place in places.tolist():
                members = pieces.read(place)
                about = json.loads(members.pop("json"))
                del about[CHECKSUM]
                shard.write({"__key__": pieces.key(place), **members, "json": about})
        move(here, work / "shards", name, (".arrow", ".tar"))
