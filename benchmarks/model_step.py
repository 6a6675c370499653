"""Forward and backward of the default family against diffusers' Wan with the same weights, step by step in turn.

    python benchmarks/model_step.py --steps 7 --output benchmarks/reports/DATE-model-step.json

768 wide, 12 heads, 8 blocks, ffn 3072, patch 1x2x2, 16 channels, latent 5x32x32 (1,280 tokens), 128 text tokens of 4,096. A step
counts only if the rest of the machine was quiet in it. Besides seconds there is the ratio, step by step, and the share of the
best matrix product sampled between the steps. FLOPs: 6 for each multiply-add, less the input gradients that nobody needs.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megasora.models.flops import forward_macs
from megasora.models.interop import wan
from megasora.models.interop.names import import_weights
from megasora.models.packing import Item, in_patches, pack, patchify
from megasora.models.video_dit import VideoDiT, VideoDiTConfig

CONFIG = VideoDiTConfig(width=768, depth=8, heads=12, ffn=3072, text_width=4096)
LATENT, TEXT_TOKENS, TIME = (16, 5, 32, 32), 128, 0.5
NOISE = 0.05  # share of the machine's time that others may take in a step that counts
GEMMS = ((1280, 768, 3072), (1280, 3072, 768), (2048, 2048, 2048))
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="counted steps of each model")
    parser.add_argument("--precision", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--compile", action="store_true", help="torch.compile each block of both")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if "bf16" in args.precision and not torch.cpu._is_avx512_bf16_supported():
        print("bf16: left out, this CPU has no avx512_bf16 and would only emulate it")
        args.precision.remove("bf16")
    results = [measure(precision, args.steps, args.compile) for precision in args.precision]
    for result in results:
        print(
            "{precision} {mode}: ours {ours_s:.3f} s, {ours_share:.3f} of the GEMM peak; diffusers {theirs_s:.3f} s, "
            "{theirs_share:.3f}; ratio {ratio:.3f} ({low:.3f} to {high:.3f}); peak {gemm_gflops:.0f} GFLOP/s".format(
                **result
            )
        )
    if args.output:
        machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        args.output.write_text(json.dumps({"schema": 1, "machine": machine, "results": results}, indent=1) + "\n")


def measure(precision: str, steps: int, compiled: bool) -> dict[str, Any]:
    """Both models in turn; times in seconds."""
    ours, theirs = build(precision, compiled)
    for step in (ours, theirs) * 2:
        step()  # warm
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    peak = gemm_peak(TYPES[precision])
    for _ in range(steps):
        times["ours"].append(quiet(ours))
        times["theirs"].append(quiet(theirs))
        peak = max(peak, gemm_peak(TYPES[precision]))
    ratios = [a / b for a, b in zip(times["ours"], times["theirs"], strict=True)]
    flops = step_flops()
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "precision": precision, "mode": "compiled" if compiled else "eager", "steps": steps, "times": times,
        "ours_s": median["ours"], "theirs_s": median["theirs"], "ratio": statistics.median(ratios), "low": min(ratios),
        "high": max(ratios), "ours_share": flops / median["ours"] / peak, "theirs_share": flops / median["theirs"] / peak,
        "gemm_gflops": peak / 1e9, "flops": flops,
    }  # fmt: skip


def build(precision: str, compiled: bool) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step of ours, as training runs it (fp32 weights, autocast), and of diffusers', in the type it is loaded in."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    dtype = TYPES[precision]
    theirs = WanTransformer3DModel(**wan.to_diffusers(CONFIG))
    ours = VideoDiT(CONFIG)
    ours.load_state_dict(import_weights(theirs.state_dict(), wan.weight_map(CONFIG), CONFIG.depth))
    theirs.to(dtype)
    latent, text = torch.randn(LATENT), torch.randn(TEXT_TOKENS, CONFIG.text_width)
    shape = in_patches(LATENT[1:], CONFIG.patch)
    row = pack([Item(patchify(latent, CONFIG.patch), shape, torch.full((shape[0],), TIME), text, torch.zeros(0))])
    inputs = {
        "hidden_states": latent[None].to(dtype),
        "timestep": torch.tensor([1000 * TIME]),
        "encoder_hidden_states": text[None].to(dtype),
    }
    if compiled:
        for model in (ours, theirs):
            for block in model.blocks:
                block.compile()

    def our_step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
            finish(ours, ours(row))

    def their_step() -> None:
        finish(theirs, theirs(**inputs).sample)

    return our_step, their_step


def finish(model: nn.Module, prediction: torch.Tensor) -> None:
    prediction.float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def step_flops() -> float:
    """Of forward and backward."""
    shape = in_patches(LATENT[1:], CONFIG.patch)
    tokens = shape[0] * shape[1] * shape[2]
    unneeded = tokens * CONFIG.patch_values * CONFIG.width + TEXT_TOKENS * CONFIG.text_width * CONFIG.width
    return 6.0 * forward_macs(CONFIG, shape, TEXT_TOKENS) - 2.0 * unneeded


def quiet(step: Callable[[], None], tries: int = 20) -> float:
    """Seconds of a step in which other processes took at most NOISE of the machine. Raises RuntimeError if it never is quiet."""
    for _ in range(tries):
        busy, mine, begin = busy_seconds(), time.process_time(), time.perf_counter()
        step()
        seconds = time.perf_counter() - begin
        others = (busy_seconds() - busy) - (time.process_time() - mine)
        if others <= NOISE * seconds * (os.cpu_count() or 1):
            return seconds
    raise RuntimeError(
        f"the machine was not quiet in {tries} steps: others took {others:.2f} s of the last {seconds:.2f} s"
    )


def busy_seconds() -> float:
    """CPU seconds of all processes since the machine started, those stolen by its host included."""
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def gemm_peak(dtype: torch.dtype) -> float:
    """FLOP/s of the best of a few matrix products."""
    best = 0.0
    for m, k, n in GEMMS:
        a, b = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
        for _ in range(4):
            begin = time.perf_counter()
            nn.functional.linear(a, b)
            best = max(best, 2 * m * k * n / (time.perf_counter() - begin))
    return best


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
