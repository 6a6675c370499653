"""A plan for people at a terminal."""

from collections.abc import Sequence
from typing import Any

from megasora.observe.hardware import GIB
from megasora.planner.search import Candidate, reasons


def table(found: dict[str, Any]) -> str:
    """The result of `megasora.planner.plan.facts`."""
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    repeated = f", recompute {found['recompute']}" + f" every {found['recompute_every']}" * (
        found["recompute_every"] > 1
    )
    lines = [
        f"layout     {found['layout']} on {found['world']:,} x {found['gpu']}, {found['precision']}{repeated}; "
        f"data: {found['data']}",
        f"parameters {found['parameters']:,}",
        f"memory     {found['memory_bytes'] / GIB:.1f} of {found['memory_limit_bytes'] / GIB:.1f} GiB: {verdict}",
        *shares(found["memory_by_part"], GIB, "GiB", found["memory_bytes"]),
    ]
    if len(found["memory_by_stage"]) > 1:
        stages = ", ".join(f"{sum(parts.values()) / GIB:.1f}" for parts in found["memory_by_stage"])
        lines.append(f"  by pipeline stage: {stages} GiB")
    lines += [
        f"step       {found['step_time_s']:.3f} s, limited by {found['limit']}",
        *shares(found["step_time_by_part"], 1, "s", found["step_time_s"]),
        f"MFU        {100 * found['mfu']:.1f} %, {found['tflops_per_device']:.0f} TFLOP/s a device, "
        f"{found['tokens_per_s']:,.0f} tokens/s, imbalance {found['imbalance']:.3f}, bubble {100 * found['bubble']:.1f} %",
        f"FLOPs      {found['flops_per_sample'] / 1e12:,.1f} TFLOP a sample, {found['flops_per_token'] / 1e9:,.2f} GFLOP a token "
        f"({found['flops_per_token_convention'] / 1e9:,.2f} counted as 6 a parameter and 12·layers·width·tokens)",
        f"rows       {found['rows_per_rank']} a rank of {found['row_tokens']:,} tokens",
    ]
    for link, kinds in found["communication_bytes"].items():
        for kind, size in sorted(kinds.items(), key=lambda item: -item[1])[:6]:
            lines.append(f"  {link:<8} {kind:<28} {size / 1e9:10.3f} GB a step")
    if "storage_bytes_per_s" in found:
        lines.append(f"storage    {found['storage_bytes_per_s'] / 1e6:,.1f} MB/s of latents for all ranks")
    lines.append(
        f"checkpoint {found['checkpoint_bytes'] / 1e9:,.1f} GB, {found['checkpoint_s']:.0f} s at 2 GB/s a node (assumed)"
    )
    if "longest" in found:
        most = found["longest"]
        lines.insert(0, f"longest    {most['frames']:,} frames of {most['height']}x{most['width']}, {most['seconds']:.1f} s at "
                        f"{most['fps']:g} frames a second, {most['tokens']:,} tokens")  # fmt: skip
    if "budget" in found:
        lines.append(
            f"budget     {found['budget']['steps']:,.0f} steps, {found['budget']['seconds'] / 86400:,.1f} days, "
            f"{found['budget']['device_hours']:,.0f} device-hours"
        )
    return "\n".join(lines)


def shares(parts: dict[str, float], unit: float, name: str, whole: float) -> list[str]:
    """The parts that are a thousandth at least, the largest first."""
    some = sorted(((part, size) for part, size in parts.items() if size > whole / 1000), key=lambda item: -item[1])
    return [f"  {part:<24} {size / unit:9.3f} {name} {100 * size / whole:5.1f} %" for part, size in some]


def ranking(found: Sequence[Candidate], most: int) -> list[dict[str, Any]]:
    """The best layouts as plain numbers, then some that do not fit, each with what it loses by."""
    rows = []
    for one, why in zip(found, reasons(found), strict=True):
        plan = one.plan
        row: dict[str, Any] = {"layout": one.name, "fits": plan is not None, "why": why}
        if plan is not None:
            row |= {"step_time_s": plan.time.seconds, "mfu": plan.mfu, "memory_bytes": plan.needed,
                    "step_time_by_part": plan.time.parts,
                    "memory_by_part": plan.parts(plan.fullest)}  # fmt: skip
        rows.append(row)
    fitting = [row for row in rows if row["fits"]]
    return fitting[:most] + [row for row in rows if not row["fits"]][: max(3, most - len(fitting))]


def ranking_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'layout':<52} {'step':>9} {'MFU':>6} {'memory':>9}  why not the best"]
    for row in rows:
        numbers = f"{'-':>9} {'-':>6} {'-':>9}"
        if row["fits"]:
            numbers = f"{row['step_time_s']:8.2f}s {100 * row['mfu']:5.1f}% {row['memory_bytes'] / GIB:5.1f} GiB"
        lines.append(f"{row['layout']:<52} {numbers}  {row['why']}")
    return "\n".join(lines)
