"""A training step of the default model on a CPU: as it is (native fused operations), its blocks compiled, and plain eager.

    python benchmarks/fused_cpu.py --steps 7 --output benchmarks/reports/DATE-fused-cpu.json

Plain eager is each kernel's formula written out in single operations, with a modulation of every token. The three take
turns on the same weights and inputs; what is compared is the processor time of each step, ratios within a turn.
MegaSora-10M, latent 5x32x32 (1,280 tokens, in two samples), 64 text tokens a sample.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from megasora.models import layers, video_dit
from megasora.models.attention_operator import as_operator
from megasora.models.families import PRESETS, build_model
from megasora.models.packing import Item, pack
from megasora.observe.hardware import device_name
from megasora.parallel.compiled import compile_blocks

RATIOS = {
    "fused/plain": ("fused", "plain"),
    "compiled/plain": ("compiled", "plain"),
    "compiled/fused": ("compiled", "fused"),
}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = ((5, 16, 8), (5, 8, 16))  # of patches


def plain_layernorm_modulate(x: Tensor, scale: Tensor, shift: Tensor, sample: Tensor, eps: float = 1e-6) -> Tensor:
    y = x.float()
    centered = y - y.mean(-1, keepdim=True)
    normed = centered / torch.sqrt(centered.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (1 + scale[sample]) + shift[sample]).type_as(x)


def plain_gated(x: Tensor, y: Tensor, gate: Tensor, sample: Tensor) -> Tensor:
    return x + (gate[sample] * y).type_as(x)


def plain_gated_layernorm(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, sample: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    out = x + y.type_as(x) if gate is None else plain_gated(x, y, gate, sample)
    return out, plain_layernorm_modulate(out, scale, shift, sample, eps)


def plain_qknorm_rope(
    x: Tensor, weight: Tensor | None, rotation: Tensor | None, head_width: int, eps: float = 1e-6
) -> Tensor:
    y = x.float()
    if weight is not None:
        y = y / torch.sqrt(y.pow(2).mean(-1, keepdim=True) + eps) * weight.float()
    y = y.unflatten(-1, (-1, head_width))
    if rotation is not None:
        real, imaginary = y[..., 0::2], y[..., 1::2]
        cosine, sine = rotation[:, None, :, 0], rotation[:, None, :, 1]
        y = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-1).flatten(-2)
    return y.type_as(x)


PLAIN = [
    (video_dit, "layernorm_modulate", plain_layernorm_modulate),
    (layers, "layernorm_modulate", plain_layernorm_modulate),
    (video_dit, "gated", plain_gated),
    (video_dit, "gated_layernorm", plain_gated_layernorm),
    (layers, "qknorm_rope", plain_qknorm_rope),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="counted turns")
    parser.add_argument("--precision", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(precision, args.steps) for precision in args.precision]
    for result in results:
        times = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in result["seconds"].items())
        ratios = ", ".join(f"{name} {result[name]:.3f}" for name in RATIOS)
        print(f"{result['precision']}: {times}; {ratios}")
    if args.output:
        machine = {"cpu": device_name(torch.device("cpu")), "threads": 1, "torch": torch.__version__}
        args.output.write_text(json.dumps({"schema": 1, "machine": machine, "results": results}, indent=1) + "\n")


def measure(precision: str, turns: int) -> dict:
    """Median processor seconds of a step of each, and the medians of the turns' ratios."""
    steps = {name: build(name, precision) for name in ("plain", "fused", "compiled")}
    losses = {name: step() for name, step in steps.items()}
    assert max(losses.values()) / min(losses.values()) < 1.01, losses
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            times[name].append(time.process_time() - begin)
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))
        for name, (one, other) in RATIOS.items()
    }
    return {
        "precision": precision, "turns": turns, **ratios, "times": times,
        "seconds": {name: statistics.median(values) for name, values in times.items()},
    }  # fmt: skip


def build(name: str, precision: str) -> Callable[[], float]:
    """A step: forward, backward, AdamW; fused but in plain eager."""
    torch.manual_seed(0)
    config = PRESETS["MegaSora-10M"]
    model = build_model(config)
    model.init_weights()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    generator = torch.Generator().manual_seed(1)
    items = [
        Item(
            torch.randn(T * H * W, config.patch_values, generator=generator), (T, H, W), torch.full((T,), 0.5),
            torch.randn(64, config.text_width, generator=generator), torch.zeros(0),
        )
        for T, H, W in SHAPES
    ]  # fmt: skip
    row = pack(items)
    if name == "compiled":  # as parallel.compile does it
        model.attention = as_operator(model.attention)
        compile_blocks(model.blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=name != "plain", foreach=False)

    def step() -> float:
        with ExitStack() as stack:
            for module, function, plain in PLAIN if name == "plain" else ():
                stack.enter_context(mock.patch.object(module, function, plain))
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
                loss = model(row).float().square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


if __name__ == "__main__":
    main()
