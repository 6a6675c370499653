"""Flash attention on CPUs with AVX512-BF16, in bf16 and fp32, for all sequences of one size at once.

torch's flash attention for CPUs gets little from bf16 without AMX: its products are calls of a library, each with its own
set-up, and what lies between them is rounded to bf16. `flash_cpu.cpp` holds one microkernel and what packs for it; it is compiled
when it is first wanted, in some seconds, and kept where torch keeps extensions (TORCH_EXTENSIONS_DIR).

Shapes: n sequences of L queries and M keys, N heads of K channels; q [n, L, N, K], k and v [n, M, N, K].

Dao 2023, algorithms 1 and 2. Sums and logits are fp32; of bf16, P and dS are rounded before their products. A head of a
sequence is computed by one thread in a fixed order: the same bits whatever the number of threads.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16",
    "-mfma", "-ffp-contract=off",
)  # fmt: skip
LANES = 16  # to which heads are padded
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


class CannotBuild(Exception):
    """Why the kernels are not to be had on this machine."""


def cannot_run() -> str:
    """Why the kernels cannot run here, as far as can be said without compiling them; empty if they can."""
    if not torch.cpu._is_avx512_bf16_supported():
        return "this CPU has no AVX512-BF16"
    return "" if compiler() else "there is no C++ compiler (c++, or CXX)"


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


@cache
def library() -> ctypes.CDLL:
    """The kernels, compiled if they are not yet. Raises CannotBuild."""
    if reason := cannot_run():
        raise CannotBuild(reason)
    cxx = compiler()
    assert cxx is not None
    try:
        root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions").expanduser()
    except RuntimeError:
        raise CannotBuild("there is no home directory: set TORCH_EXTENSIONS_DIR") from None
    directory = root / "megasora"
    name = hashlib.sha256(" ".join((cxx, *FLAGS)).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    built = directory / f"flash_cpu-{name}.so"
    if not built.exists():
        private = built.with_suffix(f".{os.uname().nodename}-{os.getpid()}")  # each process for itself, then a rename
        try:
            directory.mkdir(parents=True, exist_ok=True)
            subprocess.run([cxx, *FLAGS, SOURCE, "-o", private], check=True, capture_output=True, text=True)
            private.replace(built)
        except OSError as error:
            raise CannotBuild(f"{directory}: {error.strerror}") from None
        except subprocess.CalledProcessError as error:
            raise CannotBuild(f"{cxx}: {(error.stderr.splitlines() or ['failed'])[0]}") from None
        finally:
            with suppress(OSError):
                private.unlink(missing_ok=True)
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:  # nothing may be run from there, or it was built on another system
        raise CannotBuild(str(error)) from None


def _call(name: str, q: Tensor, *tensors: Tensor, shape: tuple[int, ...], scale: float) -> None:
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (q, *tensors)]
    sizes = [ctypes.c_int64(size) for size in shape]
    library()[f"{name}_{TYPES[q.dtype]}"](
        *addresses, *sizes, ctypes.c_float(scale), ctypes.c_int(torch.get_num_threads())
    )


def padded(*tensors: Tensor) -> list[Tensor]:
    """Heads as wide as the kernels want them; what is added is zero and changes no product."""
    return [F.pad(t, (0, -t.shape[-1] % LANES)).contiguous() for t in tensors]


@torch.library.custom_op("megasora_kernels::flash_cpu", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    width = q.shape[-1]
    q, k, v = padded(q, k, v)
    n, L, N, K = q.shape
    out, lse = torch.empty_like(q), q.new_empty(n, L, N, dtype=torch.float32)
    _call("flash_cpu_forward", q, k, v, out, lse, shape=(n, L, k.shape[1], N, K), scale=width**-0.5)
    return out[..., :width].contiguous(), lse


@torch.library.custom_op("megasora_kernels::flash_cpu_backward", mutates_args=())
def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width = q.shape[-1]
    grad, q, k, v, out = padded(grad, q, k, v, out)
    n, L, N, K = q.shape
    found = [torch.empty_like(t) for t in (q, k, v)]
    given = grad, q, k, v, out, lse.contiguous()
    _call("flash_cpu_backward", *given, *found, shape=(n, L, k.shape[1], N, K), scale=width**-0.5)
    dq, dk, dv = (t[..., :width].contiguous() for t in found)
    return dq, dk, dv


@_forward.register_fake
def _(q: Tensor, *_rest: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, grad: Tensor, _lse: Tensor) -> tuple[Tensor, ...]:
    return _backward(grad, *ctx.saved_tensors)


_forward.register_autograd(_differentiate, setup_context=_save)
Sizes = tuple[int, ...]


@register_flop_formula(torch.ops.megasora_kernels.flash_cpu)
def _forward_flops(q: Sizes, k: Sizes, v: Sizes, **_: Any) -> int:
    n, L, N, K = q
    return 4 * n * N * L * k[1] * K


@register_flop_formula(torch.ops.megasora_kernels.flash_cpu_backward)
def _backward_flops(_grad: Sizes, q: Sizes, k: Sizes, *_rest: Sizes, **_: Any) -> int:
    """Of the gradients; the logits, which are computed again, do not count, as in MFU."""
    return 2 * _forward_flops(q, k, k)


def flash_cpu(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q, k, v in bf16 or fp32 -> out [n, L, N, K], lse [n, L, N] fp32: the logarithms of the softmax's sums. Autograd of out.

    There must be keys. Raises ValueError where shapes or types do not fit, CannotBuild where it cannot run.
    """
    _check(q, k, v)
    return _forward(q, k, v)


def flash_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v given out and lse, which may be those over more keys than these: what a ring of ranks needs."""
    _check(q, k, v)
    return _backward(grad, q, k, v, out, lse)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]) or not k.shape[1]:
        raise ValueError(
            f"q [n, L, N, K], k and v [n, M, N, K], M > 0, do not fit: {[*map(list, (q.shape, k.shape, v.shape))]}"
        )
    if q.is_cuda:
        raise ValueError("q, k and v must be on a CPU")
    if q.dtype not in TYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k and v must be all bfloat16 or all float32, not {q.dtype}, {k.dtype}, {v.dtype}")
