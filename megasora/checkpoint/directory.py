"""The directory of a run's checkpoints: what it holds, how one appears in it, which are kept.

Everything here happens on one process; `save` and `load` call it from rank 0. There is one writer: see `fence`.
"""

import json
import math
import re
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasora.checkpoint.manifest import (
    FACTS,
    MANIFEST,
    Place,
    place_of,
    read_manifest,
    size_problem,
    step_name,
    sync_directory,
    write_file,
)
from megasora.errors import CheckpointError

LATEST = "latest"
_STEP = re.compile(r"step-(\d{8,})")
_REPLACED = re.compile(r"\.step-(\d{8,})\.old-[0-9a-f]{8}")
_TEMPORARY = re.compile(r"\.step-(\d{8,})\.tmp-[0-9a-f]{8}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every: int = 500  # steps between two checkpoints; 0: as often as failures and the time of a save make it worth
    keep_last: int = 3  # the newest ones are kept
    keep_every: int = 0  # and those whose step is a multiple of this; 0: none
    keep_best: int = 0  # and so many with the lowest evaluation loss (eval.loss_every)
    background: bool = True  # written while training goes on; needs memory of the host for a copy
    timeout: float = 1800.0  # seconds training waits for a save in flight; a copy that takes longer has failed
    durable: str = ""  # where some are copied to as well: another directory, or an address such as s3://bucket/run
    durable_every: int = 0  # steps between two of those, at least; 0: by failure_hours and the time that a copy takes
    failure_hours: float = 12.0  # between two failures of the job, about: for intervals that are not given
    fence: float = 60.0  # seconds without a sign of life after which another job's hold on run.dir is over

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ValueError(f"keep_last={self.keep_last}: at least 1, a run must be able to resume")
        for name in ("every", "keep_every", "keep_best", "durable_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: 0 or a number of steps")
        for name in ("timeout", "failure_hours", "fence"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: a positive number is expected")
        if self.durable_every and not self.durable:
            raise ValueError(f"durable_every={self.durable_every}: there is no `durable` to copy to")
        try:
            place_of(self.durable)
        except CheckpointError as error:
            raise ValueError(f"durable={error}") from None


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint as a look at the file system shows it; the contents of its files are not read.

    `bytes` is what it occupies; `layout` and `score` (the evaluation loss, if there was one) come from its facts and `time`
    (seconds of the Unix clock) from its manifest, None where they cannot be read; `complete` means that the manifest is
    sound and every file is there in its size. Times of one directory rise in the order of saving, whatever the clocks say,
    so they tell which one is newest.
    """

    step: int
    path: Place
    bytes: int
    layout: str | None
    score: float | None
    time: int | None
    complete: bool


def list_checkpoints(root: Place) -> list[CheckpointInfo]:
    """All checkpoints under `root`, lowest step first; an empty list if there is no such directory.

    A replaced checkpoint counts as long as its successor is not there, which is so only after a crash between the two
    renames of `commit`.
    """
    if not isinstance(root, Path):
        root.fs.invalidate_cache()  # of listings: others write there
    if not root.is_dir():
        return []
    entries = [entry for entry in root.iterdir() if entry.is_dir()]
    found = {int(match[1]): entry for entry in entries if (match := _REPLACED.fullmatch(entry.name))}
    found |= {int(match[1]): entry for entry in entries if (match := _STEP.fullmatch(entry.name))}
    return [describe(found[step]) for step in sorted(found)]


def latest(root: Place) -> Place | None:
    """The complete checkpoint that was saved last.

    That is the one with the highest step, unless the run went back to an earlier one: then the steps above belong to a
    continuation that it has left. The file `latest` is not asked, since after a crash it may be one save behind.
    """
    return next((info.path for info in newest_first(root) if info.complete), None)


def newest_first(root: Place) -> list[CheckpointInfo]:
    """All checkpoints in the order in which to try them: last saved first, after those of unknown time."""
    return sorted(list_checkpoints(root), key=lambda info: (info.time is None, info.time, info.step), reverse=True)


def describe(path: Place) -> CheckpointInfo:
    """Looks at one checkpoint directory. Its step is what its name says, else what its manifest says, else -1."""
    match = _STEP.fullmatch(path.name) or _REPLACED.fullmatch(path.name)
    size = _occupied(path)
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        return CheckpointInfo(int(match[1]) if match else -1, path, size, None, None, None, complete=False)
    facts = _facts(path)
    layout, score = facts.get("layout"), facts.get("score")
    step = int(match[1]) if match else manifest.step
    sound = all(size_problem(path, name, expected) is None for name, expected in manifest.files.items())
    return CheckpointInfo(
        step, path, size, layout if isinstance(layout, str) else None, score if isinstance(score, float) else None,
        manifest.time, complete=sound and step == manifest.step,
    )  # fmt: skip


def begin(root: Path, step: int, check: Callable[[], None]) -> Path:
    """Clears what dead writers left under `root` and makes a new temporary directory to write `step` into; `check` raises if
    this job must not."""
    check()
    root.mkdir(parents=True, exist_ok=True)
    sync_directory(root.parent)
    clear_leftovers(root)
    temporary = root / f".{step_name(step)}.tmp-{secrets.token_hex(4)}"
    temporary.mkdir()
    return temporary


def next_time(root: Path) -> int:
    """The time to record for a checkpoint that is now complete: the clock's, but later than that of every other one."""
    return max([int(time.time()), *(info.time + 1 for info in list_checkpoints(root) if info.time is not None)])


def commit(temporary: Path, step: int, check: Callable[[], None]) -> Path:
    """Gives a finished temporary directory its final name and points `latest` at it; `check` raises if that may not be.

    A directory of that name is moved aside first and removed last. Killed anywhere, `list_checkpoints` finds either the
    old or the new one.
    """
    root, final = temporary.parent, temporary.with_name(step_name(step))
    sync_directory(temporary)
    check()
    replaced = root / f".{final.name}.old-{secrets.token_hex(4)}" if final.exists() else None
    if replaced is not None:
        final.rename(replaced)
    temporary.rename(final)
    sync_directory(root)
    write_file(root / f".{LATEST}.tmp", f"{final.name}\n".encode())
    (root / f".{LATEST}.tmp").replace(root / LATEST)
    sync_directory(root)
    if replaced is not None:
        remove(replaced)
    return final


def remove(path: Place) -> None:
    """Removes a checkpoint: it loses its name at once, then its files. On object storage it loses its manifest first.

    A file that cannot be removed (NFS keeps those that a process has open) is left to the next `clear_leftovers`.
    """
    if not isinstance(path, Path):
        with suppress(FileNotFoundError):
            (path / MANIFEST).unlink()
        path.fs.rm(path.path, recursive=True)
        return
    step = path.name.strip(".").split(".")[0]
    doomed = path.with_name(f".{step}.tmp-{secrets.token_hex(4)}")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_leftovers(root: Path) -> None:
    """Removes what a dead writer left: temporary directories, and replaced checkpoints whose successor is there.

    Where the successor is not there, the replaced one gets its name back. Other names are not touched.
    """
    for entry in list(root.iterdir()):
        if _TEMPORARY.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)
        elif replaced := _REPLACED.fullmatch(entry.name):
            final = root / step_name(int(replaced[1]))
            if final.exists():
                remove(entry)
            else:
                entry.rename(final)


def surplus(root: Place, config: CheckpointConfig) -> list[Place]:
    """The complete checkpoints that the retention rule does not keep, oldest first.

    Incomplete ones are neither counted nor named, so the newest complete one always stays.
    """
    complete = [info for info in newest_first(root) if info.complete]
    older = reversed(complete[config.keep_last :])
    scored = sorted((info for info in complete if info.score is not None), key=lambda info: (info.score, -info.step))
    best = {info.path for info in scored[: config.keep_best]}
    return [
        info.path
        for info in older
        if info.path not in best and not (config.keep_every and info.step % config.keep_every == 0)
    ]


def _occupied(path: Place) -> int:
    try:
        entries = path.rglob("*") if isinstance(path, Path) else path.iterdir()
        return sum(entry.stat().st_size for entry in entries if entry.is_file())
    except Exception:  # it is being removed at this moment
        return 0


def _facts(path: Place) -> dict[str, Any]:
    """Unchecked: for a table."""
    try:
        facts = json.loads((path / FACTS).read_bytes())
    except Exception:  # whatever is wrong with them is the verification's to say
        return {}
    return facts if isinstance(facts, dict) else {}
