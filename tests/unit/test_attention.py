"""Which attention is chosen and why, what the libraries' kernels give where they run on a CPU, and their backward with
partial keys."""

from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megasora.errors import ConfigError
from megasora.models import attention
from megasora.models.attention import ChosenAttention, choose, find_attention, flash_of, sdpa_attention
from megasora.models.flash import FLASH, Flash
from megasora.models.packing import Order, Segments, Windows

CPU = torch.device("cpu")


def installed(*names: str) -> Any:
    """As if just these libraries were there."""
    return mock.patch.object(attention, "lacks", lambda *modules: next((m for m in modules if m not in names), ""))


FA2 = ("flash_attn", "flash_attn.flash_attn_interface")


def test_the_first_that_can_run_is_chosen() -> None:
    assert choose("auto", None) == ("sdpa", "torch's flash attention for CPUs")
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
    said.assert_called_once_with("attention: %s (%s)", "sdpa", "torch's flash attention for CPUs")


def test_32_bits_go_to_torch_or_are_refused() -> None:
    q = torch.randn(6, 2, 8)
    segments = Segments((4, 2), CPU)
    y = ChosenAttention("flash2", forced=False)(q, q, q, segments, segments)
    assert torch.equal(y, sdpa_attention(q, q, q, segments, segments))
    with pytest.raises(ConfigError, match="takes 16 bits only"):
        ChosenAttention("flash2", forced=True)(q, q, q, segments, segments)


def test_a_ring_has_the_librarys_kernels_or_torchs() -> None:
    assert flash_of(ChosenAttention("flash3", forced=True)) is FLASH["flash3"]
    assert flash_of(ChosenAttention("te", forced=True)) is FLASH["sdpa"]  # keeps the logarithms for itself
    assert flash_of(sdpa_attention) is FLASH["sdpa"]


# What the kernels give


def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("lnk,mnk->lnm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("lnm,mnk->lnk", scores.softmax(-1), v), scores.logsumexp(-1)


def one(kernel: Any, *tensors: Tensor) -> Any:
    """A kernel over several sequences, given one."""
    return [t[0] for t in kernel(*(t[None] for t in tensors))]


def errors_in_parts(flash: Flash, dtype: torch.dtype) -> list[float]:
    """Keys seen in two parts, merged by the logarithms, and the gradients of each part given the whole's: relative to fp64."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(n, 2, 16).to(dtype) for n in (20, 33, 33, 20))
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    expected, lse = plain(*exact)
    gradients = torch.autograd.grad(expected, exact, grad.double())
    parts = [one(flash.forward, q, k[a:b], v[a:b]) for a, b in ((0, 12), (12, 33))]
    total = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(part.float() * torch.exp(part_lse - total)[..., None] for part, part_lse in parts)
    known = out.to(dtype).contiguous(), total.contiguous()
    found = [one(flash.backward, grad, q, k[a:b], v[a:b], *known) for a, b in ((0, 12), (12, 33))]
    dq = found[0][0].float() + found[1][0].float()
    dk, dv = (torch.cat([found[0][i], found[1][i]]) for i in (1, 2))
    pairs = zip((out, total, dq, dk, dv), (expected, lse, *gradients), strict=True)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


def test_torchs_kernels_on_a_cpu_are_exact_in_parts() -> None:
    assert max(errors_in_parts(FLASH["sdpa"], torch.float32)) < 1e-5


def _triton_in_parts() -> list[float]:
    return errors_in_parts(FLASH["triton"], torch.bfloat16)


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
