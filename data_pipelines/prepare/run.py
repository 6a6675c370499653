"""Raw videos and images with captions -> shards, by any number of processes and machines, each of which may be killed.

The sources, in order, are divided into parts. Every part becomes a piece in a hidden directory beside the output; what is
there when a run begins is not done again. When all pieces are there, whoever sees it leaves out duplicates, writes the
shards and the report, and gives the directory its name. Everything appears by renaming, and the result depends on nothing
but input and config.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipelines.errors import BadSample, DataError
from data_pipelines.prepare.clip_scores import HASH_FRAMES
from data_pipelines.prepare.config import PrepareConfig
from data_pipelines.prepare.merge import choose, divide, write_shard
from data_pipelines.prepare.parts import Part, Tally, make_parts, private_directory, read_part, write_part, write_synced
from data_pipelines.prepare.raw_inputs import Inputs, open_inputs
from data_pipelines.prepare.report import draw_report, make_report
from data_pipelines.shards.index import describe
from data_pipelines.shards.storage import sync_directory
from data_pipelines.shards.tars import ShardSet
from data_pipelines.workers import WorkerDied, WorkerPool

PLAN, REPORT, PICTURE = "prepare.json", "report.json", "report.png"
NOT_IN_RESULT = ("input", "output", "root", "workers", "part", "part_files")

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class _Run:
    config: PrepareConfig
    inputs: Inputs
    tally: Tally  # of what was dropped while the input was listed; in the end, of everything
    plan: dict[str, Any]  # what the result depends on
    output: Path
    work: Path
    machine: int
    machines: int
    pool: WorkerPool | None  # None: all in this process
    progress: Progress


def prepare(config: PrepareConfig, progress: Progress) -> dict[str, Any]:
    """Writes `config.output` completely or not at all, and returns the report; progress(done, all, name of a source).

    The same input and config give the same bytes. When they made the output that is there, nothing is done and the report
    has `already_done`. Where other machines have parts to do yet, there is no report but `left_to_others`, the number of
    these parts: the last to finish writes the output. Dropped files and pieces are counted by reason. Raises `DataError` when
    the input is missing or has no usable sample, and when the output holds anything else.
    """
    if not config.input or not config.output:
        raise DataError("prepare.input and prepare.output must be set")
    output = Path(config.output).resolve()
    if output.is_mount():
        raise DataError(f"{output}: is a mount point; name a directory below it")  # it appears by renaming
    machine, machines = which_part(config.part, os.environ)
    tally = Tally()
    inputs = open_inputs(config, output, tally.drop)
    plan = {"config": _what_matters(config), "input": inputs.fingerprint}
    work = _work_directory(output, plan, config.part_files)
    if not _is_done(output, plan):
        try:
            for name in ("pieces", "shards"):
                (work / name).mkdir(parents=True, exist_ok=True)
            if not _is_done(output, plan):  # another machine may have finished and tidied up before `work` was there
                with WorkerPool(config.workers) if config.workers > 1 else nullcontext() as pool:
                    report = _do(_Run(config, inputs, tally, plan, output, work, machine, machines, pool, progress))
                if not (report["left_to_others"] and _is_done(output, plan)):
                    return report
        except (OSError, DataError, BadSample) as error:
            if not _is_done(output, plan):  # else another machine finished and tidied up while this one was at it
                if isinstance(error, BadSample):
                    raise DataError(f"{work}: {error}; delete it and run again") from None
                raise
    progress(len(inputs.sources), len(inputs.sources), "already prepared")
    _tidy(output)
    return {**json.loads((output / REPORT).read_text(encoding="utf-8")), "already_done": True, "left_to_others": 0}


def which_part(part: str, environment: Mapping[str, str]) -> tuple[int, int]:
    """(number, count) of the machines among which the parts are divided: as `part` says ("0/8"), else by the variables of a
    SLURM array and of torchrun, else one. Raises `DataError` for an array whose numbers have gaps."""
    if part:
        number, count = part.split("/")
        return int(number), int(count)
    tasks, ranks = int(environment.get("SLURM_ARRAY_TASK_COUNT", 1)), int(environment.get("WORLD_SIZE", 1))
    task = 0
    if "SLURM_ARRAY_TASK_ID" in environment:
        first, step = (
            int(environment.get(f"SLURM_ARRAY_TASK_{name}", value)) for name, value in (("MIN", 0), ("STEP", 1))
        )
        task, rest = divmod(int(environment["SLURM_ARRAY_TASK_ID"]) - first, max(step, 1))
        if rest or not 0 <= task < tasks:
            raise DataError(
                "the numbers of the SLURM array have gaps; say --prepare.part=NUMBER/COUNT, from 0/COUNT on"
            )
    return task * ranks + int(environment.get("RANK", 0)), tasks * ranks


def _what_matters(config: PrepareConfig) -> dict[str, Any]:
    """What the result depends on, as JSON has it; of a scorer, its content."""
    scorers = {}
    for name, path in config.scorers.items():
        try:
            scorers[name] = xxhash.xxh3_64_hexdigest(Path(path).read_bytes())
        except OSError as error:
            raise DataError(f"prepare.scorers.{name}={path}: {error.strerror}") from None
    facts = {name: value for name, value in asdict(config).items() if name not in NOT_IN_RESULT}
    found: dict[str, Any] = json.loads(json.dumps(facts | {"keep": config.limits, "scorers": scorers}))
    return found


def _work_directory(output: Path, plan: dict[str, Any], part_files: int) -> Path:
    """Of this plan alone: what another one left there is of no use."""
    digest = xxhash.xxh3_64_hexdigest(json.dumps([plan, part_files], sort_keys=True).encode())[:8]
    return output.with_name(f".{output.name}.{digest}.partial")


def _is_done(output: Path, plan: dict[str, Any]) -> bool:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        found = json.loads((output / PLAN).read_text(encoding="utf-8"))
        changed = [f"{name} {found['config'].get(name)} -> {value}" for name, value in plan["config"].items()
                   if found["config"].get(name) != value]  # fmt: skip
        changed += ["the input's files or captions"] * (found["input"] != plan["input"])
    except (OSError, ValueError, KeyError, AttributeError):
        raise DataError(f"{output}: is there and not made by prepare; choose another output") from None
    if changed:
        raise DataError(
            f"{output}: made from something else ({', '.join(changed)}); choose another output or delete it"
        )
    return True


def _do(run: _Run) -> dict[str, Any]:
    """Does this machine's parts, and the rest where nothing is left to others."""
    parts = make_parts(run.inputs.sources, run.config.part_files)
    mine = parts[run.machine :: run.machines]
    open_parts = _missing(run.work / "pieces", mine)
    total = sum(len(part.sources) for part in mine)
    done = total - sum(len(part.sources) for part in open_parts)

    def tell(name: str) -> None:
        nonlocal done
        run.progress(done, total, name)
        done += 1

    alone = run.config.workers == 1
    jobs = [(part, run.inputs.shards, run.config, run.work, tell if alone else None) for part in open_parts]
    for number in _each(run.pool, write_part, jobs):
        for source in () if alone else open_parts[number].sources:
            tell(source.name)
    left = len(_missing(run.work / "pieces", parts))
    report = {} if left else _publish(run, parts)
    run.progress(total, total, "")
    return {**report, "already_done": False, "left_to_others": left}


def _each(pool: WorkerPool | None, function: Callable[..., object], jobs: Sequence[tuple[Any, ...]]) -> Iterator[int]:
    """function(*job) for every job; yields their numbers as they are done. The first error ends all.

    Raises `DataError` where a process dies.
    """
    if pool is None:
        for number, job in enumerate(jobs):
            function(*job)
            yield number
        return
    numbers = {pool.submit(function, *job): number for number, job in enumerate(jobs)}
    for future in as_completed(numbers):
        try:
            future.result()
        except WorkerDied as error:
            raise DataError(f"{error} (out of memory?); what is done is kept, run again to go on") from None
        yield numbers[future]


def _missing(pieces: Path, parts: list[Part]) -> list[Part]:
    there = {path.name for path in pieces.iterdir()}
    return [part for part in parts if f"{part.name}.tar" not in there]


def _publish(run: _Run, parts: list[Part]) -> dict[str, Any]:
    """Pieces -> shards and report under the output's name. Several machines may be at it: each begins with other shards."""
    config, work, tally = run.config, run.work, run.tally
    none = np.empty((0, HASH_FRAMES + 1), np.uint64)
    signatures = np.concatenate([none, *(read_part(work, part.name, tally) for part in parts)])
    if not len(signatures):
        if run.machines == 1:  # else another may be reading the same
            _tidy(run.output)
        raise DataError(f"{config.input}: no usable sample in {run.inputs.found} files ({describe(tally.dropped)})")
    pieces = ShardSet.open(work / "pieces")
    kept = choose(pieces, signatures, config.duplicates, tally)
    shards = divide(kept, config.samples_per_shard)
    jobs = [(f"shard-{number:06d}", pieces, places, work) for number, places in enumerate(shards)]
    first = run.machine * len(jobs) // run.machines
    for _ in _each(run.pool, write_shard, jobs[first:] + jobs[:first]):
        pass
    report = make_report(run.inputs.found, kept, tally, len(shards))
    with private_directory(work) as here:
        write_synced(here / PICTURE, draw_report(report))
        for name, content in ((REPORT, report), (PLAN, run.plan)):
            write_synced(here / name, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
        for name in (PICTURE, REPORT, PLAN):
            (here / name).replace(work / "shards" / name)
    sync_directory(work / "shards")
    (work / "shards").replace(run.output)  # of several machines one succeeds, and the others find nothing to rename
    sync_directory(run.output.parent)
    _tidy(run.output)
    return report


def _tidy(output: Path) -> None:
    """Removes what runs for this output have left beside it."""
    for path in output.parent.iterdir():
        if path.name.startswith(f".{output.name}.") and path.name.endswith(".partial"):
            shutil.rmtree(path, ignore_errors=True)
