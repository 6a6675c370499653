"""Layers that the model families share. What feeds the timestep, the rotation and the norms stays in fp32: in lower
precision it leaves dark spots late in training."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megasora_kernels.layernorm_modulate import layernorm_modulate
from megasora_kernels.qknorm_rope import qknorm_rope
from torch import Tensor, nn

from megasora.models.attention import Attention
from megasora.models.packing import Segments


def timestep_embedding(timestep: Tensor, width: int = 256, max_period: float = 10_000.0) -> Tensor:
    """[S] in [0, 1] -> [S, width] fp32: cosines, then sines, of 1000·t (Ho et al. 2020, as in DiT)."""
    half = width // 2
    frequency = torch.exp(-math.log(max_period) / half * torch.arange(half, device=timestep.device))
    angle = 1000.0 * timestep.float()[:, None] * frequency[None]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rotary_angles(grid: Tensor, head_width: int, theta: float = 10_000.0) -> Tensor:
    """[L, 3] coordinates -> [L, K/2] angles, fp32: 3-D RoPE (Su et al. 2021), the head split over time, height and width.

    Height and width take 2·(K//6) channels each and time the rest, as in Wan.
    """
    spatial = 2 * (head_width // 6)
    return axial_angles(grid, (head_width - 2 * spatial, spatial, spatial), theta)


def sincos_embedding(grid: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """[L, 3] coordinates -> [L, width] fp32: sines and cosines of time, row and column, as DiT and Latte add to patches."""
    frequencies = width // 6
    steps = torch.arange(frequencies, device=grid.device) / frequencies
    angles = (grid.float()[:, :, None] * max_period**-steps).flatten(1)  # [L, 3 · frequencies]
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, width - 6 * frequencies))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x [L, N, K] turned by a `rotation_table` [L, K/2, 2], neighbouring channels being one complex number. Computed in fp32."""
    return qknorm_rope(x.flatten(1), None, rotation, x.shape[-1])


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)

    def by_head(self, x: Tensor, head_width: int, rotation: Tensor | None) -> Tensor:
        """[L, D] -> [L, N, K] heads, normed over the whole width or within each head, then turned if there is a rotation."""
        return qknorm_rope(x, self.weight, rotation, head_width, self.eps)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, computed in fp32 whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).type_as(x)


class MLP(nn.Sequential):
    """Linear, activation, linear."""

    def __init__(self, width_in: int, hidden: int, width_out: int, activation: nn.Module) -> None:
        super().__init__(nn.Linear(width_in, hidden), activation, nn.Linear(hidden, width_out))


class TableHead(nn.Module):
    """LayerNorm modulated by the timestep plus a table of its own, and the projection back to patches (PixArt, STDiT, Wan)."""

    def __init__(self, width: int, outputs: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.out = nn.Linear(width, outputs)
        self.modulation = nn.Parameter(torch.zeros(2, width))

    def forward(self, x: Tensor, time: Tensor, run: Tensor) -> Tensor:
        """x [L, D], time [R, D] fp32, the run of each token [L] -> [L, outputs]."""
        shift, scale = (self.modulation.float() + time[:, None]).unbind(1)  # two [R, D]
        return self.out(layernorm_modulate(x, scale, shift, run, self.eps))


class Modulation(nn.Linear):
    """SiLU and a linear layer from a condition to `parts` modulations, in fp32 whatever the type of its weights."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(width, parts * width)
        self.parts = parts

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """condition [S, D] -> `parts` times [S, D] fp32."""
        with torch.autocast(condition.device.type, enabled=False):
            y = F.linear(F.silu(condition.float()), self.weight.float(), self.bias.float())  # [S, parts · D]
        return y.unflatten(-1, (self.parts, -1)).unbind(1)


def axial_angles(grid: Tensor, axes: Sequence[int], theta: float = 10_000.0) -> Tensor:
    """[L, 3] coordinates -> [L, sum(axes)/2] angles, fp32: RoPE with `axes` channels for time, row and column."""
    angles = []
    for axis, channels in enumerate(axes):
        steps = torch.arange(0, channels, 2, device=grid.device, dtype=torch.float32)
        angles.append(grid[:, axis, None].float() * theta ** (-steps / channels))
    return torch.cat(angles, dim=-1)


def sincos_axis(position: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """[L] -> [L, width] fp32: sines, then cosines, of one coordinate (Vaswani et al. 2017, as MAE, DiT and Latte lay it out)."""
    steps = torch.arange(width // 2, device=position.device) / (width // 2)
    angles = position.float()[:, None] * max_period**-steps  # [L, width/2]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class MultiHeadAttention(nn.Module):
    """Attention as in Vaswani et al. 2017 and ViT; self- or cross-attention by what is passed as context."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor, queries: Segments, keys: Segments, attention: Attention) -> Tensor:
        q = self.q(x).unflatten(-1, (-1, self.head_width))  # [L, N, K]
        k = self.k(context).unflatten(-1, (-1, self.head_width))  # [M, N, K]
        v = self.v(context).unflatten(-1, (-1, self.head_width))  # [M, N, K]
        return self.out(attention(q, k, v, queries, keys).flatten(-2))  # [L, D]


def join(x: Tensor, of_x: Segments, y: Tensor, of_y: Segments) -> tuple[Tensor, Segments]:
    """x [L, D] and y [M, D] -> [L + M, D]: each segment of x, then the same sample's of y, and the segments that they make."""
    pairs = zip(x.split(of_x.lengths), y.split(of_y.lengths), strict=True)
    return torch.cat([part for pair in pairs for part in pair]), together(of_x, of_y)


def together(x: Segments, y: Segments) -> Segments:
    """Each segment of x and the same sample's of y as one, of their peers too."""

    def add(m: tuple[int, ...], n: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(map(sum, zip(m, n, strict=True)))

    peers = tuple(add(m, n) for m, n in zip(x.peers, y.peers, strict=True))
    return Segments(add(x.lengths, y.lengths), x.device, peers)


def first_part(joint: Tensor, of_x: Segments, of_y: Segments) -> Tensor:
    """[L + M, D] -> [L, D]: the x of `join`."""
    lengths = [length for pair in zip(of_x.lengths, of_y.lengths, strict=True) for length in pair]
    return torch.cat(joint.split(lengths)[::2])


def init_linears_and_norms(model: nn.Module) -> None:
    """Xavier for linears, their biases zero; norms one. What a family wants otherwise it sets afterwards."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)
