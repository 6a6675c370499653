"""One step of a run again, sample by sample: what it saw, and what each sample's loss and gradient were."""

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

from data_pipelines.batches.loader import Loader, Sample, StepBatch
from data_pipelines.samples.reading import as_they_are, read
from megasora.build import build_engine, build_recipe
from megasora.checkpoint.directory import list_checkpoints
from megasora.checkpoint.load import load, verify
from megasora.checkpoint.manifest import Place, place_of
from megasora.encoders import open_stage, to_pixels
from megasora.engines.optim import learning_rate
from megasora.engines.torch_native import Engine
from megasora.errors import CheckpointError, ConfigError
from megasora.init_from import init_from
from megasora.microbatch import Recipe, build_microbatch, build_rows, draw_frames, drops_caption, training_loss
from megasora.models.first_stage import FirstStage
from megasora.models.packing import in_patches
from megasora.observe.logs import log
from megasora.observe.metrics import EVENTS, read_lines, read_steps
from megasora.observe.progress import Progress
from megasora.parallel.mesh import Processes
from megasora.planner.fitting import settle_recompute
from megasora.resume import logged_replacements
from megasora.schema import Config
from megasora.segments import Segment, segments_of
from megasora.training_data import build_loader, open_data

SUSPECT = 5.0  # times the median of the step's other samples


@dataclass(frozen=True)
class ReplayedSample:
    """`loss` is the mean over the sample's learned tokens, `grad_norm` the norm of its own gradient. Noise, timesteps and the
    like are drawn by generators of (NAME, *seeds)."""

    position: int
    key: str
    shard: str
    bucket: str
    caption: str
    caption_dropped: bool
    seeds: tuple[int, int, int]  # seed, segment, position
    timesteps: list[float]  # of its frames of patches; 0: given
    loss: float
    grad_norm: float
    suspect: bool
    thumbnail: str  # a PNG, base64; empty where the VAE is not at hand


@dataclass(frozen=True)
class Replay:
    """A step and its samples, the largest gradient first. `recorded_*` are what metrics.jsonl says, None if it does not."""

    step: int
    start: int  # the checkpoint that it was reached from
    layout: str
    loss: float
    grad_norm: float
    recorded_loss: float | None
    recorded_grad_norm: float | None
    samples: list[ReplayedSample]


def replay(config: Config, step: int, group: Processes) -> Replay:
    """Goes to `step` from the nearest good checkpoint below it, by the updates that the run made, and takes it apart.

    Any layout with one data-parallel rank. Raises ConfigError for another one and for a step that the run has not,
    CheckpointError where there is nothing to start from.
    """
    if group.layout.dp > 1 or group.layout.pp > 1:
        raise ConfigError(f"--layout={group.layout}: a replay goes sample by sample; nearest is dp1")
    data = open_data(config, group.device)
    run = Path(config.run.dir)
    start, path = find_nearest(config, step)
    facts: dict[str, Any] = {"breaks": []}
    engine = build_engine(settle_recompute(config, group, data), group, blank=path is not None)
    if path is not None:
        engine.materialise_optimizer()
        facts = load(path, engine.tensors(), verified=True)
        engine.loaded()
    elif config.run.init_from:
        init_from(place_of(config.run.init_from), config, engine, run)
        engine.loaded()
    log.info("from step %d, %d updates to step %d", start, step - 1 - start, step)
    skipped = {line["step"] for line in read_lines(run / EVENTS) if line["event"] == "skipped"}
    obey = logged_replacements(run)
    found: Replay | None = None
    with Progress("replay") as progress:
        for segment in segments_of(config, facts["breaks"]):
            if not segment.first < step or segment.end <= start:
                continue
            loader = build_loader(config, group, data, segment.stage, segment.number, obey)
            recipe = build_recipe(config, group, data.facts, segment.stage, segment.number)
            now = max(start, segment.first)
            batches = loader.batches(now - segment.first)
            for batch in batches:
                now += 1
                if now == step:
                    found = take_apart(config, engine, loader, recipe, batch, start, step)
                    break
                progress(now - start, step - start, "updates")
                if now not in skipped:
                    update(config, engine, segment, recipe, batch, now)
                if now == segment.end:
                    break
            batches.close()
    if found is None:
        raise ConfigError(f"--step={step}: the run ends before it")
    return found


def find_nearest(config: Config, step: int) -> tuple[int, Place | None]:
    """The good checkpoint with the highest step below `step`; 0 and None: the beginning of the run."""
    run = Path(config.run.dir)
    steps = {line["step"] for line, counts in read_steps(run) if counts}
    if step not in steps:
        raise ConfigError(f"--step={step}: {run} has no such step; it has 1 to {max(steps, default=0)}")
    # What a rollback took back is not the way that the run went.
    rolled = [line["step"] for line in read_lines(run / EVENTS) if line["event"] == "rollback" and line["step"] < step]
    least = max(rolled, default=0)
    roots = [run / "checkpoints", *([place_of(config.checkpoint.durable)] if config.checkpoint.durable else [])]
    infos = [info for root in roots for info in list_checkpoints(root) if info.complete and least <= info.step < step]
    for info in sorted(infos, key=lambda info: info.step, reverse=True):
        if not verify(info.path):
            return info.step, info.path
    if least:
        raise CheckpointError(
            f"{run}: rolled back at step {least}, and there is no good checkpoint from then to step {step}"
        )
    return 0, None


def update(config: Config, engine: Engine, segment: Segment, recipe: Recipe, batch: StepBatch, step: int) -> None:
    """What the trainer does with a step that it does not skip."""
    engine.forward_backward(build_rows(batch, recipe), training_loss(recipe))
    engine.clip()
    done, stage = step - 1 - segment.stage_first, segment.stage
    engine.update(learning_rate(config.optim, stage.lr or config.optim.lr, done, stage.steps))


def take_apart(
    config: Config, engine: Engine, loader: Loader, recipe: Recipe, batch: StepBatch, start: int, step: int
) -> Replay:
    """The step as it was, then each of its samples alone in a row."""
    loss = engine.forward_backward(build_rows(batch, recipe), training_loss(recipe)).item()
    grad_norm = engine.clip().item()
    engine.discard()
    stage = find_stage(config, recipe.device)
    samples = sorted((sample for row in batch.rows for sample in row), key=lambda sample: sample.position)
    alone = []
    for sample in samples:
        tokens = loader.tokens_of(sample.bucket)
        length = -(-tokens // config.data.row_multiple) * config.data.row_multiple
        rows = [build_microbatch([sample], recipe, length)]
        own = engine.forward_backward(rows, training_loss(recipe)).item() * recipe.global_batch
        alone.append((own, engine.clip().item() * recipe.global_batch))
        engine.discard()
    suspects = [any(stands_out(values, i) for values in zip(*alone, strict=True)) for i in range(len(samples))]
    recorded = next(line for line, counts in read_steps(Path(config.run.dir)) if counts and line["step"] == step)
    found = [
        describe(loader, recipe, stage, sample, *values, suspect)
        for sample, values, suspect in zip(samples, alone, suspects, strict=True)
    ]
    found.sort(key=lambda sample: -sample.grad_norm if math.isfinite(sample.grad_norm) else -math.inf)
    return Replay(
        step, start, config.parallel.layout, loss, grad_norm, recorded["loss"], recorded["grad_norm"], found
    )  # fmt: skip


def stands_out(values: Sequence[float], index: int) -> bool:
    """Whether one value is not finite, or far above the others."""
    others = [value for i, value in enumerate(values) if i != index and math.isfinite(value)]
    return not math.isfinite(values[index]) or (bool(others) and values[index] > SUSPECT * median(others))


def describe(
    loader: Loader,
    recipe: Recipe,
    stage: FirstStage | None,
    sample: Sample,
    loss: float,
    grad_norm: float,
    suspect: bool,
) -> ReplayedSample:
    """A sample as people look at it."""
    item = loader.item_at(sample.position)
    source = loader.sources[item.source]
    row = item.row if source.key(item.row) == sample.key else loader.row_of(sample.key, sample.position, item)
    seeds = (recipe.seed, recipe.segment, sample.position)
    shape = in_patches(sample.latent.mean.shape[1:], recipe.patch)
    timesteps, *_ = draw_frames(shape, sample.latent.mean.shape[1:], recipe, seeds)
    return ReplayedSample(
        position=sample.position, key=sample.key, shard=source.shard_of(row), bucket=str(sample.bucket),
        caption=caption_of(read(None, source, row, as_they_are, sample.bucket)), caption_dropped=drops_caption(recipe, seeds),
        seeds=seeds, timesteps=[round(t, 6) for t in timesteps.tolist()], loss=loss, grad_norm=grad_norm, suspect=suspect,
        thumbnail=thumbnail(stage, sample, recipe.device) if stage else "",
    )  # fmt: skip


def caption_of(members: dict[str, Any]) -> str:
    """Of a latent's facts, or a raw sample's text."""
    if "txt" in members:
        return bytes(members["txt"]).decode(errors="replace")
    facts = json.loads(bytes(members.get("json", b"{}")))
    return str(facts.get("caption", ""))


def find_stage(config: Config, device: torch.device) -> FirstStage | None:
    """The VAE, for thumbnails; None where it is not at hand."""
    try:
        return open_stage(config.encode, device)
    except ConfigError as error:
        log.warning("no thumbnails: %s", error)
        return None


@torch.no_grad()
def thumbnail(stage: FirstStage, sample: Sample, device: torch.device) -> str:
    """The first frame."""
    latent = sample.latent.mean[None, :, :1].float().nan_to_num()
    file = io.BytesIO()
    Image.fromarray(to_pixels(stage.decode(latent.to(device))[0])[0].numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def write_page(found: Replay, directory: Path) -> Path:
    """`replay.json` and `index.html`, which needs no other file."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "replay.json").write_text(json.dumps(asdict(found), indent=1) + "\n")
    rows = [
        f"<tr class={'suspect' if s.suspect else 'plain'}>"
        f"<td><img src='data:image/png;base64,{s.thumbnail}' alt=''></td><td>{html.escape(s.key)}<br>{html.escape(s.shard)}</td>"
        f"<td>{s.bucket}</td><td>{html.escape(s.caption)}{' (dropped)' if s.caption_dropped else ''}</td>"
        f"<td>{', '.join(f'{t:.3f}' for t in dict.fromkeys(s.timesteps))}</td><td>{s.loss:.5g}</td><td>{s.grad_norm:.5g}</td>"
        f"<td>{', '.join(map(str, s.seeds))}</td></tr>"
        for s in found.samples
    ]
    page = directory / "index.html"
    page.write_text(
        "<!doctype html><meta charset=utf-8><title>step</title><style>body{font:14px sans-serif}td{padding:4px 10px;"
        "vertical-align:top}.suspect{background:#fdd}img{height:72px}</style>"
        f"<h1>Step {found.step}</h1><p>loss {found.loss:.6g} (recorded {found.recorded_loss}), gradient norm "
        f"{found.grad_norm:.6g} (recorded {found.recorded_grad_norm}), replayed on {found.layout} from step {found.start}</p>"
        "<table><tr><th><th>sample<th>bucket<th>caption<th>timesteps<th>loss<th>gradient norm<th>seed, segment, position</tr>"
        f"{''.join(rows)}</table>\n"
    )
    return page


def table(found: Replay) -> str:
    """For a console."""
    wide = max(len("sample"), *(len(s.key) for s in found.samples))
    lines = [
        f"step {found.step}: loss {found.loss:.6g} (recorded {found.recorded_loss}), gradient norm {found.grad_norm:.6g} "
        f"(recorded {found.recorded_grad_norm})",
        f"{'loss':>10} {'grad norm':>10}  {'t':>6}  {'bucket':<12} {'sample':<{wide}} caption",
    ]
    for s in found.samples:
        mark = "  <- stands out" if s.suspect else ""
        lines.append(
            f"{s.loss:>10.5g} {s.grad_norm:>10.5g}  {max(s.timesteps):>6.3f}  {s.bucket:<12} "
            f"{s.key:<{wide}} {s.caption[:40]}{mark}"
        )
    return "\n".join(lines)
