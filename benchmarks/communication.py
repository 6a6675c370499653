"""What a rank sends in a step, counted at the collectives of the real engine, against the least that its layout asks for.

  python benchmarks/communication.py --json report.json
  python benchmarks/communication.py --precision.precision=bf16 tp4 dp1,cp2x2,zero3

Each layout is stepped as rank 0 on fake tensors in a world of its size, as `megasora plan --dry-run` does; DDP, which does not
take them, in processes joined by gloo. Bytes are what goes over a link by ring algorithms (Thakur et al. 2005). `least` is
counted by hand from the sizes of the model (default family): what Megatron's, DeepSpeed's and ring attention's papers say of a
layer, and a gradient once there and a weight once back. `a block` is how many collectives a block has in a step of one row.
"""

import argparse
import json
import os
import socket
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from megasora.config import load_config
from megasora.models.families import build_model
from megasora.models.packing import Shape
from megasora.parallel.layout import parse_layout
from megasora.parallel.mesh import processes
from megasora.parallel.plan import check_layout
from megasora.parallel.schedule import CHUNKS
from megasora.planner.communication import communication
from megasora.planner.dry_run import alone, build_step, dry_run
from megasora.planner.job import Job, Row
from megasora.planner.parameters import Parameter
from megasora.planner.stages import stages
from megasora.planner.watch import Call, moved, watching
from megasora.schema import Config

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
LAYOUTS = [
    "dp2", "dp4,zero1", "dp4,zero2", "dp4,zero3", "hsdp2x2", "tp2", "tp4", "tp4:nosp", "dp1,cp4,zero1", "dp1,cp4,zero3",
    "dp1,cp1x4,zero3", "dp1,cp2x2,zero3", "dp2,tp2,zero1", "dp2,tp2,zero3", "dp1,cp2,tp2,zero3", "dp1,cp1x2,tp2,zero3", "pp4",
    "pp2,tp2", "pp2:interleaved,tp2", "pp2,dp2,zero1", "pp2,dp2,zero2", "pp2,tp2,dp2",
]  # fmt: skip


def least(job: Job) -> float:
    """Bytes that rank 0 cannot help sending in a step."""
    layout, model, rows = job.layout, job.model, job.rows
    stage = stages(job)[0]
    blocks, D, e = len(stage.blocks), model.width, job.width_bytes
    tp, U, R, N = layout.tp, layout.ulysses, layout.ring, layout.dp * layout.cp
    tokens, text = job.row.length / layout.cp, job.row.text

    # Of a row in a block. Three times (attention to itself, to the caption, and the MLP) tokens are gathered and sums scattered,
    # and the other way round in backward (Korthikanti et al. 2022, section 4.2.2); QK-norm over all heads adds up its squares.
    tensor = 12 * part(tp) * tokens * D * e + 2 * 2 * part(tp) * (3 * tokens + text) * 4
    # Queries, keys, values and outputs, there and back (Jacobs et al. 2023, section 3.2).
    ulysses = 8 * part(U) * tokens * D / tp * e
    # Keys and values to all other places, twice; their gradients, in fp32, from all others (Liu et al. 2023, section 3).
    ring = (R - 1) * 2 * tokens * D / tp * (2 * e + 4)
    passed = 0.0
    if layout.pp > 1:  # the first stage sends each row on, and with several chunks takes it back
        sequence = tp if layout.sequence_parallel else 1
        passed = (2 * CHUNKS[layout.schedule] - 1) * tokens / sequence * D * e
    return rows * (blocks * (tensor + ulysses + ring) + passed) + of_state(job, stage.parameters(model), N)


def of_state(job: Job, parameters: list[Parameter], N: int) -> float:
    """Weights, gradients and what all say to all. `N` ranks see different tokens."""
    layout, tp, zero = job.layout, job.layout.tp, job.layout.zero
    shards = job.shards
    reduced = shards if zero >= 2 else 1  # gradients are in so many shards before they are summed over tp and pp
    here = 4 * sum(p.here(tp) for p in parameters)
    in_blocks = sum(p.here(tp) for p in parameters if p.block is not None)
    whole = 4 * sum(p.count for p in parameters if p.split is None)
    everywhere = ("time", "text", "pooled", "fps", "class", "label", "modulation")  # what all stages have
    shared = 4 * sum(p.count for p in parameters if p.module.startswith(everywhere))
    sent = 2 * part(tp) * whole / reduced + 2 * part(layout.pp) * shared / reduced
    if zero < 2:
        sent += 2 * part(N) * here
    else:  # all weights once a step (Rajbhandari et al. 2020, section 7.2.1), or twice a row (7.2.2); all gradients once
        times = 2 * job.rows if zero == 3 else 1
        gathered = in_blocks * job.width_bytes + (here - 4 * in_blocks)
        sent += part(shards) * (times * gathered + here) + 2 * part(N // shards) * here / shards
    # Muon wants matrices whole, wherever they are divided, and hands round what one rank made of each.
    if job.optim.name == "muon":
        for p in parameters:
            if p.is_hidden_matrix:
                ways = shards * (tp if p.split is not None else 1)
                sent += part(ways) * 4 * p.count + (4 * p.count if layout.world > layout.pp else 0)
    return sent + 2 * 2 * part(layout.world) * 4  # loss and norm


def part(n: int) -> float:
    """Of n equal parts, those of the others."""
    return (n - 1) / n


def count(config: Config, job: Job) -> list[Call]:
    """The collectives of rank 0."""
    if not job.ddp:
        return dry_run(config, job).watch.calls
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(step_for_real, (config, alone(job), port, results), nprocs=job.layout.world)
    found: list[Call] = results.get()
    return found


def step_for_real(rank: int, config: Config, job: Job, port: int, results: Any) -> None:
    world = job.layout.world
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with processes(str(job.layout)) as group:
        step = build_step(config, job, group, partial(build_model, job.model))
        for _ in range(3):  # the first two settle how DDP divides its buckets
            with watching() as watch:
                step.forward_backward()
                step.update()
        if group.is_main:
            results.put(watch.calls)


def block_calls(job: Job) -> dict[str, int]:
    """Collectives of one more block in a step of one row, by kind; without the optimizer's."""
    job = replace(job, rows=1, optim=replace(job.optim, name="adamw"))
    more = job.layout.pp * CHUNKS[job.layout.schedule]
    deeper = replace(job, model=replace(job.model, depth=job.model.depth + more))
    calls = Counter[str]()
    for one, sign in ((deeper, 1), (job, -1)):
        for call in communication(one, stages(one)[0]):
            calls[call.kind] += sign * call.count
    chunks = CHUNKS[job.layout.schedule]
    return {kind: number // chunks for kind, number in calls.items() if number}


def measure(config: Config, job: Job) -> dict[str, Any]:
    """A line of the table."""
    begin = time.perf_counter()
    calls = count(config, job)
    job = alone(job)
    sent, needed, blocks = moved(calls), least(job), block_calls(job)
    planned = sum(call.count for call in communication(job, stages(job)[0]))  # of DDP's buckets it knows no number
    return {
        "layout": str(job.layout), "processes": "gloo" if job.ddp else "fake", "bytes": sent, "least": needed,
        "ratio": sent / needed, "calls": len(calls), "calls_planned": planned,
        "calls_by_kind": dict(Counter(call.kind for call in calls)),
        "calls_a_block": blocks, "seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--shape", type=int, nargs=3, default=[4, 16, 16], help="patches of the sample: T H W")
    parser.add_argument("--rows", type=int, default=2, help="micro-batches of a rank")
    parser.add_argument("--text-tokens", type=int, default=32)
    parser.add_argument("--json", type=Path)
    parser.add_argument("layouts", nargs="*")
    args, overrides = parser.parse_known_args()
    config = load_config(args.config, overrides)
    T, H, W = args.shape
    shape: Shape = (T, H, W)
    found = []
    print(f"{'layout':24} {'MB sent':>9} {'least':>9} {'ratio':>6} {'calls':>6}  a block")
    for text in args.layouts or LAYOUTS:
        layout = parse_layout(text)
        check_layout(config.model, layout)
        row = Row(((shape, args.text_tokens),), T * H * W)
        job = Job(model=config.model, layout=layout, row=row, rows=args.rows, precision=config.precision.precision,
                  optim=config.optim)  # fmt: skip
        line = measure(config, job)
        found.append(line)
        said = ", ".join(f"{number} {kind}" for kind, number in line["calls_a_block"].items()) or "none"
        print(f"{line['layout']:24} {line['bytes'] / 1e6:9.2f} {line['least'] / 1e6:9.2f} {line['ratio']:6.3f}"
              f" {line['calls']:6}  {said}", flush=True)  # fmt: skip
    if args.json:
        facts = {"date": str(date.today()), "torch": torch.__version__, "python": sys.version.split()[0],
                 "config": args.config.name, "overrides": overrides, "model": asdict(config.model), "optim": config.optim.name,
                 "precision": config.precision.precision, "shape": shape, "text_tokens": args.text_tokens,
                 "rows": args.rows}  # fmt: skip
        args.json.write_text(json.dumps(facts | {"layouts": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
