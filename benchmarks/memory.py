"""The most that lives at once in a process, counted over the storages of its tensors in real processes, against the closed form.

  python benchmarks/memory.py --json report.json
  python benchmarks/memory.py dp2,zero3 --rows 2

Two steps of the real engine; what was there before them (weights, their average, the batch) is found by walking over all tensors
of the process, what they make is followed from its making to its end. The closed form is that of `megasora plan`.
"""

import argparse
import json
import os
import socket
import sys
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from megasora.config import load_config
from megasora.models.families import build_model, parameter_count
from megasora.models.packing import Shape
from megasora.observe.memory import living
from megasora.parallel.layout import parse_layout
from megasora.parallel.mesh import processes
from megasora.planner.dry_run import alone, build_step
from megasora.planner.job import Job, Row
from megasora.planner.memory import Memory, memory
from megasora.planner.stages import stages
from megasora.planner.watch import watching
from megasora.schema import Config

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
MODEL = ["--model.width=512", "--model.ffn=2048", "--model.depth=11", "--model.heads=8"]  # 50 million parameters
LAYOUTS = ["dp2", "dp2,zero1", "dp2,zero2", "dp2,zero3"]


def count(rank: int, config: Config, job: Job, port: int, results: Any) -> None:
    """The most bytes that lived in rank 0, and how many of them before the first step."""
    world = job.layout.world
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with processes(str(job.layout)) as group:
        step = build_step(config, job, group, partial(build_model, job.model))
        before = living(group.device)
        with watching() as watch:
            for _ in range(2):  # the optimizer has no state before its first
                step.forward_backward()
                step.update()
        if group.is_main:
            results.put((before + watch.peak(), before))


def measure(config: Config, job: Job) -> dict[str, Any]:
    """A line of the table."""
    job = alone(job)
    planned: Memory = memory(job, stages(job)[0])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(count, (config, job, port, results), nprocs=job.layout.world)
    peak, before = results.get()
    return {
        "layout": str(job.layout), "bytes": peak, "before_the_step": before, "planned": planned.total,
        "ratio": peak / planned.total, "planned_by_part": planned.parts,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--shape", type=int, nargs=3, default=[2, 8, 8], help="patches of the sample: T H W")
    parser.add_argument("--rows", type=int, default=1, help="micro-batches of a rank")
    parser.add_argument("--text-tokens", type=int, default=32)
    parser.add_argument("--json", type=Path)
    parser.add_argument("layouts", nargs="*")
    args, overrides = parser.parse_known_args()
    config = load_config(args.config, [*MODEL, "--optim.name=adamw", *overrides])
    T, H, W = args.shape
    shape: Shape = (T, H, W)
    found = []
    print(f"{'layout':20} {'counted MB':>11} {'planned':>9} {'ratio':>6}")
    for text in args.layouts or LAYOUTS:
        row = Row(((shape, args.text_tokens),), T * H * W)
        job = Job(model=config.model, layout=parse_layout(text), row=row, rows=args.rows, kernels=False,
                  precision=config.precision.precision, optim=config.optim)  # fmt: skip
        line = measure(config, job)
        found.append(line)
        print(
            f"{line['layout']:20} {line['bytes'] / 1e6:11.1f} {line['planned'] / 1e6:9.1f} {line['ratio']:6.3f}",
            flush=True,
        )
    if args.json:
        facts = {"date": str(date.today()), "torch": torch.__version__, "python": sys.version.split()[0],
                 "model": asdict(config.model), "parameters": parameter_count(config.model), "optim": asdict(config.optim),
                 "precision": config.precision.precision, "shape": shape, "text_tokens": args.text_tokens,
                 "rows": args.rows}  # fmt: skip
        args.json.write_text(json.dumps(facts | {"layouts": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
