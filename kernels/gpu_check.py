"""Every kernel on the GPU at hand: is it right, are its accesses, how near does it come to what the GPU can do?

    python kernels/gpu_check.py [--output FILE.json] [--small] [--no-sanitizer]

Three parts, one table. Parity: each kernel against fp64, at most twice torch's own error in the same type, and the same bits
twice; quantisers byte for byte. compute-sanitizer (memcheck, racecheck) over small shapes, where it is installed. Time: the
share of the roofline, which is bytes over the bandwidth of a copy or FLOPs over a matrix product's speed, measured in this run.
Exit code 0: all right; 1: something is wrong; 2: no CUDA device.

LayerNorm + modulate and the gated residual have run on an H100 and an H200. All other kernels, and this script, have NEVER RUN
on a GPU; on a CPU its checks run in Triton's interpreter (tests/unit/test_gpu_check.py).
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from megasora_kernels import activation_fp8, fp8_gemm, fp8_quantize  # noqa: E402
from megasora_kernels.cases import CASES, Case, Inputs, errors, evaluate, excess  # noqa: E402
from torch import Tensor  # noqa: E402

LENGTHS, WIDTH = (1, 4000, 0, 33, 128, 20_000, 0, 2047, 6551), 1536  # 32,760 tokens, 81 frames of 480p
SMALL_LENGTHS, SMALL_WIDTH = (5, 1, 4, 0, 2), 144
# Bytes of forward and backward together in bf16, in units of tokens x width: what each kernel's file says.
BYTES = {
    "layernorm_modulate": 10.5, "gated": 12.25, "gated_layernorm": 20.75, "added_layernorm": 18.5, "qknorm_rope": 10.7,
    "qknorm_rope_heads": 10.7, "qknorm_rope_ulysses": 10.7, "qknorm": 10.1, "rope": 8.7,
}  # fmt: skip


@dataclass
class Result:
    """Of one kernel. `share` is of the roofline; None where nothing was timed."""

    kernel: str
    wrong: list[str]
    seconds: float | None = None
    share: float | None = None


def check_gradients(case: Case, inputs: Inputs) -> list[str]:
    """What is not as exact as torch, or differs when it is done again."""
    wrong = excess(errors(case, inputs))
    first, second = (evaluate(case.kernels, inputs) for _ in range(2))
    differing = [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if not torch.equal(a, b)]
    return wrong + [f"{i}: other bits the second time" for i in differing]


def check_quantiser(x: Tensor, scaling: fp8_quantize.Scaling) -> list[str]:
    """Bytes and scales that are not the reference's, of x and of its transpose."""
    found = fp8_quantize.quantise_both_triton(x, scaling)
    expected = fp8_quantize.quantise_both_reference(x, scaling)
    names = ("data", "scale", "data of the transpose", "scale of the transpose")
    pairs = zip(names, (*found[0], *found[1]), (*expected[0], *expected[1]), strict=True)
    return [f"{name} differs" for name, a, b in pairs if not torch.equal(as_bytes(a), as_bytes(b))]


def as_bytes(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8) if t.ndim else t


def check_activation(h: Tensor, bias: Tensor, da: Tensor, activation: activation_fp8.Activation) -> list[str]:
    """Results that are further from the reference than a step of fp8 now and then."""
    found = [*activation_fp8.activation_fp8_triton(h, bias, activation)]
    expected = [*activation_fp8.activation_fp8_reference(h, bias, activation)]
    *more, dbias = activation_fp8.activation_fp8_backward_triton(da, h, bias, activation)
    *others, exact = activation_fp8.activation_fp8_backward_reference(da, h, bias, activation)
    wrong = []
    for i, (a, b) in enumerate(zip([*found, *more], [*expected, *others], strict=True)):
        same = (a.data.view(torch.uint8) == b.data.view(torch.uint8)).float().mean().item()
        if not same > 0.999:
            wrong.append(f"{i}: {100 * (1 - same):.2f} % of the bytes differ")
    if not (dbias - exact).norm() <= 1e-5 * exact.norm():
        wrong.append(f"gradient of the bias: {(dbias - exact).norm() / exact.norm():.2g} off")
    return wrong


def check_product(a: Tensor, b: Tensor, scaling: fp8_quantize.Scaling) -> list[str]:
    left, right = fp8_quantize.quantise(a, "row"), fp8_quantize.quantise(b, scaling)
    exact = fp8_quantize.dequantise(left, "row").double() @ fp8_quantize.dequantise(right, scaling).double().T
    error = ((fp8_gemm.fp8_gemm_triton(left, right, torch.float32) - exact).norm() / exact.norm()).item()
    return [] if error < 1e-3 else [f"error {error:.2g}, 1e-3 is what promoted sums of 128 have"]


def checks(device: str, lengths: tuple[int, ...], width: int) -> dict[str, Callable[[], list[str]]]:
    """All of them by name. Nothing is drawn before one is called."""

    def draw(rows: int, columns: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rows, columns, generator=generator).bfloat16().to(device)

    def of_case(case: Case) -> list[str]:
        return check_gradients(case, case.draw(lengths, width, torch.bfloat16).to(device))

    def of_quantiser(scaling: fp8_quantize.Scaling) -> list[str]:
        return check_quantiser(draw(sum(lengths), width), scaling)

    def of_activation(name: activation_fp8.Activation) -> list[str]:
        hidden = 2 * width
        da = draw(sum(lengths), hidden if name == "gelu" else width, 2)
        return check_activation(draw(sum(lengths), hidden), draw(1, hidden, 1)[0].float(), da, name)

    def of_product(scaling: fp8_quantize.Scaling) -> list[str]:
        return check_product(draw(sum(lengths), width), draw(width + 16, width, 1), scaling)

    found: dict[str, Callable[[], list[str]]] = {case.name: partial(of_case, case) for case in CASES}
    for scaling in fp8_quantize.SCALINGS:
        found[f"quantise {scaling}"] = partial(of_quantiser, scaling)
    for name in ("gelu", "swiglu"):
        found[f"activation_fp8 {name}"] = partial(of_activation, name)
    for scaling in ("tile", "row"):
        found[f"fp8_gemm {scaling}"] = partial(of_product, scaling)
    return found


def check(name: str, run: Callable[[], list[str]]) -> Result:
    try:
        return Result(name, run())
    except Exception as error:  # a kernel that does not even start must not hide the others
        return Result(name, [f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"])


# Time


def seconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """Median of calls, each after the L2 cache was overwritten."""
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    times = []
    for repeat in range(repeats + 3):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if repeat >= 3:
            times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


def roofline() -> tuple[float, float, float]:
    """Bytes a second of a copy, FLOP/s of a bf16 and of an fp8 product, of this GPU now."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / seconds(lambda: target.copy_(source))
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    bf16 = 2 * 8192**3 / seconds(lambda: a @ a)
    b, one = a.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
    fp8 = 2 * 8192**3 / seconds(lambda: torch._scaled_mm(b, b.T, one, one, out_dtype=torch.bfloat16))
    return bandwidth, bf16, fp8


def time_kernels(results: dict[str, Result]) -> None:
    """Adds seconds and the share of the roofline to what was right."""
    bandwidth, bf16, fp8 = roofline()
    tokens = sum(LENGTHS)
    x = torch.randn(tokens, WIDTH, device="cuda").bfloat16()
    for case in CASES:
        if results[case.name].wrong:
            continue
        inputs = case.draw(LENGTHS, WIDTH, torch.bfloat16).to("cuda")
        best = BYTES.get(case.name, 0) * tokens * WIDTH / bandwidth
        if case.name == "flash_varlen":
            bounds = zip(inputs.fixed[0].diff().tolist(), inputs.fixed[1].diff().tolist(), strict=True)
            best = 18 * sum(a * b for a, b in bounds) * WIDTH / bf16
        took = seconds(partial(evaluate, case.kernels, inputs))
        results[case.name].seconds, results[case.name].share = took, best / took
    for scaling in fp8_quantize.SCALINGS:
        result = results[f"quantise {scaling}"]
        best = (6 if scaling == "tensor" else 4) * tokens * WIDTH / bandwidth
        result.seconds = seconds(partial(fp8_quantize.quantise_both_triton, x, scaling))
        result.share = best / result.seconds
    bias = torch.zeros(WIDTH, device="cuda")
    for name in ("gelu", "swiglu"):
        result = results[f"activation_fp8 {name}"]
        result.seconds = seconds(partial(activation_fp8.activation_fp8_triton, x, bias, name))
        result.share = (4 if name == "gelu" else 3) * tokens * WIDTH / bandwidth / result.seconds
    a = fp8_quantize.quantise(torch.randn(8192, 8192, device="cuda").bfloat16(), "row")
    for scaling in ("tile", "row"):
        result = results[f"fp8_gemm {scaling}"]
        b = fp8_quantize.quantise(torch.randn(8192, 8192, device="cuda").bfloat16(), scaling)
        result.seconds = seconds(partial(fp8_gemm.fp8_gemm_triton, a, b, torch.bfloat16))
        result.share = 2 * 8192**3 / fp8 / result.seconds


def sanitize() -> list[Result]:
    """compute-sanitizer over this script's checks of small shapes."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not installed: not run")
        return []
    results = []
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, __file__, "--small", "--no-sanitizer"]
        done = subprocess.run(command, capture_output=True, text=True)
        wrong = [line for line in done.stdout.splitlines() if "=========" in line][-3:] or [
            f"exit code {done.returncode}"
        ]
        results.append(Result(f"compute-sanitizer {kind}", wrong if done.returncode else []))
    return results


def table(results: list[Result]) -> str:
    lines = []
    for result in results:
        time = (
            ""
            if result.seconds is None
            else f"{1e3 * result.seconds:8.3f} ms {100 * (result.share or 0):5.1f} % of the roofline"
        )
        lines.append(f"{result.kernel:<24} {'wrong' if result.wrong else 'right':<6} {time}")
        lines += [f"    {text}" for text in result.wrong]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--small", action="store_true", help="small shapes, nothing timed")
    parser.add_argument("--no-sanitizer", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: no CUDA device", file=sys.stderr)
        return 2
    shape = (SMALL_LENGTHS, SMALL_WIDTH) if args.small else (LENGTHS, WIDTH)
    results = {name: check(name, run) for name, run in checks("cuda", *shape).items()}
    if not args.small:
        time_kernels(results)
    every = [*results.values(), *([] if args.no_sanitizer else sanitize())]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(table(every))
    if args.output:
        args.output.write_text(json.dumps([asdict(result) for result in every], indent=1) + "\n")
    return int(any(result.wrong for result in every))


if __name__ == "__main__":
    sys.exit(main())
