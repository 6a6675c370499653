"""Spatial tiles for the first stage: pictures of any size through convolutions that see one tile; overlaps are cross-faded,
and several processes can share the tiles.

A whole video goes tile by tile, each streamed through time on its own, so that only the result grows. A stream of unknown
length advances all tiles together, a chunk of frames at a time: memory does not grow with its length, but every tile keeps its
causal cache, two frames of each layer. Inside a tile, as far from its cuts as the convolutions reach (6 latent positions in
the decoder of 4 x 8 x 8), both give what the whole gives.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megasora.models.first_stage import FirstStage
from megasora.models.vae import Cache, VideoVAE, check_size


def alone(mine: Tensor) -> Sequence[Tensor]:
    """The `gather` of a process that has no others."""
    return [mine]


@dataclass(frozen=True)
class Split:
    """How processes share the tiles. `gather` returns every process's tensor, all of one shape, in order of rank."""

    rank: int = 0
    ranks: int = 1
    gather: Callable[[Tensor], Sequence[Tensor]] = alone

    def share(self, tiles: int) -> list[int]:
        """This rank's tiles, round robin. Every rank has equally many: where they do not divide, the last one is repeated."""
        return [min(i, tiles - 1) for i in range(self.rank, math.ceil(tiles / self.ranks) * self.ranks, self.ranks)]

    def collect(self, mine: Iterable[Tensor], tiles: int) -> Iterable[Tensor]:
        """All tiles in order, from every rank's share; of a process alone one after the other, as they are made."""
        if self.ranks == 1:
            return mine
        shares = self.gather(torch.stack(list(mine)))
        return [shares[i % self.ranks][i // self.ranks] for i in range(tiles)]


ALONE = Split()


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along an axis: as few as overlap by `overlap` or more, evenly spread."""
    count = max(1, math.ceil((size - overlap) / (tile - overlap)))
    return [round(i * (size - tile) / max(1, count - 1)) for i in range(count)]


def fades(starts: Sequence[int], tile: int) -> list[Tensor]:
    """The weights [tile] of each tile along an axis: ramps where it shares positions with a neighbour, one elsewhere."""
    place = torch.arange(tile) + 0.5
    weights = [torch.ones(tile) for _ in starts]
    for i in range(1, len(starts)):
        shared = starts[i - 1] + tile - starts[i]  # none: place / 0 is infinite, the weight one
        weights[i] *= (place / shared).clamp(max=1)
        weights[i - 1] *= (place.flip(0) / shared).clamp(max=1)
    return weights


@dataclass(frozen=True)
class Grid:
    """Tiles over a picture, all in values of one tensor (pixels or latent positions): first rows, first columns, (h, w)."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    tile: tuple[int, int]

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def scaled(self, factor: int) -> "Grid":
        """The same tiles of a tensor with so many values for one here."""
        h, w = self.tile
        return Grid(
            tuple(r * factor for r in self.rows), tuple(c * factor for c in self.columns), (h * factor, w * factor)
        )

    def cut(self, x: Tensor, number: int) -> Tensor:
        """[..., H, W] -> the tile [..., h, w], a view."""
        row, column = divmod(number, len(self.columns))
        top, left = self.rows[row], self.columns[column]
        return x[..., top : top + self.tile[0], left : left + self.tile[1]]

    def join(self, tiles: Iterable[Tensor]) -> Tensor:
        """Every tile [..., h, w] -> [..., H, W]: where they overlap, one fades out as the next fades in."""
        vertical, horizontal = fades(self.rows, self.tile[0]), fades(self.columns, self.tile[1])
        whole = total = torch.empty(0)
        for number, tile in enumerate(tiles):
            if number == 0:
                H, W = self.rows[-1] + self.tile[0], self.columns[-1] + self.tile[1]
                whole, total = tile.new_zeros(*tile.shape[:-2], H, W), tile.new_zeros(H, W)
            row, column = divmod(number, len(self.columns))
            weight = (vertical[row][:, None] * horizontal[column]).to(whole)  # [h, w]
            self.cut(whole, number).add_(tile * weight)
            self.cut(total, number).add_(weight)
        return whole.div_(total)


def latent_grid(compression: tuple[int, int, int], size: tuple[int, int], tile: tuple[int, int], overlap: int) -> Grid:
    """Tiles of `tile` pixels, sharing `overlap` pixels or more, over a latent of `size` positions. Raises ValueError."""
    _, s, _ = compression
    if min(tile) < s or tile[0] % s or tile[1] % s:
        raise ValueError(f"tile={list(tile)}: multiples of {s} pixels are wanted")
    if overlap % s or not 0 <= overlap < min(tile):
        raise ValueError(f"overlap={overlap}: a multiple of {s} pixels below {min(tile)}, the tile's side, is wanted")
    h, w = (min(pixels // s, positions) for pixels, positions in zip(tile, size, strict=True))
    rows, columns = (tuple(tile_starts(n, t, min(overlap // s, t - 1))) for n, t in zip(size, (h, w), strict=True))
    return Grid(rows, columns, (h, w))


def encode_tiled(
    stage: FirstStage, video: Tensor, tile: tuple[int, int], overlap: int, split: Split = ALONE
) -> tuple[Tensor, Tensor]:
    """`encode_long` in tiles of `tile` (height, width) pixels: normalised mean and log-variance."""
    check_size(video, stage.compression)
    s = stage.compression[1]
    grid = latent_grid(stage.compression, (video.shape[-2] // s, video.shape[-1] // s), tile, overlap)
    pixels = grid.scaled(s)
    mine = (torch.cat(stage.encode_long(pixels.cut(video, i)), dim=1) for i in split.share(len(grid)))
    mean, logvar = grid.join(split.collect(mine, len(grid))).chunk(2, dim=1)  # [B, C, T, H, W] each
    return mean, logvar


def decode_tiled(
    stage: FirstStage, latent: Tensor, tile: tuple[int, int], overlap: int, split: Split = ALONE
) -> Tensor:
    """`decode_long` in tiles of `tile` (height, width) pixels."""
    grid = latent_grid(stage.compression, (latent.shape[-2], latent.shape[-1]), tile, overlap)
    mine = (stage.decode_long(grid.cut(latent, i)) for i in split.share(len(grid)))
    return grid.scaled(stage.compression[1]).join(split.collect(mine, len(grid)))  # [B, 3, T, H, W]


def encode_tiled_stream(
    vae: VideoVAE, chunks: Iterable[Tensor], tile: tuple[int, int], overlap: int, split: Split = ALONE
) -> Iterator[tuple[Tensor, Tensor]]:
    """`VideoVAE.encode_stream` in tiles."""
    caches: dict[int, Cache] = {}
    s = vae.compression[1]
    for chunk in chunks:
        check_size(chunk, vae.compression, first=not caches)
        grid = latent_grid(vae.compression, (chunk.shape[-2] // s, chunk.shape[-1] // s), tile, overlap)
        pixels = grid.scaled(s)
        mine = (
            torch.cat(vae.encode(pixels.cut(chunk, i), caches.setdefault(i, {})), dim=1) for i in split.share(len(grid))
        )
        mean, logvar = grid.join(split.collect(mine, len(grid))).chunk(2, dim=1)  # [B, C, T, H, W] each
        yield mean, logvar


def decode_tiled_stream(
    vae: VideoVAE, chunks: Iterable[Tensor], tile: tuple[int, int], overlap: int, split: Split = ALONE
) -> Iterator[Tensor]:
    """`VideoVAE.decode_stream` in tiles."""
    caches: dict[int, Cache] = {}
    for chunk in chunks:
        grid = latent_grid(vae.compression, (chunk.shape[-2], chunk.shape[-1]), tile, overlap)
        mine = (vae.decode(grid.cut(chunk, i), caches.setdefault(i, {})) for i in split.share(len(grid)))
        yield grid.scaled(vae.compression[1]).join(split.collect(mine, len(grid)))  # [B, 3, T, H, W]


class TiledStage:
    """Our VAE in tiles, where a `FirstStage` is wanted: for pictures whose whole would not fit in memory."""

    def __init__(self, vae: VideoVAE, tile: int, overlap: int, split: Split = ALONE) -> None:
        """Square tiles of `tile` pixels, sharing `overlap` or more. Raises ValueError starting with tile or overlap."""
        self.vae, self.how = vae, ((tile, tile), overlap, split)
        self.latent_channels, self.compression = vae.latent_channels, vae.compression
        latent_grid(vae.compression, (1, 1), *self.how[:2])

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        return encode_tiled(self.vae, video, *self.how)

    def decode(self, latent: Tensor) -> Tensor:
        return decode_tiled(self.vae, latent, *self.how)

    encode_long, decode_long = encode, decode

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return encode_tiled_stream(self.vae, chunks, *self.how)

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        return decode_tiled_stream(self.vae, chunks, *self.how)

    def fingerprint(self) -> str:
        return self.vae.fingerprint()
