"""Forward and backward of the default family against diffusers' Wan with the same weights, step by step in turn.

    python benchmarks/model_step.py --steps 7 --output benchmarks/reports/DATE-model-step.json

On a CPU: 768 wide, 12 heads, 8 blocks, ffn 3072, patch 1x2x2, 16 channels, latent 5x32x32 (1,280 tokens), 128 text tokens of
4,096; a step counts only if the rest of the machine was quiet in it. On a GPU: 8 blocks of Wan2.1-1.3B, latent 21x60x104 (81
frames of 480p, 32,760 tokens), 512 text tokens. Besides seconds there is the ratio, step by step, and the share of the best
matrix product sampled between the steps. FLOPs: 6 for each multiply-add, less the input gradients that nobody needs.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megasora.device import pick_device
from megasora.models.attention_operator import as_operator
from megasora.models.flops import forward_macs
from megasora.models.interop import wan
from megasora.models.interop.names import import_weights
from megasora.models.packing import Item, in_patches, pack, patchify
from megasora.models.video_dit import PRESETS, VideoDiT, VideoDiTConfig
from megasora.observe.hardware import device_name, peak_memory, synchronize
from megasora.parallel.compiled import compile_blocks


@dataclass(frozen=True)
class Case:
    """What is measured on a kind of device."""

    config: VideoDiTConfig
    latent: tuple[int, int, int, int]  # C, T, H, W
    text_tokens: int
    gemms: tuple[tuple[int, int, int], ...]  # M, K, N of the products whose best is the peak


CASES = {
    "cpu": Case(
        PRESETS["MegaSora-100M"], (16, 5, 32, 32), 128, ((1280, 768, 3072), (1280, 3072, 768), (2048, 2048, 2048))
    ),
    "cuda": Case(
        replace(PRESETS["Wan2.1-1.3B"], depth=8), (16, 21, 60, 104), 512,
        ((32760, 1536, 8960), (32760, 8960, 1536), (8192, 8192, 8192)),
    ),
}  # fmt: skip
TIME = 0.5
NOISE = 0.05  # share of the machine's time that others may take in a step that counts
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="counted steps of each model")
    parser.add_argument("--precision", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--compile", action="store_true", help="torch.compile each block of both")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = pick_device()
    case = CASES[device.type]
    if device.type == "cpu" and "bf16" in args.precision and not torch.cpu._is_avx512_bf16_supported():
        print("bf16: left out, this CPU has no avx512_bf16 and would only emulate it")
        args.precision.remove("bf16")
    results = [measure(case, device, precision, args.steps, args.compile) for precision in args.precision]
    for result in results:
        print(
            "{precision} {mode}: ours {ours_s:.3f} s, {ours_share:.3f} of the GEMM peak; diffusers {theirs_s:.3f} s, "
            "{theirs_share:.3f}; ratio {ratio:.3f} ({low:.3f} to {high:.3f}); peak {gemm_gflops:.0f} GFLOP/s".format(
                **result
            )
        )
    if args.output:
        machine = {
            "cpu": device_name(torch.device("cpu")),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        if device.type == "cuda":
            machine |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        args.output.write_text(json.dumps({"schema": 1, "machine": machine, "results": results}, indent=1) + "\n")


def measure(case: Case, device: torch.device, precision: str, steps: int, compiled: bool) -> dict[str, Any]:
    """Both models in turn; times in seconds."""
    ours, theirs = build(case, device, precision, compiled)
    memory = {}
    for name, step in (("ours", ours), ("theirs", theirs)) * 2:  # warm
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        step()
        memory[name] = peak_memory(device)
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    peak = gemm_peak(case, device, TYPES[precision])
    for _ in range(steps):
        times["ours"].append(seconds_of(ours, device))
        times["theirs"].append(seconds_of(theirs, device))
        peak = max(peak, gemm_peak(case, device, TYPES[precision]))
    ratios = [a / b for a, b in zip(times["ours"], times["theirs"], strict=True)]
    flops = step_flops(case)
    median = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "precision": precision, "mode": "compiled" if compiled else "eager", "steps": steps, "times": times,
        "ours_s": median["ours"], "theirs_s": median["theirs"], "ratio": statistics.median(ratios), "low": min(ratios),
        "high": max(ratios), "ours_share": flops / median["ours"] / peak, "theirs_share": flops / median["theirs"] / peak,
        "gemm_gflops": peak / 1e9, "flops": flops, "latent": case.latent, "text_tokens": case.text_tokens,
        "model": {"width": case.config.width, "depth": case.config.depth, "heads": case.config.heads, "ffn": case.config.ffn},
    }  # fmt: skip
    return result | ({"peak_memory_bytes": memory} if device.type == "cuda" else {})


def build(
    case: Case, device: torch.device, precision: str, compiled: bool
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step of ours, as training runs it (fp32 weights, autocast), and of diffusers', in the type it is loaded in."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    config, dtype = case.config, TYPES[precision]
    theirs = WanTransformer3DModel(**wan.to_diffusers(config))
    ours = VideoDiT(config)
    ours.load_state_dict(import_weights(theirs.state_dict(), wan.weight_map(config), config.depth))
    ours.to(device)
    theirs.to(device)
    for name, parameter in theirs.named_parameters():  # as from_pretrained casts
        if not any(kept in name for kept in theirs._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    latent = torch.randn(case.latent, device=device)
    text = torch.randn(case.text_tokens, config.text_width, device=device)
    shape = in_patches(case.latent[1:], config.patch)
    none = torch.zeros(0, device=device)
    row = pack([Item(patchify(latent, config.patch), shape, torch.full((shape[0],), TIME), text, none)])
    inputs = {
        "hidden_states": latent[None].to(dtype),
        "timestep": torch.tensor([1000 * TIME], device=device),
        "encoder_hidden_states": text[None].to(dtype),
    }
    if compiled:
        ours.attention = as_operator(ours.attention)
        compile_blocks(ours.blocks)
        for block in theirs.blocks:
            block.compile()

    def our_step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
            finish(ours, ours(row))

    def their_step() -> None:
        finish(theirs, theirs(**inputs).sample)

    return our_step, their_step


def finish(model: nn.Module, prediction: torch.Tensor) -> None:
    prediction.float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def step_flops(case: Case) -> float:
    """Of forward and backward."""
    config, shape = case.config, in_patches(case.latent[1:], case.config.patch)
    tokens = shape[0] * shape[1] * shape[2]
    unneeded = tokens * config.patch_values * config.width + case.text_tokens * config.text_width * config.width
    return 6.0 * forward_macs(config, shape, case.text_tokens) - 2.0 * unneeded


def seconds_of(step: Callable[[], None], device: torch.device) -> float:
    """Of a step. On a GPU the processor's load does not matter."""
    if device.type == "cpu":
        return quiet(step)
    synchronize(device)
    begin = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - begin


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


def gemm_peak(case: Case, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of a few matrix products."""
    best = 0.0
    for m, k, n in case.gemms:
        a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
        for _ in range(4):
            synchronize(device)
            begin = time.perf_counter()
            nn.functional.linear(a, b)
            synchronize(device)
            best = max(best, 2 * m * k * n / (time.perf_counter() - begin))
    return best


if __name__ == "__main__":
    main()
