"""Memory counted over the storages of live tensors, not by what the process has taken from the system."""

import gc
from collections.abc import Iterable, Mapping
from itertools import chain

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from megasora.device import on_gpu
from megasora.engines.fragments import Pieces
from megasora.parallel.zero import local


def living(device: torch.device) -> int:
    """Bytes of all storages on a device that tensors of this process have: by the allocator on a GPU, else by a walk over all
    tensors that Python knows."""
    if on_gpu(device):
        return torch.cuda.memory_allocated(device)
    gc.collect()
    kinds = ((one, type(one)) for one in gc.get_objects())  # isinstance would ask the objects, and some of them warn
    hollow = DTensor | Pieces | FakeTensor  # what they hold is seen by itself, and torch.compile's fakes hold nothing
    tensors = (one for one, kind in kinds if issubclass(kind, Tensor) and not issubclass(kind, hollow))
    return sum(storages(tensors).values())


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Storage -> bytes of what lies under them on this rank; views of one storage count once."""
    found = {}
    for tensor in chain.from_iterable(map(held, tensors)):
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return found


def held(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that this rank has of one that may be sharded, or in pieces."""
    if isinstance(tensor, Pieces):
        return [piece for _, piece in tensor.pieces]
    return [local(tensor)]


def state_by_part(weights: Iterable[Tensor], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes of the weights, the optimizer's state and the averaged weights, from an engine's `tensors` (model/, optim/, ema/)."""
    groups = {
        "weights": [*weights, *(t for name, t in tensors.items() if name.startswith("model/"))],
        "optimizer": [t for name, t in tensors.items() if name.startswith("optim/")],
        "ema": [t for name, t in tensors.items() if name.startswith("ema/")],
    }
    found, seen = {}, set[int]()
    for part, group in groups.items():
        new = {at: size for at, size in storages(group).items() if at not in seen}
        seen |= new.keys()
        found[part] = sum(new.values())
    return found
