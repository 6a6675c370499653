"""Rectified flow against closed forms."""

import math

import pytest
import torch

from megasora.diffusion.flow import Flow, FlowConfig, draw_timestep, interpolate, shift_timestep, size_shift, velocity
from megasora.diffusion.gaussian import Gaussian, GaussianConfig
from megasora.diffusion.objective import Objective, build_objective


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


def test_objective_is_the_flow_bit_by_bit() -> None:
    objective: Objective = Flow(FlowConfig(logit_mean=0.2, logit_std=0.7))
    z = torch.randn(64)
    t = torch.sigmoid(0.2 + 0.7 * z)
    assert torch.equal(objective.draw(z, 2.5), 2.5 * t / (1 + (2.5 - 1) * t))
    data, noise, prediction = torch.randn(64, 6), torch.randn(64, 6), torch.randn(64, 6).bfloat16()
    noisy = objective.corrupt(data, noise, t[:, None])
    assert torch.equal(noisy, (1 - t[:, None]) * data + t[:, None] * noise)
    loss = objective.loss(prediction, data, noise, noisy, t[:, None])
    assert loss.dtype == torch.float32
    assert torch.equal(loss, (prediction.float() - (noise - data)).square().mean(-1))
    assert objective.outputs == 1


def test_objectives_by_name() -> None:
    flow, gaussian = FlowConfig(logit_mean=1.0), GaussianConfig(variance="learned_range")
    assert build_objective("flow", flow, gaussian) == Flow(flow)
    assert build_objective("gaussian", flow, gaussian) == Gaussian(gaussian)


def test_shift_by_size() -> None:
    assert size_shift((16, 90, 160), FlowConfig()) == 1.0
    config = FlowConfig(shift_by_size=True)
    assert size_shift((1, 64, 64), config) == 1.0
    # Open-Sora 1.2: sqrt(height · width / 512²) · sqrt(latent frames), 51 frames of 720p being 15 latent frames.
    assert size_shift((15, 90, 160), config) == pytest.approx(math.sqrt(720 * 1280 / 512**2) * math.sqrt(51 // 17 * 5))
    # Four times the area or four times the frames double it, whatever the reference.
    config = FlowConfig(shift_by_size=True, shift_reference=(3, 20, 30))
    once = size_shift((5, 10, 10), config)
    assert size_shift((5, 20, 20), config) == pytest.approx(2 * once)
    assert size_shift((20, 10, 10), config) == pytest.approx(2 * once)


@pytest.mark.parametrize(
    "wrong", [{"logit_mean": math.inf}, {"logit_std": -1.0}, {"logit_std": math.nan}, {"shift_reference": (1, 0, 64)}]
)
def test_config_names_the_key(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}="):
        FlowConfig(**wrong)
