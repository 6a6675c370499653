"""An opened checkpoint of any form: what it holds, and each tensor on demand.

The forms: sharded, as training saves; consolidated safetensors; DeepSpeed's own of ZeRO, and its universal one. All have facts
and a manifest, but for what DeepSpeed's own converter has made of one of ours.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException

from megasora.checkpoint.deepspeed_files import Opened, facts_in, is_universal, is_zero, open_universal, open_zero
from megasora.checkpoint.load import read_facts
from megasora.checkpoint.manifest import MANIFEST, Place, damage, read_manifest, verify
from megasora.checkpoint.metadata import METADATA, CheckedReader, SavedTensor, read_metadata, saved_tensors
from megasora.checkpoint.ranks import failure_of_dcp
from megasora.engines.fragments import Pieces
from megasora.engines.muon import sharded_like
from megasora.errors import CheckpointError
from megasora.observe.logs import log

Form = Literal["sharded", "safetensors", "universal", "zero"]
PARTS = ("model", "ema", "optim")
TYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """An opened checkpoint: what it holds, and each tensor on demand. `time` as in its manifest, None if it has none."""

    path: Place
    facts: dict[str, Any]
    tensors: dict[str, SavedTensor]
    read: Callable[[str], Tensor]
    step: int
    time: int | None


def form_of(path: Place) -> Form:
    """CheckpointError if it is no checkpoint."""
    if isinstance(path, Path) and is_universal(path):
        return "universal"
    if isinstance(path, Path) and is_zero(path):
        return "zero"
    return "sharded" if METADATA in read_manifest(path).files else "safetensors"


def open_checkpoint(path: Place, verified: bool = False) -> Contents:
    """Verifies it first, unless the caller has. CheckpointError if it is damaged or none."""
    form = form_of(path)
    if form == "universal" and not (path / MANIFEST).exists():
        assert isinstance(path, Path)
        log.warning("%s: has no manifest: DeepSpeed has made it, and nothing in it can be verified", path)
        facts = facts_in(path)
        return Contents(path, facts, *open_universal(path), int(facts["step"]), None)
    problems = [] if verified else verify(path)
    if problems:
        raise damage(path, problems)
    if form != "sharded" and not isinstance(path, Path):
        raise CheckpointError(f"{path}: the form {form} is read from a local directory; copy it first")
    manifest = read_manifest(path)
    return Contents(path, read_facts(path), *OPEN[form](path), manifest.step, manifest.time)


def _open_sharded(path: Place) -> Opened:
    metadata = read_metadata(path)
    tensors = saved_tensors(metadata)

    def read(name: str) -> Tensor:
        target = torch.empty(tensors[name].shape, dtype=tensors[name].dtype)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load({name: target}, storage_reader=CheckedReader(path, metadata), planner=planner, no_dist=True)
        except CheckpointException as failure:  # a BaseException
            raise CheckpointError(f"{path}: {name} cannot be read: {failure_of_dcp(failure)}") from failure
        return target

    return tensors, read


def _open_safetensors(path: Any) -> Opened:
    files = read_manifest(path).files
    opened = {part: safe_open(path / f"{part}.safetensors", "pt") for part in PARTS if f"{part}.safetensors" in files}
    tensors = {}
    for part, file in opened.items():
        for name in file.keys():  # noqa: SIM118 - no dictionary
            view = file.get_slice(name)
            dtype = next((dtype for dtype, known in TYPES.items() if known == view.get_dtype()), None)
            if dtype is None:
                raise CheckpointError(
                    f"{path / part}.safetensors: {name} is of {view.get_dtype()}, which has no place here"
                )
            tensors[f"{part}/{name}"] = SavedTensor(tuple(view.get_shape()), dtype)

    def read(name: str) -> Tensor:
        part, _, rest = name.partition("/")
        found: Tensor = opened[part].get_tensor(rest)
        return found

    return tensors, read


OPEN: dict[Form, Callable[[Any], Opened]] = {
    "sharded": _open_sharded, "safetensors": _open_safetensors, "universal": open_universal, "zero": open_zero,
}  # fmt: skip


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], source: Contents) -> None:
    """Fills `tensors`, sharded however they are, from whole ones, one at a time; each rank reads for itself.

    CheckpointError, before anything is overwritten, if a tensor is missing or of another shape."""
    for name, tensor in tensors.items():
        saved = source.tensors.get(name)
        if saved is None or saved.shape != tuple(tensor.shape):
            found = "not in the checkpoint" if saved is None else f"{list(saved.shape)} in the checkpoint"
            raise CheckpointError(f"{source.path}: does not fit: {name}: {found}, {list(tensor.shape)} wanted")
    for name, tensor in tensors.items():
        whole = source.read(name)
        if isinstance(tensor, Pieces):
            tensor.receive(whole)
        else:
            tensor.copy_(sharded_like(tensor, whole.to(tensor.device)))
