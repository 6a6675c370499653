"""A part of `prepare`'s sources -> a piece of its result: a tar with its index, hashes and counts, which appear together."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import BadSample
from data_pipelines.prepare.clip_scores import HASH_FRAMES, Scorer, out_of_limits
from data_pipelines.prepare.clips import Piece, cut, frames_to_score
from data_pipelines.prepare.config import PrepareConfig
from data_pipelines.prepare.raw_inputs import Source, read_source
from data_pipelines.shards.storage import sync, sync_directory
from data_pipelines.shards.tars import ShardFile, ShardSet
from data_pipelines.video.reader import Undecodable

PART_BYTES = 1 << 30  # of sources: a part ends with the one that reaches it
EXAMPLES = 5  # names kept for each reason of dropping


@dataclass
class Tally:
    """What is not used, by reason, with the first names."""

    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, what: str) -> None:
        self.add({reason: 1}, {reason: [what]})

    def add(self, dropped: dict[str, int], examples: dict[str, list[str]]) -> None:
        self.dropped.update(dropped)
        for reason, names in examples.items():
            kept = self.examples.setdefault(reason, [])
            kept += names[: EXAMPLES - len(kept)]


@dataclass(frozen=True)
class Part:
    """A share of the sources, which one process makes into samples at a time."""

    number: int
    sources: list[Source]

    @property
    def name(self) -> str:
        return f"part-{self.number:06d}"


def make_parts(sources: list[Source], files: int) -> list[Part]:
    """Neighbours together, at most `files` and some PART_BYTES a part."""
    parts: list[Part] = []
    here: list[Source] = []
    for source in sources:
        here.append(source)
        if len(here) == files or sum(each.bytes for each in here) >= PART_BYTES:
            parts.append(Part(len(parts), here))
            here = []
    return [*parts, Part(len(parts), here)] if here else parts


def write_part(
    part: Part, shards: ShardSet | None, config: PrepareConfig, work: Path, tell: Callable[[str], None] | None = None
) -> None:
    """Writes work/pieces/NAME.tar and what belongs to it; the tar appears last. tell(name) before each source.

    The same part gives the same bytes. Of two processes that write one part, both do it in a directory of their own.
    """
    tally, signatures = Tally(), []
    scorers = [Scorer(name, path) for name, path in config.scorers.items()]
    with private_directory(work) as here:
        with ShardFile(here / f"{part.name}.tar") as shard:
            for source in part.sources:
                if tell is not None:
                    tell(source.name)
                for sample, signature in _samples(source, shards, config, scorers, tally):
                    shard.write(sample)
                    signatures.append(signature)
        hashes = np.array(signatures, np.uint64).reshape(-1, HASH_FRAMES + 1)
        with (here / f"{part.name}.npy").open("wb") as file:
            np.save(file, hashes)
            sync(file)
        counts = {"dropped": tally.dropped, "examples": tally.examples}
        write_synced(here / f"{part.name}.json", json.dumps(counts, ensure_ascii=False).encode())
        move(here, work / "pieces", part.name, (".npy", ".json", ".arrow", ".tar"))


def read_part(work: Path, name: str, tally: Tally) -> np.ndarray:
    """Adds the counts of a part that is there, and returns its signatures, uint64 [N, 5]."""
    counts = json.loads((work / "pieces" / f"{name}.json").read_text(encoding="utf-8"))
    tally.add(counts["dropped"], counts["examples"])
    signatures: np.ndarray = np.load(work / "pieces" / f"{name}.npy", allow_pickle=False)
    return signatures


def _samples(
    source: Source, shards: ShardSet | None, config: PrepareConfig, scorers: list[Scorer], tally: Tally
) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """The samples of one source, for `ShardFile.write`, and their signatures. Raises OSError where storage fails."""

    said: set[str] = set()

    def drop(reason: str, where: str) -> None:
        first = [f"{source.name} {where}".rstrip()] * (reason not in said)  # an example is the first of its file
        tally.add({reason: 1}, {reason: first})
        said.add(reason)

    try:
        content, known = read_source(source, shards)
    except BadSample as bad:
        drop(bad.reason, "")
        return
    try:
        if not known:
            drop("no caption", "")
            return
        for piece in cut(content, known, config, drop):
            where, about = f"at frame {piece.start}", piece.about
            texts = known.at((piece.start + about["frames"] / 2) / (about["fps"] or 1))
            if about["kind"] == "video" and about["frames"] < config.min_frames:
                drop("too short", where)
            elif not texts:
                drop("no caption", where)
            elif (reason := _judge(piece, config, scorers)) is not None:
                drop(reason, where)
            else:
                captions = {"captions": [list(each) for each in texts]} if len(texts) > 1 else {}
                yield (
                    {
                        "__key__": f"{source.slug}-{piece.start:06d}",
                        "jpg" if about["kind"] == "image" else "mp4": piece.content,
                        "txt": texts[0][0],
                        **({"cls": str(known.label)} if known.label >= 0 else {}),
                        "json": {
                            **about,
                            **captions,
                            "scores": piece.scores,
                            "source": source.name,
                            "start": piece.start,
                        },
                    },
                    piece.signature,
                )
    except Undecodable as error:
        drop("undecodable", f"({error})")
    except OSError as error:
        drop("unreadable file", f"({error.strerror})")


def _judge(piece: Piece, config: PrepareConfig, scorers: list[Scorer]) -> str | None:
    """Why a piece is dropped, if it is. The scorers see only what passes everything before, and add to its scores."""
    reason = out_of_limits(piece.scores, config.limits)
    if reason is None and scorers:
        frames = frames_to_score(piece)
        for scorer in scorers:
            piece.scores[scorer.name] = scorer(frames)
        reason = out_of_limits(piece.scores, config.limits)
    return reason


@contextmanager
def private_directory(work: Path) -> Iterator[Path]:
    """A directory of this process, gone afterwards; a killed one leaves it, until all is done."""
    here = work / f".{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
    here.mkdir()
    try:
        yield here
    finally:
        shutil.rmtree(here, ignore_errors=True)


def move(here: Path, there: Path, name: str, suffixes: tuple[str, ...]) -> None:
    """Moves files that belong together; the last of them says that all are there, also after a crash of the machine."""
    *others, last = suffixes
    for suffix in others:
        (here / f"{name}{suffix}").replace(there / f"{name}{suffix}")
    sync_directory(there)
    (here / f"{name}{last}").replace(there / f"{name}{last}")
    sync_directory(there)


def write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        sync(file)
