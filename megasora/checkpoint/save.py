"""Saves one step: every rank writes its shards, rank 0 makes them a checkpoint by one rename."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from megasora.checkpoint.directory import CheckpointConfig, begin, clear_leftovers, commit, next_time, remove, surplus
from megasora.checkpoint.manifest import FACTS, FileSum, Manifest, Place, file_sum, write_json, write_manifest
from megasora.checkpoint.ranks import Ranks
from megasora.checkpoint.writer import Writer
from megasora.errors import CheckpointError


def save(
    root: Path, step: int, tensors: Mapping[str, torch.Tensor], facts: dict[str, Any], ranks: Ranks | None = None
) -> Path:
    """Saves `tensors` and rank 0's `facts` (JSON) as `root/step-XXXXXXXX`, and returns that path on every rank.

    All ranks call it. A name means one tensor of the whole run: a DTensor is written once, in shards, and of a plain
    tensor that several ranks pass under one name only one rank's is written, so what differs between ranks needs
    names that differ. A checkpoint of the same step is replaced.

    CheckpointError on all ranks if anything fails on one of them (a full disk, facts that are not JSON): what was there
    before is still there, and nothing half is.
    """
    ranks = ranks or Ranks()
    shares = plan_shares(ranks, f"saving step {step} in {root}", tensors)
    return write(ranks, root, step, shares, facts, check=lambda: None)


@dataclass
class Shares:
    """What this rank writes: pieces of tensors, by where they belong. On rank 0 also what describes the whole."""

    plan: SavePlan
    pieces: dict[MetadataIndex, torch.Tensor]  # views of the live tensors, or copies
    metadata: Metadata | None

    def resolve_data(self, item: WriteItem) -> torch.Tensor:
        """For DCP's writer. Contiguous: a load reads the bytes as they lie."""
        return self.pieces[item.index].contiguous()


def plan_shares(ranks: Ranks, what: str, tensors: Mapping[str, torch.Tensor]) -> Shares:
    """Agrees with the other ranks on who writes what; each piece of what several have goes to one of them."""
    planner = _Planner()

    def own_plan() -> SavePlan:
        _check(tensors)
        planner.set_up_planner(dict(tensors), is_coordinator=ranks.rank == 0)
        return planner.create_local_plan()

    every = ranks.gather(ranks.every(what, own_plan))

    def whole_plan() -> tuple[list[SavePlan], Metadata] | None:
        if ranks.rank != 0:
            return None
        plans, metadata = planner.create_global_plan(every)
        return Writer.name_files(plans), metadata

    found = ranks.every(what, whole_plan)
    plans = ranks.gather(found[0] if found else [])[0]
    plan = plans[ranks.rank]
    pieces = {item.index: _piece(planner, item) for item in plan.items}
    return Shares(plan, pieces, found[1] if found else None)


def write(
    ranks: Ranks,
    root: Path,
    step: int,
    shares: Shares,
    facts: dict[str, Any],
    check: Callable[[], None],
) -> Path:
    """Writes what was planned and makes it a checkpoint. `check`, on rank 0 before anything is published, raises if this job
    must not. All ranks call it; raises as `save` does."""
    what = f"saving step {step} in {root}"
    temporary = ranks.first(what, lambda: begin(root, step, check))
    try:
        writer = Writer(temporary)
        results = ranks.every(what, lambda: writer.write(shares.plan, shares))
        written = ranks.gather((results, writer.sums))

        def complete() -> Path:
            assert shares.metadata is not None
            sums = {name: found for _, of_rank in written for name, found in of_rank.items()}
            return _complete(writer, temporary, step, shares.metadata, [r for r, _ in written], sums, facts, check)

        return ranks.first(what, complete)
    except CheckpointError:
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def seal(temporary: Path, step: int, facts: dict[str, Any], check: Callable[[], None]) -> Path:
    """Makes a checkpoint of the files that somebody else has written into a temporary directory of `begin`. On one rank."""
    files = {
        str(file.relative_to(temporary)): file_sum(file) for file in sorted(temporary.rglob("*")) if file.is_file()
    }
    files[FACTS] = write_json(temporary / FACTS, facts)
    write_manifest(temporary, Manifest(step, next_time(temporary.parent), files))
    return commit(temporary, step, check)


def prune(root: Place, config: CheckpointConfig, ranks: Ranks | None = None, spare: Place | None = None) -> list[Place]:
    """Removes what the retention rule does not keep, never the newest complete one nor `spare`; returns what was removed.

    All ranks call it, rank 0 acts.
    """

    def act() -> list[Place]:
        if isinstance(root, Path):
            clear_leftovers(root)
        doomed = [path for path in surplus(root, config) if path != spare]
        for path in doomed:
            remove(path)
        return doomed

    return (ranks or Ranks()).first(f"pruning {root}", act)


def _check(tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, a checkpoint holds tensors only")
        if isinstance(tensor, DTensor) and any(placement.is_partial() for placement in tensor.placements):
            raise ValueError(f"{name} is a partial sum on each rank: redistribute it before it is saved")


def _piece(planner: DefaultSavePlanner, item: WriteItem) -> torch.Tensor:
    piece = planner.resolve_data(item)
    assert isinstance(piece, torch.Tensor)
    return piece.detach()


def _complete(
    writer: Writer,
    temporary: Path,
    step: int,
    metadata: Metadata,
    results: list[list[WriteResult]],
    sums: dict[str, FileSum],
    facts: dict[str, Any],
    check: Callable[[], None],
) -> Path:
    writer.finish(metadata, results)
    files = sums | writer.sums | {FACTS: write_json(temporary / FACTS, facts)}
    write_manifest(temporary, Manifest(step, next_time(temporary.parent), files))
    return commit(temporary, step, check)


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
