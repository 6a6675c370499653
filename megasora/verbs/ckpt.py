"""`megasora ckpt ls` and `megasora ckpt verify`: look at checkpoints without torch and without reading tensors."""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megasora.checkpoint.directory import CheckpointInfo, describe, list_checkpoints
from megasora.checkpoint.manifest import MANIFEST, Place, Problem, damage, verify
from megasora.errors import CheckpointError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the sub-commands of `ckpt`."""
    actions = parser.add_subparsers(dest="action", required=True)
    listing = actions.add_parser("ls", help="list the checkpoints of a run")
    listing.add_argument("--verify", action="store_true", help="read every file and compare checksums")
    checking = actions.add_parser("verify", help="read every file and compare checksums; exit code 4 if one is damaged")
    for action in (listing, checking):
        action.add_argument("path", type=Path, help="a run, its checkpoints directory, or one checkpoint")
        action.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> None:
    """Runs the sub-command. CheckpointError if `ckpt verify` finds damage, or nothing to verify."""
    found = _checkpoints(args.path)
    if args.action == "verify" and not found:
        raise CheckpointError(f"{args.path}: holds no checkpoint")
    checked = {info.path: _verify(info) for info in found} if args.action == "verify" or args.verify else {}
    if args.json:
        verdict = {"ok": not any(checked.values())} if checked else {}
        print(json.dumps(verdict | {"checkpoints": [_record(info, checked.get(info.path)) for info in found]}))
    else:
        for line in _table(found, checked):
            print(line)
    damaged = {path: problems for path, problems in checked.items() if problems}
    if args.action == "verify" and damaged:
        raise CheckpointError("; ".join(str(damage(path, problems)) for path, problems in damaged.items()))


def _checkpoints(path: Path) -> list[CheckpointInfo]:
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    if (path / "checkpoints").is_dir():
        return list_checkpoints(path / "checkpoints")
    found = list_checkpoints(path)
    if found or not any(path.iterdir()):
        return found
    looks_like_one = (path / MANIFEST).exists() or path.name.startswith("step-") or any(path.glob("*.distcp"))
    return [describe(path)] if looks_like_one else []


def _verify(info: CheckpointInfo) -> list[Problem]:
    if not sys.stderr.isatty():
        print(f"verifying {info.path} ({_size(info.bytes)})", file=sys.stderr)
    # disable=None: a bar on a terminal only
    with tqdm(total=info.bytes, desc=info.path.name, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        return verify(info.path, on_bytes=bar.update)


def _record(info: CheckpointInfo, problems: list[Problem] | None) -> dict[str, Any]:
    record: dict[str, Any] = {**asdict(info), "path": str(info.path)}
    if problems is not None:
        record |= {"verified": not problems, "problems": [asdict(problem) for problem in problems]}
    return record


def _table(found: list[CheckpointInfo], checked: dict[Place, list[Problem]]) -> list[str]:
    rows = [("step", "size", "layout", "age", "state")]
    for info in found:
        problems = checked.get(info.path)
        if problems is None:
            state = "complete" if info.complete else "INCOMPLETE"
        else:
            state = "; ".join(f"{p.file}: {p.reason}" for p in problems[:3]) or "verified"
        rows.append((str(info.step), _size(info.bytes), info.layout or "-", _age(info.time), state))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size >= 1000:
            size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _age(saved: int | None) -> str:
    if saved is None:
        return "-"
    seconds = max(0, int(time.time()) - saved)
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
