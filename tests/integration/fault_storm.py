"""A storm of faults over a training run, and whether its history is the undisturbed one's.

    python -m tests.integration.fault_storm --rounds 20 --seed 0 [--report FILE]

Each round starts the run, draws a fault and an instant, lets it happen, and starts again. Half of the rounds keep one layout:
that history must equal the undisturbed run's bit for bit. The other half change the layout too: there losses agree to 1e-4. A
sample of NaNs is in the data, so that some steps of either are skipped.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml
from safetensors.torch import save, save_file

from data_pipelines.buckets import BucketConfig
from data_pipelines.shards.tars import ShardWriter
from megasora.checkpoint.directory import newest_first
from megasora.checkpoint.manifest import verify
from megasora.encoders import make_manifest, open_stage
from megasora.models.text import SmallTextEncoder
from megasora.observe.metrics import history, read_lines
from megasora.schema import EncodeConfig
from tests.integration.conftest import environment

SAMPLES, EVERY = 40, 5
FIXED = (2, "dp2,zero3")
MOVING = [
    (1, "dp1"), (2, "dp2"), (2, "dp1,tp2"), (2, "cp2x1"), (2, "pp2,dp1"), (2, "dp2,zero1"), (3, "dp3,zero2"),
    (4, "dp2,tp2,zero3"), FIXED,
]  # fmt: skip
PATIENCE = 240.0  # seconds for a start, or without a step, before the storm itself has failed
UNENDING = 100_000  # steps
STALLED = 8.0  # seconds without a step: then a watchdog kills
TMPFS = 24 << 20  # bytes for checkpoints: small enough to fill


def draw_latents(directory: Path, factors: dict[int, float]) -> None:
    """Noise around two colours; some samples are multiplied by a factor that ruins them."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    captions = ["a red wall", "a blue wall"]
    encoder = SmallTextEncoder.create(captions, width=16)
    encoder.save(directory / "text")
    red, blue, null = encoder.encode([*captions, ""])
    with ShardWriter(directory, samples_per_shard=8) as writer:
        for i in range(SAMPLES):
            latent = torch.randn(3, 6, 16, 16, generator=generator) * 0.3 + (i % 2) - 0.5
            latent = latent * factors.get(i, 1.0)
            text = (red, blue)[i % 2]
            tensors = {
                "mean": latent,
                "logvar": torch.full_like(latent, -30.0),
                "text": text.tokens,
                "pooled": text.pooled,
            }
            facts = {"kind": "video", "frames": 6, "fps": 8.0, "height": 16, "width": 16, "temporal_compression": 1,
                     "caption_tokens": len(text.tokens), "label": i % 2, "caption": captions[i % 2]}  # fmt: skip
            writer.write({"__key__": f"s{i:03d}", "json": facts, "safetensors": save(tensors)})
    made = EncodeConfig(vae="pixels", text=str(directory / "text"), output=str(directory), latent_dtype="float32")
    buckets = BucketConfig(resolutions=(16,), frames=(1, 6), aspects=("1:1",), multiple=16)
    manifest = make_manifest(open_stage(made, torch.device("cpu")), encoder, made, [buckets])
    (directory / "latents.json").write_text(json.dumps(manifest))
    save_file({"null_text": null.tokens, "pooled": null.pooled}, directory / "null_text.safetensors")


def write_config(directory: Path) -> Path:
    config = {
        "run": {"seed": 3},
        "data": {"path": str(directory / "latents"), "global_batch": 12, "capacity": 256},
        "model": {"width": 48, "depth": 2, "heads": 4, "channels": 3, "patch": [1, 4, 4], "ffn": 96, "text_width": 16},
        "encode": {"vae": "pixels"},
        "optim": {"lr": 1e-3, "warmup": 5, "ema": 0.9, "schedule": "constant"},
        "stages": [{"steps": UNENDING, "tasks": {"text": 0.7, "image": 0.3},
                    "buckets": {"resolutions": [16], "frames": [1, 6], "aspects": ["1:1"], "multiple": 16}}],
        "checkpoint": {"every": EVERY, "keep_last": 4},
        "observe": {"tensorboard": False},
    }  # fmt: skip
    (directory / "storm.yaml").write_text(yaml.safe_dump(config))
    return directory / "storm.yaml"


@dataclass
class Job:
    """One start of a run."""

    run: Path
    process: subprocess.Popen[str]

    @property
    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for task in children.parents[1].glob("*/children") for pid in task.read_text().split()]

    @property
    def step(self) -> int:
        steps = history(self.run)
        return steps[-1]["step"] if steps else 0

    def until(self, what: str, condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.run}: ended with {self.process.returncode} before {what}: {self.said()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.run}: waited {seconds:.0f} s for {what}")
            time.sleep(0.02)

    def said(self) -> str:
        return (self.run.parent / f"{self.run.name}.err").read_text()[-2000:]

    def kill(self) -> None:
        """The launcher, and with it its workers."""
        if self.process.poll() is not None:
            return
        for pid in [self.process.pid, *self.workers]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


@dataclass
class Storm:
    """A run under faults, the faults that were, and what each cost."""

    name: str
    config: Path
    chance: random.Random
    layouts: list[tuple[int, str]]
    run: Path = field(init=False)
    cost: list[dict[str, Any]] = field(default_factory=list)
    layout: tuple[int, str] = FIXED
    job: Job | None = None  # that runs now
    deck: list[Callable[["Storm", Job], None]] = field(default_factory=list)  # of faults to come

    def __post_init__(self) -> None:
        self.run = self.config.parent / self.name

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    def start(self, steps: int) -> Job:
        """Starts it, and sees that it goes on from the newest good checkpoint and from no other."""
        good = [info for info in newest_first(self.checkpoints) if not verify(info.path)]
        expected = str(good[0].path) if good else "None"
        attempts = sum(line["event"] == "start" for line in read_lines(self.run / "events.jsonl"))
        job = launch(self.config, self.run, self.layout, steps)
        job.until("its start", lambda: len(starts(self.run)) > attempts)
        loaded = starts(self.run)[-1]["checkpoint"]
        assert loaded == expected, f"{self.run}: loaded {loaded}, the newest good one is {expected}"
        return job

    def round(self) -> None:
        """One fault, and the start after it up to where the fault was."""
        if not self.deck:  # each kind comes before any comes again
            self.deck = [kind for kind in FAULTS if kind is not moved or len(self.layouts) > 1]
            self.chance.shuffle(self.deck)
        fault = self.deck.pop()
        job = self.job or self.start(UNENDING)
        moment = job.step + self.chance.choice((1, EVERY, 2 * EVERY))
        job.until("its moment", lambda: job.step >= moment)
        time.sleep(self.chance.uniform(0.0, 0.5))
        before = time.monotonic()
        fault(self, job)
        at = job.step
        self.job = again = self.start(UNENDING)
        attempt, resumed = starts(self.run)[-1]["attempt"], starts(self.run)[-1]["step"]
        again.until(
            "what was lost", lambda: any(m["attempt"] == attempt and m["step"] >= at for m in history(self.run))
        )
        seconds = time.monotonic() - before
        self.cost.append({"fault": fault.__name__, "at": at, "resumed": resumed, "seconds": round(seconds, 2)})
        print(f"{self.name}: {fault.__name__} after step {at}, on {self.layout[1]} again from {resumed}, "
              f"{seconds:.1f} s until it was there again", file=sys.stderr, flush=True)  # fmt: skip

    def finish(self) -> int:
        """Lets it run to an end."""
        if self.job:
            self.job.kill()
        last = history(self.run)[-1]["step"] + 3
        job = self.start(last)
        assert job.process.wait(PATIENCE) == 0, job.said()
        return last


def starts(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(run / "events.jsonl") if line["event"] == "start"]


def launch(config: Path, run: Path, layout: tuple[int, str], steps: int) -> Job:
    command = [sys.executable, "-m", "megasora", "launch", "local", "--nproc", str(layout[0]), "train", "--config",
               str(config), f"--run.dir={run}", f"--parallel.layout={layout[1]}", f"--run.steps={steps}"]  # fmt: skip
    with (run.parent / f"{run.name}.err").open("w") as err:
        process = subprocess.Popen(
            command, env=environment(), stdout=err, stderr=err, text=True, start_new_session=True
        )
    return Job(run, process)


def killed_all(storm: Storm, job: Job) -> None:
    job.kill()


def killed_one(storm: Storm, job: Job) -> None:
    os.kill(storm.chance.choice(job.workers), signal.SIGKILL)
    assert job.process.wait(60) == 128 + signal.SIGKILL, job.said()


def killed_in_a_save(storm: Storm, job: Job) -> None:
    job.until("a save", lambda: any(storm.checkpoints.glob(".step-*.tmp-*")))
    time.sleep(storm.chance.uniform(0.0, 0.05))
    job.kill()


def damaged(storm: Storm, job: Job, how: Callable[[Path, random.Random], None]) -> None:
    job.until("two checkpoints", lambda: sum(info.complete for info in newest_first(storm.checkpoints)) > 1)
    job.kill()
    good = [info for info in newest_first(storm.checkpoints) if not verify(info.path)]
    if len(good) > 1:  # or nothing good would be left
        how(storm.chance.choice(sorted(Path(good[0].path).iterdir())), storm.chance)
        assert verify(good[0].path), "the damage is not seen"


def flipped_bit(storm: Storm, job: Job) -> None:
    def flip(file: Path, chance: random.Random) -> None:
        content = bytearray(file.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)

    damaged(storm, job, flip)


def truncated(storm: Storm, job: Job) -> None:
    damaged(storm, job, lambda file, chance: os.truncate(file, chance.randrange(file.stat().st_size)))


def deleted(storm: Storm, job: Job) -> None:
    damaged(storm, job, lambda file, _: file.unlink())


def disk_full(storm: Storm, job: Job) -> None:
    """Nothing more can be saved for a while; training goes on."""
    ballast = storm.checkpoints / ".ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 14)):
                pass
        except OSError:
            pass
    failed = len(failures(storm.run))
    job.until("a failed save", lambda: len(failures(storm.run)) > failed)
    step = job.step
    job.until("further steps", lambda: job.step > step)
    assert "free space there" in failures(storm.run)[-1]["reason"]
    ballast.unlink()
    saved = len(saves(storm.run))
    job.until("a save that succeeds", lambda: len(saves(storm.run)) > saved)
    job.kill()


def asked_to_stop(storm: Storm, job: Job) -> None:
    job.process.send_signal(storm.chance.choice((signal.SIGTERM, signal.SIGUSR1)))
    assert job.process.wait(PATIENCE) == 75, job.said()


def stopped_rank(storm: Storm, job: Job) -> None:
    """A rank that hangs; what watches the job sees no more steps and kills it."""
    os.kill(storm.chance.choice(job.workers), signal.SIGSTOP)
    step, since = job.step, time.monotonic()
    while time.monotonic() - since < STALLED:
        if job.step > step:
            step, since = job.step, time.monotonic()
        time.sleep(0.1)
    job.kill()


def moved(storm: Storm, job: Job) -> None:
    job.kill()
    storm.layout = storm.chance.choice([layout for layout in storm.layouts if layout != storm.layout])


def failures(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(run / "events.jsonl") if line["event"] == "save_failed"]


def saves(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(run / "events.jsonl") if line["event"] == "save"]


FAULTS: list[Callable[[Storm, Job], None]] = [
    killed_all, killed_one, killed_in_a_save, flipped_bit, truncated, deleted, disk_full, asked_to_stop, stopped_rank, moved,
]  # fmt: skip


def compare(run: Path, reference: Path, last: int) -> dict[str, Any]:
    """Every step once, with the samples of the undisturbed run; the largest relative difference of a loss."""
    found, expected = history(run), history(reference)[:last]
    assert [m["step"] for m in found] == [m["step"] for m in expected] == list(range(1, last + 1))
    assert [(m["order"], m["samples"], m["lr"]) for m in found] == [
        (m["order"], m["samples"], m["lr"]) for m in expected
    ]
    skipped = [m["step"] for m in expected if m["loss"] is None]
    assert skipped == [m["step"] for m in found if m["loss"] is None]
    pairs = [(f, e) for f, e in zip(found, expected, strict=True) if e["loss"] is not None]
    return {
        "steps": last,
        "skipped": len(skipped),
        "attempts": len(starts(run)),
        "same_bits": all((f["loss"], f["grad_norm"]) == (e["loss"], e["grad_norm"]) for f, e in pairs),
        "worst": max(abs(f["loss"] - e["loss"]) / abs(e["loss"]) for f, e in pairs),
    }


def storm(rounds: int, seed: int, directory: Path) -> dict[str, Any]:
    """Runs it in `directory`; the report. AssertionError where anything is not as it must be."""
    draw_latents(directory / "latents", {17: math.nan})
    config = write_config(directory)
    chance, begin = random.Random(seed), time.monotonic()
    storms = [Storm("fixed", config, chance, [FIXED]), Storm("moving", config, chance, MOVING)]
    ends = {}
    for each, share in zip(storms, ((rounds + 1) // 2, rounds // 2), strict=True):
        each.checkpoints.mkdir(parents=True)
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={TMPFS}", "tmpfs", str(each.checkpoints)], capture_output=True
        )
        if mounted.returncode:
            print("no tmpfs can be mounted here: no round with a full disk", file=sys.stderr)
            FAULTS[:] = [fault for fault in FAULTS if fault is not disk_full]
        try:
            for _ in range(share):
                each.round()
            ends[each.name] = each.finish()
        finally:
            if each.job:
                each.job.kill()
            if not mounted.returncode:
                subprocess.run(["umount", "-l", str(each.checkpoints)], check=True)
    whole = launch(config, directory / "whole", FIXED, max(ends.values()))
    assert whole.process.wait(1200) == 0, whole.said()
    results = {name: compare(directory / name, directory / "whole", last) for name, last in ends.items()}
    assert results["fixed"]["same_bits"], results["fixed"]
    assert results["moving"]["worst"] <= 1e-4, results["moving"]
    cost = [entry for each in storms for entry in each.cost]
    lost = {
        kind: {
            "times": len(of_kind),
            "seconds": round(mean(entry["seconds"] for entry in of_kind), 1),
            "steps": round(mean(entry["at"] - entry["resumed"] for entry in of_kind), 1),
        }
        for kind in sorted({entry["fault"] for entry in cost})
        if (of_kind := [entry for entry in cost if entry["fault"] == kind])
    }
    minutes = round((time.monotonic() - begin) / 60, 1)
    facts = {"rounds": rounds, "seed": seed, "checkpoint_every": EVERY, "cores": os.cpu_count(), "minutes": minutes}
    return facts | {"runs": results, "lost_by_fault": lost, "faults": cost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, default=Path("runs/storm"), help="made anew")
    parser.add_argument("--report", type=Path, help="a JSON file")
    args = parser.parse_args()
    shutil.rmtree(args.directory, ignore_errors=True)
    report = storm(args.rounds, args.seed, args.directory.absolute())
    if args.report:
        args.report.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "faults"}, indent=1))


if __name__ == "__main__":
    main()
