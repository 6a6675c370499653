"""Says before the queue whether a job fits, how fast it is, what limits it, and which layout is best. Nothing is started.

Memory, communication and FLOPs are closed forms of this project's own models and engine; times are those at the efficiencies of
the device's profile, which `--calibrate` fits to results of `bench`. Exits 2 where the job cannot fit, naming a layout that does.

examples:
  megasora plan --config configs/wan-1.3b.yaml --world 8 --gpu h100
  megasora plan --config configs/wan-1.3b.yaml --world 64 --gpu h100 --search
  megasora plan --list-presets --json
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megasora.config import load_config
from megasora.errors import CheckFailed, ConfigError
from megasora.models.families import PRESETS, parameter_count
from megasora.observe.hardware import DEVICES, GIB, Device
from megasora.parallel.layout import Layout, parse_layout
from megasora.parallel.plan import check_layout
from megasora.planner.dry_run import DryRun, dry_run
from megasora.planner.fitting import POLICIES
from megasora.planner.job import Job, Recompute
from megasora.planner.mixture import Mixture, find_mixture
from megasora.planner.plan import (
    Plan,
    budget,
    build_plan,
    check_unit,
    facts,
    job_of,
    refuse,
)
from megasora.planner.profiles import find_device
from megasora.planner.search import Candidate, Make, best_policy, fewest, search
from megasora.planner.step_time import Step
from megasora.planner.tables import ranking, ranking_table, table
from megasora.schema import Config


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
    parser.add_argument("--fewest", action="store_true", help="the least number of devices on which the job fits")
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
    if args.config is None:
        raise ConfigError("plan: give --config FILE, or --list-presets")
    if args.world is not None and args.world < 1:
        raise ConfigError(f"--world={args.world}: at least 1")
    config = load_config(args.config, args.overrides)
    layout = parse_layout(config.parallel.layout, args.world)
    config = check_unit(config, layout)
    device = find_device(args.gpu, config.precision.precision)
    stage = find_stage(config, args.stage)
    mixture = find_mixture(config, stage, args.text_tokens, args.data == "shards")
    if config.parallel.memory:
        device = replace(device, memory=config.parallel.memory * GIB + device.reserved)
    kernels = device.name != "cpu"

    def make(tried: Layout, policy: Recompute, often: int) -> tuple[Job, Sequence[Step]]:
        steps = mixture.steps(tried)
        return job_of(config, tried, steps, policy, often, kernels), steps

    if args.fewest:
        found = fewest(make, device, config.model)
        if found is None:
            raise ConfigError(f"--fewest: no number of {device.name}s up to 16384 holds this job")
        show(args, facts(found, mixture, config))
        return
    if args.search:
        candidates = search(make, layout.world, device, config.model)
        if candidates[0].plan is None:
            raise ConfigError(f"--world={layout.world}: no layout of so many {device.name}s fits; try --fewest")
        report_search(args, candidates, mixture, config)
        return
    check_layout(config.model, layout, None if config.parallel.across_nodes else device.node)
    recompute, every = recompute_of(config, make, layout, device)
    job, steps = make(layout, recompute, every)
    if args.dry_run:
        report_dry_run(args, dry_run(config, job, args.rank))
        return
    plan = build_plan(job, steps, device)
    if not plan.fits:
        raise refuse(plan, nearest(search(make, layout.world, device, config.model), layout))
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


def find_stage(config: Config, name: str) -> Any:
    """The stage of that name, by default the last. Raises ConfigError."""
    for stage in reversed(config.stages):
        if name in ("", stage.name):
            return stage
    raise ConfigError(f"--stage={name}: the config has {', '.join(stage.name for stage in config.stages)}")


def recompute_of(config: Config, make: Make, layout: Layout, device: Device) -> tuple[Recompute, int]:
    """`every2` -> ("full", 2); auto -> as little as fits, or all."""
    policy = config.parallel.recompute
    if policy == "auto":
        found = best_policy(make, layout, device, POLICIES).plan
        return (found.job.recompute, found.job.every) if found else ("full", 1)
    if policy.startswith("every"):
        return "full", int(policy.removeprefix("every"))
    for known in ("none", "selective", "full"):
        if policy == known:
            return known, 1
    raise ConfigError(f"parallel.recompute={policy}: none, selective, full or everyK")


def nearest(found: Sequence[Candidate], layout: Layout) -> Plan | None:
    """Of what fits the layout with the fewest degrees changed; of equals the fastest."""
    fitting = [one.plan for one in found if one.plan is not None]

    def distance(plan: Plan) -> tuple[int, float]:
        ours, theirs = vars(layout), vars(plan.job.layout)
        return sum(ours[name] != theirs[name] for name in ours), plan.time.seconds

    return min(fitting, key=distance, default=None)


def report_search(args: argparse.Namespace, found: Sequence[Candidate], mixture: Mixture, config: Config) -> None:
    rows = ranking(found, args.top)
    best = found[0].plan
    assert best is not None
    answer = facts(best, mixture, config)
    if args.json:
        print(json.dumps(answer | {"layouts": rows}))
        return
    print(ranking_table(rows))
    print()
    print(table(answer))


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


def show(args: argparse.Namespace, answer: dict[str, Any]) -> None:
    print(json.dumps(answer) if args.json else table(answer))
    if answer["empty_buckets"] and not args.json:
        print(
            f"warning: {len(answer['empty_buckets'])} buckets have no sample: {', '.join(answer['empty_buckets'][:8])}"
        )
