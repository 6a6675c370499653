"""Text and video of a packed row as the one sequence that MMDiT's blocks attend over: who stands where, there and back.

Further shape: J = M + L tokens of the joint sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megasora.models.layers import together
from megasora.models.packing import PackedRow, Segments, on_device

Lengths = tuple[int, ...]


@dataclass(frozen=True)
class Joint:
    """The text and the video of a row as one sequence: between blocks all text comes first, in attention each sample's text
    comes before its video.

    Where attention layers see several pieces of a row together (`PackedRow.attended`), all have as much text: the shorter
    ones end with a token of padding that nobody attends to.
    """

    samples: Segments  # of J, as attention sees it
    order: Tensor | None  # [J] which token of the pieces comes where; None: as it is
    pieces: int  # that attention layers see together
    owner: Tensor  # [M + L] int64, non-decreasing: which of [texts of samples; runs] each token of this piece is of
    text_owner: Tensor  # [M] of it: of the text, padding among it

    @property
    def text(self) -> int:
        """M, text tokens of a piece."""
        return len(self.text_owner)

    def enter(self, x: Tensor) -> Tensor:
        """[pieces · (M + L), ...] -> [J, ...] as attention sees it."""
        return x if self.order is None else x.index_select(0, self.order)

    def leave(self, y: Tensor) -> Tensor:
        """The inverse of `enter`; padding gets zeros."""
        if self.order is None:
            return y
        return y.new_zeros(self.pieces * len(self.owner), *y.shape[1:]).index_copy(0, self.order, y)

    def meet(self, text: Tensor, video: Tensor) -> Tensor:
        """[pieces · M, ...] and [pieces · L, ...] -> [J, ...] as attention sees it."""
        return self.enter(self.beside(text, video))

    def beside(self, text: Tensor, video: Tensor) -> Tensor:
        """[pieces · M, ...] and [pieces · L, ...] -> [pieces · (M + L), ...]."""
        shape = (self.pieces, self.text), (self.pieces, -1)
        both = [x.unflatten(0, sizes) for x, sizes in zip((text, video), shape, strict=True)]
        return torch.cat(both, dim=1).flatten(0, 1)

    def part(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `meet`."""
        both = self.leave(y).unflatten(0, (self.pieces, len(self.owner)))
        return both[:, : self.text].flatten(0, 1), both[:, self.text :].flatten(0, 1)


def join(row: PackedRow) -> Joint:
    """Where everything goes, once a row."""
    S = len(row.shapes)
    texts, videos = pieces_of(row, row.own_caption), pieces_of(row, row.video)
    M = max(map(sum, texts))
    text_owner = nn.functional.pad(row.own_caption.index, (0, M - row.own_caption.total), value=S - 1)  # [M]
    owner = torch.cat([text_owner, S + row.runs.index])  # [M + L]
    seen = together(row.attended.own_caption, row.attended.video)
    return Joint(seen, by_sample(texts, videos, owner.device), len(texts), owner, text_owner)


def pieces_of(row: PackedRow, segments: Segments) -> Sequence[Lengths]:
    """The lengths of a row's segments in each piece that attention layers see together."""
    return segments.peers if row.wider else [segments.lengths]


def by_sample(texts: Sequence[Lengths], videos: Sequence[Lengths], device: torch.device) -> Tensor | None:
    """From the lengths of each sample's text and video in each piece: the order that puts samples side by side, text first, and
    leaves out what pads the text; None where all lies so already."""
    M, S = max(map(sum, texts)), len(texts[0])
    places, counts = [], []  # of stretches: where they belong, and their tokens
    for text, video in zip(texts, videos, strict=True):
        places += [*range(0, 2 * S, 2), 2 * S, *range(1, 2 * S, 2)]
        counts += [*text, M - sum(text), *video]
    present = [place for place, count in zip(places, counts, strict=True) if count]
    padding = sum(M - sum(text) for text in texts)
    if not padding and present == sorted(present):
        return None
    tokens = sum(counts)
    sizes = on_device(counts, device)
    place = torch.repeat_interleave(on_device(places, device), sizes, output_size=tokens)
    return place.argsort(stable=True)[: tokens - padding]
