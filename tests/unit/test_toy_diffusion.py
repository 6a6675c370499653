"""Each objective learns eight Gaussians on a circle, and each of its samplers gives them back."""

import math
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from megasora.diffusion.flow import Flow, FlowConfig
from megasora.diffusion.gaussian import Gaussian, GaussianConfig, Predict
from megasora.diffusion.samplers import SAMPLERS

SPREAD = 0.1
OBJECTIVES: dict[str, Flow | Gaussian] = {
    "flow": Flow(FlowConfig()),
    "noise": Gaussian(GaussianConfig()),
    "velocity": Gaussian(GaussianConfig(schedule="cosine", prediction="velocity", variance="fixed_large")),
    "data": Gaussian(GaussianConfig(prediction="data", min_snr_gamma=5.0)),
    "learned": Gaussian(GaussianConfig(steps=100, variance="learned_range", vlb_weight=0.01)),
}
STEPS = {"euler": 40, "heun": 15, "ddpm": 50, "ddim": 30, "dpmpp": 15}
CASES = [(name, sampler) for name in OBJECTIVES for sampler in SAMPLERS["flow" if name == "flow" else "gaussian"]]


def circle(n: int, generator: torch.Generator) -> Tensor:
    """[n, 2] points of the mixture."""
    angle = torch.randint(8, (n,), generator=generator) * (math.pi / 4)
    return torch.stack([angle.cos(), angle.sin()], dim=-1) + SPREAD * torch.randn(n, 2, generator=generator)


class Toy(nn.Module):
    """[n, 2] noisy points and [n, 1] timesteps -> [n, outputs]."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 12, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, outputs)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t * math.pi * 2.0 ** torch.arange(-1, 5)  # [n, 6]
        return self.layers(torch.cat([x, angle.sin(), angle.cos()], dim=-1))


def untrained(name: str) -> Toy:
    torch.manual_seed(0)
    return Toy(2 * OBJECTIVES[name].outputs)


@cache
def trained(name: str) -> Toy:
    objective, steps = OBJECTIVES[name], 1000
    model, generator = untrained(name), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        data = circle(512, generator)
        noise = torch.randn(512, 2, generator=generator)
        t = objective.draw(torch.randn(512, 1, generator=generator), 1.0)
        noisy = objective.corrupt(data, noise, t)
        loss = objective.loss(model(noisy, t), data, noise, noisy, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def predictor(name: str, model: Toy) -> Predict:
    def predict(x: list[Tensor], t: float) -> list[tuple[Tensor, Tensor | None]]:
        output = model(x[0], torch.full((len(x[0]), 1), t))
        return [(output[:, :2], output[:, 2:] if OBJECTIVES[name].outputs == 2 else None)]

    return predict


@torch.no_grad()
def sample(name: str, sampler: str, model: Toy) -> Tensor:
    """[2000, 2] points."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(2000, 2, generator=generator)
    run = SAMPLERS["flow" if name == "flow" else "gaussian"][sampler]
    (x,) = run(
        OBJECTIVES[name],
        predictor(name, model),
        [noise],
        STEPS[sampler],
        1.0,
        lambda step, i, x: torch.randn(x.shape, generator=generator),
    )
    return x


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2·E|a - b| - E|a - a'| - E|b - b'|: 0 for the same distribution (Székely and Rizzo 2013)."""
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


def near(x: Tensor) -> float:
    """The share of points that lie within three deviations of a middle."""
    angle = torch.arange(8) * (math.pi / 4)
    middles = torch.stack([angle.cos(), angle.sin()], dim=-1)
    return (torch.cdist(x, middles).amin(-1) < 3 * SPREAD).float().mean().item()


@pytest.mark.parametrize("name, sampler", CASES)
def test_learned_and_sampled(name: str, sampler: str) -> None:
    truth = circle(2000, torch.Generator().manual_seed(3))
    found = sample(name, sampler, trained(name))
    raw = sample(name, sampler, untrained(name))
    # Another draw of the truth is at 0.001, all of it but a hundredth near; noise is at 0.06, a fifth of it near.
    assert energy_distance(found, truth) < 0.012
    assert near(found) > 0.55
    assert not energy_distance(raw, truth) < 0.04  # or not a number: nothing holds an untrained variance back
    assert near(raw) < 0.3


def test_a_learned_variance_shortens_the_code() -> None:
    predict, generator = predictor("learned", trained("learned")), torch.Generator().manual_seed(4)
    data = circle(300, generator)

    def with_variance(value: float | None) -> float:
        def changed(x: list[Tensor], t: float) -> list[tuple[Tensor, Tensor | None]]:
            ((prediction, values),) = predict(x, t)
            assert values is not None
            return [(prediction, values if value is None else torch.full_like(values, value))]

        objective, noise = OBJECTIVES["learned"], torch.Generator().manual_seed(5)
        assert isinstance(objective, Gaussian)
        return objective.bits_per_dimension(changed, [data], lambda *_: torch.randn(300, 2, generator=noise))[0]

    learned, posterior, beta = with_variance(None), with_variance(-1.0), with_variance(1.0)
    assert learned < min(posterior, beta)
