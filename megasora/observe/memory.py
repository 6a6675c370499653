"""Memory counted over the storages of live tensors, not by what the process has taken from the system."""

import gc
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megasora.device import on_gpu


def living(device: torch.device) -> int:
    """Bytes of all storages on a device that tensors of this process have: by the allocator on a GPU, else by a walk over all
    tensors that Python knows."""
    if on_gpu(device):
        return torch.cuda.memory_allocated(device)
    gc.collect()
    kinds = ((one, type(one)) for one in gc.get_objects())  # isinstance would ask the objects, and some of them warn
    tensors = (one for one, kind in kinds if issubclass(kind, Tensor) and not issubclass(kind, DTensor))
    return sum(storages(tensors).values())


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of what lies under them on this rank; views of one storage count once."""
    found = {}
    for tensor in tensors:
        here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if here.device.type != "meta":
            storage = here.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


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
