"""Loads a checkpoint: first every file is checked, then that its tensors fit, and only then is anything overwritten."""

import json
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException

from megasora.checkpoint import manifest
from megasora.checkpoint.directory import newest_first
from megasora.checkpoint.manifest import FACTS, Place, Problem, damage, place_of, read_checked, reason
from megasora.checkpoint.metadata import CheckedReader, SavedTensor, read_metadata, saved_tensors
from megasora.checkpoint.ranks import Ranks, failure_of_dcp
from megasora.errors import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True)
class Resume:
    """Where to resume from (None: start anew), and the newer checkpoints that were passed over, with what is wrong."""

    path: Place | None
    rejected: dict[Place, list[Problem]]


def load(
    path: Place, tensors: Mapping[str, torch.Tensor], prefix: str | tuple[str, ...] = "", verified: bool = False
) -> dict[str, Any]:
    """Fills `tensors` in place from the checkpoint at `path` and returns its facts. All ranks call it.

    Every file is compared with its checksum first, unless the caller has just had them `verified` by `resume_path`.

    The tensors may be sharded otherwise than when they were saved. Values are cast to their type. Together the ranks
    must pass exactly the names that the checkpoint has under `prefix`; others in the checkpoint are left alone.

    CheckpointError on all ranks, with `tensors` untouched, if a file is damaged or a tensor is missing, unexpected or
    of another shape. Should reading fail later (the disk), `tensors` are partly filled and the error says so.
    """
    ranks = Ranks()
    problems = [] if verified else verify(path)
    if problems:
        raise damage(path, problems)
    what = f"loading {path}"
    facts = ranks.every(what, lambda: read_facts(path))
    metadata = ranks.every(what, lambda: read_metadata(path))
    _check_fit(path, saved_tensors(metadata), tensors, prefix, ranks)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(dict(tensors), storage_reader=CheckedReader(path, metadata), planner=planner)
    except CheckpointException as failure:  # a BaseException
        said = failure_of_dcp(failure)
        raise CheckpointError(f"{what}: failed half-way, the tensors are not usable: {said}") from failure
    return facts


def verify(path: Place) -> list[Problem]:
    """Compares all files of a checkpoint with its manifest, the work divided over the ranks. All ranks call it."""
    ranks = Ranks()
    share = ranks.every(f"verifying {path}", lambda: manifest.verify(path, rank=ranks.rank, world=ranks.world))
    shares = ranks.gather(share)
    return sorted(
        {problem for share in shares for problem in share}, key=lambda problem: (problem.file, problem.reason)
    )


def read_facts(path: Place) -> dict[str, Any]:
    """The facts that were saved with a checkpoint. CheckpointError if they are missing or damaged."""
    try:
        facts = json.loads(read_checked(path, FACTS))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / FACTS}: not JSON: {error}") from error
    if not isinstance(facts, dict):
        raise CheckpointError(f"{path / FACTS}: not an object")
    return facts


def resume_path(root: Place, resume: str, durable: str = "") -> Resume:
    """What `run.resume` means for the checkpoints under `root`, and for those copied to `durable`. All ranks call it.

    `auto`: the newest checkpoint that verifies, or none where none was ever saved; of two copies the nearer one. `none`: start
    anew. Anything else is the path of one checkpoint. CheckpointError if that one is damaged, and if `auto` finds only
    damaged ones.
    """
    if resume == "none":
        return Resume(None, {})
    if resume != "auto":
        named = place_of(resume)
        problems = verify(named)
        if problems:
            raise damage(named, problems)
        return Resume(named, {})
    ranks = Ranks()
    paths, unreachable = ranks.first(f"listing {root}", lambda: candidates(root, durable))
    rejected: dict[Place, list[Problem]] = {place_of(durable): [Problem(".", unreachable)]} if unreachable else {}
    for path in paths:
        problems = verify(path)
        if not problems:
            return Resume(path, rejected)
        rejected[path] = problems
    if rejected:
        newest = damage(*next(iter(rejected.items())))
        raise CheckpointError(f"{root}: no good checkpoint, set run.resume=none to start anew; the newest is {newest}")
    return Resume(None, {})


def candidates(root: Place, durable: str = "") -> tuple[list[Place], str]:
    """All checkpoints of a run, in the order in which to try them, and why those in `durable` cannot be listed, if so."""
    near, unreachable = newest_first(root), ""
    try:
        far = answered(lambda: newest_first(place_of(durable))) if durable else []
    except Exception as error:  # of whatever client the address needs
        far, unreachable = [], f"cannot be listed: {reason(error)}"
    # A copy has the time of its original, and the sort is stable: the nearer one comes first.
    order = sorted([*near, *far], key=lambda info: (info.time is None, info.time or 0, info.step), reverse=True)
    return [info.path for info in order], unreachable


def answered(ask: Callable[[], T], seconds: float = 120.0) -> T:
    """What a store answers. TimeoutError where it has none after so long, as a dead mount; the thread is left behind."""
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer after {seconds:.0f} s") from None


def _check_fit(
    path: Place,
    saved: dict[str, SavedTensor],
    tensors: Mapping[str, torch.Tensor],
    prefix: str | tuple[str, ...],
    ranks: Ranks,
) -> None:
    """Compares names and shapes over all ranks, which need not pass the same names (pipeline stages do not)."""
    wrong = [complaint for name, tensor in tensors.items() if (complaint := _misfit(name, tensor, saved.get(name)))]
    required = [name for name in saved if name.startswith(prefix)]
    asked = sum(1 << bit for bit, name in enumerate(required) if name in tensors)  # a bit a name: small to gather
    asked_anywhere = 0
    complaints: list[str] = []
    for of_rank, asked_there in ranks.gather((wrong[:3], asked)):
        asked_anywhere |= asked_there
        complaints += [complaint for complaint in of_rank if complaint not in complaints]
    unexpected = [name for bit, name in enumerate(required) if not asked_anywhere >> bit & 1]
    complaints += [f"{name}: in the checkpoint but not wanted" for name in unexpected]
    if complaints:
        more = f"; and {len(complaints) - 3} more" if len(complaints) > 3 else ""
        raise CheckpointError(f"{path}: does not fit: {'; '.join(complaints[:3])}{more}")


def _misfit(name: str, tensor: torch.Tensor, saved: SavedTensor | None) -> str | None:
    if saved is None:
        return f"{name}: not in the checkpoint"
    if tuple(tensor.shape) != saved.shape:
        return f"{name}: {list(saved.shape)} in the checkpoint, {list(tensor.shape)} wanted"
    if tensor.is_floating_point() != saved.dtype.is_floating_point:
        return f"{name}: {saved.dtype} in the checkpoint, {tensor.dtype} wanted"
    if tensor.is_meta:
        return f"{name}: is on the meta device, nothing can be loaded into it"
    return None
