"""A plan as one HTML file: memory against the limit, the step's time, layouts compared."""

from collections.abc import Sequence
from typing import Any

from megasora.observe.charts import Bar, page, paragraph, stacked_bars, table
from megasora.observe.hardware import GIB


def report(found: dict[str, Any], layouts: Sequence[dict[str, Any]] = ()) -> str:
    """Of `megasora.planner.plan.facts`, and of `tables.ranking` if there was a search."""
    title = f"{found['layout']} on {found['world']:,} x {found['gpu']}"
    sections = [("", summary(found)), ("Memory of one device", memory(found)), ("A step", step(found))]
    if layouts:
        sections.append(("Layouts", compared(found, layouts)))
    return page(
        title, [*sections, ("Communication of a step", communication(found)), ("Parameters", parameters(found))]
    )


def summary(found: dict[str, Any]) -> list[str]:
    verdict = "fits" if found["fits"] else "does not fit"
    needs, limit = found["memory_bytes"] / GIB, found["memory_limit_bytes"] / GIB
    rows = [
        ("precision, recompute", f"{found['precision']}, {found['recompute']}"),
        ("step", f"{found['step_time_s']:.3f} s, limited by {found['limit']}"),
        ("MFU", f"{100 * found['mfu']:.1f} %, {found['tflops_per_device']:.0f} TFLOP/s a device"),
        ("throughput", f"{found['tokens_per_s']:,.0f} tokens/s, {found['samples_per_s']:.2f} samples/s"),
        (
            "FLOPs",
            f"{found['flops_per_sample'] / 1e12:,.1f} TFLOP a sample, {found['flops_per_token'] / 1e9:.2f} GFLOP a token",
        ),
        (
            "rows",
            f"{found['rows_per_rank']} a rank, the largest of {found['row_tokens']:,} tokens; data: {found['data']}",
        ),
        ("imbalance, bubble", f"{found['imbalance']:.3f}, {100 * found['bubble']:.1f} %"),
        ("checkpoint", f"{found['checkpoint_bytes'] / 1e9:,.1f} GB, {found['checkpoint_s']:.0f} s"),
    ]
    if "budget" in found:
        budget = found["budget"]
        rows.append(("training", f"{budget['steps']:,.0f} steps, {budget['seconds'] / 86400:,.1f} days, "
                                 f"{budget['device_hours']:,.0f} device-hours"))  # fmt: skip
    warnings = [f"no sample falls into bucket {bucket}" for bucket in found["empty_buckets"][:8]]
    return [
        paragraph(f"The job {verdict}: {needs:.1f} of {limit:.1f} GiB.", "good" if found["fits"] else "bad"),
        *(paragraph(f"Warning: {warning}", "bad") for warning in warnings),
        table((), [(name, f" {value}") for name, value in rows]),
    ]


def memory(found: dict[str, Any]) -> list[str]:
    stages = found["memory_by_stage"]
    several = len(stages) > 1
    bars = [
        Bar(
            f"pipeline stage {number}" if several else "every device",
            in_gib(parts),
            f"{sum(parts.values()) / GIB:.1f} GiB",
        )
        for number, parts in enumerate(stages)
    ]
    limit = found["memory_limit_bytes"] / GIB
    return [stacked_bars(bars, "GiB", limit, f"{found['gpu']}:"), shares(found["memory_by_part"], GIB, "GiB")]


def in_gib(parts: dict[str, float]) -> dict[str, float]:
    return {name: size / GIB for name, size in parts.items()}


def step(found: dict[str, Any]) -> list[str]:
    parts, seconds = found["step_time_by_part"], found["step_time_s"]
    return [stacked_bars([Bar("seconds of a step", parts, f"{seconds:.3f} s")], "s"), shares(parts, 1, "s")]


def shares(parts: dict[str, float], unit: float, name: str) -> str:
    whole = sum(parts.values())
    some = sorted(((part, size) for part, size in parts.items() if size > 0), key=lambda item: -item[1])
    rows = [(part, f"{size / unit:,.3f}", f"{100 * size / whole:.1f} %") for part, size in some]
    return table(("part", name, "share"), rows)


def compared(found: dict[str, Any], layouts: Sequence[dict[str, Any]]) -> list[str]:
    fitting = [row for row in layouts if row["fits"]]
    limit = found["memory_limit_bytes"] / GIB
    time = [Bar(name_of(row), row["step_time_by_part"], f"{row['step_time_s']:.2f} s") for row in fitting]
    room = [Bar(name_of(row), in_gib(row["memory_by_part"]), f"{row['memory_bytes'] / GIB:.1f} GiB") for row in fitting]
    rows = [
        (row["layout"], f"{row['step_time_s']:.2f} s", f"{100 * row['mfu']:.1f} %", f"{row['memory_bytes'] / GIB:.1f} GiB",
         row["why"]) if row["fits"] else (row["layout"], "-", "-", "-", row["why"])
        for row in layouts
    ]  # fmt: skip
    return [
        stacked_bars(time, "s", order=largest_first(found["step_time_by_part"])),
        stacked_bars(room, "GiB", limit, f"{found['gpu']}:", order=largest_first(found["memory_by_part"])),
        table(("layout", "step", "MFU", "memory", "why not the best"), rows),
    ]


def largest_first(parts: dict[str, float]) -> list[str]:
    """As the charts of the plan itself have them."""
    return sorted((name for name, size in parts.items() if size > 0), key=lambda name: -parts[name])


def name_of(row: dict[str, Any]) -> str:
    return str(row["layout"]).replace(" parallel.recompute=", " ")


def communication(found: dict[str, Any]) -> list[str]:
    rows = [
        (kind, "NVLink or the like" if link == "link" else "network", f"{size / 1e9:,.3f} GB")
        for link, kinds in found["communication_bytes"].items()
        for kind, size in sorted(kinds.items(), key=lambda item: -item[1])
        if size > 1e5
    ]
    return [table(("collective", "over", "sent by a rank"), rows)] if rows else [paragraph("None.", "note")]


def parameters(found: dict[str, Any]) -> list[str]:
    rows = sorted(found["parameters_by_module"].items(), key=lambda item: -item[1])
    whole = found["parameters"]
    return [table(("module", "parameters", "share"), [(n, f"{c:,}", f"{100 * c / whole:.2f} %") for n, c in rows])]
