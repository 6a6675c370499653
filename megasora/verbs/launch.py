"""Runs a verb on several processes, here or under SLURM, and keeps its exit code. `launch local --help` and `launch slurm --help`
say the rest.

examples:
  megasora launch local --nproc 2 train --config configs/demo.yaml --run.steps=20
  megasora launch slurm train --config configs/demo.yaml --nodes 16 --gpus-per-node 8 --time 12:00:00 --doctor --dry-run
"""

import argparse
import signal
import sys
from pathlib import Path

from megasora.cli import taught
from megasora.cluster.signals import collected_signals
from megasora.cluster.slurm import SLURM_VERBS, check_numbers
from megasora.errors import ConfigError

LOCAL = """Runs a verb on N processes of this machine, or of several, if each runs it. Everything after the verb is passed on as
it is. SIGUSR1, SIGTERM and Ctrl-C let the workers finish the step, save, and end with 75 (a second SIGTERM or Ctrl-C kills them).

examples:
  megasora launch local --nproc 2 train --config configs/demo.yaml --run.steps=20
  megasora launch local --nproc 8 --nnodes 2 --rdzv-endpoint node1:29500 train --config configs/wan-1.3b.yaml
"""
SLURM = """Writes a batch script from launch/slurm.sbatch, keeps it with the resolved config and the code's revision in
RUN/launch/NNNN, and submits it. At preemption and before the time limit the job saves and goes back into the queue. A job that
finds too few fit nodes waits, or with --min-nodes goes on with fewer and the same global batch.

examples:
  megasora launch slurm train --config configs/demo.yaml --nodes 16 --gpus-per-node 8 --time 12:00:00 --doctor --dry-run
  megasora launch slurm encode --config configs/demo.yaml --array 32 --gpus-per-node 8
  megasora launch slurm train --config configs/demo.yaml --nodes 2 --sweep 'optim.lr=1e-3;2e-3' --after 1234
"""
STALL = 480  # seconds; less than the ten minutes after which a collective fails by itself and names nobody


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_subparsers(dest="where", metavar="local|slurm", required=True)
    local = where.add_parser("local", help="processes of this machine", allow_abbrev=False, **taught(LOCAL))
    local.add_argument("--nproc", type=int, required=True, metavar="N", help="processes on this machine: one per GPU")
    local.add_argument("--nnodes", type=int, default=1, metavar="N", help="machines, each running this command")
    local.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="of one machine, the same on all; with --nnodes")
    local.add_argument("--rdzv-id", default="megasora", metavar="ID", help="of the job, the same on all machines")
    local.add_argument("--local-addr", metavar="ADDR", help="of this machine, where host names do not resolve")
    local.add_argument(
        "--max-restarts", type=int, default=0, metavar="K", help="after failures that a restart may mend"
    )
    _add_stall(local)
    local.add_argument("command", nargs=argparse.REMAINDER, metavar="VERB ...", help="the verb and its arguments")

    slurm = where.add_parser("slurm", help="a job of a SLURM cluster", allow_abbrev=False, **taught(SLURM))
    slurm.add_argument("verb", metavar="VERB", help=f"{', '.join(SLURM_VERBS)}; its arguments may follow anywhere")
    slurm.add_argument("--nodes", type=int, default=1, metavar="N")
    slurm.add_argument("--min-nodes", type=int, default=0, metavar="N", help="go on with so few; default: wait for all")
    slurm.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="0: a CPU cluster")
    slurm.add_argument("--nproc", type=int, default=0, metavar="N", help="processes a node; default: one a GPU")
    slurm.add_argument(
        "--time", default="24:00:00", metavar="D-HH:MM:SS", help="limit; a job that saves in time goes on"
    )
    slurm.add_argument("--partition", default="", metavar="P")
    slurm.add_argument("--account", default="", metavar="A")
    slurm.add_argument("--qos", default="", metavar="Q")
    slurm.add_argument("--exclude", default="", metavar="NODES", help="never these")
    slurm.add_argument("--sbatch", action="append", default=[], metavar="=--OPTION", help="any other option of sbatch")
    slurm.add_argument("--container", default="", metavar="IMAGE", help="by pyxis and enroot")
    slurm.add_argument("--mounts", default="", metavar="SRC:DST,...", help="further ones of the container")
    slurm.add_argument("--python", default="", metavar="FILE", help="default: this one; in a container, its own")
    slurm.add_argument("--array", type=int, default=0, metavar="N", help="prepare, encode: N tasks share the work")
    slurm.add_argument("--sweep", action="append", default=[], metavar="KEY=A;B", help="a task for each combination")
    slurm.add_argument(
        "--chain", type=int, default=1, metavar="N", help="so many jobs one after the other, each going on"
    )
    slurm.add_argument("--after", default="", metavar="JOB", help="start when that job has succeeded")
    slurm.add_argument("--warning", type=int, default=120, metavar="SECONDS", help="before the limit, in which to save")
    slurm.add_argument("--max-restarts", type=int, default=3, metavar="K", help="within the job")
    _add_stall(slurm)
    slurm.add_argument(
        "--doctor", nargs="?", const="", metavar="=OPTIONS", help="look at the nodes first, leave out bad ones"
    )
    slurm.add_argument("--dry-run", action="store_true", help="only print the script")


def _add_stall(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stall", type=int, default=STALL, metavar="SECONDS", help="without progress, then restart; 0: never"
    )


def run(args: argparse.Namespace) -> None:
    """Ends the process with the workers' exit code. Raises ConfigError, before anything starts, for a bad command."""
    if args.where == "slurm":
        from megasora.verbs.launch_slurm import launch_slurm

        launch_slurm(args)
        return
    from megasora.cli import check_command

    if args.overrides:
        raise ConfigError(f"launch: {args.overrides[0]} is no option of launch; the verb's own come after the verb")
    check_numbers(("--nproc", args.nproc, 1), ("--nnodes", args.nnodes, 1), ("--max-restarts", args.max_restarts, 0),
                  ("--stall", args.stall, 0))  # fmt: skip
    with collected_signals() as pending:  # what comes while torch is imported is passed on later
        check_command(args.command)

        from megasora.cluster.local import launch_local

        code = launch_local(
            [sys.executable, "-m", "megasora", *args.command],
            nproc=args.nproc,
            nnodes=args.nnodes,
            rdzv_endpoint=args.rdzv_endpoint,
            rdzv_id=args.rdzv_id,
            local_addr=args.local_addr,
            max_restarts=args.max_restarts,
            stall=args.stall,
            log_dir=_log_dir(args.command),
            pending=pending,
        )
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the work is over: a late warning does not change its code
    raise SystemExit(code)


def _log_dir(command: list[str]) -> Path | None:
    """Where the workers of this command write rank-NNNNN.log: `logs` of the run directory."""
    from megasora.cli import parse_verb
    from megasora.config import load_config

    args = parse_verb(command)
    return Path(load_config(args.config, args.overrides).run.dir) / "logs" if "config" in args else None
