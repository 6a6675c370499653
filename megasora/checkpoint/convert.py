"""Checkpoints in other forms, a tensor at a time: consolidated safetensors, DeepSpeed's universal form, and back; the difference
of two, the mean of several.

A consolidated checkpoint is a directory with `model.safetensors`, `ema.safetensors`, `optim.safetensors` (where there is such a
part), the facts and a manifest: it verifies like any other.
"""

import json
import shutil
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor, uint8

from megasora.checkpoint.contents import PARTS, TYPES, Contents
from megasora.checkpoint.deepspeed_files import write_universal
from megasora.checkpoint.directory import begin
from megasora.checkpoint.manifest import FACTS, FileSum, Manifest, sync_directory, write_json, write_manifest
from megasora.checkpoint.metadata import SavedTensor
from megasora.checkpoint.save import save, seal
from megasora.errors import CheckpointError
from megasora.parallel.plan import split_dim


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
        header[name] = {"dtype": TYPES[found.dtype], "shape": list(found.shape), "data_offsets": [begin, end]}
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
        yield tensor.contiguous().flatten().view(uint8).numpy().data


def shard(source: Contents, root: Path) -> Path:
    """A checkpoint of another form as training saves it, under its own step, in one process's shard."""
    facts = {**source.facts, "layout": source.facts.get("layout"), "converted_from": str(source.path)}
    return save(root, source.step, {name: source.read(name) for name in source.tensors}, facts)


def universal(source: Contents, root: Path) -> Path:
    """In DeepSpeed's universal form, under its own step, beside the file by which DeepSpeed finds the newest. Its loader takes it
    on any number of ranks with ZeRO. CheckpointError where there is no optimizer's state, which it wants."""
    if not any(name.startswith("optim/") for name in source.tensors):
        raise CheckpointError(f"{source.path}: has no optimizer's state, without which DeepSpeed loads nothing")
    family = source.facts["config"]["model"]["family"]
    names = [name.removeprefix("model/") for name in source.tensors if name.startswith("model/")]
    temporary = begin(root, source.step, lambda: None)
    try:
        dims = {name: split_dim(family, name) for name in names}
        write_universal(temporary, source.tensors, source.read, source.facts, dims)
        path = seal(temporary, source.step, source.facts, lambda: None)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    (root / "latest_universal").write_text(path.name)
    return path


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
    return save(root, sources[-1].step, {name: mean(name) for name in kept}, facts)


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
    files = sums | {FACTS: write_json(target / FACTS, source.facts)}
    write_manifest(target, Manifest(source.step, int(time.time()) if source.time is None else source.time, files))
    sync_directory(target)
