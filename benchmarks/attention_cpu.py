"""Our attention on a CPU beside torch's, in turn: seconds, the ratio, and the share of the best product of the run.

    python benchmarks/attention_cpu.py --json benchmarks/reports/DATE-attention-cpu.json

FLOPs: 4·n·N·L·M·K forward, 2.5 times that backward, where the logits are computed again.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megasora_kernels.flash_cpu import TYPES

from megasora.models.flash import FLASH
from megasora.observe.hardware import device_name

SHAPES = ((1, 1280, 1280, 12, 64), (8, 256, 256, 12, 64), (1, 1280, 128, 12, 64), (1, 4096, 4096, 12, 128))  # n L M N K
PRODUCT = (1280, 768, 3072)  # M, K, N


def seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure(shape: tuple[int, int, int, int, int], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    n, L, M, N, K = shape
    q, grad = (torch.randn(n, L, N, K).to(dtype) for _ in range(2))
    k, v = (torch.randn(n, M, N, K).to(dtype) for _ in range(2))
    a, b = torch.randn(PRODUCT[0], PRODUCT[1]).to(dtype), torch.randn(PRODUCT[2], PRODUCT[1]).to(dtype)
    known = {name: FLASH[name].forward(q, k, v) for name in ("cpu", "sdpa")}
    work: dict[str, Callable[[], Any]] = {"product": partial(torch.nn.functional.linear, a, b)}
    for name, outs in known.items():
        work[f"{name} forward"] = partial(FLASH[name].forward, q, k, v)
        work[f"{name} backward"] = partial(FLASH[name].backward, grad, q, k, v, *outs)
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, call in work.items():
            times[name].append(seconds(call))
    peak = 2 * PRODUCT[0] * PRODUCT[1] * PRODUCT[2] / min(times["product"])
    found: dict[str, Any] = {"shape": shape, "precision": str(dtype).removeprefix("torch.")}
    for way, flops in (("forward", 4 * n * N * L * M * K), ("backward", 10 * n * N * L * M * K)):
        ours, theirs = (times[f"{name} {way}"][1:] for name in ("cpu", "sdpa"))
        ratio = statistics.median(y / x for x, y in zip(ours, theirs, strict=True))
        found[way] = {
            "ours_s": statistics.median(ours), "torchs_s": statistics.median(theirs), "torchs_over_ours": round(ratio, 2),
            "ours_share": round(flops / statistics.median(ours) / peak, 3),
            "torchs_share": round(flops / statistics.median(theirs) / peak, 3),
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    facts = {"date": str(date.today()), "threads": torch.get_num_threads(), "cores": os.cpu_count(),
             "cpu": device_name(torch.device("cpu")), "torch": torch.__version__,
             "shapes": [measure(shape, dtype, args.rounds) for dtype in TYPES for shape in SHAPES]}  # fmt: skip
    for found in facts["shapes"]:
        for way in ("forward", "backward"):
            print("{precision} n L M N K {shape} {way}: torch's takes {torchs_over_ours:.2f} times ours; shares of a product "
                  "{ours_share:.2f}, {torchs_share:.2f}".format(way=way, **found, **found[way]))  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
