"""What a rank sends in a step, and what lives on it at most: counted on a step of the real engine, against closed forms.

  python benchmarks/communication.py --config configs/demo.yaml 'dp4,zero1' 'dp4,zero3' tp4 cp4 'pp2,tp2,dp2'

Each layout is stepped on fake tensors in a world of its size, as `megasora plan --dry-run` does for one; DDP alone does not take
them. `bytes` go into collectives; `least` is what the layout cannot do without, by its closed form; `a block` is how many
collectives a block has.
"""

import argparse
import json
from pathlib import Path

from megasora.config import load_config
from megasora.models.packing import Shape
from megasora.parallel.layout import parse_layout
from megasora.parallel.plan import check_layout
from megasora.planner.communication import communication, in_blocks
from megasora.planner.dry_run import alone, dry_run
from megasora.planner.job import Job, Row
from megasora.planner.stages import stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--shape", type=int, nargs=3, default=[4, 16, 16], help="patches of the sample: T H W")
    parser.add_argument("--rows", type=int, default=2, help="micro-batches of a rank")
    parser.add_argument("--text-tokens", type=int, default=32)
    parser.add_argument("--json", type=Path)
    parser.add_argument("layouts", nargs="+")
    args, overrides = parser.parse_known_args()
    config = load_config(args.config, overrides)
    T, H, W = args.shape
    shape: Shape = (T, H, W)
    found = []
    print(
        f"{'layout':24} {'MB sent':>10} {'least':>10} {'ratio':>7} {'a block':>8} {'peak MB':>9} {'planned':>9} {'ratio':>7}"
    )
    for text in args.layouts:
        layout = parse_layout(text)
        check_layout(config.model, layout)
        job = Job(
            model=config.model, layout=layout, row=Row(((shape, args.text_tokens),), T * H * W), rows=args.rows,
            precision=config.precision.precision, optim=config.optim,
            recompute="none" if config.parallel.recompute.startswith("every") else config.parallel.recompute,
        )  # fmt: skip
        run = dry_run(config, job)
        counted = sum(call.sent for call in run.watch.calls)
        stage = stages(alone(job))[run.stage]
        least = sum(one.sent * one.count for one in communication(alone(job), stage))
        blocks = sum(one.count for one in in_blocks(alone(job), stage)) / len(stage.blocks) / alone(job).rows
        peak, planned = run.compared["peak of what comes and goes"]
        weights = run.compared["weights"][0] + run.compared["optimizer"][0]
        result = {
            "layout": str(layout), "bytes": counted, "least": least, "calls": len(run.watch.calls),
            "collectives_per_block": blocks, "state_bytes": weights, "peak_bytes": peak, "peak_planned": planned,
            "differences": run.differences,
        }  # fmt: skip
        found.append(result)
        print(f"{text:24} {counted / 1e6:10.2f} {least / 1e6:10.2f} {counted / least if least else 1:7.3f} {blocks:8.1f}"
              f" {(peak + weights) / 1e6:9.2f} {(planned + weights) / 1e6:9.2f} {(peak + weights) / (planned + weights):7.3f}",
              flush=True)  # fmt: skip
    if args.json:
        args.json.write_text(
            json.dumps({"config": str(args.config), "overrides": overrides, "results": found}, indent=1)
        )


if __name__ == "__main__":
    main()
