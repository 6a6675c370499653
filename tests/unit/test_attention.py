"""Which attention is chosen and why, what the libraries' kernels give where they run on a CPU, and their backward with
partial keys."""

import ctypes
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megasora_kernels.flash_cpu import CannotBuild, cannot_run, library

from megasora.errors import ConfigError
from megasora.models import attention
from megasora.models.attention import (
    ChosenAttention,
    alike,
    cannot_build,
    choose,
    find_attention,
    flash_of,
    sdpa_attention,
    varlen_attention,
)
from megasora.models.attention_operator import as_operator
from megasora.models.flash import FLASH
from megasora.models.packing import Order, Segments, Windows
from tests.attention_in_parts import errors_in_parts

CPU = torch.device("cpu")


def installed(*names: str) -> Any:
    """As if just these libraries were there."""
    return mock.patch.object(attention, "lacks", lambda *modules: next((m for m in modules if m not in names), ""))


FA2 = ("flash_attn", "flash_attn.flash_attn_interface")


def test_the_first_that_can_run_is_chosen() -> None:
    with mock.patch.object(attention, "cannot_run", return_value="this CPU has no AVX512-BF16"):
        assert choose("auto", None) == ("sdpa", "torch's; this CPU has no AVX512-BF16")
    with mock.patch.object(attention, "cannot_run", return_value=""):
        assert choose("auto", None) == ("cpu", "our own for CPUs with AVX512-BF16")
    with installed():
        name, reason = choose("auto", 90)
        assert name == "sdpa"
        assert "not flash3: flash_attn_interface is not installed" in reason
    with installed(*FA2):
        assert choose("auto", 90)[0] == "flash2"
    with installed(*FA2, "flash_attn_interface"):
        assert choose("auto", 90)[0] == "flash3"
        assert choose("auto", 80)[0] == "flash2"  # flash-attn 3 is for Hopper
    with installed(*FA2):
        assert choose("auto", 75)[0] == "sdpa"


@pytest.mark.parametrize(
    "name, capability, message",
    [
        (
            "flash2",
            90,
            r"model\.attention=flash2: flash_attn is not installed: pip install 'megasora\[gpu\]', or use auto",
        ),
        ("flash3", 90, "flash_attn_interface is not installed: from the folder hopper"),
        ("te", 90, r"transformer_engine\.pytorch is not installed"),
        ("cudnn", None, "there is no CUDA device, or use auto"),
        ("cpu", 90, "there is a GPU, or use auto"),
        ("cudnn", 75, r"compute capability 8\.0 or more is needed, this one has 7\.5"),
    ],
)
def test_a_forced_choice_that_cannot_run_is_one_line(name: str, capability: int | None, message: str) -> None:
    with installed(), pytest.raises(ConfigError, match=message) as found:
        choose(name, capability)
    assert "\n" not in str(found.value)


def test_a_forced_choice_is_taken() -> None:
    with installed():
        assert choose("sdpa", 90) == ("sdpa", "as the config says")
        assert choose("cudnn", 90)[0] == "cudnn"


def test_the_reason_is_logged_once() -> None:
    find_attention.cache_clear()
    with mock.patch.object(attention.log, "info") as said:
        assert find_attention("auto") is find_attention("auto")
    said.assert_called_once_with("attention: %s (%s)", *choose("auto", None))


def test_32_bits_go_to_torch_or_are_refused() -> None:
    q = torch.randn(6, 2, 8)
    segments = Segments((4, 2), CPU)
    y = ChosenAttention("flash2", forced=False)(q, q, q, segments, segments)
    assert torch.equal(y, sdpa_attention(q, q, q, segments, segments))
    with pytest.raises(ConfigError, match="takes 16 bits only"):
        ChosenAttention("flash2", forced=True)(q, q, q, segments, segments)


@pytest.mark.parametrize(
    "bound, most, alone, together",
    [(1 << 28, 1 << 16, 8, 48), (1, 1 << 16, 1, 1), (7 * 2 * 128 * 32, 1 << 16, 7, 6), (1 << 28, 2, 2, 2)],
)
def test_rows_of_many_segments_go_in_calls_of_bounded_size(
    monkeypatch: pytest.MonkeyPatch, bound: int, most: int, alone: int, together: int
) -> None:
    """As on a GPU: the same outputs and gradients, also of pictures in a temporal block, whose segments are one token."""
    torch.manual_seed(0)
    leaves = [torch.randn(49, 2, 16, requires_grad=True) for _ in range(3)]
    mixed, single = (7,) * 5 + (1,) * 9 + (0, 3, 2), (1,) * 49
    rows = [
        (mixed, mixed),
        (single, single),
        ((7,) * 7, (7,) * 7),
        (single, (1, *[0] * 47, 48)),
        ((6,) * 8 + (1,), (6,) * 8 + (1,)),
    ]
    eager, sizes = ChosenAttention("sdpa", forced=True), []

    def watched(*given: Any) -> torch.Tensor:
        sizes.append(len(given[3].lengths))
        return sdpa_attention(*given)

    def found(attend: Any, lengths: tuple[tuple[int, ...], ...]) -> list[torch.Tensor]:
        y = attend(*leaves, *(Segments(each, CPU) for each in lengths))
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    monkeypatch.setitem(attention.VARLEN, "watched", watched)
    ways = (eager, as_operator(eager), partial(varlen_attention, "watched"))
    expected = [[found(attend, row) for row in rows] for attend in ways]
    sizes.clear()
    monkeypatch.setattr(attention, "on_gpu", lambda _: True)
    monkeypatch.setattr(attention, "SUMS_MAX", bound)
    monkeypatch.setattr(attention, "SEQUENCES_MAX", most)
    for attend, known in zip(ways, expected, strict=True):
        for row, parts in zip(rows, known, strict=True):
            for a, b in zip(parts, found(attend, row), strict=True):
                # Of lone tokens the gradients of q and k are zero, which kernels round.
                assert torch.equal(a, b) or (1 in row[1] and torch.allclose(a, b, rtol=0, atol=1e-4))
    assert max(sizes) == together
    assert max(n for n, _ in alike(leaves[0], [(6 * i, 6, 6 * i, 6) for i in range(8)], apart=False)) == alone
    assert not any(found(attend, (single, single))[1].any() for attend in ways)


def test_a_ring_has_the_librarys_kernels_or_torchs() -> None:
    short, long = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    assert flash_of(ChosenAttention("flash3", forced=False), short) is FLASH["flash3"]
    assert flash_of(ChosenAttention("flash3", forced=False), long) is FLASH["sdpa"]  # takes 16 bits only
    assert flash_of(ChosenAttention("te", forced=True), short) is FLASH["sdpa"]  # keeps the logarithms for itself
    assert flash_of(sdpa_attention, short) is FLASH["sdpa"]


# What the kernels give


def test_torchs_kernels_on_a_cpu_are_exact_in_parts() -> None:
    assert max(errors_in_parts(FLASH["sdpa"], torch.float32, CPU)) < 1e-5


def test_a_single_key_is_not_for_cudnn() -> None:
    """Which refuses it; on a CPU, where it has no kernels, both parts are flash attention's."""
    assert max(errors_in_parts(FLASH["cudnn"], torch.float32, CPU, (20, 1, 1))) < 1e-5


cpu_kernels = pytest.mark.skipif(bool(cannot_run()), reason=f"our attention for CPUs was not run: {cannot_run()}")


@cpu_kernels
@pytest.mark.parametrize(
    "lengths, heads, width",
    [((20, 12, 21), 2, 16), ((97, 300, 1), 3, 64), ((48, 256, 257), 1, 128), ((55, 33, 40), 2, 20), ((1, 1, 1), 1, 80)],
)
def test_our_kernels_for_cpus_are_exact_in_parts(lengths: tuple[int, int, int], heads: int, width: int) -> None:
    """Blocks cut anywhere, heads that fill no register."""
    assert max(errors_in_parts(FLASH["cpu"], torch.float32, CPU, lengths, heads, width)) < 2e-6
    found = errors_in_parts(FLASH["cpu"], torch.bfloat16, CPU, lengths, heads, width)
    torchs = errors_in_parts(FLASH["sdpa"], torch.bfloat16, CPU, lengths, heads, width)
    assert max(found) < 0.006
    assert sum(found) < 1.25 * sum(torchs)
    assert found[1] < 1e-6  # logits are never rounded


@cpu_kernels
def test_our_kernels_for_cpus_take_large_and_equal_logits() -> None:
    q = 40 * torch.randn(2, 60, 2, 32).bfloat16()
    k, v = torch.randn(2, 400, 2, 32).bfloat16(), torch.randn(2, 400, 2, 32).bfloat16()
    for a, b in ((q, k), (q, torch.zeros_like(k)), (-40 * q, k * 40)):
        out, lse = FLASH["cpu"].forward(a, b, v)
        logits = torch.einsum("slnk,smnk->slnm", a.double(), b.double()) * 32**-0.5
        expected = torch.einsum("slnm,smnk->slnk", logits.softmax(-1), v.double())
        assert torch.allclose(lse.double(), logits.logsumexp(-1), rtol=1e-5)
        assert ((out.double() - expected).norm() / expected.norm()).item() < 0.005
    one = torch.full(
        (1, 1, 1, 32), 40.0
    ).bfloat16()  # of one key, beside which only padding lies: exp(-lse) is infinite
    known = FLASH["cpu"].forward(one, -one, one)
    assert known[1].item() < -9000
    assert all(not t.isnan().any() for t in FLASH["cpu"].backward(one, one, -one, one, *known))


@cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spoilt", range(4))
@pytest.mark.parametrize("token, value", [(0, "nan"), (259, "nan"), (300, "nan"), (130, "inf")])
def test_our_kernels_for_cpus_pass_nan_on(spoilt: int, token: int, value: str, dtype: torch.dtype) -> None:
    """In q, k, v and the gradient, in the first, the middle and the last block: where torch has NaN ours has, too."""
    torch.manual_seed(0)
    q, k, v, grad = parts = [torch.randn(2, 301, 2, 32).to(dtype) for _ in range(4)]
    parts[spoilt][0, token, 1, 3] = float(value)
    found, expected = [], []
    for name, results in (("cpu", found), ("sdpa", expected)):
        known = FLASH[name].forward(q, k, v)
        results += [result.isfinite() for result in (*known, *FLASH[name].backward(grad, q, k, v, *known))]
    assert not all(finite.all() for finite in expected)
    assert all((b | ~a).all() for a, b in zip(found, expected, strict=True))


@cpu_kernels
def test_our_kernels_for_cpus_take_packed_rows_eager_and_as_operators() -> None:
    """Segments, windows and an order, with empty ones among them: outputs and gradients."""
    eager, sdpa = ChosenAttention("cpu", forced=False), ChosenAttention("sdpa", forced=True)
    torch.manual_seed(0)
    leaves = [torch.randn(n, 2, 16).bfloat16().requires_grad_() for n in (20, 24, 24)]
    cases = [
        (Segments((7, 0, 13), CPU), Segments((20, 4, 0), CPU)),
        (Segments((12, 8), CPU), Windows((0, 4), (10, 20))),
        *[(Order(Segments((5,) * 4, CPU), ((1, 4, 5),)),) * 2],
        (Segments((10, 10), CPU), Segments((12, 12), CPU)),  # nothing is put together
        (Segments((20,), CPU), Windows((4,), (10,))),
        (Segments((20,), CPU), Segments((24,), CPU)),
    ]
    for queries, keys in cases:
        given = [leaf[:20] for leaf in leaves] if isinstance(queries, Order) else leaves
        expected, found, operated = [
            [y := chosen(*given, queries, keys), *torch.autograd.grad(y.float().square().sum(), leaves)]
            for chosen in (sdpa, eager, as_operator(eager))
        ]
        for a, b, c in zip(expected, found, operated, strict=True):
            assert torch.equal(b, c)
            assert torch.allclose(a.float(), b.float(), atol=0.06, rtol=0.02)


@cpu_kernels
def test_our_kernels_for_cpus_give_the_same_bits_on_any_number_of_threads() -> None:
    q = torch.randn(2, 130, 3, 32).bfloat16()
    threads, found = torch.get_num_threads(), []
    for number in (1, 3):
        torch.set_num_threads(number)
        out, lse = FLASH["cpu"].forward(q, q, q)
        found.append((out, lse, *FLASH["cpu"].backward(q, q, q, q, out, lse)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@cpu_kernels
def test_without_a_compiler_bf16_is_torchs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    q, whole = torch.randn(6, 2, 16).bfloat16(), Segments((6,), CPU)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert choose("auto", None) == ("sdpa", "torch's; there is no C++ compiler (c++, or CXX)")
    with pytest.raises(ConfigError, match="attention=cpu: there is no C"):
        choose("cpu", None)
    monkeypatch.setenv("CXX", "false")  # there, but of no use
    for cached in (library, cannot_build):
        cached.cache_clear()
    with mock.patch.object(attention.log, "warning") as said:
        y = ChosenAttention("cpu", forced=False)(q, q, q, whole, whole)
    assert torch.equal(y, sdpa_attention(q, q, q, whole, whole))
    assert "false: failed" in str(said.call_args)
    with pytest.raises(ConfigError, match=r"attention=cpu: .*false: failed, or use auto"):
        ChosenAttention("cpu", forced=True)(q, q, q, whole, whole)
    for cached in (library, cannot_build):
        cached.cache_clear()


@cpu_kernels
def test_a_library_that_cannot_be_loaded_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where nothing may be run from the cache, or it was filled on another system; and where there is no cache at all."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(ctypes, "CDLL", mock.Mock(side_effect=OSError("x.so: failed to map segment")))
    with pytest.raises(CannotBuild, match="failed to map segment"):
        library.__wrapped__()
    assert len(list((tmp_path / "megasora").iterdir())) == 1  # and nothing half made
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(CannotBuild, match="set TORCH_EXTENSIONS_DIR"):
        library.__wrapped__()


def _triton_in_parts() -> list[float]:
    return errors_in_parts(FLASH["triton"], torch.bfloat16, CPU)


def test_our_triton_kernels_are_exact_in_parts(interpreter: ProcessPoolExecutor) -> None:
    assert max(interpreter.submit(_triton_in_parts).result()) < 0.01


def _triton_attention() -> list[float]:
    """Segments, windows and an order, with empty ones among them: the largest difference from torch's attention."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 2, 16).bfloat16() for n in (20, 24, 24))
    chosen = ChosenAttention("triton", forced=True)
    cases = [
        (q, k, v, Segments((7, 0, 13), CPU), Segments((20, 4, 0), CPU)),
        (q, k, v, Segments((12, 8), CPU), Windows((0, 4), (10, 20))),
        (q, q, q, *[Order(Segments((5,) * 4, CPU), ((1, 4, 5),))] * 2),
        (q, k, v, Segments((20,), CPU), Segments((0,), CPU)),
    ]
    sdpa = ChosenAttention("sdpa", forced=True)
    return [(chosen(*case).float() - sdpa(*case).float()).abs().max().item() for case in cases]


def test_our_triton_kernels_take_all_that_models_ask(interpreter: ProcessPoolExecutor) -> None:
    assert max(interpreter.submit(_triton_attention).result()) < 0.02
