"""Triton kernels on a CPU: the interpreter in a process of its own, corrected, and with every memory access checked.

Triton 3.7.1's interpreter is silently wrong twice: `tl.dot` multiplies the raw bit patterns of bf16 operands, and casts
from fp32 round half up (bf16) or lose the carry of the mantissa (fp8). `correct` replaces both by torch's exact casts.
It also sees neither accesses out of bounds nor conflicts between programs; `check_memory` does.
"""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as interp


def correct() -> None:
    """Corrects this process's interpreter."""
    torch_types = {
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
        tl.bfloat16: torch.bfloat16,
        tl.float16: torch.float16,
        tl.float32: torch.float32,
    }
    raw = {8: (np.uint8, torch.uint8), 16: (np.uint16, torch.uint16), 32: (np.uint32, torch.uint32)}
    wrong_convert = interp._convert_float

    def as_torch(array: np.ndarray, dtype: Any) -> torch.Tensor:
        bits = np.array(array, copy=True, order="C").view(raw[dtype.primitive_bitwidth][0])
        return torch.from_numpy(bits).view(torch_types[dtype]).reshape(array.shape)

    def convert(array: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        known = source in torch_types and target in torch_types
        if not known or rounding == interp._ir.ROUNDING_MODE.RTZ:
            return wrong_convert(array, source, target, rounding)
        value = as_torch(array, source).float()
        if target in (tl.float8e4nv, tl.float8e5):  # the GPU's cast saturates
            limit = torch.finfo(torch_types[target]).max
            value = torch.where(value.isnan(), value, value.clamp(-limit, limit))
        bits = value.to(torch_types[target]).view(raw[target.primitive_bitwidth][1])
        return bits.numpy().reshape(array.shape)

    def dot(_builder: Any, a: Any, b: Any, acc: Any, _precision: Any, _max_imprecise: Any) -> Any:
        left, right = (
            as_torch(h.data, h.dtype).float() if h.dtype in torch_types else torch.from_numpy(h.data) for h in (a, b)
        )
        total = (left @ right).numpy() + acc.data
        return interp.TensorHandle(total.astype(acc.data.dtype), acc.dtype.scalar)

    interp._convert_float = convert
    interp.InterpreterBuilder.create_dot = dot


def check_memory() -> None:
    """From now on a launch raises when it leaves its tensors, or when one program stores what another one touches."""
    spans: list[tuple[int, int]] = []  # [start, end) addresses of the launch's tensors
    arenas: list[
        tuple[int, int, np.ndarray, np.ndarray]
    ] = []  # the same, merged: of each byte who stored it, who loaded it
    programs: list[tuple[int, ...]] = []  # those that have touched something; 0 is nobody
    init = interp.GridExecutor._init_args_hst
    load, store = interp.InterpreterBuilder.create_masked_load, interp.InterpreterBuilder.create_masked_store

    def start_launch(executor: Any, args: Any, kwargs: Any) -> Any:
        host_args, host_kwargs = init(executor, args, kwargs)
        spans.clear()
        arenas.clear()
        programs[:] = [()]
        for value in [*host_args, *host_kwargs.values()]:
            tensor = getattr(value, "base", value)  # of a descriptor
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                steps = zip(tensor.shape, tensor.stride(), strict=True)
                extent = sum((size - 1) * stride for size, stride in steps) + 1
                spans.append((tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()))
        merged: list[list[int]] = []
        for low, high in sorted(spans):
            if merged and low <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], high)
            else:
                merged.append([low, high])
        arenas.extend((low, high, *np.zeros((2, high - low), np.int32)) for low, high in merged)
        return host_args, host_kwargs

    def check(builder: Any, pointers: Any, mask: Any, what: str) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        live = np.broadcast_to(mask.data, pointers.data.shape).reshape(-1).astype(bool)
        addresses = pointers.data.astype(np.int64).reshape(-1)[live]
        inside = np.zeros(addresses.shape, bool)
        for low, high in spans:
            inside |= (addresses >= low) & (addresses + size <= high)
        program = tuple(builder.grid_idx)
        if not inside.all():
            raise IndexError(f"{what} out of bounds at {(~inside).sum()} of {inside.size} addresses, program {program}")
        if programs[-1] != program:
            programs.append(program)
        me = len(programs) - 1
        for low, high, writer, reader in arenas:
            place = addresses[(addresses >= low) & (addresses < high)] - low
            others = writer[place][(writer[place] != 0) & (writer[place] != me)]
            if others.size:
                raise RuntimeError(f"race: {what} in program {program} of what program {programs[others[0]]} stored")
            if what == "load":
                first = place[reader[place] == 0]
                reader[first] = me
                continue
            others = reader[place][(reader[place] != 0) & (reader[place] != me)]
            if others.size:
                raise RuntimeError(f"race: store in program {program} of what program {programs[others[0]]} loaded")
            writer[place] = me

    def checked_load(builder: Any, pointers: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        check(builder, pointers, mask, "load")
        return load(builder, pointers, mask, *args, **kwargs)

    def checked_store(builder: Any, pointers: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        check(builder, pointers, mask, "store")
        return store(builder, pointers, value, mask, *args, **kwargs)

    interp.GridExecutor._init_args_hst = start_launch
    interp.InterpreterBuilder.create_masked_load = checked_load
    interp.InterpreterBuilder.create_masked_store = checked_store


def _prepare(corrected: bool) -> None:
    torch.set_num_threads(1)
    if corrected:
        correct()
        check_memory()
        torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN: what nobody stored shows


@contextmanager
def interpreter_process(corrected: bool = True) -> Iterator[ProcessPoolExecutor]:
    """One fresh process that interprets kernels: `pool.submit(function, *args).result()`, with a module-level function.

    The variable must be set before a kernel is decorated, hence the process. `corrected=False` leaves Triton as it is.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_prepare, initargs=(corrected,)) as pool:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            pool.submit(os.getpid).result()  # starts it
        yield pool
