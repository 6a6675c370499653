"""Saves one step: every rank writes its shards, rank 0 makes them a checkpoint by one rename."""

import io
import os
import shutil
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData
from torch.distributed.tensor import DTensor

from megasora.checkpoint.directory import CheckpointConfig, begin, clear_leftovers, commit, next_time, remove, surplus
from megasora.checkpoint.manifest import FACTS, FileSum, Manifest, write_json, write_manifest
from megasora.checkpoint.ranks import Ranks, failure_of_dcp
from megasora.errors import CheckpointError


def save(root: Path, step: int, tensors: Mapping[str, torch.Tensor], facts: dict[str, Any]) -> Path:
    """Saves `tensors` and rank 0's `facts` (JSON) as `root/step-XXXXXXXX`, and returns that path on every rank.

    All ranks call it. A name means one tensor of the whole run: a DTensor is written once, in shards, and of a plain
    tensor that several ranks pass under one name only one rank's is written, so what differs between ranks needs
    names that differ. A checkpoint of the same step is replaced.

    CheckpointError on all ranks if anything fails on one of them (a full disk, facts that are not JSON): what was there
    before is still there, and nothing half is.
    """
    ranks = Ranks()
    what = f"saving step {step} in {root}"
    ranks.every(what, lambda: _check(tensors))
    temporary = ranks.first(what, lambda: begin(root, step))
    try:
        written = ranks.gather(ranks.every(what, lambda: _write_shards(temporary, tensors)))
        files = {name: found for of_rank in written for name, found in of_rank.items()}
        return ranks.first(what, lambda: _complete(temporary, step, files, facts))
    except CheckpointError:
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def prune(root: Path, config: CheckpointConfig) -> list[Path]:
    """Removes what the retention rule does not keep, never the newest complete one; returns what was removed.

    All ranks call it, rank 0 acts.
    """

    def act() -> list[Path]:
        clear_leftovers(root)
        doomed = surplus(root, config)
        for path in doomed:
            remove(path)
        return doomed

    return Ranks().first(f"pruning {root}", act)


def _check(tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, a checkpoint holds tensors only")
        if isinstance(tensor, DTensor) and any(placement.is_partial() for placement in tensor.placements):
            raise ValueError(f"{name} is a partial sum on each rank: redistribute it before it is saved")


def _write_shards(directory: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, FileSum]:
    """Writes this rank's part of `tensors`; returns its files. A collective call."""
    writer = _Writer(directory)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(dict(tensors), storage_writer=writer, planner=_Planner())
    except CheckpointException as failure:  # a BaseException
        raise CheckpointError(failure_of_dcp(failure)) from failure
    return writer.files.sums


def _complete(temporary: Path, step: int, files: dict[str, FileSum], facts: dict[str, Any]) -> Path:
    files = files | {FACTS: write_json(temporary / FACTS, facts)}
    write_manifest(temporary, Manifest(step, next_time(temporary.parent), files))
    return commit(temporary, step)


class _Planner(DefaultSavePlanner):
    """Takes names as they are, and refuses one that means tensors of different shapes on different ranks.

    DCP keeps one of them and drops the others without a word.
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        seen: dict[MetadataIndex, TensorWriteData | None] = {}
        for rank, plan in enumerate(all_plans):
            for item in plan.items:
                first, here = seen.setdefault(item.index, item.tensor_data), item.tensor_data
                if first is None or here is None or _kind(first) != _kind(here):
                    raise ValueError(f"{item.index.fqn} on rank {rank} is not the tensor that it is on a lower rank")
        return super().create_global_plan(all_plans)


def _kind(data: TensorWriteData) -> tuple[torch.Size, torch.Size, torch.dtype]:
    return data.size, data.chunk.sizes, data.properties.dtype


class _SummedFile(io.BufferedWriter):
    """A file that sums what is written to it, before it reaches the disk, and is on disk when it is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.state, self.size = xxhash.xxh3_64(), 0

    def write(self, data: Any) -> int:
        self.state.update(data)
        self.size += memoryview(data).nbytes
        return super().write(data)

    def close(self) -> None:
        try:
            if not self.closed:
                self.flush()
                os.fsync(self.fileno())
        finally:
            super().close()


class _SummingFileSystem(FileSystem):
    """The file system as DCP's writer sees it; remembers the checksum of each file that it wrote."""

    def __init__(self) -> None:
        self.sums: dict[str, FileSum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        if mode != "wb":
            raise ValueError(f"{path}: opened for {mode}, not for writing")
        with _SummedFile(Path(path)) as file:
            yield file
        self.sums[Path(path).name] = FileSum(file.size, file.state.hexdigest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class _Writer(FileSystemWriter):
    """DCP's writer with checksums. One thread: in DCP the error of a second one would be lost, and its tensors."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, sync_files=False, thread_count=1, overwrite=False)
        self.fs = self.files = _SummingFileSystem()

    def storage_meta(self) -> StorageMeta | None:
        """None: the directory's temporary name and a random number have no place in the metadata."""
        return None
