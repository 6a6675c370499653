"""How evenly a global batch spreads over the ranks, on metadata of a mixture of images and videos.

python benchmarks/balance.py [--ranks 8 64 256] [--cp 1 2 4] [--steps 500] [--seed 0] [--json FILE]

Imbalance is the time of a step over the mean of the ranks: `step` when they meet once a step, `micro` when they meet in every
micro-batch; `bound` is what no assignment can beat there. `unbalanced` is 16 samples a rank as they come, once a step.
With context parallelism a group of cp ranks shares its micro-batches evenly; the token cap of a micro-batch stays the same,
or is cp times as high with --scale-cap (as many tokens a rank).
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from data_pipelines.batches.balance import Assignment, assign
from data_pipelines.batches.order import Order

ITEMS, PER_RANK, SHARD, WINDOW = 200_000, 16, 1000, 8
PARAMETERS, LAYERS, WIDTH = 6.455e9, 57, 3072
MAX_PIXELS, MAX_LATENT_FRAMES, TEXT = 921_600, 61, 512
CAP = MAX_LATENT_FRAMES * MAX_PIXELS // 16**2 + TEXT  # 220,112 tokens


def mixture(items: int, seed: int) -> np.ndarray:
    """Tokens of each item: 30 % images; log-normal durations; latents 4x8x8 and patches of 2x2, so 16x16 pixels a token."""
    rng = np.random.default_rng(seed)
    image = rng.random(items) < 0.3
    seconds = np.clip(7 * np.exp(0.7 * rng.standard_normal(items)), 2, 60)
    short = rng.choice([360, 480, 720, 1080, 2160], items, p=[0.10, 0.20, 0.35, 0.30, 0.05])
    aspect = rng.choice([16 / 9, 9 / 16, 1, 4 / 3, 21 / 9], items, p=[0.70, 0.15, 0.08, 0.05, 0.02])
    height, width = short * np.maximum(1, 1 / aspect), short * np.maximum(1, aspect)
    scale = np.minimum(1, np.sqrt(MAX_PIXELS / (height * width)))
    latent_frames = np.where(image, 1, 1 + (np.round(24 * seconds) - 1) // 4)
    tokens = np.minimum(latent_frames, MAX_LATENT_FRAMES) * np.round(height * scale / 16) * np.round(width * scale / 16)
    return tokens.astype(np.int64) + TEXT


def cost_of(tokens: np.ndarray) -> np.ndarray:
    """FLOPs of a training step: linear layers and attention within each sample."""
    return 6 * PARAMETERS * tokens + 12.0 * LAYERS * WIDTH * tokens.astype(np.float64) ** 2


def bound(tokens: np.ndarray, groups: int, cap: int) -> float:
    """A lower bound of `micro`, for any number of rows and any packing.

    Let b(1) >= b(2) >= ... be the costs of the samples, and u(k) the most that a row can cost whose samples are none larger than
    the k-th: as many of that size as fit and one of what is left, as cost is convex. While the k-th is longer than half a row,
    the first k are in k rows: the k-th dearest row costs b(k) or more. And it costs u(k) or less, as at most k - 1 rows have a
    sample of the first k - 1. In time the rows are best sorted by cost and cut into micro-batches; one that begins at k takes
    b(k) or more, and leaves b(k) - u(j) idle in its row j, where that is positive.
    """
    size = -np.sort(-tokens)
    dearest = (cap // size * cost_of(size) + cost_of(cap % size)).reshape(-1, groups)
    first = np.where(2 * size > cap, cost_of(size), 0).reshape(-1, groups)[:, :1]
    return 1 + float(np.maximum(0, first - dearest).sum() / cost_of(tokens).sum())


def check(assignment: Assignment, tokens: np.ndarray, cap: int) -> None:
    """Every sample once, no row empty or too long."""
    assert np.array_equal(np.sort(assignment.samples), np.arange(len(tokens)))
    assert np.diff(assignment.ends, prepend=0).min() > 0
    starts = np.concatenate(([0], assignment.ends[:-1]))
    assert np.add.reduceat(tokens[assignment.samples], starts).max() <= cap


def measure(batches: np.ndarray, groups: int, cap: int) -> dict[str, float]:
    """Averages over the batches, rows of `batches` of tokens."""
    rows = []
    for tokens in batches:
        costs = cost_of(tokens)
        plain_tokens, plain_costs = tokens.tolist(), costs.tolist()
        by_step = assign(plain_tokens, plain_costs, groups, cap, "step")
        wall, cpu = time.perf_counter(), time.thread_time()
        by_micro = assign(plain_tokens, plain_costs, groups, cap)
        by_micro.of(0)
        cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
        for assignment in (by_step, by_micro):
            check(assignment, tokens, cap)
        in_order = costs.reshape(groups, -1).sum(axis=1)
        rows.append(
            {
                "unbalanced": in_order.max() / in_order.mean(),
                "step": by_step.imbalance,
                "step_with_micro": by_micro.imbalance,
                "micro": by_micro.micro_imbalance,
                "micro_bound": bound(tokens, groups, cap),
                "micro_batches": len(by_micro.lengths),
                "padding": by_micro.padding,
                "cpu_ms": 1e3 * cpu,
                "wall_ms": 1e3 * wall,
            }
        )
    result = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return result | {name: float(np.median([row[name] for row in rows])) for name in ("cpu_ms", "wall_ms")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--cp", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale-cap", action="store_true", help="a cap of cp times as many tokens")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    tokens = mixture(ITEMS, args.seed)
    order = Order([SHARD] * (ITEMS // SHARD), args.seed, WINDOW)
    positions = max(args.ranks) * PER_RANK * args.steps
    items = np.fromiter(map(order, range(positions)), np.int64, positions)
    results = []
    print("ranks cp unbalanced    step   micro   bound  rows padding    ms  wall")
    for ranks in args.ranks:
        batches = tokens[items[: ranks * PER_RANK * args.steps].reshape(args.steps, -1)]
        for cp in args.cp:
            if ranks % cp:
                parser.error(f"--cp {cp} does not divide --ranks {ranks}")
            result = measure(batches, ranks // cp, CAP * (cp if args.scale_cap else 1))
            results.append({"ranks": ranks, "cp": cp} | result)
            print(
                f"{ranks:5} {cp:2} {result['unbalanced']:10.3f} {result['step']:7.4f} {result['micro']:7.4f} "
                f"{result['micro_bound']:7.4f} {result['micro_batches']:5.1f} {result['padding']:7.2%} "
                f"{result['cpu_ms']:5.1f} {result['wall_ms']:5.1f}",
                flush=True,
            )
    seen = np.bincount(items, minlength=ITEMS)
    print(f"{positions / ITEMS:.2f} epochs at {max(args.ranks)} ranks; {np.count_nonzero(seen == 0)} items never seen")
    if args.json:
        report = {
            "steps": args.steps, "seed": args.seed, "cap": CAP, "scale_cap": args.scale_cap, "results": results,
            "epochs": positions / ITEMS, "never_seen": int(np.count_nonzero(seen == 0)),
            "machine": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "load": os.getloadavg(),
            "numpy": np.__version__, "python": platform.python_version(),
        }  # fmt: skip
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
