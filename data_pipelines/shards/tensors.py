"""The tensors of a safetensors buffer as views of it: nothing is copied, and nothing that its header says is believed."""

import json
import math
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
HEADER_MAX = 1 << 24  # bytes


def tensors_in(buffer: memoryview) -> dict[str, Tensor]:
    """By name; they live as long as the buffer does. Raises ValueError for what is no safetensors file.

    A file is the length of its header (8 bytes), the header as JSON {name: {dtype, shape, data_offsets}}, the data.
    """
    if len(buffer) < 8 or not 2 <= (size := int.from_bytes(buffer[:8], "little")) <= min(HEADER_MAX, len(buffer) - 8):
        raise ValueError("no safetensors header")
    try:
        header = json.loads(bytes(buffer[8 : 8 + size]))
        if not isinstance(header, dict):
            raise TypeError("the header is no object")
        return {name: _tensor(buffer, 8 + size, facts) for name, facts in header.items() if name != "__metadata__"}
    except (KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"damaged safetensors header ({error})") from None


def _tensor(buffer: memoryview, start: int, facts: dict[str, Any]) -> Tensor:
    dtype, shape = DTYPES[facts["dtype"]], facts["shape"]
    begin, end = facts["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)):
        raise TypeError("sizes that are no counts")
    count = math.prod(shape)
    if not begin <= end <= len(buffer) - start or count * dtype.itemsize != end - begin:
        raise ValueError("a tensor outside of its file")
    if not count:
        return torch.empty(shape, dtype=dtype)
    if (start + begin) % dtype.itemsize:  # torch wants whole steps; our writer's header is padded to 8
        return torch.frombuffer(bytearray(buffer[start + begin : start + end]), dtype=dtype).reshape(shape)
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=start + begin).reshape(shape)
