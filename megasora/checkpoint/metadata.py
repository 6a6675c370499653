"""Reads torch.distributed.checkpoint's `.metadata` without trusting it.

The file is a pickle, and torch reads it with a bare `pickle.load`, which runs whatever the file says. Here only the
types that describe tensors can be built from it. Entries other than tensors are refused: torch would unpickle them too.
"""

import io
import math
import pickle  # nosec B403 # what is read passes `_AllowList`
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
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
        self.place = path
        self.metadata = metadata

    def read_metadata(self) -> Metadata:
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """A few files at once; of each, one piece is held at a time, or read right into the tensor."""
        files: dict[str, list[ReadItem]] = {}
        for item in sorted(plan.items, key=lambda item: self._place(item).offset):
            files.setdefault(self._place(item).relative_path, []).append(item)

        def read(name: str) -> None:
            with open_for_reading(self.place / name) as stream:
                for item in files[name]:
                    self._read_item(stream, item, planner)

        with ThreadPoolExecutor(READERS) as threads:
            list(threads.map(read, files))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _place(self, item: ReadItem) -> Any:
        return self.storage_data[item.storage_index]

    def _read_item(self, stream: Any, item: ReadItem, planner: LoadPlanner) -> None:
        """torch.save's archive of one contiguous tensor: its bytes lie in the record data/0."""
        index, place = item.storage_index, self._place(item)
        described = self.metadata.state_dict_metadata[index.fqn]
        assert isinstance(described, TensorStorageMetadata)
        shape = next(chunk.sizes for chunk in described.chunks if chunk.offsets == index.offset)
        record = torch._C.PyTorchFileReader(self._slice_file(stream, place)).get_record_offset("data/0")  # type: ignore[attr-defined]
        if record + math.prod(shape) * described.properties.dtype.itemsize > place.length:
            raise EOFError(f"{index.fqn}: its file has fewer bytes than the metadata says")
        stream.seek(place.offset + record)
        target = planner.resolve_tensor(item).detach()
        dtype = described.properties.dtype
        whole = (
            target.shape == shape and target.dtype == dtype and target.is_contiguous() and target.device.type == "cpu"
        )
        piece = target if whole else torch.empty(shape, dtype=dtype)
        fill(piece, stream)
        if not whole:
            target.copy_(narrow_tensor_by_index(piece, item.storage_offsets, item.lengths))
        planner.commit_tensor(item, target)


def fill(tensor: torch.Tensor, stream: Any) -> None:
    """Reads a contiguous tensor's bytes. EOFError if there are not so many."""
    left: Any = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    while left:
        read = stream.readinto(left)
        if not read:
            raise EOFError(f"{len(left)} bytes of a tensor are missing")
        left = left[read:]


def read_metadata(path: Place) -> Metadata:
    """What the checkpoint at `path` holds, and where. CheckpointError for anything that `save` does not write."""
    raw = read_checked(path, METADATA)
    files = read_manifest(path).files
    try:
        metadata = _AllowList(io.BytesIO(raw)).load()
        claimed = sum(found.bytes for found in saved_tensors(metadata).values())
        for index, place in metadata.storage_data.items():
            if place.relative_path not in files or place.transform_descriptors:
                raise pickle.UnpicklingError(f"{index.fqn} lies in {place.relative_path}, which is not in the manifest")
            if not 0 <= place.offset <= place.offset + place.length <= files[place.relative_path].size:
                raise pickle.UnpicklingError(f"{index.fqn} lies outside of {place.relative_path}")
        if claimed > sum(found.size for found in files.values()):
            raise pickle.UnpicklingError(f"its tensors have {claimed} bytes, more than its files")
    except Exception as error:  # a hostile pickle can raise anything
        raise CheckpointError(f"{path / METADATA}: refused: {error}") from error
    return metadata


def saved_tensors(metadata: Metadata) -> dict[str, SavedTensor]:
    """The tensors that `metadata` describes, by name. UnpicklingError if it describes anything else."""
    found: dict[str, SavedTensor] = {}
    for name, entry in sorted(metadata.state_dict_metadata.items()):
        if not isinstance(entry, TensorStorageMetadata) or not isinstance(entry.properties.dtype, torch.dtype):
            raise pickle.UnpicklingError(f"{name} is not a tensor")
        if min(entry.size, default=0) < 0:
            raise pickle.UnpicklingError(f"{name} has a negative size")
        found[name] = SavedTensor(tuple(torch.Size(entry.size)), entry.properties.dtype)
    return found


class _AllowList(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which has no place in a checkpoint")
