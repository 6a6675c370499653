"""Is this node fit for a job? Devices, driver, memory errors, the same product twice, disks, clocks, a command of the site; with
--links, on several processes, also the bandwidth between all pairs of them. Exits 1 and names the nodes that are not fit.

`megasora launch slurm ... --doctor` asks it before the job and leaves out the nodes it names; launch/prolog.sh is for SLURM.

examples:
  megasora doctor --gpus 8 --driver 575.57.08 --free-gb 100
  megasora launch slurm doctor --nodes 16 --gpus-per-node 8 --site /opt/site/check.sh --json
"""

import argparse
import dataclasses
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

from megasora.cluster.doctor import Finding, Limits, examine
from megasora.cluster.links import judge_links, measure_links, one_a_node
from megasora.cluster.origin import node_name
from megasora.errors import CheckFailed, ConfigError
from megasora.parallel.mesh import processes, rank, world_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for limit in dataclasses.fields(Limits):
        option = f"--{limit.name.replace('_', '-')}"
        parser.add_argument(
            option, type=type(limit.default), default=limit.default, metavar="X", help=f"default {limit.default!r}"
        )
    parser.add_argument(
        "--directory", type=Path, default=Path(), metavar="DIR", help="that runs write to; default: here"
    )
    parser.add_argument("--reports", type=Path, metavar="DIR", help="NODE.json, and NODE.fit for each that is")
    parser.add_argument("--links", action="store_true", help="between the processes of this job")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    if args.overrides:
        raise ConfigError(f"doctor: {args.overrides[0]} is no option of doctor")
    limits = Limits(**{limit.name: getattr(args, limit.name) for limit in dataclasses.fields(Limits)})
    node = node_name()
    findings = {node: look(args.reports, args.directory, limits, node)} if one_a_node() else {}
    if args.links and world_size() > 1:
        findings = meet(findings, node, limits)
    if args.reports and one_a_node():
        report(args.reports, node, findings[node])
    if rank() != 0:
        return
    print(json.dumps(as_dict(findings)) if args.json else table(findings))
    if unfit := {node: bad for node, found in findings.items() if (bad := [f for f in found if f.ok is False])}:
        raise CheckFailed(
            "not fit: "
            + "; ".join(f"{node}: {bad[0].check} {bad[0].found}, wanted {bad[0].limit}" for node, bad in unfit.items())
        )


def look(reports: Path | None, directory: Path, limits: Limits, node: str) -> list[Finding]:
    """This node's findings, those that an earlier pass has reported if there are any."""
    earlier = reports / f"{node}.json" if reports else None
    if earlier and earlier.exists():
        return [Finding(**finding) for finding in json.loads(earlier.read_text())["checks"]]
    return list(examine(limits, directory))


def meet(own: dict[str, list[Finding]], node: str, limits: Limits) -> dict[str, list[Finding]]:
    """The findings of all nodes, with those about the links between them. All processes call it."""
    import torch.distributed as dist

    with processes("auto", timeout=timedelta(seconds=120)) as group:
        links, skew = measure_links(group, node)
        everyone: list[Any] = [None] * group.world
        dist.all_gather_object(everyone, own)
    findings: dict[str, list[Finding]] = {name: found for part in everyone for name, found in part.items()}
    for name, found in judge_links(links, skew, limits).items():
        findings[name] = [*findings[name], *found]
    return findings


def report(directory: Path, node: str, findings: list[Finding]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{node}.json").write_text(json.dumps(as_dict({node: findings})["nodes"][node], indent=1))
    fit = directory / f"{node}.fit"
    if any(finding.ok is False for finding in findings):
        fit.unlink(missing_ok=True)
    else:
        fit.touch()


def as_dict(findings: dict[str, list[Finding]]) -> dict[str, Any]:
    nodes = {
        node: {"fit": all(finding.ok is not False for finding in found), "checks": [vars(finding) for finding in found]}
        for node, found in findings.items()
    }
    return {"fit": all(node["fit"] for node in nodes.values()), "nodes": nodes}


def table(findings: dict[str, list[Finding]]) -> str:
    words = {True: "ok", False: "BAD", None: "-"}
    return "\n".join(
        f"{node:<16} {words[finding.ok]:<4} {finding.check:<24} {finding.found}"
        + (f"  (wanted {finding.limit})" if finding.ok is False else "")
        for node, found in findings.items()
        for finding in found
    )
