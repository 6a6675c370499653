"""torch.distributed.checkpoint's files, with the checksum of each, taken while it is written."""

import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils.serialization import config as serialization

from megasora.checkpoint.manifest import FileSum

AHEAD = 32 << 20  # bytes


class Resolver(Protocol):
    """Where the tensors of a plan come from."""

    def resolve_data(self, item: WriteItem) -> torch.Tensor: ...


class Writer(FileSystemWriter):
    """DCP's writer. One thread: in DCP the error of a second one would be lost, and its tensors."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, sync_files=False, thread_count=1, per_thread_copy_ahead=0, overwrite=False)
        self.fs = self.files = _SummingFileSystem()

    @staticmethod
    def name_files(plans: list[SavePlan]) -> list[SavePlan]:
        """Each rank's files begin with its number."""
        return FileSystemWriter("").prepare_global_plan(plans)

    def write(self, plan: SavePlan, source: Resolver) -> list[WriteResult]:
        """Writes this rank's part; where each piece of it lies."""
        with serialization.patch("save.compute_crc32", False):  # type: ignore[attr-defined]  # each file has a better sum
            results: list[WriteResult] = self.write_data(plan, source).wait()  # type: ignore[arg-type]
        return results

    @property
    def sums(self) -> dict[str, FileSum]:
        """Of the files written so far, by name."""
        return self.files.sums

    def storage_meta(self) -> StorageMeta | None:
        """None: the directory's temporary name and a random number have no place in the metadata."""
        return None


class _SummingFileSystem(FileSystem):
    """The file system as DCP's writer sees it; remembers the checksum of each file that it wrote."""

    def __init__(self) -> None:
        self.sums: dict[str, FileSum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        if mode != "wb":
            raise ValueError(f"{path}: opened for {mode}, not for writing")
        file = _SummedFile(Path(path))
        try:
            with file:
                yield file
        except RuntimeError as error:
            raise (file.failure or error) from None  # torch's writer says nothing of why the disk refused
        self.sums[Path(path).name] = FileSum(file.size, file.state.hexdigest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class _SummedFile(io.BufferedWriter):
    """A file that sums what is written to it, before it reaches the disk, and is on disk when it is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.state, self.size, self.begun = xxhash.xxh3_64(), 0, 0
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        self.state.update(data)
        self.size += memoryview(data).nbytes
        try:
            written = super().write(data)
        except OSError as error:
            self.failure = error
            raise
        if self.size - self.begun >= AHEAD:  # the disk begins with what is there; else it would wait for the last byte
            os.posix_fadvise(self.fileno(), self.begun, self.size - self.begun, os.POSIX_FADV_DONTNEED)
            self.begun = self.size
        return written

    def close(self) -> None:
        try:
            if not self.closed:
                self.flush()
                os.fsync(self.fileno())
        finally:
            super().close()
