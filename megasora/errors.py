"""The errors a command ends with. Each carries its exit code; `cli.main` prints the message as one line.

Codes: 0 done, 1 a requested check failed, 2 usage or config, 3 data, 4 checkpoint, 75 stopped early with a good checkpoint.
Data errors are `data_pipelines.errors.DataError`, which knows nothing of this package.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.errors import MissingData


class MegasoraError(Exception):
    """Base of the errors that end a command with one line and a documented exit code."""

    exit_code = 1


class CheckFailed(MegasoraError):
    """A check that the user asked for did not hold (bench --against, ckpt verify's comparisons, parity)."""

    exit_code = 1


class ConfigError(MegasoraError):
    """Unknown key, wrong type, impossible layout. The message names the key, the value and the nearest valid one."""

    exit_code = 2


class NotWritable(ConfigError):
    """What a command makes cannot be written where the message says."""


class CheckpointError(MegasoraError):
    """A checkpoint is damaged or does not fit. The message names the file."""

    exit_code = 4


class StorageFull(CheckpointError):
    """Nothing can be written: the disk is full, a quota used up, or the file system read-only. Somebody has to act first."""


class Superseded(CheckpointError):
    """Another job has taken over this run: this one ends without another word."""


class StoppedEarly(MegasoraError):
    """Stopped by a signal with a good checkpoint behind it: running the same command again continues (EX_TEMPFAIL)."""

    exit_code = 75


# A disk that is full or closed to us is no bug of this program.
CLOSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)


def not_written(error: Exception) -> str | None:
    """What kept a file from being written, with its name if that is known; None for errors of any other kind."""
    if isinstance(error, OSError) and error.errno in CLOSED:
        return f"{error.filename}: {error.strerror}" if error.filename else f"{error.strerror}"
    if type(error).__name__ == "SafetensorError" and "os error" in str(error):  # it wraps the system's own
        return str(error).rpartition("I/O error: ")[2]
    return None


@contextlib.contextmanager
def writing(key: str) -> Iterator[None]:
    """Around what writes the output that `key` (as the user gave it) names. Raises NotWritable where that cannot be done."""
    try:
        yield
    except Exception as error:
        if (reason := not_written(error)) is None:
            raise
        raise NotWritable(f"{key}: {reason}") from error


def check_writable(key: str, file: Path) -> None:
    """Raises NotWritable where `file`, which `key` names and which long work will end in, could not be written."""
    if not file.parent.is_dir():
        raise NotWritable(f"{key}: there is no directory {file.parent}")
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise NotWritable(f"{key}: cannot be written")


@contextlib.contextmanager
def made_by(verb: str, key: str) -> Iterator[None]:
    """Around what opens the directory that `key` names: MissingData says then which verb makes it."""
    try:
        yield
    except MissingData as error:
        raise MissingData(f"{key}: {error}; `megasora {verb}` makes it") from None
