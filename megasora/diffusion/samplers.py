"""From noise to data: the samplers of each objective, and classifier-free guidance.

A sampler takes the objective, `predict`, the noise (tensors of any shape), the number of steps, the shift of the timesteps
and `noise_of`, the source of further noise, so that its result is a function of a seed. `predict(x, t)` gives, for every
tensor of the list `x` at timestep t, the model's prediction, already guided, and the variance's values or None.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from megasora.diffusion.flow import Flow, shift_timestep
from megasora.diffusion.gaussian import Gaussian, NoiseOf, Predict
from megasora.errors import ConfigError

Sampler = Callable[..., list[Tensor]]  # (objective, predict, noise, steps, shift, noise_of)


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): unconditional + scale · (conditional - unconditional)."""
    return unconditional + scale * (conditional - unconditional)


def guidance_at(t: float, scale: float, interval: tuple[float, float]) -> float:
    """The scale inside the interval of timesteps, ends included, and 1 outside (Kynkäänniemi et al. 2024)."""
    low, high = interval
    return scale if low <= t <= high else 1.0


def euler(
    objective: Flow, predict: Predict, noise: list[Tensor], steps: int, shift: float, noise_of: NoiseOf
) -> list[Tensor]:
    """Integrates the velocity from t = 1 to 0 in `steps` Euler steps, on a grid bent by `shift`."""
    x = noise
    for t, following in pairwise(times(steps, shift)):
        x = [a + (following - t) * v for a, (v, _) in zip(x, predict(x, t), strict=True)]
    return x


def heun(
    objective: Flow, predict: Predict, noise: list[Tensor], steps: int, shift: float, noise_of: NoiseOf
) -> list[Tensor]:
    """Heun's second-order method on Euler's grid: 2·steps - 1 predictions (Karras et al. 2022, algorithm 1).

    The last step is Euler's, because no model is trained at t = 0.
    """
    x = noise
    for t, following in pairwise(times(steps, shift)):
        slopes = [v for v, _ in predict(x, t)]
        ahead = [a + (following - t) * v for a, v in zip(x, slopes, strict=True)]
        if following > 0:
            ends = [v for v, _ in predict(ahead, following)]
            ahead = [a + (following - t) * 0.5 * (v + w) for a, v, w in zip(x, slopes, ends, strict=True)]
        x = ahead
    return x


def times(steps: int, shift: float) -> list[float]:
    """From 1 to 0, steps + 1 timesteps of fp32 precision, bent by `shift`."""
    return shift_timestep(torch.linspace(1, 0, steps + 1, dtype=torch.float32), shift).tolist()


def ddpm(
    objective: Gaussian, predict: Predict, noise: list[Tensor], steps: int, shift: float, noise_of: NoiseOf
) -> list[Tensor]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) of the chain respaced to `steps`. The last step adds no noise."""
    kept = spacing(objective, steps)
    chain = objective.chain.spaced(kept)
    x = noise
    for step, k in enumerate(reversed(range(steps))):
        index = torch.tensor(k)
        outputs = predict(x, kept[k] / objective.config.steps)
        means = [
            chain.posterior_mean(chain.data_of(prediction, a, index), a, index)
            for a, (prediction, _) in zip(x, outputs, strict=True)
        ]
        if k == 0:
            return means
        scales = [torch.exp(0.5 * chain.log_variance(index, values)) for _, values in outputs]
        x = [a + s * noise_of(step, i, a) for i, (a, s) in enumerate(zip(means, scales, strict=True))]
    return x


def ddim(
    objective: Gaussian,
    predict: Predict,
    noise: list[Tensor],
    steps: int,
    shift: float,
    noise_of: NoiseOf,
    eta: float = 0.0,
) -> list[Tensor]:
    """Song et al. 2021, eq. 12, on the steps of `ddpm`. eta 0 adds no noise, 1 as much as the posterior has."""
    kept = spacing(objective, steps)
    chain = objective.chain.spaced(kept)
    x = noise
    for step, k in enumerate(reversed(range(steps))):
        alpha_bar, previous = chain.alpha_bar[k].item(), chain.previous[k].item()
        sigma = eta * math.sqrt(chain.posterior_variance[k].item())
        direction = math.sqrt(max(0.0, 1 - previous - sigma**2))
        following = []
        for i, (a, (prediction, _)) in enumerate(zip(x, predict(x, kept[k] / objective.config.steps), strict=True)):
            data = chain.data_of(prediction, a, torch.tensor(k))
            rest = (a - math.sqrt(alpha_bar) * data) / math.sqrt(1 - alpha_bar)  # the noise that the prediction means
            a = math.sqrt(previous) * data + direction * rest
            following.append(a + sigma * noise_of(step, i, a) if sigma > 0 else a)
        x = following
    return x


def dpmpp(
    objective: Gaussian, predict: Predict, noise: list[Tensor], steps: int, shift: float, noise_of: NoiseOf
) -> list[Tensor]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), deterministic. First order at both ends: the first step has no
    history, and at the last, which goes to no noise at all, second order has no meaning."""
    visited = reversed(spacing(objective, steps, first=False))
    alpha_bars = objective.chain.alpha_bar.tolist()
    x, last, last_h = noise, noise, math.inf  # after an infinite step, history counts nothing
    for k, following in pairwise([*visited, -1]):
        outputs = predict(x, k / objective.config.steps)
        data = [
            objective.chain.data_of(prediction, a, torch.tensor(k))
            for a, (prediction, _) in zip(x, outputs, strict=True)
        ]
        if following < 0:
            return data
        source, goal = alpha_bars[k], alpha_bars[following]
        h = 0.5 * math.log(goal / (1 - goal) * (1 - source) / source)  # step of λ = log(alpha / sigma)
        slopes = [d + h / (2 * last_h) * (d - before) for d, before in zip(data, last, strict=True)]
        keep, take = math.sqrt((1 - goal) / (1 - source)), -math.sqrt(goal) * math.expm1(-h)
        x = [keep * a + take * slope for a, slope in zip(x, slopes, strict=True)]
        last, last_h = data, h
    return x


def spacing(objective: Gaussian, steps: int, first: bool = True) -> list[int]:
    """`steps` of the chain's steps, rising, evenly spread over all of them with both ends, as IDDPM respaces; or with all
    but the first, which DPM-Solver++ leaps over. Raises ConfigError when there are too few."""
    total, skipped = objective.config.steps, 0 if first else 1
    if steps > total - skipped:
        raise ConfigError(f"steps={steps}: at most {total - skipped}, for the model learned a chain of {total}")
    points = torch.linspace(total - 1, 0, steps + skipped, dtype=torch.float64).round().long().flip(0)
    return points[skipped:].tolist()


SAMPLERS: dict[str, dict[str, Sampler]] = {
    "flow": {"euler": euler, "heun": heun},
    "gaussian": {"ddpm": ddpm, "ddim": ddim, "dpmpp": dpmpp},
}
