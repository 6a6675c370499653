"""Every kernel compiled for sm_90a through its public function, for every width that is shipped: nothing spills, and what
it costs is what was committed (tests/data/kernels.json). A new table: `python -m tests.unit.test_kernels_compiled`."""

import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from megasora_kernels import activation_fp8, flash_varlen, fp8_gemm, fp8_quantize, gated_layernorm, run_sums
from megasora_kernels.cases import CASES, Inputs, draw_gated_layernorm, evaluate

from megasora.models.families import PRESETS
from tests.seeded import with_bug
from tests.triton_stub import Cost, compiled_by, faults, stub_process

TABLE = Path(__file__).parents[1] / "data/kernels.json"
# Widths of rows and heads of all presets.
SHAPES = sorted({(config.width, config.head_width) for config in PRESETS.values()})
QUICK = (1536,)
LENGTHS = (33, 31)


def compile_row(case: int, width: int, head_width: int) -> None:
    given = {"head_width": head_width} if "rope" in CASES[case].name or "qknorm" in CASES[case].name else {}
    evaluate(CASES[case].kernels, CASES[case].draw(LENGTHS, width, torch.bfloat16, **given))


def compile_fp8_norm(width: int) -> None:
    (x, y, *modulations), (sample,), _ = draw_gated_layernorm(LENGTHS, width, torch.bfloat16)
    gated_layernorm.gated_layernorm_triton(x, y, *modulations, sample, 1e-6, torch.ones(()))


def compile_attention(head_width: int) -> None:
    q, k, v, dout = (torch.zeros(256, 2, head_width, dtype=torch.bfloat16) for _ in range(4))
    bounds = torch.tensor([0, 100, 256], dtype=torch.int32)
    evaluate(lambda *given: flash_varlen.flash_varlen(*given)[0], Inputs([q, k, v], [bounds, bounds, 156, 156], [dout]))


def compile_quantiser(scaling: fp8_quantize.Scaling) -> None:
    x = torch.zeros(256, 384, dtype=torch.bfloat16)
    fp8_quantize.quantise_triton(x, scaling)
    fp8_quantize.quantise_both_triton(x, scaling)


def compile_activation(activation: activation_fp8.Activation) -> None:
    h, bias = torch.zeros(256, 1024, dtype=torch.bfloat16), torch.zeros(1024)
    da = torch.zeros(256, 1024 if activation == "gelu" else 512, dtype=torch.bfloat16)
    activation_fp8.activation_fp8_triton(h, bias, activation)
    activation_fp8.activation_fp8_backward_triton(da, h, bias, activation)


def fp8_zeros(rows: int, columns: int, scale_rows: int) -> fp8_quantize.Quantised:
    data = torch.zeros(rows, columns).to(torch.float8_e4m3fn)
    return fp8_quantize.Quantised(data, torch.ones(scale_rows, -(-columns // 128)))


def compile_gemm(scaling: str) -> None:
    """Through the autotuner, which compiles all of its tiles."""
    other = fp8_zeros(256, 512, 256 if scaling == "row" else 2)
    fp8_gemm.fp8_gemm_triton(fp8_zeros(256, 512, 256), other, torch.bfloat16)


def configurations() -> dict[str, tuple[Callable[..., None], tuple[Any, ...]]]:
    """Everything that is compiled, by name."""
    rows = {
        f"{case.name} {width}": (compile_row, (number, width, head_width))
        for number, case in enumerate(CASES)
        if case.name != "flash_varlen"
        for width, head_width in SHAPES
    }
    return {
        **rows,
        **{f"gated_layernorm to fp8 {width}": (compile_fp8_norm, (width,)) for width, _ in SHAPES},
        **{f"quantise {scaling}": (compile_quantiser, (scaling,)) for scaling in fp8_quantize.SCALINGS},
        **{f"activation_fp8 {name}": (compile_activation, (name,)) for name in ("gelu", "swiglu")},
        **{f"fp8_gemm {scaling}": (compile_gemm, (scaling,)) for scaling in ("tile", "row")},
        **{f"flash_varlen {K}": (compile_attention, (K,)) for K in (64, 72, 128)},
    }


def compiled(pool: ProcessPoolExecutor, name: str) -> list[Cost]:
    function, arguments = configurations()[name]
    return pool.submit(compiled_by, function, *arguments).result()


def quick(name: str) -> bool:
    return name.startswith(("quantise", "activation", "fp8_gemm tile", "flash_varlen 128")) or name.endswith(
        tuple(f" {width}" for width in QUICK)
    )


NAMES = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if quick(n) else pytest.mark.long) for n in configurations()]
)


@NAMES
def test_costs_are_those_committed(h100: ProcessPoolExecutor, name: str) -> None:
    found = compiled(h100, name)
    assert found == json.loads(TABLE.read_text())[name], "if meant: python -m tests.unit.test_kernels_compiled"


@pytest.mark.parametrize("name", configurations())
def test_committed_costs_are_good(name: str) -> None:
    kernels: list[Cost] = json.loads(TABLE.read_text())[name]
    assert [faults(cost) for cost in kernels] == [[]] * len(kernels)
    for cost in kernels:
        if cost["kernel"] == "_gemm_kernel":
            assert cost["wgmma"] >= 4
            assert cost["tma"] > 0
        elif name.startswith("flash_varlen"):
            assert cost["wgmma"] > 0
        if cost["kernel"] != "_gemm_kernel":
            assert cost["wide_loads"] > 0
        if cost["kernel"] == "_quantise_kernel" or ("fp8" in name and cost["kernel"] == "_forward_kernel"):
            assert cost["fp8_casts"] > 0


# Bugs that must be caught


def _spilling_tile() -> None:
    copy = with_bug(fp8_gemm, "TILES = (", "TILES = ((256, 8, 2), ")
    copy.fp8_gemm_triton(fp8_zeros(512, 512, 512), fp8_zeros(256, 512, 256), torch.bfloat16)


def _unpromoted() -> None:
    """All products summed where fp8 sums are short; one scale at the end."""
    copy = with_bug(
        fp8_gemm,
        "part = tl.dot(left, right.T)", "total = tl.dot(left, right.T, total)",
        "total += part * (factor[:, None] * other[None, :])", "pass",
        "total += part * (factor * tl.load(b_scale + tl.program_id(1).to(tl.int64) * blocks + block))[:, None]", "pass",
    )  # fmt: skip
    copy.fp8_gemm_triton(fp8_zeros(384, 512, 384), fp8_zeros(256, 512, 2), torch.bfloat16)


def _narrow_loads() -> None:
    copy = with_bug(
        run_sums, "slot[:, None] * width + column[None, :]", "slot[:, None] * (width + 1) + column[None, :]"
    )
    copy.sum_runs(torch.zeros(4, 64), torch.zeros(64, dtype=torch.int64), 1, 32)


def _wrong_call() -> None:
    copy = with_bug(gated_layernorm, "fp8, parts, mean, rstd,\n", "fp8, mean, rstd,\n")
    (x, y, *modulations), (sample,), _ = draw_gated_layernorm((3, 2), 192, torch.bfloat16)
    copy.gated_layernorm_triton(x, y, *modulations, sample)


def test_seeded_bugs_are_caught(h100: ProcessPoolExecutor) -> None:
    first, *_ = h100.submit(compiled_by, _spilling_tile).result()
    assert any("spilled" in fault for fault in faults(first))
    found = h100.submit(compiled_by, _unpromoted).result()
    assert all("unpromoted fp8 sums" in faults(cost) for cost in found)
    (narrow,) = h100.submit(compiled_by, _narrow_loads).result()
    assert narrow["wide_loads"] == 0
    with pytest.raises(Exception, match="missing 1 required"):
        h100.submit(compiled_by, _wrong_call).result()


if __name__ == "__main__":
    with stub_process() as pool:
        table = json.loads(TABLE.read_text()) if sys.argv[1:] else {}
        for name in sys.argv[1:] or configurations():  # some names, or all
            table[name] = compiled(pool, name)
            for cost in table[name]:
                print(name, cost["kernel"], cost["registers"], *faults(cost), flush=True)
    TABLE.write_text("{\n" + ",\n".join(f'"{n}": {json.dumps(c)}' for n, c in table.items()) + "\n}\n")
