"""Says before the queue whether a job fits, how fast it is, what limits it, and which layout is best. Nothing is started.

Memory, communication and FLOPs are closed forms of this project's own models and engine; times are those at the efficiencies of
the device's profile, which `--calibrate` fits to results of `bench`. Exits 2 where the job cannot fit, naming a layout that does.

`--calibrate` fits a device's efficiencies to reports of `bench` and writes a profile that `--gpu FILE` reads.

examples:
  megasora plan --config configs/wan-1.3b.yaml --world 8 --gpu h100
  megasora plan --config configs/wan-1.3b.yaml --world 64 --gpu h100 --search
  megasora plan --config configs/wan-1.3b.yaml --world 64 --gpu h100 --search --html plan.html
  megasora plan --calibrate small.json large.json --profile mine.json
  megasora plan --list-presets --json
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_pipelines.buckets import buckets_of
from megasora.bench import TEXT_TOKENS
from megasora.config import load_config
from megasora.errors import CheckFailed, ConfigError
from megasora.microbatch import patches_of
from megasora.models.families import PRESETS, parameter_count
from megasora.observe.hardware import DEVICES, GIB, Device
from megasora.parallel.layout import Layout, parse_layout
from megasora.parallel.plan import check_layout
from megasora.planner.calibrate import calibrate
from megasora.planner.dry_run import DryRun, dry_run
from megasora.planner.encoders import encoder_bytes
from megasora.planner.job import Job, Recompute
from megasora.planner.mixture import Mixture, find_mixture
from megasora.planner.plan import budget, build_plan, check_unit, facts, job_of, recompute_of, refuse
from megasora.planner.profiles import find_device, write_profile
from megasora.planner.report import report
from megasora.planner.search import Make, best_policy, fewest, layouts, longest, nearest, search
from megasora.planner.step_time import Step
from megasora.planner.tables import ranking, ranking_table, table
from megasora.schema import Config
from megasora.segments import find_stage
from megasora.training_data import UNKNOWN_TEXT, open_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML, see configs/")
    parser.set_defaults(sections=("data", "model", "stages", "optim", "parallel", "precision"))
    parser.add_argument("--world", type=int, metavar="N", help="devices; default: those of parallel.layout")
    parser.add_argument(
        "--gpu",
        default="h100",
        metavar="NAME|FILE",
        help=f"{', '.join(DEVICES).lower()}, cpu, or a profile of --calibrate",
    )
    parser.add_argument("--stage", default="", metavar="NAME", help="of the config's stages; default: the last")
    parser.add_argument("--text-tokens", type=int, metavar="N", help="of every caption; default: the data's, or 128")
    parser.add_argument("--data", choices=("shards", "synthetic"), default="synthetic",
                        help="synthetic (default): as if all buckets were alike; shards: by the index of data.path")  # fmt: skip
    parser.add_argument("--search", action="store_true", help="all layouts of so many devices, best first")
    parser.add_argument(
        "--dry-run", action="store_true", help="step one rank on fake tensors; exit 1 if it is not as planned"
    )
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="that --dry-run is")
    parser.add_argument("--rows", type=int, default=1, metavar="N", help="at least, that --dry-run steps; default: 1")
    parser.add_argument("--fewest", action="store_true", help="the least number of devices on which the job fits")
    parser.add_argument(
        "--longest", action="store_true", help="the longest video of the stage's largest picture that fits"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="also a page with charts; of layouts with --search")
    parser.add_argument(
        "--calibrate", type=Path, nargs="+", metavar="REPORT", help="reports of bench on one kind of device"
    )
    parser.add_argument(
        "--profile", type=Path, default=Path("profile.json"), metavar="FILE", help="that --calibrate writes"
    )
    parser.add_argument("--top", type=int, default=10, metavar="N", help="layouts that --search lists")
    parser.add_argument(
        "--tokens", type=float, default=0, metavar="N", help="a budget of training: device-hours for it"
    )
    parser.add_argument("--samples", type=float, default=0, metavar="N", help="the same in samples")
    parser.add_argument("--list-presets", action="store_true", help="every preset and its parameters")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    if args.list_presets:
        list_presets(args)
        return
    if args.calibrate:
        report_calibration(args)
        return
    if args.config is None:
        raise ConfigError("plan: give --config FILE, --calibrate REPORT or --list-presets")
    if args.world is not None and args.world < 1:
        raise ConfigError(f"--world={args.world}: at least 1")
    config = load_config(args.config, args.overrides)
    layout = parse_layout(config.parallel.layout, args.world)
    config = check_unit(config, layout)
    device = find_device(args.gpu, config.precision.precision)
    stage = find_stage(config, "--stage", args.stage or config.stages[-1].name)
    data = open_data(config, torch.device("cpu")) if args.data == "shards" else None
    mixture = find_mixture(config, stage, args.text_tokens, data)
    if config.parallel.memory:
        device = replace(device, memory=config.parallel.memory * GIB + device.reserved)
    node = None if config.parallel.across_nodes else device.node
    kernels, encoders = device.name != "cpu", encoder_bytes(config)

    def make(tried: Layout, policy: Recompute, often: int) -> tuple[Job, Sequence[Step]]:
        steps = mixture.steps(tried)
        return job_of(config, tried, steps, policy, often, kernels, encoders), steps

    if args.fewest:
        found = fewest(make, device, config.model, node)
        if found is None:
            raise ConfigError(f"--fewest: no number of {device.name}s up to 16384 holds this job")
        show(args, facts(found, mixture, config))
        return
    every_layout = layouts(layout.world, device.node, config.model)
    if args.search:
        candidates = search(make, every_layout, device, config.model, node)
        if candidates[0].plan is None:
            raise ConfigError(f"--world={layout.world}: no layout of so many {device.name}s fits; try --fewest")
        show(args, facts(candidates[0].plan, mixture, config), ranking(candidates, args.top))
        return
    check_layout(config.model, layout, node)
    job, steps = make(layout, *settled(config, make, layout, device))
    if args.longest:
        report_longest(args, config, job, device, node, stage, mixture)
        return
    if args.dry_run:
        report_dry_run(args, dry_run(config, job, args.rank, args.rows))
        return
    plan = build_plan(job, steps, device)
    if not plan.fits:
        raise refuse(plan, nearest(search(make, every_layout, device, config.model, node), layout))
    answer = facts(plan, mixture, config)
    if args.tokens or args.samples:
        answer["budget"] = budget(plan, args.tokens, args.samples)
    else:
        answer["budget"] = budget(plan, steps=stage.steps)
    show(args, answer)


def list_presets(args: argparse.Namespace) -> None:
    presets = {
        name: {"parameters": parameter_count(config), "family": config.family}  # type: ignore[attr-defined]
        for name, config in PRESETS.items()
    }
    if args.json:
        print(json.dumps(presets))
        return
    for name, found in presets.items():
        print(f"{name:<22} {found['family']:<10} {found['parameters']:>16,}")


def report_longest(
    args: argparse.Namespace, config: Config, job: Job, device: Device, node: int | None, stage: Any, mixture: Mixture
) -> None:
    """In pixel frames and in seconds at encode.fps (or that of `sample`). Raises ConfigError where not even a picture fits."""
    bucket = max(buckets_of(stage.buckets), key=lambda bucket: bucket.height * bucket.width)
    compression, patch = config.vae.compression, config.model.patch
    _, H, W = patches_of(bucket, compression, patch)
    text = (args.text_tokens or UNKNOWN_TEXT) if config.model.text_width else 0
    found = longest(job, job.layout.world, device, (H, W), text, node)
    if found is None:
        raise ConfigError(
            f"--longest: not even one frame of {bucket.height}x{bucket.width} fits on {job.layout.world} devices"
        )
    frames = 1 + (found[0] * patch[0] - 1) * compression[0]
    fps = config.encode.fps or config.sample.fps
    answer = facts(found[1], mixture, config)
    answer["longest"] = {"frames": frames, "seconds": frames / fps, "fps": fps, "height": bucket.height,
                         "width": bucket.width, "tokens": found[0] * H * W}  # fmt: skip
    show(args, answer)


def settled(config: Config, make: Make, layout: Layout, device: Device) -> tuple[Recompute, int]:
    """What blocks recompute; where the config leaves that to memory, as little as fits, or all."""
    if config.parallel.recompute != "auto":
        return recompute_of(config.parallel)
    found = best_policy(make, layout, device).plan
    return (found.job.recompute, found.job.every) if found else ("full", 1)


def report_calibration(args: argparse.Namespace) -> None:
    device, runs = calibrate(args.calibrate, TEXT_TOKENS)
    write_profile(device, args.profile)
    rows: list[dict[str, Any]] = [
        {"report": run.name, "measured_s": run.seconds, "predicted_s": run.predicted(device)} for run in runs
    ]
    if args.json:
        print(json.dumps({"profile": str(args.profile), "efficiency": vars(device.efficiency), "runs": rows}))
        return
    for row in rows:
        off = 100 * (row["predicted_s"] / row["measured_s"] - 1)
        print(
            f"{row['report']:<60} measured {row['measured_s']:9.4f} s, predicted {row['predicted_s']:9.4f} s {off:+6.1f} %"
        )
    print(", ".join(f"{name} {value:.3g}" for name, value in vars(device.efficiency).items()))
    print(f"{args.profile}: for --gpu={args.profile}")


def report_dry_run(args: argparse.Namespace, found: DryRun) -> None:
    """Raises CheckFailed where the rank did something else than the closed form says."""
    if args.json:
        print(json.dumps({"rank": found.rank, "stage": found.stage, "compared": found.compared,
                          "differences": found.differences}))  # fmt: skip
    else:
        print(f"{'rank ' + str(found.rank):<60} {'found, MB':>16} {'closed form':>16}")
        for name, (ours, closed) in found.compared.items():
            print(f"{name:<60} {ours / 1e6:16,.3f} {closed / 1e6:16,.3f}")
    if found.differences:
        raise CheckFailed(f"--dry-run: {'; '.join(found.differences)}")


def show(args: argparse.Namespace, answer: dict[str, Any], ranked: Sequence[dict[str, Any]] = ()) -> None:
    """The answer as JSON or a table, before it the layouts of a search; and as a page."""
    if args.html:
        try:
            args.html.write_text(report(answer, ranked))
        except OSError as error:
            raise ConfigError(f"--html={args.html}: {error.strerror}") from None
    if args.json:
        print(json.dumps(answer | ({"layouts": ranked} if ranked else {})))
        return
    print("\n\n".join([*([ranking_table(ranked)] if ranked else []), table(answer)]))
    if empty := answer["empty_buckets"]:
        print(f"warning: {len(empty)} buckets have no sample: {', '.join(empty[:8])}")
