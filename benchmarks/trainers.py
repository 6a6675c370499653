"""The same training by MegaSora, by a plain loop over diffusers' Wan, compiled or not, and by accelerate: step, memory, start-up.

    python benchmarks/trainers.py --rounds 3 --json benchmarks/reports/DATE-trainers.json

Same weights, samples, noise, timesteps, AdamW and clipping; first of all, losses must agree. Each is a process of its own, and
they take turns, so that a drift of the machine meets all alike: read the ratios. Memory is the process's VmHWM. Start-up is from
the start of the process to the end of its first step. Trainers that are not in the table are in OTHERS, with the reason.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megasora.build import build_engine, build_recipe
from megasora.cluster.origin import process_start
from megasora.config import load_config
from megasora.encoders import LatentFacts
from megasora.microbatch import MicroBatch, training_loss
from megasora.models.interop import wan
from megasora.models.interop.names import import_weights
from megasora.models.packing import Item, in_patches, pack, patchify
from megasora.models.text import Text
from megasora.observe.hardware import device_name, peak_memory
from megasora.parallel.mesh import Processes, processes
from megasora.schema import Config

LATENT, TEXT = (16, 5, 32, 32), 64  # C, T, H, W; tokens of a caption
LR, CLIP = 1e-3, 1.0
MODEL = [
    "--model.width=256", "--model.heads=4", "--model.ffn=1024", "--model.depth=4", "--model.text_width=64", "--optim.ema=0",
    "--optim.weight_decay=0.01", f"--optim.clip={CLIP}", "--vae.preset=4x8x8",
]  # fmt: skip
KINDS = ("megasora", "megasora compiled", "diffusers", "diffusers compiled", "accelerate")
OTHERS = {  # read in their packages, none was run
    "torchtitan 0.3.0": "its Flux trainer takes a CUDA device where there is no accelerator (tools/utils.py); it trains images",
    "fastvideo 0.2.1": "requires torch 2.12.0 exactly, and fastvideo-kernel and flashinfer, which are CUDA's",
    "nemo-toolkit 3.0.0": "has no video generator any more: its diffusion is of speech",
    "opensora": "is not on the package index",
}


def config_of(precision: str, compiled: bool) -> Config:
    return load_config(
        None, [*MODEL, f"--precision.precision={precision}", f"--parallel.compile={str(compiled).lower()}"]
    )


def sample(step: int) -> tuple[Tensor, Tensor, float, Tensor]:
    """Latent, noise, timestep and caption of a step."""
    random = torch.Generator().manual_seed(step)
    clean, blur = (torch.randn(LATENT, generator=random) for _ in range(2))
    return clean, blur, 0.05 + 0.9 * torch.rand((), generator=random).item(), torch.randn(TEXT, 64, generator=random)


def by_megasora(weights: Path, precision: str, compiled: bool, group: Processes) -> Callable[[int], float]:
    """A step of the trainer's engine, on rows as its loader packs them."""
    config = config_of(precision, compiled)
    engine = build_engine(config, group)
    given = import_weights(load_file(weights), wan.weight_map(config.model), config.model.depth)
    for name, tensor in engine.tensors().items():
        if name.startswith("model/"):
            tensor.copy_(given[name.removeprefix("model/")])
    engine.loaded()
    facts = LatentFacts({}, Text(torch.zeros(1, 64), torch.zeros(0)))
    loss = training_loss(build_recipe(config, group, facts, config.stages[0], 0))
    shape = in_patches(LATENT[1:], config.model.patch)

    def step(number: int) -> float:
        clean, blur, t, text = sample(number)
        x, y = patchify(clean, config.model.patch), patchify(blur, config.model.patch)
        row = pack([Item((1 - t) * x + t * y, shape, torch.full((shape[0],), t), text, torch.zeros(0))], len(x))
        value = engine.forward_backward([MicroBatch(row, x, y, torch.full((len(x),), 1 / len(x)))], loss).item()
        engine.clip().item()
        engine.update(LR)
        return value

    return step


def by_diffusers(weights: Path, precision: str, compiled: bool, accelerated: bool) -> Callable[[int], float]:
    """A step as its users write it: fp32 weights, autocast, torch's fused AdamW."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(**wan.to_diffusers(config_of(precision, False).model))
    model.load_state_dict(load_file(weights))
    model.train()
    if compiled:
        for block in model.blocks:
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    backward: Callable[[Tensor], Any] = Tensor.backward
    lower: AbstractContextManager[Any] = torch.autocast(
        "cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=True
    )
    clip: Callable[..., Any] = torch.nn.utils.clip_grad_norm_
    if accelerated:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True, mixed_precision="bf16" if precision == "bf16" else "no")
        model, optimizer = accelerator.prepare(model, optimizer)
        # A prepared model casts by itself.
        backward, lower, clip = accelerator.backward, nullcontext(), accelerator.clip_grad_norm_

    def step(number: int) -> float:
        clean, blur, t, text = sample(number)
        noisy = (1 - t) * clean + t * blur
        with lower:
            found = model(noisy[None], torch.tensor([1000 * t]), text[None]).sample
        loss = (found.float() - (blur - clean)[None]).square().mean()
        backward(loss)
        clip(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def work(kind: str, weights: Path, precision: str, steps: int, leaving: ExitStack) -> dict[str, Any]:
    """What one process measures: warm-up of two steps, which count as start-up and not as steps."""
    name, _, compiled = kind.partition(" ")
    if name == "megasora":
        group = leaving.enter_context(processes("dp1"))
        step = by_megasora(weights, precision, bool(compiled), group)
    else:
        step = by_diffusers(weights, precision, bool(compiled), name == "accelerate")
    losses = [step(0)]
    start_up = time.time() - process_start()
    losses.append(step(1))
    times = []
    for number in range(2, 2 + steps):
        begin = time.perf_counter()
        losses.append(step(number))
        times.append(time.perf_counter() - begin)
    return {"losses": losses, "step_time_s": statistics.median(times), "start_up_s": start_up,
            "peak_memory_bytes": peak_memory(torch.device("cpu"))}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)  # kind, weights, precision
    args = parser.parse_args()
    if args.worker:
        kind, weights, precision = args.worker
        with ExitStack() as leaving:
            print(json.dumps(work(kind, Path(weights), precision, args.steps, leaving)), flush=True)
        os._exit(0)
    facts: dict[str, Any] = {"date": str(date.today()), "command": sys.argv[1:], "latent": LATENT, "model": MODEL,
                             "others": OTHERS, "results": {}}  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        weights = Path(directory) / "weights.safetensors"
        draw(weights)
        for precision in args.precision:
            facts["results"][precision] = compare(weights, precision, args.steps, args.rounds)
    facts["machine"] = {"cpu": device_name(torch.device("cpu")), "cores": os.cpu_count(), "torch": torch.__version__,
                        "python": platform.python_version()}  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


def draw(weights: Path) -> None:
    """Weights as diffusers begins with, for all."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(**wan.to_diffusers(config_of("fp32", False).model))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, weights)


def compare(weights: Path, precision: str, steps: int, rounds: int) -> dict[str, Any]:
    """All kinds in turn; a table. Ratios of a round are to MegaSora's of that round."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind in KINDS:
            command = [sys.executable, __file__, f"--steps={steps}", "--worker", kind, str(weights), precision]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[kind].append(json.loads(done.stdout.splitlines()[-1]))
    ours = found["megasora"]
    print(f"\n{precision:<20} {'step s':>8} {'ratio':>6} {'memory MB':>10} {'start-up s':>11} {'losses off by':>14}")
    results = {}
    for kind, runs in found.items():
        pairs = zip(runs[0]["losses"], found["diffusers"][0]["losses"], strict=True)
        off = max(abs(a - b) / abs(b) for a, b in pairs)
        result = {name: statistics.median(run[name] for run in runs) for name in
                  ("step_time_s", "start_up_s", "peak_memory_bytes")}  # fmt: skip
        ratios = [run["step_time_s"] / own["step_time_s"] for run, own in zip(runs, ours, strict=True)]
        results[kind] = result | {"ratio": statistics.median(ratios), "ratios": ratios, "losses_off": off, "runs": runs}
        print(f"{kind:<20} {result['step_time_s']:8.4f} {results[kind]['ratio']:6.3f} {result['peak_memory_bytes'] / 1e6:10.0f} "
              f"{result['start_up_s']:11.1f} {off:14.1e}")  # fmt: skip
    return results


if __name__ == "__main__":
    main()
