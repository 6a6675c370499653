"""The part of `launch` that writes and submits SLURM jobs: what to ask for, what to keep beside the run, what to print."""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import xxhash
import yaml

import megasora
from megasora.cli import VERBS, parse_verb
from megasora.cluster.command import choices
from megasora.cluster.elastic import layouts_by_nodes
from megasora.cluster.slurm import SLURM_VERBS, Job, check_numbers, render, submit
from megasora.config import load_config, to_dict
from megasora.errors import ConfigError, writing
from megasora.parallel.layout import check_share, parse_layout
from megasora.schema import Config

SHARED = ("train", "bench", "doctor")  # verbs whose processes work together; the others of a node work for themselves
ALONE = ("prepare", "parity", "doctor", "accept", "train-vae")  # verbs that want one process a node
CHECKS = ("parity", "doctor", "accept", "bench")  # verbs that fail by finding something: again they would find it again
ARRAYS = ("prepare", "encode")  # verbs whose tasks share the work without meeting

TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}|UNLIMITED|INFINITE")  # as sbatch reads it


def launch_slurm(args: argparse.Namespace) -> None:
    """Raises ConfigError, before anything is created, for what cannot run; what sbatch refuses leaves nothing either. Of a chain
    that it takes a part of, that part stays."""
    check(args)
    configs, arguments = read_command(args)
    run = Path(configs[0].run.dir if configs else f"runs/{args.verb}").absolute()
    run = run.parent if args.sweep else run  # of which each task has a directory
    snapshot = next_free(run / "launch")
    job = describe(args, configs, arguments, run, snapshot)
    script = render(job)
    if args.dry_run:
        print(script, end="")
        return
    with writing(f"run.dir={run}"):
        keep(snapshot, script, args, configs)
        job.log.parent.mkdir(parents=True, exist_ok=True)
    ids: list[str] = []
    try:
        for _ in range(args.chain):
            ids.append(submit(snapshot / "job.sbatch"))
    except ConfigError as error:
        if ids:
            raise ConfigError(f"{error}; submitted before that and queued: job {' '.join(ids)}") from None
        shutil.rmtree(snapshot)
        raise
    size = f"{' or '.join(map(str, job.layouts))} nodes x {job.nproc} processes"
    print(f"job {' '.join(ids)}: {args.verb} on {size}{f', {job.array} tasks' if job.array else ''}")
    print(f"log          {str(job.log).replace('%j', ids[0]).replace('%A', ids[0])}")
    if args.verb == "train":
        print(f"TensorBoard  {sys.executable} -m tensorboard.main --logdir {shlex.quote(str(run))}")
    print(f"kept         {snapshot}")


def check(args: argparse.Namespace) -> None:
    if args.verb not in SLURM_VERBS or args.verb not in VERBS:
        known = ", ".join(verb for verb in SLURM_VERBS if verb in VERBS)
        raise ConfigError(f"launch slurm: {args.verb}: not a verb for SLURM; known are {known}")
    check_numbers(("--nodes", args.nodes, 1), ("--gpus-per-node", args.gpus_per_node, 0), ("--nproc", args.nproc, 0),
                  ("--min-nodes", args.min_nodes, 0), ("--array", args.array, 0), ("--chain", args.chain, 1),
                  ("--warning", args.warning, 1), ("--max-restarts", args.max_restarts, 0),
                  ("--stall", args.stall, 0))  # fmt: skip
    if not TIME.fullmatch(args.time):
        raise ConfigError(f"launch: --time={args.time}: D-HH:MM:SS, HH:MM:SS or minutes are expected")
    if args.min_nodes > args.nodes:
        raise ConfigError(f"launch: --min-nodes={args.min_nodes}: at most --nodes={args.nodes}")
    if args.min_nodes and args.verb != "train":
        raise ConfigError(f"launch: --min-nodes={args.min_nodes}: only train goes on with fewer nodes")
    if args.nodes > 1 and args.verb not in SHARED:
        hint = "use --array" if args.verb in ARRAYS else "it runs on one"
        raise ConfigError(f"launch: --nodes={args.nodes}: the processes of {args.verb} do not meet; {hint}")
    if args.array and args.verb not in ARRAYS:
        raise ConfigError(f"launch: --array={args.array}: only {' and '.join(ARRAYS)}; --sweep makes an array of runs")
    if args.sweep and args.verb not in ("train", "bench"):
        raise ConfigError(f"launch: --sweep={args.sweep[0]}: only train and bench")


def read_command(args: argparse.Namespace) -> tuple[list[Config], list[str]]:
    """The config, resolved, of each task of a sweep or of the only one, and the verb's own arguments."""
    parsed = parse_verb([args.verb, *args.overrides])
    if "config" not in parsed:
        if parsed.overrides:
            raise ConfigError(f"launch: {parsed.overrides[0]}: {args.verb} has no such option")
        return [], args.overrides
    own, words = [], iter(args.overrides)
    for word in words:
        if word == "--config":
            next(words)
        elif word not in parsed.overrides and not word.startswith("--config="):
            own.append(word)
    if not args.sweep:
        return [load_config(parsed.config, parsed.overrides)], own
    whole = load_config(parsed.config, parsed.overrides)
    found = []
    for task, choice in enumerate(choices(args.sweep)):
        places = [f"--run.dir={Path(whole.run.dir) / f'{task:04d}'}"]
        if whole.checkpoint.durable:  # each task's copies, too, lie apart
            places.append(f"--checkpoint.durable={whole.checkpoint.durable.rstrip('/')}/{task:04d}")
        found.append(load_config(parsed.config, [*parsed.overrides, *choice, *places]))
    return found, own


def describe(args: argparse.Namespace, configs: list[Config], arguments: list[str], run: Path, snapshot: Path) -> Job:
    """The job that the options ask for."""
    nproc = args.nproc or (1 if args.verb in ALONE else max(1, args.gpus_per_node))
    layouts = {args.nodes: ""}
    for config in configs if args.verb in ("train", "bench") else []:
        layout = parse_layout(config.parallel.layout, args.nodes * nproc)
        check_share(config.data.global_batch, layout)
        if args.min_nodes:
            found = layouts_by_nodes(layout, args.nodes, args.min_nodes, nproc, config.data.global_batch)
            if config is not configs[0] and found != layouts:
                raise ConfigError(f"launch: --min-nodes={args.min_nodes}: the tasks of a sweep must have one layout")
            layouts = found
        if args.chain > 1 and config.run.resume != "auto":
            raise ConfigError(
                f"launch: --chain={args.chain}: every job would begin at run.resume={config.run.resume}; give auto"
            )
    tasks = len(configs) if args.sweep else args.array
    gpus = ("--gpus", str(args.gpus_per_node))  # before what the user asks for, which counts
    doctor = None if args.doctor is None else (*gpus, *shlex.split(args.doctor))
    if doctor is not None and (unknown := parse_verb(["doctor", *doctor]).overrides):
        raise ConfigError(f"launch: --doctor={args.doctor}: doctor has no {unknown[0]}")
    if args.verb == "doctor":
        arguments = ["--links", *gpus, *arguments]
    if args.verb == "accept":
        arguments = [*gpus, *arguments]
    here = Path.cwd()
    digest = xxhash.xxh3_64_hexdigest(str(run).encode())[:6]
    after = [f"afterok:{args.after}"] * bool(args.after) + ["singleton"] * (args.chain > 1)
    return Job(
        name=f"{args.verb}-{re.sub(r'[^A-Za-z0-9_.-]', '_', run.name)}-{digest}",
        verb=args.verb,
        arguments=tuple(arguments),
        config=snapshot / "config.yaml" if configs else None,
        layouts=layouts,
        gpus_per_node=args.gpus_per_node,
        nproc=nproc,
        python=args.python or ("python" if args.container else sys.executable),
        directory=here,
        log=run / "logs" / f"slurm-{'%A_%a' if tasks else '%j'}.out",
        cache=here / ".cache",
        time=args.time,
        partition=args.partition,
        account=args.account,
        qos=args.qos,
        exclude=args.exclude,
        dependency=",".join(after),
        array=tasks,
        sweep=bool(args.sweep),
        container=args.container,
        mounts=",".join(dict.fromkeys([f"{here}:{here}", f"{run}:{run}", *filter(None, [args.mounts])])),
        warning=args.warning,
        max_restarts=0 if args.verb in CHECKS else args.max_restarts,
        stall=args.stall,
        doctor=doctor,
        reports=snapshot / "doctor",
        options=tuple(args.sbatch),
    )


def keep(snapshot: Path, script: str, args: argparse.Namespace, configs: list[Config]) -> None:
    """The script, the resolved configs and the code's revision, for the job to read and for whoever asks later."""
    snapshot.mkdir(parents=True)
    (snapshot / "job.sbatch").write_text(script)
    for task, config in enumerate(configs):
        name = f"config-{task}.yaml" if args.sweep else "config.yaml"
        (snapshot / name).write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    if args.sweep:
        tasks = [
            {"task": task, "run": config.run.dir, "values": list(choice)}
            for task, (config, choice) in enumerate(zip(configs, choices(args.sweep), strict=True))
        ]
        (snapshot / "sweep.json").write_text(json.dumps(tasks, indent=1))
    revision, changes = code_revision()
    (snapshot / "revision.txt").write_text(f"{revision}\n")
    if changes:
        (snapshot / "changes.diff").write_text(changes)


def code_revision() -> tuple[str, str]:
    """The version, with the commit and what differs from it if the code lies in a git repository of its own."""
    root, tool = Path(megasora.__file__).parents[1], shutil.which("git")

    def git(*words: str) -> str:
        if tool is None:
            return ""
        done = subprocess.run([tool, "-C", str(root), *words], capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else ""

    version = f"megasora {megasora.__version__}"
    if Path(git("rev-parse", "--show-toplevel").strip() or "/") != root:
        return version, ""
    changes = git("diff", "HEAD")
    return f"{version} {git('rev-parse', 'HEAD').strip()}{' with changes' if changes else ''}", changes


def next_free(directory: Path) -> Path:
    """directory/0000, or the number after the highest there."""
    numbers = [int(path.name) for path in directory.glob("*") if path.name.isdigit()]
    return directory / f"{max(numbers, default=-1) + 1:04d}"
