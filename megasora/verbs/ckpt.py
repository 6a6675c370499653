"""Looks at checkpoints, and makes others of them.

examples:
  megasora ckpt ls runs/demo                        # step, size, layout, age, whether complete
  megasora ckpt verify runs/demo                    # every file against its checksum
  megasora ckpt convert runs/demo/checkpoints/step-00000500 whole
  megasora ckpt export runs/demo/checkpoints/step-00000500 exported
  megasora ckpt diff runs/a/checkpoints/step-00000500 runs/b/checkpoints/step-00000500
  megasora ckpt average runs/demo/checkpoints/step-00000400 runs/demo/checkpoints/step-00000500 --output mean
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megasora.checkpoint.directory import CheckpointInfo, describe, list_checkpoints
from megasora.checkpoint.fence import WRITER
from megasora.checkpoint.manifest import MANIFEST, Place, Problem, damage, place_of, step_name, verify
from megasora.cli import taught
from megasora.errors import CheckFailed, CheckpointError, ConfigError, writing

LS = """Lists the checkpoints of a run: step, size, layout, age, and whether each is complete.

examples:
  megasora ckpt ls runs/demo
  megasora ckpt ls s3://bucket/run --verify --json
"""
VERIFY = """Compares every file with its checksum in the manifest. Exits 4 and names what is damaged.

examples:
  megasora ckpt verify runs/demo
  megasora ckpt verify runs/demo/checkpoints/step-00000500 --json
"""
CONVERT = """Makes a checkpoint of another form: one that is sharded becomes safetensors in one piece, any other becomes sharded
as OUTPUT/step-XXXXXXXX, with --to universal as DeepSpeed loads it. DeepSpeed's own forms are read as well.

examples:
  megasora ckpt convert runs/demo/checkpoints/step-00000500 whole
  megasora ckpt convert whole runs/again/checkpoints
  megasora ckpt convert runs/demo/checkpoints/step-00000500 for-deepspeed --to universal
"""
EXPORT = """Writes a directory that diffusers opens, and compares its output with ours where diffusers is installed. Exits 1
where they differ.

examples:
  megasora ckpt export runs/demo/checkpoints/step-00000500 exported
  megasora ckpt export runs/demo/checkpoints/step-00000500 exported --weights model --json
"""
DIFF = """Compares two checkpoints tensor by tensor. Exits 1 where they differ.

examples:
  megasora ckpt diff runs/a/checkpoints/step-00000500 runs/b/checkpoints/step-00000500
  megasora ckpt diff runs/a/checkpoints/step-00000500 whole --tolerance 1e-6
"""
AVERAGE = """The mean of several checkpoints' weights, as OUTPUT/step-XXXXXXXX, to sample and to start from.

examples:
  megasora ckpt average runs/demo/checkpoints/step-00000400 runs/demo/checkpoints/step-00000500 --output mean
  megasora ckpt average runs/a/checkpoints/step-00000500 runs/b/checkpoints/step-00000500 --weights 1,3 --output mean
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the sub-commands of `ckpt`."""
    actions = parser.add_subparsers(dest="action", required=True)
    listing = actions.add_parser("ls", help="list the checkpoints of a run", **taught(LS))
    listing.add_argument("--verify", action="store_true", help="read every file and compare checksums")
    checking = actions.add_parser(
        "verify", help="read every file and compare checksums; exit code 4 if one is damaged", **taught(VERIFY)
    )
    for action in (listing, checking):
        action.add_argument("path", type=place_of, help="a run, its checkpoints directory, or one checkpoint")
    converting = actions.add_parser(
        "convert", help="sharded -> consolidated safetensors, back, and from and to DeepSpeed's", **taught(CONVERT)
    )
    converting.add_argument(
        "--to", choices=("sharded", "safetensors", "universal"), help="default: safetensors of sharded, else sharded"
    )
    exporting = actions.add_parser("export", help="to a directory of diffusers, with a parity report", **taught(EXPORT))
    exporting.add_argument("--weights", choices=("ema", "model"), default="ema")
    for action in (converting, exporting):
        action.add_argument("path", type=place_of, help="one checkpoint")
        action.add_argument("output", type=Path, help="a directory that is not there yet")
    comparing = actions.add_parser(
        "diff", help="compare two checkpoints tensor by tensor; exit code 1 if they differ", **taught(DIFF)
    )
    comparing.add_argument("paths", type=place_of, nargs=2)
    comparing.add_argument("--tolerance", type=float, default=0.0, help="of the norm of a difference, relative")
    averaging = actions.add_parser("average", help="the mean of several checkpoints' weights", **taught(AVERAGE))
    averaging.add_argument("paths", type=place_of, nargs="+")
    averaging.add_argument("--output", type=Path, required=True)
    averaging.add_argument("--weights", default="", help="comma-separated, one a checkpoint; default: all alike")
    for action in (listing, checking, converting, exporting, comparing, averaging):
        action.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> None:
    """Runs the sub-command. CheckpointError for damage, or for nothing to look at; CheckFailed where two differ."""
    if args.overrides:
        raise ConfigError(
            f"ckpt: {args.overrides[0]} is no option of `ckpt {args.action}`; `megasora ckpt {args.action} --help` has them"
        )
    actions = {"ls": look, "verify": look, "convert": convert, "export": export, "diff": diff, "average": average}
    with writing(f"{args.output}" if "output" in args else f"ckpt {args.action}"):
        actions[args.action](args)


def look(args: argparse.Namespace) -> None:
    """Without torch, and without reading tensors."""
    found = _checkpoints(args.path)
    if args.action == "verify" and not found:
        raise CheckpointError(f"{args.path}: holds no checkpoint")
    checked = {info.path: _verify(info) for info in found} if args.action == "verify" or args.verify else {}
    if args.json:
        verdict = {"ok": not any(checked.values())} if checked else {}
        print(json.dumps(verdict | {"checkpoints": [_record(info, checked.get(info.path)) for info in found]}))
    else:
        print("\n".join(_table(found, checked)) if found else f"{args.path}: no checkpoints")
    damaged = {path: problems for path, problems in checked.items() if problems}
    if args.action == "verify" and damaged:
        raise CheckpointError("; ".join(str(damage(path, problems)) for path, problems in damaged.items()))


def convert(args: argparse.Namespace) -> None:
    from megasora.checkpoint.contents import form_of, open_checkpoint
    from megasora.checkpoint.convert import consolidate, shard, universal

    form = form_of(args.path)
    wanted = args.to or ("safetensors" if form == "sharded" else "sharded")
    if wanted == form:
        raise ConfigError(f"--to={wanted}: {args.path} is that already")
    source = open_checkpoint(args.path)
    if wanted == "safetensors":
        _refuse_existing(args.output)
        written = consolidate(source, args.output)
    else:
        _refuse_run(args.output, source.step)
        written = [{"sharded": shard, "universal": universal}[wanted](source, args.output)]
    print(json.dumps({"written": [str(path) for path in written]}) if args.json else "\n".join(map(str, written)))


def export(args: argparse.Namespace) -> None:
    from megasora.checkpoint.contents import open_checkpoint
    from megasora.export import TOLERANCE, export

    _refuse_existing(args.output)
    report = export(open_checkpoint(args.path), args.output, args.weights)
    if args.json:
        print(json.dumps(vars(report)))
    else:
        said = "not compared, diffusers is not installed" if report.parity is None else f"{report.parity:.1e} relative"
        print(f"{args.output}: {', '.join(report.parts)}; {report.transformer}, {report.parameters:,} parameters")
        print(f"difference of diffusers' output from ours: {said}")
        for part, why in report.left_out.items():
            print(f"left out: {part} ({why})")
    if report.parity is not None and not report.parity <= TOLERANCE:
        raise CheckFailed(f"{args.output}: diffusers' output differs by {report.parity:.1e}, above {TOLERANCE}")


def diff(args: argparse.Namespace) -> None:
    from megasora.checkpoint.contents import open_checkpoint
    from megasora.checkpoint.convert import differences

    a, b = (open_checkpoint(path) for path in args.paths)
    found = list(differences(a, b))
    apart = [d for d in found if d.reason or not d.relative <= args.tolerance]
    if args.json:
        print(json.dumps({"tensors": len(found), "different": [asdict(d) for d in apart]}))
    else:
        for d in sorted(apart, key=lambda d: -d.relative):
            print(f"{d.name}: {d.reason or f'{d.relative:.2e} relative, {d.largest:.2e} at most'}")
        print(f"{len(found) - len(apart)} of {len(found)} tensors are equal")
    if apart:
        raise CheckFailed(f"{args.paths[0]} and {args.paths[1]} differ in {len(apart)} of {len(found)} tensors")


def average(args: argparse.Namespace) -> None:
    from megasora.checkpoint.contents import open_checkpoint
    from megasora.checkpoint.convert import average

    try:
        weights = [float(w) for w in args.weights.split(",")] if args.weights else [1.0] * len(args.paths)
    except ValueError:
        raise ConfigError(f"--weights={args.weights}: numbers, comma-separated") from None
    if len(weights) != len(args.paths) or not sum(weights) > 0:
        raise ConfigError(f"--weights={args.weights}: {len(args.paths)} numbers with a sum above 0 are expected")
    sources = [open_checkpoint(path) for path in args.paths]
    _refuse_run(args.output, sources[-1].step)
    path = average(sources, weights, args.output)
    print(json.dumps({"written": [str(path)]}) if args.json else path)


def _refuse_existing(output: Path) -> None:
    if output.exists():
        raise ConfigError(f"{output}: is there already; name a directory that is not")


def _refuse_run(output: Path, step: int) -> None:
    """A directory that a step of these would damage: another's step is there, or a run saves into it."""
    _refuse_existing(output / step_name(step))
    if output.name in ("checkpoints", "deepspeed") and (output.parent / WRITER).exists():
        raise ConfigError(f"{output}: a run saves its own checkpoints here; name another directory")


def _checkpoints(path: Place) -> list[CheckpointInfo]:
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
