"""Copies a checkpoint to where it outlives the machine: another directory, or object storage.

There is no rename on object storage: the manifest is the commit. It goes first where a copy is replaced or removed, and comes
last where one is made.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import xxhash

from megasora.checkpoint.manifest import CHUNK, MANIFEST, FileSum, Place, read_manifest, size_problem, sync_directory
from megasora.checkpoint.ranks import Ranks
from megasora.errors import CheckpointError


def copy(ranks: Ranks, path: Path, root: Place, check: Callable[[], None]) -> Place:
    """Copies the checkpoint at `path` to a directory of the same name under `root`, the files divided over the ranks.

    All ranks call it. CheckpointError on all if a file cannot be written, or is not any more what its checksum says;
    then there is no copy, and none of that step that was there before.
    """
    target, what = root / path.name, f"copying {path} to {root}"

    def clear() -> None:
        check()
        target.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            (target / MANIFEST).unlink()

    ranks.first(what, clear)
    files = read_manifest(path).files
    share = sorted(files, key=lambda name: (-files[name].size, name))[ranks.rank :: ranks.world]

    def copy_share() -> None:
        for name in share:
            copy_file(path / name, target / name, files[name])

    ranks.every(what, copy_share)

    def commit() -> None:
        check()
        problems = [problem for name in files if (problem := size_problem(target, name, files[name]))]
        if problems:
            raise CheckpointError(f"{target / problems[0].file}: {problems[0].reason}")
        for name in {entry.name for entry in target.iterdir()} - files.keys():
            (target / name).unlink()
        put(target / MANIFEST, (path / MANIFEST).read_bytes())

    ranks.first(what, commit)
    return target


def copy_file(source: Path, target: Place, expected: FileSum) -> None:
    """Copies one file piece by piece. CheckpointError if what was read is not what `expected` says."""
    state = xxhash.xxh3_64()
    with source.open("rb", buffering=0) as reading, target.open("wb") as writing:
        while piece := reading.read(CHUNK):
            state.update(piece)
            writing.write(piece)
        if isinstance(target, Path):
            writing.flush()
            os.fsync(writing.fileno())
    if state.hexdigest() != expected.xxh3:
        raise CheckpointError(f"{source}: damaged, its checksum differs")


def put(target: Place, content: bytes) -> None:
    """A whole small file: on object storage it appears at once, in a directory by renaming."""
    if not isinstance(target, Path):
        target.write_bytes(content)
        return
    hidden = target.with_name(f".{target.name}.tmp")
    with hidden.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    hidden.replace(target)
    sync_directory(target.parent)
