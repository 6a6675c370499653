"""What happens where a sample is read: here or in a worker process. Nothing heavy is imported, since every worker does."""

from collections.abc import Callable
from typing import Any

import numpy as np

from data_pipelines.buckets import Bucket
from data_pipelines.errors import BadSample
from data_pipelines.samples.items import SampleSource
from data_pipelines.workers import WorkerDied, WorkerPool

Decode = Callable[[str, dict[str, Any], Bucket], Any]  # (key, members, bucket)


def read(workers: WorkerPool | None, source: SampleSource, row: int, decode: Decode, bucket: Bucket) -> Any:
    """A sample's members through `decode`, in a worker process if there are any. Raises BadSample, and OSError
    where storage fails.

    What kills two workers is a bad sample.
    """
    if workers is None:
        return read_here(source, row, decode, bucket)
    try:
        return workers.submit(read_here, source, row, decode, bucket).result()
    except WorkerDied:
        try:
            return workers.submit(read_here, source, row, decode, bucket).result()
        except WorkerDied as error:
            raise BadSample(source.key(row), str(error)) from None


def read_here(source: SampleSource, row: int, decode: Decode, bucket: Bucket) -> Any:
    return decode(source.key(row), source.read(row), bucket)


def as_they_are(key: str, members: dict[str, Any], bucket: Bucket) -> dict[str, Any]:
    """The members themselves; the large one as an array, which a worker process hands over without a copy."""
    return {
        name: np.frombuffer(member, np.uint8) if isinstance(member, memoryview) else member
        for name, member in members.items()
    }
