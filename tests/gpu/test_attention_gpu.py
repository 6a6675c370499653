"""Every library's attention on a GPU: exact in parts, as a ring of ranks needs it, and over packed segments."""

import pytest
import torch

from megasora.models.attention import ChosenAttention, compute_capability, why_not
from megasora.models.flash import FLASH, VARLEN
from megasora.models.packing import Order, Segments, Windows
from tests.attention_in_parts import errors_in_parts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: attention was not run"),
]
CUDA = torch.device("cuda")


def skip_where_missing(name: str) -> None:
    if reason := why_not(name, compute_capability()):
        pytest.skip(f"attention by {name}: {reason}")


@pytest.mark.parametrize("head_width", [64, 128])
@pytest.mark.parametrize("name", FLASH)
def test_exact_in_parts(name: str, head_width: int) -> None:
    skip_where_missing(name)
    for lengths in ((777, 300, 1001), (777, 1, 300)):
        found = errors_in_parts(FLASH[name], torch.bfloat16, CUDA, lengths, 3, head_width)
        assert max(found) < 0.01, (lengths, found)


@pytest.mark.parametrize("head_width", [64, 128])
@pytest.mark.parametrize("name", [*VARLEN, "cudnn"])
def test_packed_segments_are_as_torchs(name: str, head_width: int) -> None:
    """Out and gradients; segments of one token and without any, cross-attention, windows, an order."""
    skip_where_missing(name)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(n, 3, head_width, generator=generator).to(CUDA) for n in (2000, 2400, 2400, 2000))
    whole = [*[Segments((700, 1, 1299), CUDA)] * 2]
    cases = {
        "packed": (q, k[:2000], v[:2000], *whole),
        "cross": (q, k, v, Segments((700, 0, 1300), CUDA), Segments((2000, 400, 0), CUDA)),
        "windows": (q, k, v, Segments((1200, 800), CUDA), Windows((0, 400), (1000, 2000))),
        "order": (q, k[:2000], v[:2000], *[Order(Segments((500,) * 4, CUDA), ((10, 50, 4),))] * 2),
    }
    for case, (*tensors, queries, keys) in cases.items():
        results = []
        for chosen, dtype in ((name, torch.bfloat16), ("sdpa", torch.float32)):
            leaves = [t.bfloat16().to(dtype).requires_grad_() for t in tensors]
            out = ChosenAttention(chosen, forced=True)(*leaves, queries, keys)
            results.append([out, *torch.autograd.grad(out, leaves, grad.to(dtype))])
        for i, (found, expected) in enumerate(zip(*results, strict=True)):
            error = ((found.float() - expected).norm() / expected.norm()).item()
            assert error < 0.01, f"{case}: {('out', 'dq', 'dk', 'dv')[i]} is {error:.3f} off"


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("name", [*VARLEN, "cudnn", "sdpa"])
def test_more_segments_than_one_call_takes(name: str, length: int) -> None:
    """As pictures have in a temporal block. Never run since rows go in several calls."""
    skip_where_missing(name)
    segments = Segments((length,) * 70_000, CUDA)
    leaves = [torch.randn(70_000 * length, 2, 64, device=CUDA).bfloat16().requires_grad_() for _ in range(3)]
    grad = torch.randn_like(leaves[0])
    found = ChosenAttention(name, forced=True)(*leaves, segments, segments)
    q, k, v = (leaf.float().unflatten(0, (-1, length)) for leaf in leaves)  # [n, L, N, K]
    weights = (torch.einsum("slnk,smnk->snlm", q, k) / 8).softmax(-1)
    expected = torch.einsum("snlm,smnk->slnk", weights, v).flatten(0, 1)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    for a, b in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad.float()), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
