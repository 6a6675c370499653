"""Are the meters right? FLOPs, tokens/s and memory as `megasora bench` states them, against what others count.

  python benchmarks/meters.py --json benchmarks/reports/DATE-meters.json

FLOPs: the closed form of a step's samples against the products that torch's FlopCounterMode sees in the engine's own forward and
backward. Tokens/s: against a stopwatch in this process, which starts and stops it by the lines that the bench logs. Memory: the
peak against the VmHWM of the other process; and the sum of the parts, by storages, against it too, as the difference of two
models, for a process has memory of its own beside its tensors; once with glibc's heap, which keeps what was freed, and once
without it (`memory_mapped`).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megasora.bench import TEXT_TOKENS
from megasora.build import build_engine, build_recipe
from megasora.config import load_config
from megasora.microbatch import build_rows, training_loss
from megasora.parallel.mesh import processes
from megasora.schema import Config
from megasora.training_data import build_loader, synthetic_data

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
# One shape, so that all steps are alike, of which rows have no padding: 2 x 448 tokens.
ONE_SHAPE = ["--stages=[{name: s, steps: 1, buckets: {resolutions: [128], frames: [25], aspects: ['1:1']}}]",
             "--data.global_batch=4", "--data.capacity=1024", "--optim.name=adamw", "--parallel.recompute=none"]  # fmt: skip
LARGER = ["--model.width=512", "--model.ffn=2048", "--model.heads=8"]
DEPTHS = (4, 16)
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives what is larger back to the system when it is freed


def flops(config: Config) -> dict[str, float]:
    """Of one step: by closed form, and as counted. The count lacks gradients that nobody asks for, those of the data."""
    with processes("dp1") as group:
        data = synthetic_data(config, TEXT_TOKENS)
        engine = build_engine(config, group)
        batches = build_loader(config, group, data, config.stages[0], 0, {}).batches(0)
        recipe = build_recipe(config, group, data.facts, config.stages[0], 0)
        batch = next(batches)
        rows = build_rows(batch, recipe)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            engine.forward_backward(rows, training_loss(recipe))
        batches.close()
    counted = float(counter.get_total_flops())
    return {"closed_form": batch.flops, "counted": counted, "ratio": batch.flops / counted}


def bench(config: Path, words: list[str], mapped: bool = False) -> tuple[dict[str, Any], float, int]:
    """The result, and what was seen of its only round from here: seconds, and VmHWM at its end, in bytes."""
    command = [sys.executable, "-m", "megasora", "bench", "--config", str(config), "--data=synthetic", "--json",
               "--bench.rounds=1", *words]  # fmt: skip
    begin, seconds, peak = 0.0, 0.0, 0
    pipe, environment = subprocess.PIPE, os.environ | (MAPPED if mapped else {})
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("bench: round"):
                begin = time.perf_counter()
            if line.startswith("bench: step"):
                seconds = time.perf_counter() - begin
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
        result = json.loads(process.stdout.read())
    return result, seconds, peak


def speed(config: Path, words: list[str]) -> dict[str, float]:
    result, seconds, _ = bench(config, [*words, "--bench.steps=20"])
    outside = result["steps"] * result["tokens"] / seconds
    stated = result["tokens"] / result["spread"]["mean"]
    return {"stated": stated, "stopwatch": outside, "ratio": stated / outside, "median_stated": result["tokens_per_s"]}


def memory(config: Path, words: list[str], mapped: bool) -> dict[str, Any]:
    found = []
    for depth in DEPTHS:
        result, _, peak = bench(config, [*words, *LARGER, f"--model.depth={depth}", "--bench.steps=3"], mapped)
        parts = result["memory_by_part"]
        found.append({"depth": depth, "stated": result["peak_memory_bytes"], "vmhwm": peak, "parts": parts,
                      "ratio": result["peak_memory_bytes"] / peak, "by_storages": sum(parts.values())})  # fmt: skip
    less, more = found
    by_storages, by_system = (more[name] - less[name] for name in ("by_storages", "vmhwm"))
    return {"runs": found, "difference_by_storages": by_storages, "difference_by_vmhwm": by_system,
            "ratio": by_storages / by_system}  # fmt: skip


def show(found: dict[str, Any]) -> None:
    for run in found["runs"]:
        print("  peak            {stated:14,d} stated, {vmhwm:14,d} VmHWM: {ratio:.4f}; depth {depth}".format(**run))
    print("  of more depth   {difference_by_storages:14,d} by storages, {difference_by_vmhwm:14,d} by VmHWM: {ratio:.4f}".format(
        **found))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--json", type=Path)
    args, overrides = parser.parse_known_args()
    words = [*ONE_SHAPE, *overrides]
    found: dict[str, Any] = {"flops": flops(load_config(args.config, words))}
    print(
        "FLOPs of a step   {closed_form:14,.0f} by closed form, {counted:14,.0f} counted: {ratio:.4f}".format(
            **found["flops"]
        )
    )
    found["tokens_per_s"] = speed(args.config, words)
    print(
        "tokens/s          {stated:14,.1f} stated, {stopwatch:14,.1f} by stopwatch: {ratio:.4f}".format(
            **found["tokens_per_s"]
        )
    )
    for name, mapped in (("memory", False), ("memory_mapped", True)):
        found[name] = memory(args.config, words, mapped)
        print(name)
        show(found[name])
    if args.json:
        facts = {
            "date": str(date.today()),
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "words": words,
        }
        args.json.write_text(json.dumps(facts | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
