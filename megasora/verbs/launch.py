"""`launch local --nproc N VERB ...` runs a verb on N processes of this machine, or of several, if each runs it.

Everything after the verb is passed on as it is. The exit code is the workers' own; SIGUSR1, SIGTERM and Ctrl-C let them
finish the step, save, and end with 75 (a second SIGTERM or Ctrl-C kills them).

  megasora launch local --nproc 2 train --config configs/demo.yaml --run.steps=20
"""

import argparse
import sys
from pathlib import Path

from megasora.cluster.signals import collected_signals
from megasora.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_subparsers(dest="where", metavar="local", required=True)
    local = where.add_parser("local", help="processes of this machine", allow_abbrev=False)
    local.add_argument("--nproc", type=int, required=True, metavar="N", help="processes on this machine: one per GPU")
    local.add_argument("--nnodes", type=int, default=1, metavar="N", help="machines, each running this command")
    local.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="of one machine, the same on all; with --nnodes")
    local.add_argument("--rdzv-id", default="megasora", metavar="ID", help="of the job, the same on all machines")
    local.add_argument("--local-addr", metavar="ADDR", help="of this machine, where host names do not resolve")
    local.add_argument(
        "--max-restarts", type=int, default=0, metavar="K", help="after failures that a restart may mend"
    )
    local.add_argument("command", nargs=argparse.REMAINDER, metavar="VERB ...", help="the verb and its arguments")


def run(args: argparse.Namespace) -> None:
    """Ends the process with the workers' exit code. Raises ConfigError, before any worker starts, for a bad command."""
    from megasora.cli import check_command

    if args.overrides:
        raise ConfigError(f"launch: {args.overrides[0]} is no option of launch; the verb's own come after the verb")
    for option, value, least in (
        ("--nproc", args.nproc, 1),
        ("--nnodes", args.nnodes, 1),
        ("--max-restarts", args.max_restarts, 0),
    ):
        if value < least:
            raise ConfigError(f"launch: {option}={value}: at least {least}")
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
            log_dir=_log_dir(args.command),
            pending=pending,
        )
    raise SystemExit(code)


def _log_dir(command: list[str]) -> Path | None:
    """Where the workers of this command write rank-NNNNN.log: `logs` of the run directory."""
    from megasora.cli import parse_verb
    from megasora.config import load_config

    args = parse_verb(command)
    return Path(load_config(args.config, args.overrides).run.dir) / "logs" if "config" in args else None
