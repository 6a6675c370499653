"""Packed rows: samples of any shape side by side in one sequence, as NaViT does for images (Dehghani et al., 2023).

Shapes, here and in every model: B batch, C channels, T H W latent frames, height, width, L tokens of a row, S samples of a
row, R runs of a row (neighbouring tokens with one timestep), M text tokens of a row, E their width, V width of the pooled
text, N heads, K head width, D model width, P values of a patch (C·pt·ph·pw). A batch of equal shapes is a row like any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby, pairwise

import torch
from einops import rearrange
from torch import Tensor

from megasora.device import on_gpu

Patch = tuple[int, int, int]
Shape = tuple[int, int, int]  # T, H, W


def on_device(x: Tensor | Sequence[float], device: torch.device) -> Tensor:
    """What is on the host, on a device, without waiting for it: that takes pinned memory."""
    x = x if isinstance(x, Tensor) else torch.tensor(x)
    moves = x.device.type == "cpu" and on_gpu(device)
    return x.pin_memory().to(device, non_blocking=True) if moves else x.to(device)


@dataclass(frozen=True)
class Segments:
    """Which tokens of a row belong together. Lengths stay on the host, so that nothing waits for the device.

    A row may be a part of a larger one; `peers` then are the lengths of each part, this one's among them.
    """

    lengths: tuple[int, ...]
    device: torch.device
    peers: tuple[tuple[int, ...], ...] = ()

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First token of each segment, and the end."""
        return (0, *accumulate(self.lengths))

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """`offsets` as the int32 tensor that variable-length attention kernels take."""
        return on_device(torch.tensor(self.offsets, dtype=torch.int32), self.device)

    @property
    def starts(self) -> tuple[int, ...]:
        """First token of each segment."""
        return self.offsets[:-1]

    @cached_property
    def index(self) -> Tensor:
        """[L] int64: the segment of each token."""
        lengths = on_device(self.lengths, self.device)
        return torch.repeat_interleave(torch.arange(len(lengths), device=self.device), lengths, output_size=self.total)

    @cached_property
    def shares(self) -> Tensor:
        """[P, S] int64 on the host: `peers`."""
        return torch.tensor(self.peers)

    @cached_property
    def spans(self) -> Tensor:
        """[2, S] int64 on the host: first token and length of each segment, for operators that a graph calls."""
        return torch.tensor([self.starts, self.lengths])

    @property
    def total(self) -> int:
        return self.offsets[-1]

    def part(self, index: int, parts: int) -> "Segments":
        """What lies in one of so many equal stretches of the tokens (the last ones may be a token shorter)."""
        bounds = [stretch(self.total, i, parts) for i in range(parts)]
        peers = tuple(
            tuple(max(0, min(b, end) - max(a, begin)) for a, b in pairwise(self.offsets)) for begin, end in bounds
        )
        return Segments(peers[index], self.device, peers)


def stretch(total: int, index: int, parts: int) -> tuple[int, int]:
    """Where one of so many stretches of `total` tokens begins and ends; they differ by one token at most."""
    small, longer = divmod(total, parts)
    begin = index * small + min(index, longer)
    return begin, begin + small + (index < longer)


@dataclass(frozen=True)
class Windows:
    """The stretch of keys that each query segment sees. Unlike `Segments` they may overlap."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @cached_property
    def spans(self) -> Tensor:
        """As of `Segments`."""
        return torch.tensor([self.starts, self.lengths])


@dataclass(frozen=True)
class Order:
    """The whole row's tokens in an order in which those that see each other are neighbours: a segment each."""

    segments: Segments
    boxes: tuple[tuple[int, int, int], ...] = ()  # n neighbouring samples as [n, A, B]; none: the row's own order

    def enter(self, x: Tensor) -> Tensor:
        """[L, ...] of the row -> [L, ...] of the segments."""
        return transposed(x, self.boxes)

    def leave(self, x: Tensor) -> Tensor:
        """The inverse of `enter`."""
        return transposed(x, self.turned)

    @property
    def turned(self) -> tuple[tuple[int, int, int], ...]:
        """The boxes after `enter`."""
        return tuple((n, B, A) for n, A, B in self.boxes)

    @cached_property
    def turns(self) -> tuple[Tensor, Tensor] | None:
        """`boxes` and `turned` as [G, 3] int64 on the host, for operators that a graph calls; None where nothing moves."""
        return (torch.tensor(self.boxes), torch.tensor(self.turned)) if self.boxes else None


def transposed(x: Tensor, boxes: tuple[tuple[int, int, int], ...]) -> Tensor:
    """[L, ...], which is boxes [n, A, B, ...] side by side -> the same with every box turned to [n, B, A, ...]."""
    if not boxes:
        return x
    parts = x.split([n * A * B for n, A, B in boxes])
    turned = [part.unflatten(0, box).transpose(1, 2).flatten(0, 2) for part, box in zip(parts, boxes, strict=True)]
    return torch.cat(turned) if len(turned) > 1 else turned[0]


@dataclass(frozen=True)
class Item:
    """One sample before it is packed."""

    patches: Tensor  # [L, P]
    shape: Shape  # in patches
    timesteps: Tensor  # [T] fp32 on the CPU, one a frame of patches: 0 is data (a given frame), 1 is noise
    text: Tensor  # [M, E]
    pooled: Tensor  # [V], empty where the model wants none
    fps: float = 24.0
    label: int = -1  # class, for models that are conditioned on one; -1: none
    first_frame: int = 0  # where on the time axis the sample begins, in patches
    guidance: float = 1.0  # scale of the guided prediction that is wanted, for models that take it; 1: the plain one


@dataclass(frozen=True)
class PackedRow:
    """One model input. Padding, where there is any, is the last sample: its own segment, without text, at timestep 0.

    A part of a row (`part`) has a stretch of its tokens and all that belongs to samples, runs and captions. Of the caption's
    tokens, models that carry text through their blocks take `own_text`. Attention layers may see more tokens than the rest of
    a block: those of `attended`.
    """

    tokens: Tensor  # [L, P] noisy patches
    grid: Tensor  # [L, 3] latent frame, row and column of each patch, in patches
    video: Segments  # of `tokens`: the samples
    shapes: tuple[Shape, ...]  # of the samples, in patches; padding is one row of patches
    timestep: Tensor  # [R] fp32 in [0, 1]
    runs: Segments  # of `tokens`: neighbours with one timestep, each within one sample
    run_owners: tuple[int, ...]  # the sample of each run
    text: Tensor  # [M, E] text embeddings
    caption: Segments  # of `text`
    pooled: Tensor  # [S, V]
    fps: Tensor  # [S] fp32
    label: Tensor  # [S] int64, -1 for none
    guidance: Tensor  # [S] fp32
    own_text: tuple[int, int]  # first and end of the tokens of `text` that are this part's
    own_caption: Segments  # of them
    wider: "PackedRow | None" = None  # the part that attention layers see, if that is more than this one

    @property
    def attended(self) -> "PackedRow":
        """The row as attention layers see it."""
        return self.wider or self

    @cached_property
    def frames(self) -> Segments:
        """The tokens of one frame of one sample, side by side."""
        return Segments(tuple(H * W for T, H, W in self.shapes for _ in range(T)), self.tokens.device)

    @cached_property
    def run_sample(self) -> Tensor:
        """[R] int64: the sample of each run."""
        return on_device(self.run_owners, self.tokens.device)

    def part(self, index: int, parts: int, shared: int = 1) -> "PackedRow":
        """One of so many equal stretches of the row. Attention layers see `shared` neighbouring ones together: those are cut
        off first, then divided, and the part's peers are the others of them."""
        if shared > 1:
            wider = self.part(index // shared, parts // shared)
            return replace(wider.part(index % shared, shared), wider=wider)
        begin, end = stretch(self.video.total, index, parts)
        first, last = (self.own_text[0] + place for place in stretch(self.own_caption.total, index, parts))
        return replace(
            self,
            tokens=self.tokens[begin:end],
            grid=self.grid[begin:end],
            video=self.video.part(index, parts),
            runs=self.runs.part(index, parts),
            own_text=(first, last),
            own_caption=self.own_caption.part(index, parts),
        )


def patchify(latent: Tensor, patch: Patch) -> Tensor:
    """[C, T, H, W] -> [L, P]: spacetime patches, each flattened as (pt ph pw C)."""
    pt, ph, pw = patch
    return rearrange(latent, "C (T pt) (H ph) (W pw) -> (T H W) (pt ph pw C)", pt=pt, ph=ph, pw=pw)


def unpatchify(tokens: Tensor, shape: Sequence[int], patch: Patch) -> Tensor:
    """[L, P] -> [C, T, H, W] of the given (T, H, W): the inverse of `patchify`."""
    pt, ph, pw = patch
    T, H, W = shape
    return rearrange(
        tokens, "(T H W) (pt ph pw C) -> C (T pt) (H ph) (W pw)", T=T // pt, H=H // ph, W=W // pw, pt=pt, ph=ph, pw=pw
    )


def in_patches(shape: Sequence[int], patch: Patch) -> Shape:
    """(T, H, W) of a latent -> the same in patches. Raises ValueError when a patch does not divide it."""
    if any(size % step for size, step in zip(shape, patch, strict=True)):
        raise ValueError(f"patches of {list(patch)} do not divide a latent of {list(shape)}")
    T, H, W = (size // step for size, step in zip(shape, patch, strict=True))
    return T, H, W


def patch_grid(shape: Shape, device: torch.device, first_frame: int = 0) -> Tensor:
    """[L, 3] int64 coordinates of the tokens of a sample of (T, H, W) patches, whose frames begin at `first_frame`."""
    T, H, W = shape
    axes = [torch.arange(n, device=device) for n in (T, H, W)]
    axes[0] = axes[0] + first_frame
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def pack(items: Sequence[Item], capacity: int | None = None) -> PackedRow:
    """Puts samples side by side. With a `capacity`, the row is padded to so many tokens.

    Raises ValueError when the samples do not fit.
    """
    first = items[0]
    device = first.patches.device
    padding = 0 if capacity is None else capacity - sum(len(item.patches) for item in items)
    if padding < 0:
        raise ValueError(f"{sum(len(item.patches) for item in items)} tokens do not fit a row of {capacity}")
    steps = [item.timesteps.tolist() for item in items]
    grids = [patch_grid(item.shape, device, item.first_frame) for item in items]
    if padding:
        patches = first.patches.new_zeros(padding, first.patches.shape[1])
        pad = Item(patches, (1, 1, padding), torch.zeros(1), first.text[:0], torch.zeros_like(first.pooled))
        items = [*items, pad]
        steps.append([0.0])
        grids.append(grids[0].new_zeros(padding, 3))
    timesteps, lengths, owners = [], [], []
    for sample, item in enumerate(items):
        for value, frames in groupby(steps[sample]):
            timesteps.append(value)
            lengths.append(len(list(frames)) * item.shape[1] * item.shape[2])
            owners.append(sample)
    caption = Segments(tuple(len(item.text) for item in items), device)
    return PackedRow(
        tokens=torch.cat([item.patches for item in items]),
        grid=torch.cat(grids),
        video=Segments(tuple(len(item.patches) for item in items), device),
        shapes=tuple(item.shape for item in items),
        timestep=on_device(timesteps, device),
        runs=Segments(tuple(lengths), device),
        run_owners=tuple(owners),
        text=torch.cat([item.text for item in items]),
        caption=caption,
        pooled=torch.stack([item.pooled for item in items]),
        fps=on_device([item.fps for item in items], device),
        label=on_device([item.label for item in items], device),
        guidance=on_device([item.guidance for item in items], device),
        own_text=(0, caption.total),
        own_caption=caption,
    )


def chunk_windows(shapes: Sequence[Shape], chunk: int, window: int, device: torch.device) -> tuple[Segments, Windows]:
    """Block-causal attention over chunks of `chunk` frames: the queries of each chunk, and the keys that it sees: its own
    sample's, from `window` chunks before it (0: from the first) up to its own end."""
    lengths, starts, widths, begin = [], [], [], 0
    for T, H, W in shapes:
        for frame in range(0, T, chunk):
            end = min(frame + chunk, T)
            seen = max(0, frame - window * chunk) if window else 0
            lengths.append((end - frame) * H * W)
            starts.append(begin + seen * H * W)
            widths.append((end - seen) * H * W)
        begin += T * H * W
    return Segments(tuple(lengths), device), Windows(tuple(starts), tuple(widths))
