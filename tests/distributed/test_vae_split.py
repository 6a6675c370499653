"""Tiles of the VAE shared by two processes: each gets what one alone would make of all of them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megasora.models.vae import VAEConfig, VideoVAE
from megasora.models.vae_tiling import ALONE, Split, decode_tiled, decode_tiled_stream, encode_tiled
from tests.harness import run_distributed
from tests.unit.test_vae import build, noise


def gather(mine: Tensor) -> Sequence[Tensor]:
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    return every


def work(split: Split, vae: VideoVAE) -> tuple[Tensor, ...]:
    """Six tiles of the encoder and four of the decoder; of the decoder once more as a stream of three chunks."""
    with torch.no_grad():
        mean, logvar = encode_tiled(vae, noise(1, 3, 9, 32, 40), (24, 16), 8, split)
        stream = decode_tiled_stream(vae, mean.split(1, dim=2), (24, 24), 8, split)
        return mean, logvar, decode_tiled(vae, mean, (24, 24), 8, split), torch.cat([*stream], dim=2)


def on_a_rank() -> tuple[tuple[Tensor, ...], int]:
    vae = build(VAEConfig(width=4, multipliers=(1, 2, 2)))
    decoded: list[Tensor] = []
    vae.decoder.register_forward_hook(lambda module, inputs, output: decoded.append(output))
    return work(Split(dist.get_rank(), dist.get_world_size(), gather), vae), len(decoded)


def test_two_processes_make_what_one_does() -> None:
    torch.set_num_threads(1)  # as the processes do: sums in the same order
    vae = build(VAEConfig(width=4, multipliers=(1, 2, 2)))
    decoded: list[Tensor] = []
    vae.decoder.register_forward_hook(lambda module, inputs, output: decoded.append(output))
    alone = work(ALONE, vae)
    for result, tiles in run_distributed(on_a_rank, 2):
        assert all(torch.equal(a, b) for a, b in zip(result, alone, strict=True))
        assert tiles * 2 == len(decoded)  # each did half of the work
