"""A stretch of a flattened parameter, which is what a rank of DeepSpeed's ZeRO owns, as the boxes of the whole tensor that a
checkpoint knows: the end of a row, whole rows, the beginning of another."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


@dataclass(frozen=True)
class Split:
    """How tensor parallelism has cut a parameter: along `dim`, and which of the equal parts is here."""

    dim: int = 0
    part: int = 0
    parts: int = 1

    def of(self, whole: Tensor) -> Tensor:
        """This rank's share of the whole tensor: a view."""
        return whole if self.parts == 1 else whole.chunk(self.parts, self.dim)[self.part]

    def whole_shape(self, shape: Sequence[int]) -> torch.Size:
        return torch.Size(n * self.parts if d == self.dim else n for d, n in enumerate(shape))


WHOLE = Split()


@dataclass(frozen=True)
class Fragment:
    """`count` numbers from `start` of a rank's share of a parameter, flattened; they lie from `offset` in `flat`, which the
    optimizer knows as one parameter of its own."""

    flat: Tensor
    offset: int
    start: int
    count: int

    def of(self, flat: Tensor) -> Tensor:
        """These numbers of `flat`, or of another tensor that is laid out like it: a view."""
        return flat.detach().view(-1).narrow(0, self.offset, self.count)


class Pieces(torch.Tensor):
    """Stands for a tensor of which this rank has some boxes, or none: (offsets, view of the live memory). DCP saves and loads it
    by those; nothing can be computed with it."""

    pieces: list[tuple[torch.Size, Tensor]]

    @staticmethod
    def __new__(cls, shape: torch.Size, dtype: torch.dtype, pieces: list[tuple[torch.Size, Tensor]]) -> "Pieces":
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device("cpu"))
        made.pieces = pieces
        found: Pieces = made
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} of a tensor in pieces")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pieces({tuple(self.shape)}, {len(self.pieces)} here)"

    def receive(self, whole: Tensor) -> None:
        """Gives this rank's boxes the values that they have in the whole tensor."""
        for offsets, piece in self.pieces:
            piece.copy_(whole[tuple(slice(o, o + n) for o, n in zip(offsets, piece.shape, strict=True))])

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(name, offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(offsets, piece.shape), TensorProperties.create_from_tensor(piece), self.shape
                ),
            )
            for offsets, piece in self.pieces
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, piece.shape) for offsets, piece in self.pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(piece for offsets, piece in self.pieces if offsets == index.offset)


def in_pieces(shape: Sequence[int], split: Split, start: int, numbers: Tensor | None) -> Pieces:
    """A parameter, or a state of it, whose share here has this `shape`, and of that share, flattened, the `numbers` from `start`.
    None: nothing of it is here."""
    whole = split.whole_shape(shape)
    if numbers is None:
        return Pieces(whole, torch.float32, [])
    moved = [split.part * shape[d] if d == split.dim and split.parts > 1 else 0 for d in range(len(shape))]
    pieces = []
    for offsets, sizes, begin in boxes(shape, start, start + numbers.numel()):
        view = numbers.narrow(0, begin - start, math.prod(sizes)).view(sizes)
        pieces.append((torch.Size(o + m for o, m in zip(offsets, moved, strict=True)), view))
    return Pieces(whole, numbers.dtype, pieces)


def boxes(shape: Sequence[int], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """The stretch from `begin` to `end` of a flattened tensor as boxes of it: offsets, sizes, and where each begins."""
    if begin >= end:
        return
    if len(shape) <= 1:
        yield ((begin,), (end - begin,), begin) if shape else ((), (), begin)
        return
    rest = tuple(shape[1:])
    inner = math.prod(rest)
    row, inside = divmod(begin, inner)
    if inside or end < (row + 1) * inner:  # a part of a row
        stop = min(end, (row + 1) * inner)
        for offsets, sizes, at in boxes(rest, inside, stop - row * inner):
            yield (row, *offsets), (1, *sizes), row * inner + at
    else:
        stop = end // inner * inner
        yield (row, *(0 for _ in rest)), (stop // inner - row, *rest), begin
    yield from boxes(shape, stop, end)


def together(tensor: Pieces) -> Tensor:
    """All of a tensor of which each rank has some pieces, on every rank, on the CPU. All ranks call it; for small ones."""
    mine = [(offsets, piece.cpu()) for offsets, piece in tensor.pieces]
    every: list[Any] = [mine] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    whole = torch.full(tensor.shape, float("nan"))
    for offsets, piece in (found for of_rank in every for found in of_rank):
        place = tuple(slice(o, o + n) for o, n in zip(offsets, piece.shape, strict=True))
        whole[place] = piece
    return whole
