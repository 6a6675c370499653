"""Randomness as a function of names and positions: nothing random has a state that a checkpoint must carry."""

import torch
import xxhash
from torch import Tensor


def fold(*parts: int | str) -> int:
    """A 63-bit seed from any names and numbers: fold(seed, "noise", segment, position)."""
    return xxhash.xxh3_64_intdigest(repr(parts).encode()) >> 1


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by `fold`."""
    return torch.Generator(device).manual_seed(fold(*parts))


def normal(shape: tuple[int, ...], *parts: int | str, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal fp32 noise, a function of `parts` (and of the kind of device) alone."""
    return torch.randn(shape, generator=generator(*parts, device=device), device=device)
