"""Is a new cluster ready? On one node, one after the other: doctor, every kernel on its GPU, parity of layouts, and bench, in one
JSON record. Exits 1 and names what failed.

--table prints such records as the rows of a table, for a README that says what has run on what.

examples:
  megasora accept --config configs/demo.yaml --processes 2 --layout dp2 --layout tp2 --output accepted.json
  megasora launch slurm accept --nodes 1 --gpus-per-node 8 --config configs/wan-1.3b.yaml --layout dp8,zero3
  megasora accept --table accepted.json other.json
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megasora import __version__
from megasora.cluster.command import megasora, outcome
from megasora.errors import CheckFailed, ConfigError
from megasora.observe.logs import start_logging

SCHEMA = 1
GPU_CHECK = Path(__file__).parents[2] / "kernels" / "gpu_check.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML, see configs/")
    parser.add_argument("--processes", type=int, metavar="N", help="of the bench; default: one a GPU, or one")
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="that the node must have; 0: not asked for")
    parser.add_argument(
        "--layout", action="append", default=[], metavar="L", help="to prove and, the first, to measure"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="the record; default: only printed")
    parser.add_argument("--table", nargs="+", type=Path, default=[], metavar="RECORD", help="print records as a table")


def run(args: argparse.Namespace) -> None:
    if args.table:
        print(table([read_record(path) for path in args.table]))
        return
    if args.config is None:
        raise ConfigError("accept: give --config FILE, or --table RECORD")
    start_logging(None, 0)
    from megasora.config import load_config
    from megasora.device import devices_here

    load_config(args.config, args.overrides)
    nproc = args.processes or len(devices_here())
    record = accept(args.config, args.overrides, nproc, args.layout or [f"dp{nproc}"], args.gpus)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    if bad := [name for name, part in record["parts"].items() if part.get("exit")]:
        raise CheckFailed(f"not accepted: {', '.join(bad)}; {record['parts'][bad[0]]['error']}")


def accept(config: Path, overrides: Sequence[str], nproc: int, layouts: Sequence[str], gpus: int) -> dict[str, Any]:
    """Runs every part to its end, whatever the others found; `gpus` is what the node must have, 0 for anything."""
    import torch

    from megasora.device import pick_device
    from megasora.observe.hardware import device_name

    common = ["--config", str(config), *overrides]
    bench = ["bench", *common, "--data=synthetic", "--json", f"--parallel.layout={layouts[0]}"]
    parts: dict[str, Any] = {"doctor": outcome(megasora("doctor", "--gpus", str(gpus), "--json"))}
    if torch.cuda.is_available() and GPU_CHECK.exists():
        parts["kernels"] = outcome([sys.executable, str(GPU_CHECK)])
    else:
        parts["kernels"] = {"skipped": f"no {'CUDA device' if GPU_CHECK.exists() else GPU_CHECK}"}
    proven = [word for layout in layouts for word in ("--layout", layout)]
    parts["parity"] = outcome(megasora("parity", *common, *proven, "--json"))
    parts["bench"] = outcome(megasora(*bench, nproc=nproc))
    device = device_name(pick_device())
    return {
        "schema": SCHEMA, "megasora": __version__, "torch": torch.__version__, "python": platform.python_version(),
        "time": time.strftime("%Y-%m-%d"), "device": device, "processes": nproc, "layouts": list(layouts),
        "config": config.name, "accepted": not any(found.get("exit") for found in parts.values()), "parts": parts,
    }  # fmt: skip


def read_record(path: Path) -> dict[str, Any]:
    """Raises ConfigError for what is no record, or one of another version."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        if record["schema"] == SCHEMA:
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"--table={path}: not a record of `megasora accept` of schema {SCHEMA}")


def table(records: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    rows = ["| device | processes | layouts | date, versions | doctor | kernels | parity | bench |", "|" + " --- |" * 8]
    for record in records:
        said = [
            "not run: " + found["skipped"] if "skipped" in found else "failed" if found["exit"] else "passed"
            for found in (record["parts"][name] for name in ("doctor", "kernels", "parity", "bench"))
        ]
        about = f"{record['time']}, MegaSora {record['megasora']}, torch {record['torch']}"
        cells = [record["device"], str(record["processes"]), " ".join(record["layouts"]), about, *said]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
