"""Attention over packed rows: each segment's queries see its own keys only. Context parallelism replaces this one seam.

Which kernels compute it is chosen once, by what is installed and what the device can do (`choose`); flash.py has them all.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import torch
import torch.nn.functional as F
from megasora_kernels.flash_cpu import TYPES as CPU_TYPES
from megasora_kernels.flash_cpu import CannotBuild, cannot_run, flash_cpu, library
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megasora.device import on_gpu
from megasora.errors import ConfigError
from megasora.models.flash import CAPABILITY, FLASH, HOW, MODULES, VARLEN, Flash, lacks
from megasora.models.packing import Order, Segments, Windows

Attention = Callable[[Tensor, Tensor, Tensor, Segments | Order, Segments | Windows | Order], Tensor]
Span = tuple[int, int, int, int]  # first query and their number, first key and their number
NAMES = ("auto", "sdpa", "cpu", "flash4", "flash3", "flash2", "te", "cudnn", "triton")  # of model.attention
# On a GPU, before torch's own. Only torch's and cuDNN's have been measured.
PREFERRED = ("flash3", "flash4", "flash2", "te")
# Flash attention's backward sums dq in fp32 [n, up(L, 128), N, up(K, 32)]: tens of thousands of short sequences fill the memory,
# and illegal accesses are reported beyond 2^31 numbers. How many one call may take on a GPU:
SUMS_MAX = 1 << 28
SEQUENCES_MAX = 65_535  # of one call: the second and third axis of a launch have no more

log = logging.getLogger("megasora")


@dataclass(frozen=True)
class ChosenAttention:
    """An `Attention` by one library."""

    name: str
    forced: bool

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Segments | Order, keys: Segments | Windows | Order
    ) -> Tensor:
        """q [L, N, K], k and v [M, N, K] -> [L, N, K]."""
        if isinstance(queries, Order):
            assert not isinstance(keys, Segments | Windows)
            q, k, v = (queries.enter(x) for x in (q, k, v))  # [L, N, K] each: those that see each other side by side
            return queries.leave(self(q, k, v, queries.segments, queries.segments))
        assert not isinstance(keys, Order)
        if self.name == "cpu":
            return by_segment(cpu_attend if self.kernels(q) == "cpu" else sdpa_attend, q, k, v, queries, keys)
        if self.name == "sdpa" or (q.dtype == torch.float32 and not self.forced):  # on a GPU only torch takes 32 bits
            return sdpa_attention(q, k, v, queries, keys)
        if q.dtype == torch.float32:
            raise ConfigError(
                f"model.attention={self.name}: takes 16 bits only: precision.precision=bf16, or attention=sdpa"
            )
        if self.name == "cudnn":
            # cuDNN refuses segments with a single key: those are flash attention's.
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
                return sdpa_attention(q, k, v, queries, keys)
        return varlen_attention(self.name, q, k, v, queries, keys)

    def kernels(self, q: Tensor) -> str:
        """Whose kernels (`FLASH`) a ring of ranks and compiled blocks call for such queries: torch's for 32 bits on a GPU, and
        where a library keeps its logarithms for itself."""
        if self.name == "cpu":
            return "cpu" if q.dtype in CPU_TYPES and self.cpu_ready() else "sdpa"
        here = (q.dtype != torch.float32 or self.forced) and self.name in FLASH
        return self.name if here else "sdpa"

    def cpu_ready(self) -> bool:
        """Whether our kernels for CPUs are to be had, which may compile them. Raises ConfigError where they are asked for."""
        reason = cannot_build()
        if reason and self.forced:
            raise ConfigError(f"model.attention=cpu: {reason}, or use auto")
        return not reason


@cache
def cannot_build() -> str:
    """Why our kernels for CPUs are not to be had, or nothing; they may be compiled now."""
    try:
        library()
    except CannotBuild as error:
        log.warning("attention: torch's; our kernels for CPUs cannot be built: %s", error)
        return str(error)
    return ""


def flash_of(attention: Attention, q: Tensor) -> Flash:
    """The kernels of a ring of ranks."""
    return FLASH[attention.kernels(q) if isinstance(attention, ChosenAttention) else "sdpa"]


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments | Windows) -> Tensor:
    """q [L, N, K], k and v [M, N, K] -> [L, N, K], by torch's flash attention. Vaswani et al. 2017, eq. 1."""
    return by_segment(sdpa_attend, q, k, v, queries, keys)


def sdpa_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # torch wants [n, N, L, K]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def cpu_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_cpu(q, k, v)[0]


def by_segment(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Segments,
    keys: Segments | Windows,
) -> Tensor:
    """Attention of packed rows by what takes n whole sequences of one size, q [n, L, N, K], k and v [n, M, N, K]: neighbouring
    segments of one size in one call. A segment without keys (padding in cross-attention) gets zeros."""
    outputs = []
    attended = list(zip(queries.starts, queries.lengths, keys.starts, keys.lengths, strict=True))
    for n, (a, length, b, width) in alike(q, attended, apart=isinstance(keys, Windows)):
        if length == 0:
            continue
        part_q = q[a : a + n * length]
        if width == 0:
            outputs.append(torch.zeros_like(part_q))
            continue
        parts = (part_q, k[b : b + n * width], v[b : b + n * width])
        if lone(q, length, width):
            outputs.append(answer(*parts))
            continue
        outputs.append(attend(*(x.unflatten(0, (n, -1)) for x in parts)).flatten(0, 1))
    if not any(length and width for _, length, _, width in attended):
        return nothing_seen(q, k, v)
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def alike(q: Tensor, spans: Iterable[Span], apart: bool) -> Iterator[tuple[int, Span]]:
    """Neighbours of one size, as many as one call takes: how many, and the first of them. What is `apart`, as windows are, goes
    one by one."""
    for _, group in groupby(spans, (lambda span: span) if apart else (lambda span: (span[1], span[3]))):
        found = list(group)
        _, length, _, width = found[0]
        called = length and width and not lone(q, length, width)
        most = at_once(q, length) if called else len(found)
        for first in range(0, len(found), most):
            yield min(most, len(found) - first), found[first]


def at_once(q: Tensor, length: int) -> int:
    """How many sequences of so many queries one call takes, of heads as in q [..., N, K]."""
    if not on_gpu(q.device):
        return sys.maxsize
    return max(1, min(SEQUENCES_MAX, SUMS_MAX // (-(-length // 128) * 128 * sums_of_token(q))))


def sums_of_token(q: Tensor) -> int:
    """Numbers that flash attention's backward sums of a token: N · up(K, 32)."""
    return q.shape[-2] * -(-q.shape[-1] // 32) * 32


def lone(q: Tensor, length: int, width: int) -> bool:
    """Whether a token sees one key where calls have limits: its answer needs none."""
    return length == width == 1 and on_gpu(q.device)


def answer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[n, N, K] each, of tokens that see one key: v. The others are of the graph, with gradients of zero."""
    return v + 0 * q + 0 * k


def varlen_attention(name: str, q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments | Windows) -> Tensor:
    """The same by a library that takes all segments at once."""
    if not any(length and width for length, width in zip(queries.lengths, keys.lengths, strict=True)):
        return nothing_seen(q, k, v)
    if isinstance(keys, Windows):  # the kernels want every segment's keys side by side
        stretches = [torch.arange(a, a + n, device=k.device) for a, n in zip(keys.starts, keys.lengths, strict=True)]
        places = torch.cat(stretches)
        k, v, keys = k[places], v[places], Segments(keys.lengths, k.device)
    calls = [*varlen_calls(q, queries, keys)]
    if len(calls) == 1:
        return varlen_call(name, q, k, v, queries, keys)
    outputs = []
    for first, end in calls:
        (a, b), (c, d) = ((s.offsets[first], s.offsets[end]) for s in (queries, keys))
        mine, seen = (Segments(s.lengths[first:end], q.device) for s in (queries, keys))
        outputs.append(varlen_call(name, q[a:b], k[c:d], v[c:d], mine, seen))
    return torch.cat(outputs)


def varlen_calls(q: Tensor, queries: Segments, keys: Segments) -> Iterator[tuple[int, int]]:
    """Of each call the first segment and the end: lone tokens go apart, of others as many as a call takes, padded by up to 128
    tokens each."""
    most, token = SUMS_MAX if on_gpu(q.device) else sys.maxsize, sums_of_token(q)
    first, taken, before = 0, 0, False
    for i, (length, width) in enumerate(zip(queries.lengths, keys.lengths, strict=True)):
        sums, alone = (length + 128) * token, lone(q, length, width)
        full = not alone and (taken + sums > most or i - first == SEQUENCES_MAX)
        if i > first and (full or alone != before):
            yield first, i
            first, taken = i, 0
        taken, before = taken + sums, alone
    yield first, len(queries.lengths)


def varlen_call(name: str, q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
    """Segments that are all lone tokens, or none of them."""
    if not any(map(min, queries.lengths, keys.lengths)):
        return nothing_seen(q, k, v)
    if lone(q, queries.lengths[0], keys.lengths[0]):
        return answer(q, k, v)
    return VARLEN[name](q, k, v, queries, keys)


def nothing_seen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Zeros, but every weight is of the graph: wrappers count on it."""
    return q * 0 + (k.sum() + v.sum()) * 0


def why_not(name: str, capability: int | None) -> str:
    """Why these kernels cannot run on a device of that compute capability (90 for an H100, None for a CPU); empty if they can."""
    if name == "cpu":
        return "there is a GPU" if capability is not None else cannot_run()
    if missing := lacks(*MODULES.get(name, ())):
        return f"{missing} is not installed: {HOW[name]}"
    least = CAPABILITY.get(name, 0)
    if least and capability is None:
        return "there is no CUDA device"
    if capability is not None and capability < least:
        return f"a GPU of compute capability {least / 10} or more is needed, this one has {capability / 10}"
    return ""


def choose(name: str, capability: int | None) -> tuple[str, str]:
    """The kernels for `model.attention=name`, and why. Raises ConfigError where the forced ones cannot run."""
    if name != "auto":
        if reason := why_not(name, capability):
            raise ConfigError(f"model.attention={name}: {reason}, or use auto")
        return name, "as the config says"
    if capability is None:
        reason = why_not("cpu", capability)
        return ("sdpa", f"torch's; {reason}") if reason else ("cpu", "our own for CPUs with AVX512-BF16")
    passed: list[str] = []
    for candidate in PREFERRED:
        reason = why_not(candidate, capability)
        if not reason:
            return candidate, "the first that can run here" + "".join(f"; {text}" for text in passed)
        passed.append(f"not {candidate}: {reason}")
    return "sdpa", "torch's own; " + "; ".join(passed)


def compute_capability() -> int | None:
    """Of this machine's GPU, tens and ones; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


@cache
def find_attention(name: str) -> ChosenAttention:
    """The attention for `model.attention=name` on this machine's device, logged once. Raises ConfigError where it cannot run."""
    chosen, reason = choose(name, compute_capability())
    log.info("attention: %s (%s)", chosen, reason)
    return ChosenAttention(chosen, forced=name != "auto")
