"""Rectified flow against closed forms."""

import math

import pytest
import torch

from megasora.diffusion.flow import FlowConfig, draw_timestep, euler, guide, interpolate, shift_timestep, velocity


def test_path_and_velocity() -> None:
    data, noise = torch.randn(3, 5), torch.randn(3, 5)
    assert torch.equal(interpolate(data, noise, torch.tensor(0.0)), data)
    assert torch.equal(interpolate(data, noise, torch.tensor(1.0)), noise)
    t = torch.tensor(0.3, requires_grad=True)
    (slope,) = torch.autograd.grad(interpolate(data, noise, t).sum(), t)
    assert slope.item() == pytest.approx(velocity(data, noise).sum().item(), rel=1e-5)


def test_timesteps_are_logit_normal_and_shifted() -> None:
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    t = draw_timestep(z, FlowConfig(logit_mean=0.5, logit_std=0.8), shift=1.0)
    logits = torch.log(t / (1 - t))
    assert t.dtype == torch.float32
    assert logits.mean().item() == pytest.approx(0.5, abs=0.01)
    assert logits.std().item() == pytest.approx(0.8, abs=0.01)
    # A shift by s adds log(s) to the logit: s·t / (1 + (s-1)·t) = sigmoid(logit(t) + log s).
    shifted = draw_timestep(z, FlowConfig(), shift=3.0)
    assert torch.allclose(shifted, torch.sigmoid(z + math.log(3.0)), atol=1e-6)
    assert shift_timestep(torch.tensor(0.25), 3.0).item() == pytest.approx(0.5)


def test_euler_reaches_a_gaussian_exactly_known() -> None:
    # For data N(m, s²) and noise N(0, 1), x_t ~ N((1-t)m, (1-t)²s² + t²) and the best velocity is known; its flow maps
    # noise z to m + s·z.
    m, s = 2.0, 0.5

    def predict(x: list[torch.Tensor], t: float) -> list[torch.Tensor]:
        variance = (1 - t) ** 2 * s**2 + t**2
        gain = (t - (1 - t) * s**2) / variance
        return [gain * (x[0] - (1 - t) * m) - m]

    z = torch.linspace(-2, 2, 9)
    (x,) = euler(predict, [z], steps=400, shift=1.0)
    assert torch.allclose(x, m + s * z, atol=0.01)
    (coarse,) = euler(predict, [z], steps=3, shift=1.0)
    assert not torch.allclose(coarse, m + s * z, atol=0.01)


def test_guidance() -> None:
    a, b = torch.tensor([1.0]), torch.tensor([3.0])
    assert guide(a, b, 1.0) == a
    assert guide(a, b, 0.0) == b
    assert guide(a, b, 2.0).item() == -1.0


def test_euler_visits_the_shifted_times() -> None:
    times: list[float] = []

    def predict(x: list[torch.Tensor], t: float) -> list[torch.Tensor]:
        times.append(t)
        return [torch.ones_like(x[0])]

    (x,) = euler(predict, [torch.zeros(1)], steps=4, shift=3.0)
    assert times == pytest.approx([1, 0.9, 0.75, 0.5])  # 3t / (1 + 2t) of 1, 3/4, 1/2, 1/4
    assert x.item() == pytest.approx(-1)
