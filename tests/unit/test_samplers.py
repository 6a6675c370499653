"""Samplers against diffusers' schedulers on a model of random numbers, and against Gaussians, whose answer is known."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from megasora.diffusion.flow import Flow, FlowConfig
from megasora.diffusion.gaussian import Gaussian, GaussianConfig, NoiseOf, Predict
from megasora.diffusion.samplers import SAMPLERS, ddim, ddpm, dpmpp, euler, guidance_at, guide, heun
from megasora.errors import ConfigError

FLOW = Flow(FlowConfig())
THEIR_PREDICTION = {"noise": "epsilon", "velocity": "v_prediction", "data": "sample"}
THEIR_SCHEDULE = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def no_noise(step: int, i: int, like: Tensor) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def seeded(seed: int) -> NoiseOf:
    return lambda step, i, x: torch.randn(x.shape, generator=torch.Generator().manual_seed(1000 * seed + 10 * step + i))


def wave(x: Tensor, t: float) -> Tensor:
    """A model's output that depends on everything and stays bounded."""
    return torch.sin(3 * x + 5 * t) + 0.3 * x.flip(-1)


def test_guidance() -> None:
    a, b = torch.tensor([1.0]), torch.tensor([3.0])
    assert guide(a, b, 1.0) == a
    assert guide(a, b, 0.0) == b
    assert guide(a, b, 2.0).item() == -1.0


def test_guidance_only_in_its_interval() -> None:
    assert [guidance_at(t, 4.0, (0.2, 0.8)) for t in (0.0, 0.1, 0.2, 0.5, 0.8, 0.9, 1.0)] == [1, 1, 4, 4, 4, 1, 1]
    assert guidance_at(0.0, 4.0, (0.0, 1.0)) == guidance_at(1.0, 4.0, (0.0, 1.0)) == 4.0


# Rectified flow


def test_euler_visits_the_shifted_times() -> None:
    times: list[float] = []

    def predict(x: list[Tensor], t: float) -> list[tuple[Tensor, None]]:
        times.append(t)
        return [(torch.ones_like(x[0]), None)]

    (x,) = euler(FLOW, predict, [torch.zeros(1)], steps=4, shift=3.0, noise_of=no_noise)
    assert times == pytest.approx([1, 0.9, 0.75, 0.5])  # 3t / (1 + 2t) of 1, 3/4, 1/2, 1/4
    assert x.item() == pytest.approx(-1)


def test_euler_bit_by_bit() -> None:
    noise = [torch.randn(3, 4), torch.randn(5, 2, 2)]
    t = torch.linspace(1, 0, 14, dtype=torch.float32)
    x = noise
    for now, following in pairwise((2.7 * t / (1 + (2.7 - 1) * t)).tolist()):
        x = [a + (following - now) * wave(a, now) for a in x]
    found = euler(FLOW, lambda x, t: [(wave(a, t), None) for a in x], noise, 13, 2.7, no_noise)
    assert all(torch.equal(a, b) for a, b in zip(found, x, strict=True))


def best_velocity(m: float, s: float) -> Predict:
    """For data N(m, s²), x_t ~ N((1-t)m, (1-t)²s² + t²); the flow of this velocity maps noise z to m + s·z."""

    def predict(x: list[Tensor], t: float) -> list[tuple[Tensor, None]]:
        variance = (1 - t) ** 2 * s**2 + t**2
        gain = (t - (1 - t) * s**2) / variance
        return [(gain * (a - (1 - t) * m) - m, None) for a in x]

    return predict


@pytest.mark.parametrize("sampler, order", [(euler, 1), (heun, 2)])
def test_flow_samplers_reach_a_gaussian_by_their_order(sampler: Callable, order: int) -> None:
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def error(steps: int, shift: float) -> float:
        (x,) = sampler(FLOW, best_velocity(2.0, 0.5), [z], steps, shift, no_noise)
        return (x - (2.0 + 0.5 * z)).abs().max().item()

    assert error(400, 1.0) < 0.01
    assert error(3, 1.0) > 0.01
    # Doubling the steps divides the error by 2^order.
    assert math.log2(error(40, 1.0) / error(80, 1.0)) == pytest.approx(order, abs=0.15)
    assert math.log2(error(80, 3.0) / error(160, 3.0)) == pytest.approx(order, abs=0.15)


def test_heun_never_asks_at_the_end() -> None:
    times: list[float] = []

    def predict(x: list[Tensor], t: float) -> list[tuple[Tensor, None]]:
        times.append(t)
        return [(x[0], None)]

    heun(FLOW, predict, [torch.ones(1)], 3, 1.0, no_noise)
    assert times == pytest.approx([1, 2 / 3, 2 / 3, 1 / 3, 1 / 3])


# Gaussian diffusion


def asks(prediction: str, variance: str, visited: list[int]) -> Predict:
    def predict(x: list[Tensor], t: float) -> list[tuple[Tensor, Tensor | None]]:
        visited.append(round(1000 * t))
        learned = variance == "learned_range"
        return [(wave(a, t), torch.cos(a + t) if learned else None) for a in x]

    return predict


@pytest.mark.parametrize(
    "prediction, variance, schedule, steps",
    [
        ("noise", "fixed_small", "linear", 50),
        ("velocity", "fixed_large", "linear", 33),
        ("data", "learned_range", "linear", 20),
        ("velocity", "learned_range", "cosine", 25),
        ("noise", "learned_range", "linear", 1000),
    ],
)
def test_ddpm_is_that_of_diffusers(prediction: str, variance: str, schedule: str, steps: int) -> None:
    theirs = DDPMScheduler(
        beta_schedule=THEIR_SCHEDULE[schedule],
        variance_type=variance,
        prediction_type=THEIR_PREDICTION[prediction],
        clip_sample=False,
        timestep_spacing="linspace",
    )
    theirs.set_timesteps(steps)
    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    x, generator = noise, torch.Generator().manual_seed(1)
    for t in theirs.timesteps.tolist():
        output = wave(x, t / 1000)
        if variance == "learned_range":
            output = torch.cat([output, torch.cos(x + t / 1000)], dim=1)
        x = theirs.step(output, t, x, generator=generator).prev_sample

    again = torch.Generator().manual_seed(1)
    visited: list[int] = []
    objective = Gaussian(GaussianConfig(schedule=schedule, prediction=prediction, variance=variance))
    predict = asks(prediction, variance, visited)
    (found,) = ddpm(objective, predict, [noise], steps, 1.0, lambda step, i, x: torch.randn(x.shape, generator=again))
    assert visited == theirs.timesteps.tolist()
    assert torch.allclose(found, x, rtol=1e-3, atol=1e-3 * x.abs().max().item())


@pytest.mark.parametrize(
    "prediction, eta, schedule", [("noise", 0.0, "linear"), ("velocity", 1.0, "cosine"), ("data", 0.5, "linear")]
)
def test_ddim_is_that_of_diffusers(prediction: str, eta: float, schedule: str) -> None:
    theirs = DDIMScheduler(
        beta_schedule=THEIR_SCHEDULE[schedule], prediction_type=THEIR_PREDICTION[prediction], clip_sample=False
    )
    # 28 steps of 1000 are 37 apart, 0 and 999 among them. Theirs takes the stride to be 1000 // steps: 27 makes it 37.
    steps, theirs.num_inference_steps = 28, 27
    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    x, noise_of = noise, seeded(3)
    for step, t in enumerate(range(999, -1, -37)):
        x = theirs.step(wave(x, t / 1000), t, x, eta, variance_noise=noise_of(step, 0, x)).prev_sample

    visited: list[int] = []
    objective = Gaussian(GaussianConfig(schedule=schedule, prediction=prediction))
    predict = asks(prediction, "fixed_small", visited)
    (found,) = ddim(objective, predict, [noise], steps, 1.0, noise_of if eta else no_noise, eta=eta)
    assert visited == list(range(999, -1, -37))
    assert torch.allclose(found, x, rtol=1e-3, atol=1e-3 * x.abs().max().item())


@pytest.mark.parametrize(
    "prediction, schedule, steps",
    [
        ("noise", "linear", 20),
        ("velocity", "linear", 7),
        ("data", "cosine", 30),
        ("noise", "linear", 1),
        ("data", "linear", 999),
    ],
)
def test_dpmpp_is_that_of_diffusers(prediction: str, schedule: str, steps: int) -> None:
    theirs = DPMSolverMultistepScheduler(
        beta_schedule=THEIR_SCHEDULE[schedule], prediction_type=THEIR_PREDICTION[prediction]
    )
    theirs.set_timesteps(steps)
    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    x = noise
    for t in theirs.timesteps.tolist():
        x = theirs.step(wave(x, t / 1000), t, x).prev_sample

    visited: list[int] = []
    objective = Gaussian(GaussianConfig(schedule=schedule, prediction=prediction))
    (found,) = dpmpp(objective, asks(prediction, "fixed_small", visited), [noise], steps, 1.0, no_noise)
    assert visited == theirs.timesteps.tolist()
    assert torch.allclose(found, x, rtol=1e-3, atol=1e-3 * x.abs().max().item())


def best_gaussian(objective: Gaussian, steps: int, m: float, s: float) -> Predict:
    """For data N(m, s²): the noise to expect in x_k, and as learned variance the true one of the chain of `steps`."""
    kept = torch.linspace(0, objective.config.steps - 1, steps, dtype=torch.float64).round().long()
    alpha_bar = objective.chain.alpha_bar[kept]
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])

    def predict(x: list[Tensor], t: float) -> list[tuple[Tensor, Tensor | None]]:
        k = kept.tolist().index(round(t * objective.config.steps))
        a, b = alpha_bar[k].item(), before[k].item()
        total = a * s**2 + 1 - a
        # x_{k-1} and x_k are jointly Gaussian: variances b·s² + 1 - b and total, covariance sqrt(a/b) of the former.
        prior = b * s**2 + 1 - b
        reverse = prior - (a / b) * prior**2 / total
        beta = 1 - a / b
        small = beta * (1 - b) / (1 - a) if k else reverse
        share = math.log(reverse / small) / math.log(beta / small)
        noise = [math.sqrt(1 - a) / total * (v - math.sqrt(a) * m) for v in x]
        return [(v, torch.full_like(v, 2 * share - 1)) for v in noise]

    return predict


@pytest.mark.parametrize("steps", [2, 4, 30])
def test_ddpm_with_the_true_reverse_variance_is_exact_in_any_number_of_steps(steps: int) -> None:
    objective = Gaussian(GaussianConfig(variance="learned_range", schedule="cosine"))
    (x,) = ddpm(objective, best_gaussian(objective, steps, 2.0, 0.5), [torch.randn(50_000)], steps, 1.0, seeded(0))
    # The last step alone takes the mean: of what is left there, var(x_0 | x_1), nothing is added.
    assert x.mean().item() == pytest.approx(2.0, abs=0.01)
    assert x.std().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("sampler, steps, bound", [(ddim, 200, 0.02), (dpmpp, 25, 0.02)])
def test_deterministic_samplers_map_noise_to_a_gaussian(sampler: Callable, steps: int, bound: float) -> None:
    m, s = 2.0, 0.5
    objective = Gaussian(GaussianConfig(schedule="cosine"))

    def predict(x: list[Tensor], t: float) -> list[tuple[Tensor, None]]:
        a = objective.chain.alpha_bar[round(1000 * t)].item()
        return [(math.sqrt(1 - a) / (a * s**2 + 1 - a) * (v - math.sqrt(a) * m), None) for v in x]

    z = torch.linspace(-2, 2, 9)
    (x,) = sampler(objective, predict, [z], steps, 1.0, no_noise)
    assert torch.allclose(x, m + s * z, atol=bound)
    (coarse,) = sampler(objective, predict, [z], 2, 1.0, no_noise)
    assert not torch.allclose(coarse, m + s * z, atol=bound)


EVERY = [(family, name) for family, samplers in SAMPLERS.items() for name in samplers]


@pytest.mark.parametrize("family, name", EVERY)
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_every_sampler_takes_tensors_of_any_shape_alike(family: str, name: str, steps: int) -> None:
    objective = FLOW if family == "flow" else Gaussian(GaussianConfig(variance="learned_range"))
    noise = [torch.randn(2, 3), torch.randn(4, 1, 2)]
    kept = [a.clone() for a in noise]
    predict: Predict = lambda x, t: [(wave(a, t), torch.cos(a)) for a in x]  # noqa: E731
    both = SAMPLERS[family][name](objective, predict, noise, steps, 1.0, seeded(0))
    assert [x.shape for x in both] == [x.shape for x in noise]
    assert all(torch.equal(a, b) for a, b in zip(noise, kept, strict=True)), "the noise was changed in place"
    alone = SAMPLERS[family][name](objective, predict, noise[1:], steps, 1.0, lambda step, i, x: seeded(0)(step, 1, x))
    assert torch.equal(both[1], alone[0])
    other = SAMPLERS[family][name](objective, predict, noise, steps, 1.0, seeded(1))
    assert torch.equal(both[1], other[1]) == (name != "ddpm" or steps == 1)


@pytest.mark.parametrize("name, most", [("ddpm", 20), ("ddim", 20), ("dpmpp", 19)])
def test_no_more_steps_than_the_chain_has(name: str, most: int) -> None:
    objective = Gaussian(GaussianConfig(steps=20))
    visited: list[float] = []

    def predict(x: list[Tensor], t: float) -> list[tuple[Tensor, None]]:
        visited.append(t)
        return [(a, None) for a in x]

    SAMPLERS["gaussian"][name](objective, predict, [torch.randn(3)], most, 1.0, seeded(0))
    assert visited == [k / 20 for k in range(19, 19 - most, -1)]
    with pytest.raises(ConfigError, match=rf"^steps={most + 1}: at most {most}"):
        SAMPLERS["gaussian"][name](objective, predict, [torch.randn(3)], most + 1, 1.0, seeded(0))
