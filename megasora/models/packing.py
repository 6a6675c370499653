"""Packed rows: samples of any shape side by side in one sequence, as NaViT does for images (Dehghani et al., 2023).

Shapes, here and in every model: B batch, C channels, T H W latent frames, height, width, L tokens of a row, S samples of a
row, M text tokens of a row, N heads, K head width, D model width, P values of a patch (C·pt·ph·pw).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from einops import rearrange
from torch import Tensor

Patch = tuple[int, int, int]


@dataclass(frozen=True)
class Segments:
    """Which tokens of a row belong to which sample. Lengths stay on the host, so that nothing waits for the device."""

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First token of each sample, and the end: S + 1 numbers."""
        return (0, *accumulate(self.lengths))

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """`offsets` as the int32 [S + 1] tensor that variable-length attention kernels take."""
        return torch.tensor(self.offsets, dtype=torch.int32, device=self.device)

    @cached_property
    def sample(self) -> Tensor:
        """[L] int64: the sample of each token."""
        lengths = torch.tensor(self.lengths, device=self.device)
        return torch.repeat_interleave(torch.arange(len(lengths), device=self.device), lengths, output_size=self.total)

    @property
    def total(self) -> int:
        return self.offsets[-1]


@dataclass(frozen=True)
class PackedRow:
    """One model input. Padding, where there is any, is the last sample: its own segment, without text, at timestep 0."""

    tokens: Tensor  # [L, P] noisy patches
    grid: Tensor  # [L, 3] latent frame, row and column of each patch, in patches
    video: Segments  # of `tokens`
    timestep: Tensor  # [S] fp32 in [0, 1]: 0 is data, 1 is noise
    text: Tensor  # [M, E] text embeddings
    caption: Segments  # of `text`


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


def patch_grid(shape: Sequence[int], patch: Patch, device: torch.device) -> Tensor:
    """[L, 3] int64 coordinates, in patches, of the tokens that `patchify` makes of a (T, H, W) latent."""
    axes = [torch.arange(size // step, device=device) for size, step in zip(shape, patch, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def pack(
    patches: Sequence[Tensor],
    grids: Sequence[Tensor],
    timesteps: Tensor,
    texts: Sequence[Tensor],
    capacity: int | None = None,
) -> PackedRow:
    """Puts samples side by side: patches [L_i, P], grids [L_i, 3], timesteps [S], texts [M_i, E].

    With a `capacity`, the row is padded to so many tokens. Raises ValueError when the samples do not fit.
    """
    device = timesteps.device
    lengths, captions = [len(p) for p in patches], [len(t) for t in texts]
    padding = 0 if capacity is None else capacity - sum(lengths)
    if padding < 0:
        raise ValueError(f"{sum(lengths)} tokens do not fit a row of {capacity}")
    if padding:
        patches = [*patches, patches[0].new_zeros(padding, patches[0].shape[1])]
        grids = [*grids, grids[0].new_zeros(padding, 3)]
        timesteps = torch.cat([timesteps, timesteps.new_zeros(1)])
        lengths, captions = [*lengths, padding], [*captions, 0]
    return PackedRow(
        tokens=torch.cat(list(patches)),
        grid=torch.cat(list(grids)),
        video=Segments(tuple(lengths), device),
        timestep=timesteps,
        text=torch.cat(list(texts)),
        caption=Segments(tuple(captions), device),
    )
