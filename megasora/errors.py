"""The errors a command ends with. Each carries its exit code; `cli.main` prints the message as one line.

Codes: 0 done, 1 a requested check failed, 2 usage or config, 3 data, 4 checkpoint, 75 stopped early with a good checkpoint.
Data errors are `data_pipelines.errors.DataError`, which knows nothing of this package.
"""


class MegasoraError(Exception):
    """Base of the errors that end a command with one line and a documented exit code."""

    exit_code = 1


class CheckFailed(MegasoraError):
    """A check that the user asked for did not hold (bench --against, ckpt verify's comparisons, parity)."""

    exit_code = 1


class ConfigError(MegasoraError):
    """Unknown key, wrong type, impossible layout. The message names the key, the value and the nearest valid one."""

    exit_code = 2


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
