"""What can go wrong with data: `DataError` ends a command (exit code 3), `BadSample` costs one sample."""


class DataError(Exception):
    """Nothing usable, or data other than what the run began with. The message names the path."""

    exit_code = 3


class MissingData(DataError):
    """There is no such directory: whoever knows which command makes it says so."""


class BadSample(Exception):
    """One sample cannot be read or decoded. It is skipped and counted, never fatal and never silent."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # it comes from worker processes, too
        return type(self), (self.key, self.reason)
