"""The reader of safetensors, against the original, and on damaged input."""

import json
import random

import pytest
import torch
from safetensors.torch import load, save

from data_pipelines.shards.tensors import DTYPES, tensors_in


def examples() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for name, dtype in DTYPES.items()}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "odd": torch.ones(7, dtype=torch.uint8)}


def test_it_reads_what_safetensors_writes() -> None:
    content = bytearray(save(examples(), metadata={"who": "a test"}))
    ours, theirs = tensors_in(memoryview(content)), load(bytes(content))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)


def test_nothing_is_copied() -> None:
    content = bytearray(save({"a": torch.zeros(1000)}))
    a = tensors_in(memoryview(content))["a"]
    content[-4:] = b"\x00\x00\x80\x3f"
    assert a[-1] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [3]}, {"shape": [-2, -1]}, {"shape": "2"}, {"dtype": "F9"}, {"data_offsets": [0, 1 << 40]},
        {"data_offsets": [4, 0]}, {"data_offsets": [-8, 0]}, {"data_offsets": None}, {"shape": [1 << 62, 4]},
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(change: dict[str, object]) -> None:
    facts = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change
    header = json.dumps({"a": facts}).encode()
    with pytest.raises(ValueError, match=r"safetensors header|outside"):
        tensors_in(memoryview(bytearray(len(header).to_bytes(8, "little") + header + bytes(8))))


def test_random_damage_is_an_error_or_a_tensor() -> None:
    whole = save(examples())
    draw, refused = random.Random(1), 0
    for _ in range(500):
        content = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            content[draw.randrange(draw.choice((8, 300, len(content))))] = draw.randrange(256)
        content = content[: draw.choice((len(content), draw.randrange(len(content))))]
        try:
            for tensor in tensors_in(memoryview(content)).values():
                tensor.clone()
        except ValueError:
            refused += 1
    assert 100 < refused < 500
