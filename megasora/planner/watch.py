"""Watches a step as it runs, on real or on fake tensors: every collective with the bytes that it takes in, and every storage from
its making to its end."""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from megasora.planner.tape import Collective

KINDS = {
    "all_gather_into_tensor": "all_gather", "_allgather_base_": "all_gather", "allgather_": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter", "_reduce_scatter_base_": "reduce_scatter",
    "all_reduce": "all_reduce", "allreduce_": "all_reduce", "all_reduce_": "all_reduce",
    "all_to_all_single": "all_to_all", "alltoall_base_": "all_to_all", "send": "send",
    "broadcast_": "broadcast", "reduce_": "reduce", "scatter_": "scatter",
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One collective: over which ranks, and the bytes it takes in here."""

    kind: str
    ranks: tuple[int, ...]
    sent: int


@dataclass
class Watch(TorchDispatchMode):
    """A context. `calls` are the collectives in order; `peak()` follows what lives."""

    calls: list[Call] = field(default_factory=list)
    events: list[tuple[int, int]] = field(default_factory=list)  # (storage, bytes more or less), in order
    _sizes: dict[int, int] = field(default_factory=dict)
    _numbers: Any = field(default_factory=weakref.WeakKeyDictionary)

    def __post_init__(self) -> None:
        super().__init__()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled; what keeps torch.compile out would cost more than the watching."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and not args[0].fake_mode.in_kernel_invocation:
            return args[0].fake_device  # autograd asks every fake tensor, which is half of all calls
        name = func.__name__.split(".")[0]
        if func.namespace in ("_c10d_functional", "c10d") and name in KINDS:
            self.calls.append(Call(KINDS[name], ranks_of(args), bytes_in(KINDS[name], name, args)))
        for tensor in tensors_in(args):
            self.note(tensor, before=True)
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in((result,)):
            self.note(tensor)
        # Waiting makes another tensor of a fake one and gives back a real one itself.
        number = self.number_of(args[0]) if name == "wait_tensor" else None
        if number is not None and number >= 0 and number != self.number_of(result):
            self.resized(number, 0)
        return result

    def note(self, tensor: Tensor, before: bool = False) -> None:
        """A storage that is seen for the first time; `before`: it was made earlier, and does not count. Wrappers have none of
        their own: what they wrap counts."""
        if is_traceable_wrapper_subclass(tensor):
            for name in tensor.__tensor_flatten__()[0]:
                if isinstance(inner := getattr(tensor, name), Tensor):
                    self.note(inner, before)
            return
        storage = tensor.untyped_storage()
        if storage in self._numbers:
            return
        if before:
            self._numbers[storage] = -1
            return
        number = len(self._sizes)
        self._numbers[storage] = number
        self._sizes[number] = 0
        self.resized(number, storage.nbytes())
        weakref.finalize(storage, self.resized, number, 0)

    def resized(self, number: int, size: int) -> None:
        more = size - self._sizes[number]
        if more:
            self._sizes[number] = size
            self.events.append((number, more))

    def number_of(self, tensor: Tensor) -> int | None:
        return self._numbers.get(tensor.untyped_storage())

    def peak(self, without: Iterable[Tensor] = ()) -> int:
        """The most bytes that lived at once of all that was made here, but for the storages of some tensors."""
        left_out = {self.number_of(tensor) for tensor in without}
        live = most = 0
        for number, more in self.events:
            if number not in left_out:
                live += more
                most = max(most, live)
        return most


def tensors_in(values: Sequence[Any]) -> Iterator[Tensor]:
    """Of arguments or results of an operation, which are tensors, lists of them, and what is neither."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def moved(calls: Iterable[Call]) -> float:
    """Bytes that this rank sends over its links in these calls, by ring algorithms."""
    return sum(Collective(call.kind, "", len(call.ranks), call.sent, 1).moved for call in calls)


@contextmanager
def watching() -> Iterator[Watch]:
    """Also sees FSDP give back the memory of gathered weights, which it does by resizing their storage."""
    watch = Watch()
    plain = torch.UntypedStorage.resize_

    def resize(storage: torch.UntypedStorage, size: int) -> Any:
        result = plain(storage, size)
        if watch._numbers.get(storage, -1) >= 0:
            watch.resized(watch._numbers[storage], size)
        return result

    torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
    try:
        with watch:
            yield watch
    finally:
        torch.UntypedStorage.resize_ = plain  # type: ignore[method-assign]


def ranks_of(args: tuple[Any, ...]) -> tuple[int, ...]:
    """The global ranks of the group that a collective is over."""
    for arg in reversed(args):
        if isinstance(arg, str):
            try:
                group = dist.distributed_c10d._resolve_process_group(arg)  # type: ignore[arg-type]
            except (RuntimeError, ValueError):
                continue
            return tuple(dist.get_process_group_ranks(group))
        if isinstance(arg, torch.ScriptObject):
            try:
                group = dist.ProcessGroup.unbox(arg)
            except (RuntimeError, AttributeError):
                continue
            return tuple(dist.get_process_group_ranks(group))
    return ()


def bytes_in(kind: str, name: str, args: tuple[Any, ...]) -> int:
    """What the collective takes in on this rank. In-place forms of c10d name the output first."""
    tensors = [[t for t in tree_leaves(arg) if isinstance(t, Tensor)] for arg in args]
    given = [some for some in tensors if some]
    two = name in ("_allgather_base_", "allgather_", "_reduce_scatter_base_", "alltoall_base_", "scatter_")
    return sum(t.numel() * t.element_size() for t in given[1 if two else 0])
