"""Checkpoints in other forms, a tensor at a time: consolidated safetensors and back, the difference of two, the mean of several.

A consolidated checkpoint is a directory with `model.safetensors`, `ema.safetensors`, `optim.safetensors` (where there is such a
part), the facts and a manifest: it verifies like any other.
"""

import json
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner

from megasora.checkpoint.load import read_facts
from megasora.checkpoint.manifest import (
    FACTS,
    FileSum,
    Manifest,
    Place,
    damage,
    read_manifest,
    sync_directory,
    verify,
    write_json,
    write_manifest,
)
from megasora.checkpoint.metadata import METADATA, CheckedReader, SavedTensor, read_metadata, saved_tensors
from megasora.checkpoint.save import save
from megasora.errors import CheckpointError

PARTS = ("model", "ema", "optim")
_TYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """An opened checkpoint, sharded or consolidated: what it holds, and each tensor on demand."""

    path: Place
    facts: dict[str, Any]
    tensors: dict[str, SavedTensor]
    read: Callable[[str], Tensor]


def open_checkpoint(path: Place) -> Contents:
    """Verifies it first. CheckpointError if it is damaged or none."""
    problems = verify(path)
    if problems:
        raise damage(path, problems)
    if is_sharded(path):
        return _open_sharded(path)
    files = read_manifest(path).files
    if not isinstance(path, Path):
        raise CheckpointError(f"{path}: a consolidated checkpoint is read from a local directory; copy it first")
    opened = {part: safe_open(path / f"{part}.safetensors", "pt") for part in PARTS if f"{part}.safetensors" in files}
    tensors = {}
    for part, file in opened.items():
        for name in file.keys():  # noqa: SIM118 - no dictionary
            view = file.get_slice(name)
            tensors[f"{part}/{name}"] = SavedTensor(tuple(view.get_shape()), _dtype_of(view.get_dtype()))

    def read(name: str) -> Tensor:
        part, _, rest = name.partition("/")
        found: Tensor = opened[part].get_tensor(rest)
        return found

    return Contents(path, read_facts(path), tensors, read)


def is_sharded(path: Place) -> bool:
    """Whether it is in the form that training saves. CheckpointError if it is no checkpoint."""
    return METADATA in read_manifest(path).files


def _open_sharded(path: Place) -> Contents:
    metadata = read_metadata(path)
    tensors = saved_tensors(metadata)

    def read(name: str) -> Tensor:
        target = torch.empty(tensors[name].shape, dtype=tensors[name].dtype)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load({name: target}, storage_reader=CheckedReader(path, metadata), planner=planner, no_dist=True)
        return target

    return Contents(path, read_facts(path), tensors, read)


def consolidate(source: Contents, target: Path) -> list[Path]:
    """One safetensors file for each part. Memory: one tensor."""
    target.mkdir(parents=True)
    sums, files = {}, []
    for part in PARTS:
        here = {name: found for name, found in source.tensors.items() if name.startswith(f"{part}/")}
        if here:
            files.append(target / f"{part}.safetensors")
            described = {name.removeprefix(f"{part}/"): found for name, found in here.items()}
            sums[files[-1].name] = write_safetensors(files[-1], described, map(source.read, here))
    _seal(target, source, sums)
    return files


def write_safetensors(file: Path, described: Mapping[str, SavedTensor], tensors: Iterable[Tensor]) -> FileSum:
    """Writes tensors in the order in which they are described, one after the other. The format:
    https://huggingface.co/docs/safetensors, "Format"."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, found in described.items():
        begin, end = end, end + found.bytes
        header[name] = {"dtype": _TYPES[found.dtype], "shape": list(found.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    state, size = xxhash.xxh3_64(), 0
    with file.open("wb") as writing:
        for piece in _pieces(text, tensors):
            state.update(piece)
            writing.write(piece)
            size += len(piece)
    return FileSum(size, state.hexdigest())


def _pieces(header: bytes, tensors: Iterable[Tensor]) -> Iterator[Any]:
    yield struct.pack("<Q", len(header))
    yield header
    for tensor in tensors:
        yield tensor.contiguous().flatten().view(torch.uint8).numpy().data


def shard(source: Contents, root: Path) -> Path:
    """A consolidated checkpoint as one that training resumes from, under its own step, in one process's shard."""
    facts = {**source.facts, "layout": source.facts.get("layout"), "converted_from": str(source.path)}
    return save(root, read_manifest(source.path).step, {name: source.read(name) for name in source.tensors}, facts)


def average(sources: list[Contents], weights: list[float], root: Path) -> Path:
    """Their mean, of the weights and of their averages, as a checkpoint without optimizer: to sample and to start from.

    CheckpointError where they do not hold the same tensors.
    """
    kept = [name for name in sources[0].tensors if not name.startswith("optim/")]
    for other in sources[1:]:
        for name in kept:
            if other.tensors.get(name) != sources[0].tensors[name]:
                raise CheckpointError(f"{other.path}: {name} is not what it is in {sources[0].path}")
    total = sum(weights)

    def mean(name: str) -> Tensor:
        mixed = sum(w / total * other.read(name).double() for w, other in zip(weights, sources, strict=True))
        assert isinstance(mixed, Tensor)
        return mixed.to(sources[0].tensors[name].dtype)

    facts = {**sources[-1].facts, "averaged": [[str(other.path), w] for other, w in zip(sources, weights, strict=True)]}
    return save(root, read_manifest(sources[-1].path).step, {name: mean(name) for name in kept}, facts)


@dataclass(frozen=True)
class Difference:
    """One tensor of two checkpoints: the largest absolute difference, and the norm of the difference over the first's norm.

    `reason` says why there are no numbers: missing, new, or of another shape.
    """

    name: str
    largest: float = 0.0
    relative: float = 0.0
    reason: str = ""


def differences(a: Contents, b: Contents) -> Iterator[Difference]:
    """Tensor by tensor, those that are equal too."""
    for name in sorted(a.tensors.keys() | b.tensors.keys()):
        if name not in a.tensors or name not in b.tensors:
            yield Difference(name, reason=f"only in {a.path if name in a.tensors else b.path}")
        elif a.tensors[name].shape != b.tensors[name].shape:
            yield Difference(name, reason=f"{list(a.tensors[name].shape)} and {list(b.tensors[name].shape)}")
        else:
            one, other = a.read(name).double(), b.read(name).double()
            gap = one - other
            scale = max(float(one.norm()), 1e-300)
            yield Difference(name, float(gap.abs().max()) if gap.numel() else 0.0, float(gap.norm()) / scale)


def _seal(target: Path, source: Contents, sums: dict[str, FileSum]) -> None:
    origin = read_manifest(source.path)
    files = sums | {FACTS: write_json(target / FACTS, source.facts)}
    write_manifest(target, Manifest(origin.step, origin.time, files))
    sync_directory(target)


def _dtype_of(name: str) -> torch.dtype:
    return next(dtype for dtype, known in _TYPES.items() if known == name)
