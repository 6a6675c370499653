"""The bubble of a pipeline, measured: stages of which every block sleeps, so that processes need not share cores.

  python benchmarks/pipeline.py --processes 4 --rows 4 8 16 --json report.json

Beside it (p-1) / (rows·chunks + p-1), the bubble of stages that cost alike and send for nothing (Narayanan et al. 2021).
"""

import argparse
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from megasora.models.attention import find_attention
from megasora.models.base import Model, ModelConfig, Setting
from megasora.models.packing import Item, PackedRow, pack
from megasora.parallel.layout import parse_layout
from megasora.parallel.mesh import processes
from megasora.parallel.pipeline import Pipeline, Stages
from megasora.parallel.schedule import CHUNKS, bubble

UNIT = 0.03  # seconds that a block sleeps in a forward pass; twice that in backward
BLOCKS = 8
WIDTH, TOKENS = 8, 128


class Sleep(torch.autograd.Function):
    """The identity, slowly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        time.sleep(UNIT)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        time.sleep(2 * UNIT)
        return grads[0]


class SleepingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH, WIDTH))

    def forward(self, x: Tensor, setting: Setting) -> Tensor:
        return Sleep.apply(x) + 0 * self.weight[0]


class SleepingModel(Model[Setting]):
    """Nothing but blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.config = ModelConfig(width=WIDTH, heads=1)
        self.attention = find_attention("sdpa")
        self.blocks = nn.ModuleList(SleepingBlock() for _ in range(BLOCKS))

    def setting(self, row: PackedRow, *options: Any) -> Setting:
        return Setting(row, self.attention)

    def enter(self, setting: Setting) -> Tensor:
        return setting.row.tokens

    def leave(self, x: Tensor, setting: Setting) -> Tensor:
        return x


class Row:
    """What a pipeline needs of a micro-batch."""

    def __init__(self) -> None:
        item = Item(torch.randn(TOKENS, WIDTH), (1, 8, 16), torch.zeros(1), torch.zeros(0, 1), torch.zeros(0))
        self.row = pack([item])


def work(rank: int, count: int, port: int, name: str, rows: int, results: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with processes(f"pp{count}:{name}") as group:
        pipeline = Pipeline(Stages(SleepingModel(), group.pipeline), WIDTH, torch.float32, group.device)
        batch = [Row() for _ in range(rows)]
        times = []
        for _ in range(3):
            dist.barrier()
            begin = time.perf_counter()
            pipeline.step(
                batch, lambda model, row: model(row.row).sum(), lambda y, gradient, last: y.backward(gradient)
            )
            dist.barrier()
            times.append(time.perf_counter() - begin)
        if group.is_main:
            results.put(sorted(times)[1])


def measure(name: str, count: int, rows: int) -> float:
    """The share of a step that a process waits."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(work, (count, port, name, rows, results), nprocs=count)
    return 1 - rows * BLOCKS / count * 3 * UNIT / results.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    parse_layout(f"pp{args.processes}")
    found = []
    print(f"{'schedule':12} {'processes':>9} {'rows':>5} {'measured':>9} {'played':>8} {'ideal':>8}")
    for name in CHUNKS:
        for rows in args.rows:
            ideal = (args.processes - 1) / (rows * CHUNKS[name] + args.processes - 1)
            measured, played = measure(name, args.processes, rows), bubble(name, args.processes, rows)
            print(f"{name:12} {args.processes:9} {rows:5} {measured:9.3f} {played:8.3f} {ideal:8.3f}", flush=True)
            found.append(
                {"schedule": name, "processes": args.processes, "rows": rows, "measured": measured, "ideal": ideal}
            )
    if args.json:
        args.json.write_text(json.dumps({"unit_seconds": UNIT, "blocks": BLOCKS, "bubbles": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
