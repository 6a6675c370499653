"""Reads torch.distributed.checkpoint's `.metadata` without trusting it.

The file is a pickle, and torch reads it with a bare `pickle.load`, which runs whatever the file says. Here only the
types that describe tensors can be built from it. Entries other than tensors are refused: torch would unpickle them too.
"""

import io
import math
import pickle
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from megasora.checkpoint.manifest import Place, open_for_reading, read_checked, read_manifest
from megasora.errors import CheckpointError

METADATA = ".metadata"
READERS = 2  # threads of a process that load
_DCP = "torch.distributed.checkpoint"
_ALLOWED = {
    (f"{_DCP}.metadata", "Metadata"),
    (f"{_DCP}.metadata", "MetadataIndex"),
    (f"{_DCP}.metadata", "TensorStorageMetadata"),
    (f"{_DCP}.metadata", "ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "TensorProperties"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


@dataclass(frozen=True)
class SavedTensor:
    """Global shape and type of one tensor in a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class CheckedReader(FileSystemReader):
    """Reads the shards of a checkpoint whose metadata `read_metadata` has already checked."""

    def __init__(self, path: Place, metadata: Metadata) -> None:
        super().__init__("")
        self.fs, self.path = _Places(), path  # type: ignore[assignment]
        self.metadata = metadata

    def read_metadata(self) -> Metadata:
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """In a few threads: each holds one piece of the checkpoint at a time, and a copy of it."""
        shares = [replace(plan, items=plan.items[i::READERS]) for i in range(READERS)]
        with ThreadPoolExecutor(READERS) as threads:
            list(threads.map(lambda share: super(CheckedReader, self).read_data(share, planner), shares))
        done: Future[None] = Future()
        done.set_result(None)
        return done


class _Places(FileSystem):
    """A directory here or on object storage as DCP's reader sees it."""

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[io.IOBase, None, None]:
        with open_for_reading(path) as stream:
            yield stream


def read_metadata(path: Place) -> Metadata:
    """What the checkpoint at `path` holds, and where. CheckpointError for anything that `save` does not write."""
    raw = read_checked(path, METADATA)
    files = read_manifest(path).files
    try:
        metadata = _AllowList(io.BytesIO(raw)).load()
        saved_tensors(metadata)
        for index, place in metadata.storage_data.items():
            if place.relative_path not in files or place.transform_descriptors:
                raise pickle.UnpicklingError(f"{index.fqn} lies in {place.relative_path}, which is not in the manifest")
    except Exception as error:  # a hostile pickle can raise anything
        raise CheckpointError(f"{path / METADATA}: refused: {error}") from error
    return metadata


def saved_tensors(metadata: Metadata) -> dict[str, SavedTensor]:
    """The tensors that `metadata` describes, by name. UnpicklingError if it describes anything else."""
    found: dict[str, SavedTensor] = {}
    for name, entry in sorted(metadata.state_dict_metadata.items()):
        if not isinstance(entry, TensorStorageMetadata) or not isinstance(entry.properties.dtype, torch.dtype):
            raise pickle.UnpicklingError(f"{name} is not a tensor")
        found[name] = SavedTensor(tuple(torch.Size(entry.size)), entry.properties.dtype)
    return found


class _AllowList(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which has no place in a checkpoint")
