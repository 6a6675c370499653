"""Where a run goes on: the checkpoint, and the promise that nothing but what may change has changed."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError
from megasora.checkpoint.contents import fill, form_of, open_checkpoint
from megasora.checkpoint.directory import list_checkpoints, newest_first
from megasora.checkpoint.fence import job_facts
from megasora.checkpoint.load import load, read_facts, resume_path, verify
from megasora.checkpoint.manifest import MANIFEST, Place, Problem, place_of, write_file
from megasora.checkpoint.ranks import Ranks
from megasora.config import flatten, to_dict
from megasora.engines.torch_native import Engine
from megasora.errors import CheckpointError, ConfigError
from megasora.init_from import init_from, is_source
from megasora.observe.logs import log
from megasora.observe.metrics import EVENTS, read_lines
from megasora.schema import Config
from megasora.training_data import TrainingData, describe_difference

# Sections and keys that may differ between a checkpoint and the run that resumes it, because losses do not depend on them.
# data.path may move: the index's fingerprint is what counts.
FREE = (
    "run.dir", "run.steps", "run.resume", "run.init_from", "run.init_rules", "run.allow_change", "run.determinism",
    "engine", "deepspeed", "parallel", "observe", "checkpoint", "sample", "eval", "bench", "profile", "prepare", "train_vae",
    "vae", "encode",
    "model.attention", "model.preset", "data.path", "data.capacity", "data.row_multiple", "data.costs", "data.segments",
    "data.prefetch", "data.readers", "data.workers", "data.cache", "data.cache_gb", "data.max_replacements",
)  # fmt: skip
# Which samples a step has follows from these; changed on purpose, they begin a new segment.
ORDER = re.compile(r"data\.(mixture|latents|global_batch|window|scores)\b.*|stages\.\d+\.buckets\..*")


@dataclass(frozen=True)
class Start:
    """The step that a run starts from (0: anew) and the replacements that earlier attempts agreed on."""

    step: int
    source: Place | None
    rejected: dict[Place, list[Problem]]  # newer checkpoints that were passed over
    obey: dict[int, dict[int, str]]  # segment -> position -> key
    breaks: tuple[int, ...] = ()  # steps at which the data was changed on purpose
    recent: list[list[float]] = field(default_factory=list)  # losses and gradient norms: what a spike is measured by
    spikes: int = 0  # in a row, up to this step
    resumed_from: str = ""  # the checkpoint by whose path this run, or an earlier attempt at it, was told to go on


def find_start(config: Config, data: TrainingData) -> Start:
    """Looks for what `run.resume` names and compares it with this run; changes and creates nothing. All ranks call it.

    Raises ConfigError for a changed key, DataError for changed data, CheckpointError for a damaged or missing checkpoint.
    """
    run = Path(config.run.dir)
    root = run / "checkpoints"
    how = gone_on(root, config.run.resume) if is_restart() else config.run.resume
    for key, place in (("run.dir", root), ("checkpoint.durable", config.checkpoint.durable)):
        if how == "none" and place and list_checkpoints(place_of(place)):
            raise ConfigError(
                f"run.resume=none: {place} has checkpoints; give another {key}, or run.resume=auto to go on"
            )
    if how not in ("auto", "none") and not (place_of(how) / MANIFEST).exists():
        raise CheckpointError(
            f"run.resume={how}: no checkpoint here; name a step directory, RUN/checkpoints/step-XXXXXXXX"
        )
    if config.run.init_from and not is_source(place_of(config.run.init_from)):
        raise CheckpointError(
            f"run.init_from={config.run.init_from}: no checkpoint here; name a step directory or one of diffusers"
        )
    resume = resume_path(root, how, config.checkpoint.durable)
    obey = logged_replacements(run)
    if resume.path is None:
        return Start(0, None, resume.rejected, obey)
    facts = read_facts(resume.path)
    step, breaks = int(facts["step"]), tuple(facts["breaks"])
    if check_same_run(facts, config, data, resume.path):
        log.info("other data than before: a new segment begins after step %d", step)
        breaks = (*(b for b in breaks if b < step), step)
    named = facts.get("resumed_from", "") if config.run.resume in ("auto", "none") else config.run.resume
    recent, spikes = facts.get("recent", []), facts.get("spikes", 0)
    return Start(step, resume.path, resume.rejected, obey, breaks, recent, spikes, named)


def is_restart() -> bool:
    """Whether the scheduler or the launcher has started this very command before."""
    facts = job_facts()
    return (facts["restart"], facts["attempt"]) > (0, 0)


def gone_on(root: Path, resume: str) -> str:
    """What a restart makes of `run.resume`: the newest good checkpoint that was saved since the run began as it says, else what
    it says. All ranks call it."""
    if resume in ("auto", "none"):
        return "auto"
    since = Ranks().first(
        f"listing {root}",
        lambda: [info.path for info in newest_first(root) if info.complete and resumed_from(info.path) == resume],
    )
    return str(next((path for path in since if not verify(path)), resume))


def resumed_from(path: Place) -> str:
    try:
        return str(read_facts(path).get("resumed_from", ""))
    except CheckpointError:
        return ""


def load_start(start: Start, config: Config, engine: Engine) -> None:
    """Fills the engine with what `find_start` found, or with the weights of `run.init_from`. All ranks call it."""
    for path, problems in start.rejected.items():
        log.warning("passing over %s: %s: %s", path, problems[0].file, problems[0].reason)
    if start.source is not None:
        engine.materialise_optimizer()
        load_from(start.source, engine)
    elif config.run.init_from:
        init_from(place_of(config.run.init_from), config, engine, Path(config.run.dir))
        engine.loaded()


def load_from(path: Place, engine: Engine) -> None:
    """Fills the engine with a checkpoint of any form, verified already. All ranks call it; of other forms than training's own
    each reads whole tensors."""
    if form_of(path) == "sharded":
        load(path, engine.tensors(), verified=True)
    else:
        ranks = Ranks()
        source = ranks.every(f"loading {path}", lambda: open_checkpoint(path, verified=True))
        ranks.every(f"loading {path}", lambda: fill(engine.tensors(), source))
    engine.loaded()


def check_same_run(facts: dict[str, Any], config: Config, data: TrainingData, path: Place) -> bool:
    """Compares a checkpoint's config and data with this run's, apart from what is free or allowed by run.allow_change or,
    as far as the data goes, by data.segments=open. Whether the order of the data is another one."""
    allowed = (*FREE, *config.run.allow_change)
    opens = config.data.segments == "open"

    def may_change(key: str) -> bool:
        return any(key == free or key.startswith(f"{free}.") for free in allowed)

    before, now = flatten(facts["config"]), flatten(to_dict(config))
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    for key in changed:
        order = ORDER.fullmatch(key) is not None
        if not may_change(key) and not (order and opens):
            hint = "--data.segments=open begins a new segment" if order else f"give --run.allow_change=[{key}]"
            if key.startswith("model."):  # most change the weights' shapes
                hint += ", or, where the weights are of other shapes, another run.dir and --run.init_from"
            raise ConfigError(
                f"{key}={now.get(key)}: the checkpoint {path} was made with {before.get(key)}; "
                f"to change it on purpose {hint}"
            )
    other = facts["fingerprint"] != data.fingerprint
    if other and not (may_change("data") or opens):
        digests = read_digests(Path(config.run.dir), facts["fingerprint"])
        difference = describe_difference(digests, data.digests) if digests else "what it was is not recorded here"
        raise DataError(
            f"{' and '.join(data.digests)}: not the data that {path} was trained on ({difference}); "
            f"to change it on purpose --data.segments=open begins a new segment"
        )
    return other or any(ORDER.fullmatch(key) for key in changed)


def save_digests(run: Path, data: TrainingData) -> None:
    """What each shard of the data held, for the day on which it is another."""
    write_file(run / f"data-{data.fingerprint}.json", json.dumps(data.digests, indent=1).encode())


def read_digests(run: Path, fingerprint: str) -> dict[str, dict[str, str]]:
    try:
        found = json.loads((run / f"data-{fingerprint}.json").read_text())
    except (OSError, ValueError):
        return {}
    assert isinstance(found, dict)
    return found


def logged_replacements(run: Path) -> dict[int, dict[int, str]]:
    """segment -> position -> key, of all samples that an earlier attempt replaced: a replay reads the same ones."""
    obey: dict[int, dict[int, str]] = {}
    for line in read_lines(run / EVENTS):
        if line.get("event") == "bad_sample":
            obey.setdefault(line["segment"], {})[line["position"]] = line["by"]
    return obey
