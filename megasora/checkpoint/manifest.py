"""What a checkpoint directory holds: `manifest.json` with size and checksum of every file, and the check against it."""

import json
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash
from upath import UPath

from data_pipelines.names import is_safe
from megasora.errors import CheckpointError

MANIFEST = "manifest.json"
FACTS = "facts.json"
FORMAT = 2  # 1: the columns of MMDiT's single blocks lay in another order
CHUNK = 4 << 20  # bytes read at once

Place = Path | UPath  # a directory or file here, or at an address that fsspec opens


@dataclass(frozen=True)
class FileSum:
    """Size in bytes and xxh3_64 (16 hexadecimal digits) of one file."""

    size: int
    xxh3: str


@dataclass(frozen=True)
class Manifest:
    """The files that make one checkpoint. `time` is when it was completed, in seconds of the Unix clock."""

    step: int
    time: int
    files: dict[str, FileSum]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a checkpoint: the file's name in its directory, and what is wrong with it."""

    file: str
    reason: str


def place_of(address: str | Path) -> Place:
    """`s3://bucket/run` and the like as fsspec opens them, anything else as a path. CheckpointError for an unknown kind."""
    try:
        return UPath(address) if "://" in str(address) else Path(address)
    except (ValueError, ImportError) as error:
        raise CheckpointError(f"{address}: {error}") from None


def step_name(step: int) -> str:
    """The name of a step's directory."""
    return f"step-{step:08d}"


def write_file(path: Path, data: bytes) -> FileSum:
    """Writes a small file and waits until it is on disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileSum(len(data), xxhash.xxh3_64_hexdigest(data))


def file_sum(path: Path) -> FileSum:
    """Of a file that somebody else has written, which is waited for until it is on disk."""
    state, size = xxhash.xxh3_64(), 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while piece := file.read(CHUNK):
            state.update(piece)
            size += len(piece)
    return FileSum(size, state.hexdigest())


def sync_directory(path: Path) -> None:
    """Waits until the names in a directory are on disk. fsync of a file does not promise that."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> FileSum:
    """Writes `value` as JSON. ValueError or TypeError if it is none (a NaN, a tensor)."""
    return write_file(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes `manifest.json`, the last file of a checkpoint."""
    files = {name: {"size": found.size, "xxh3": found.xxh3} for name, found in sorted(manifest.files.items())}
    body = {"format": FORMAT, "step": manifest.step, "time": manifest.time, "files": files}
    write_file(directory / MANIFEST, _sealed(body))


def read_manifest(directory: Place) -> Manifest:
    """Reads and checks `manifest.json`. CheckpointError if it is missing or damaged."""
    try:
        raw = (directory / MANIFEST).read_bytes()
    except FileNotFoundError:
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such directory") from None
        hint = f"; a run's lie in {directory / 'checkpoints'}" if (directory / "checkpoints").is_dir() else ""
        raise CheckpointError(f"{directory / MANIFEST}: missing, so this is no complete checkpoint{hint}") from None
    except Exception as error:  # clients of object stores have errors of their own
        raise CheckpointError(f"{directory / MANIFEST}: cannot be read: {reason(error)}") from error
    try:
        return _parse(raw)
    except ValueError as error:
        raise CheckpointError(f"{directory / MANIFEST}: {error}") from error


def reason(error: Exception) -> str:
    """What went wrong with a file, without its name."""
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"


def read_checked(directory: Place, name: str) -> bytes:
    """The bytes of one small file of a checkpoint, checked against the manifest. CheckpointError names the file."""
    expected = read_manifest(directory).files.get(name)
    if expected is None:
        raise CheckpointError(f"{directory / name}: not in {MANIFEST}")
    try:
        data = (directory / name).read_bytes()
    except Exception as error:
        raise CheckpointError(f"{directory / name}: cannot be read: {reason(error)}") from error
    if FileSum(len(data), xxhash.xxh3_64_hexdigest(data)) != expected:
        raise CheckpointError(f"{directory / name}: damaged, its checksum is not the one in {MANIFEST}")
    return data


def open_for_reading(file: Place) -> Any:
    """A raw file where it lies on a disk; what comes over a network is read ahead."""
    return file.open("rb", buffering=0) if isinstance(file, Path) else file.open("rb", block_size=CHUNK)


def size_problem(directory: Place, name: str, expected: FileSum) -> Problem | None:
    """What the file system alone can tell: a missing file, or one of another size."""
    try:
        found = (directory / name).stat()
    except FileNotFoundError:
        return Problem(name, "missing")
    except Exception as error:
        return Problem(name, f"cannot be read: {reason(error)}")
    if not stat.S_ISREG(found.st_mode):
        return Problem(name, "not a regular file")
    if found.st_size != expected.size:
        return Problem(name, f"{found.st_size} bytes instead of {expected.size}")
    return None


def verify(
    directory: Place, *, rank: int = 0, world: int = 1, on_bytes: Callable[[int], object] | None = None
) -> list[Problem]:
    """Compares every file of a checkpoint with its manifest; an empty list means that it is good. Raises nothing.

    Of `world` callers, each looks into its share of the files and reports a manifest that it cannot read; `rank` 0 also
    reports on files that are not in it. `on_bytes` is told the number of bytes read, from several threads.
    """
    try:
        manifest = read_manifest(directory)
    except CheckpointError as error:
        why = str(error).removeprefix(f"{directory / MANIFEST}: ").removeprefix(f"{directory}: ")
        return [Problem(MANIFEST, why)]
    problems = _misnamed(directory, manifest) + _foreign_files(directory, manifest) if rank == 0 else []
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
    share = by_size[rank::world]
    if share:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1, len(share))) as threads:
            found = threads.map(lambda name: _file_problem(directory, name, manifest.files[name], on_bytes), share)
            problems += [problem for problem in found if problem is not None]
    return sorted(problems, key=lambda problem: problem.file)


def damage(directory: Place, problems: list[Problem]) -> CheckpointError:
    """The error for a checkpoint that did not verify: one line with the first files."""
    named = "; ".join(f"{problem.file}: {problem.reason}" for problem in problems[:3])
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return CheckpointError(f"{directory}: not a good checkpoint: {named}{more}")


def _sealed(body: dict[str, Any]) -> bytes:
    """The manifest's text: `body` after the checksum of `body`'s own text."""
    text = json.dumps(body, indent=1)
    return (json.dumps({"xxh3": xxhash.xxh3_64_hexdigest(text.encode()), **body}, indent=1) + "\n").encode()


def _parse(raw: bytes) -> Manifest:
    """ValueError with the reason for anything but the exact bytes that `write_manifest` writes."""
    try:
        document = json.loads(raw)
        claimed = document.pop("xxh3")
        genuine = raw == _sealed(document)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        raise ValueError("damaged, not a manifest") from None
    if not genuine:
        raise ValueError(f"damaged, it does not have its own checksum {claimed}")
    if document.get("format") != FORMAT:
        raise ValueError(f"format {document.get('format')}, this version reads format {FORMAT}")
    try:
        files = {name: FileSum(int(entry["size"]), str(entry["xxh3"])) for name, entry in document["files"].items()}
        manifest = Manifest(int(document["step"]), int(document["time"]), files)
    except (ValueError, TypeError, AttributeError, KeyError):
        raise ValueError("not a manifest: it lacks step, time or files") from None
    outside = [name for name in files if not is_safe(name)]
    if outside:
        raise ValueError(f"names {outside[0]!a}, which is not a file of this directory")
    return manifest


def _misnamed(directory: Place, manifest: Manifest) -> list[Problem]:
    if directory.name.startswith("step-") and directory.name != step_name(manifest.step):
        return [Problem(MANIFEST, f"is that of step {manifest.step}")]
    return []


def _foreign_files(directory: Place, manifest: Manifest) -> list[Problem]:
    try:
        names = {entry.name for entry in directory.iterdir()} - {MANIFEST} - set(manifest.files)
        for below in {PurePosixPath(name).parts[0] for name in manifest.files if "/" in name} & names:
            names.remove(below)
            found = (entry for entry in (directory / below).rglob("*") if not entry.is_dir())
            names |= {"/".join(entry.parts[len(directory.parts) :]) for entry in found} - set(manifest.files)
    except Exception as error:
        return [Problem(".", f"cannot be listed: {reason(error)}")]
    return [Problem(name, f"not in {MANIFEST}") for name in names]


def _file_problem(
    directory: Place, name: str, expected: FileSum, on_bytes: Callable[[int], object] | None
) -> Problem | None:
    problem = size_problem(directory, name, expected)
    if problem is not None:
        return problem
    state = xxhash.xxh3_64()
    buffer = memoryview(bytearray(min(CHUNK, expected.size)))
    try:
        with open_for_reading(directory / name) as file:
            while count := file.readinto(buffer):
                state.update(buffer[:count])
                if on_bytes is not None:
                    on_bytes(count)
    except Exception as error:
        return Problem(name, f"cannot be read: {reason(error)}")
    return None if state.hexdigest() == expected.xxh3 else Problem(name, "damaged, its checksum differs")
