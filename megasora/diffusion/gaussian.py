"""Discrete Gaussian diffusion: DDPM (Ho et al. 2020) with the learned variance, the cosine schedule and the respacing of
IDDPM (Nichol and Dhariwal 2021), the objective of DiT, Latte and Open-Sora 1.0.

Knows no model: tensors in, tensors out. Schedules are computed in fp64 and given in fp32. A chain's step k counts from 0, the
least noisy; k = 0 is x_1 in the papers. The model sees step k of all `steps` as timestep k / steps, fp32.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["noise", "velocity", "data"]
Variance = Literal["fixed_small", "fixed_large", "learned_range"]
# (tensors of any shape, t) -> for each its prediction and, with a learned variance, the variance's values
Predict = Callable[[list[Tensor], float], list[tuple[Tensor, Tensor | None]]]
# (step of the loop from 0, which tensor, a tensor of the wanted shape and device) -> standard normal noise
NoiseOf = Callable[[int, int, Tensor], Tensor]

HALF_BIN = 1 / 255  # of the last step's likelihood, IDDPM's for pixels in [-1, 1]
LARGEST_BETA = 0.999


@dataclass(frozen=True, kw_only=True)
class GaussianConfig:
    """The chain, what the model predicts, and its variance. The defaults are DDPM's; DiT has variance learned_range."""

    steps: int = 1000
    schedule: Literal["linear", "cosine"] = "linear"
    prediction: Prediction = "noise"  # velocity is sqrt(ā)·noise - sqrt(1 - ā)·data (Salimans and Ho 2022)
    variance: Variance = "fixed_small"  # small: of the posterior; large: beta; learned_range: between, by the model
    vlb_weight: float = 0.001  # of the variational bound that the learned variance is trained by
    min_snr_gamma: float = 0.0  # caps the weight of little noise (Hang et al. 2023, who take 5); 0 is off

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps={self.steps}: at least 2")
        for name in ("vlb_weight", "min_snr_gamma"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: at least 0")


def betas(config: GaussianConfig) -> Tensor:
    """[steps] fp64: the variance that each step adds.

    linear: DDPM's 1e-4 to 0.02, times 1000 / steps as in IDDPM's code, so that any number of steps ends in noise. cosine:
    IDDPM, eq. 17, with s = 0.008. Neither beyond 0.999.
    """
    if config.schedule == "linear":
        scale = 1000 / config.steps
        beta = torch.linspace(1e-4 * scale, 0.02 * scale, config.steps, dtype=torch.float64)
    else:
        u = torch.arange(config.steps + 1, dtype=torch.float64) / config.steps
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
        beta = 1 - f[1:] / f[:-1]
    return beta.clamp(max=LARGEST_BETA)


def at(table: Tensor, k: Tensor) -> Tensor:
    """The fp32 values of a [K] table at steps k, of k's shape."""
    return table.float().to(k.device, non_blocking=True)[k]


@dataclass(frozen=True)
class Chain:
    """The closed forms of a chain of K steps whose x_k is sqrt(ā_k)·data + sqrt(1 - ā_k)·noise.

    It is given by ā alone: a chain of fewer steps with the same marginals is a selection of it. All methods take steps k as
    an int64 tensor that broadcasts against data (0-d for one step) and give tensors of data's shape unless said otherwise.
    """

    alpha_bar: Tensor  # [K] fp64, falling
    prediction: Prediction
    variance: Variance

    def spaced(self, kept: Sequence[int]) -> "Chain":
        """The chain of the steps in `kept`, rising: betas follow from what is left of ā (IDDPM, eq. 19)."""
        return Chain(self.alpha_bar[torch.tensor(kept)], self.prediction, self.variance)

    @cached_property
    def previous(self) -> Tensor:
        """[K] fp64: ā of the step before, 1 for the first."""
        return torch.cat([self.alpha_bar.new_ones(1), self.alpha_bar[:-1]])

    @cached_property
    def beta(self) -> Tensor:
        """[K] fp64."""
        return 1 - self.alpha_bar / self.previous

    @cached_property
    def posterior_variance(self) -> Tensor:
        """[K] fp64: of x_{k-1} given x_k and data (DDPM, eq. 7); 0 for the first."""
        return self.beta * (1 - self.previous) / (1 - self.alpha_bar)

    @cached_property
    def log_small(self) -> Tensor:
        """[K] fp64: log of the posterior's variance, the first, which is 0, being given the second's as in IDDPM's code."""
        small = self.posterior_variance
        return torch.cat([small[1:2], small[1:]]).clamp(min=1e-20).log() if len(small) > 1 else self.beta.log()

    @cached_property
    def log_large(self) -> Tensor:
        """[K] fp64: log beta."""
        return self.beta.log()

    @cached_property
    def snr(self) -> Tensor:
        """[K] fp64: signal to noise, ā / (1 - ā)."""
        return self.alpha_bar / (1 - self.alpha_bar)

    def corrupt(self, data: Tensor, noise: Tensor, k: Tensor) -> Tensor:
        """x_k of the given data and noise (DDPM, eq. 4)."""
        return at(self.alpha_bar.sqrt(), k) * data + at((1 - self.alpha_bar).sqrt(), k) * noise

    def target(self, data: Tensor, noise: Tensor, k: Tensor) -> Tensor:
        """What the model should predict."""
        if self.prediction == "noise":
            return noise
        if self.prediction == "data":
            return data
        return at(self.alpha_bar.sqrt(), k) * noise - at((1 - self.alpha_bar).sqrt(), k) * data

    def data_of(self, prediction: Tensor, noisy: Tensor, k: Tensor) -> Tensor:
        """The data that a prediction means, fp32."""
        prediction, noisy = prediction.float(), noisy.float()
        if self.prediction == "noise":
            return at(self.alpha_bar.rsqrt(), k) * noisy - at((1 / self.alpha_bar - 1).sqrt(), k) * prediction
        if self.prediction == "data":
            return prediction
        return at(self.alpha_bar.sqrt(), k) * noisy - at((1 - self.alpha_bar).sqrt(), k) * prediction

    def posterior_mean(self, data: Tensor, noisy: Tensor, k: Tensor) -> Tensor:
        """Mean of x_{k-1} given x_k and data (DDPM, eq. 7); of the data itself for the first step."""
        return at(self.data_share, k) * data + at(self.noisy_share, k) * noisy

    @cached_property
    def data_share(self) -> Tensor:
        """[K] fp64: what data counts in the posterior's mean."""
        return self.beta * self.previous.sqrt() / (1 - self.alpha_bar)

    @cached_property
    def noisy_share(self) -> Tensor:
        """[K] fp64: what x_k counts in the posterior's mean."""
        return (1 - self.previous) * (1 - self.beta).sqrt() / (1 - self.alpha_bar)

    def log_variance(self, k: Tensor, values: Tensor | None) -> Tensor:
        """Log of the variance of the model's x_{k-1}, of k's shape, or of the shape of the learned `values`.

        learned_range (IDDPM, eq. 15): -1 is the posterior's, 1 is beta, between them by the logarithm. fixed_large starts
        with the posterior's second, for a better likelihood of data, as in IDDPM's code.
        """
        if self.variance == "fixed_small":
            return at(self.log_small, k)
        if self.variance == "fixed_large":
            return at(torch.cat([self.log_small[:1], self.log_large[1:]]), k)
        if values is None:
            raise ValueError("variance=learned_range: the prediction has no values for it")
        share = (values.float() + 1) / 2
        return share * at(self.log_large, k) + (1 - share) * at(self.log_small, k)

    def vlb_bits(self, prediction: Tensor, values: Tensor | None, data: Tensor, noisy: Tensor, k: Tensor) -> Tensor:
        """Each value's term of the variational bound at step k, in bits, fp32 (DDPM, eq. 5).

        For k > 0 the divergence of the model's x_{k-1} from the posterior. For k = 0 the code length of the data rounded to
        bins of 2/255, as IDDPM has it for pixels and DiT for latents too. Unlike theirs, the bins go on beyond [-1, 1],
        where latents do, and neither the distribution function nor its logarithm is approximated or cut off.
        """
        data = data.float()
        error = data - self.data_of(prediction, noisy, k)
        log_variance = self.log_variance(k, values)
        true = at(self.log_small, k)
        means = at(self.data_share, k) * error  # their difference: both have the same share of x_k
        divergence = 0.5 * (
            log_variance - true - 1 + torch.exp(true - log_variance) + means.square() * torch.exp(-log_variance)
        )
        # Elsewhere the error may be too large for the code length, whose gradient would not be a number.
        length = code_length(torch.where(k == 0, error, torch.zeros_like(error)), log_variance)
        return torch.where(k == 0, length, divergence) / math.log(2)

    def prior_bits(self, data: Tensor) -> Tensor:
        """Each value's divergence of the last x_k from standard normal noise, in bits; nothing can train it."""
        a = self.alpha_bar[-1].item()
        return 0.5 * (a * data.float().square() - a - math.log1p(-a)) / math.log(2)


def code_length(error: Tensor, log_variance: Tensor) -> Tensor:
    """-log of a Gaussian's mass, in nats, in a bin of width 2/255 whose middle is `error` away from the mean.

    Both ends are taken on the lower side, where neither the mass nor the difference loses its digits.
    """
    scale = torch.exp(-0.5 * log_variance)
    upper = torch.special.log_ndtr((HALF_BIN - error.abs()) * scale)
    lower = torch.special.log_ndtr((-HALF_BIN - error.abs()) * scale)
    return -upper - torch.log(-torch.expm1(lower - upper))


@dataclass(frozen=True)
class Gaussian:
    """The discrete diffusion as an objective: see `megasora.diffusion.objective`. `chain` has the closed forms."""

    config: GaussianConfig

    @cached_property
    def chain(self) -> Chain:
        """All steps of the config."""
        return Chain(torch.cumprod(1 - betas(self.config), 0), self.config.prediction, self.config.variance)

    @property
    def outputs(self) -> int:
        """2 with a learned variance, else 1: values that the model gives for each value of its input."""
        return 2 if self.config.variance == "learned_range" else 1

    def draw(self, z: Tensor, shift: float) -> Tensor:
        """Standard normal z -> one of the timesteps k / steps, each as likely, fp32. There is nothing to shift."""
        k = (torch.special.ndtr(z.double()) * self.config.steps).floor().clamp(max=self.config.steps - 1)
        return (k / self.config.steps).float()

    def step_of(self, t: Tensor) -> Tensor:
        """Timestep -> k, int64."""
        return torch.round(t.float() * self.config.steps).long().clamp(0, self.config.steps - 1)

    def corrupt(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_k at the nearest step of t; t broadcasts against data."""
        return self.chain.corrupt(data, noise, self.step_of(t))

    def loss(self, prediction: Tensor, data: Tensor, noise: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """[L] fp32: L_simple, and for a learned variance the hybrid L_simple + vlb_weight·L_vlb of IDDPM (eq. 16).

        prediction [L, P], or [L, 2P] with a learned variance; data, noise, noisy [L, P]; t [L, 1]. L_vlb is the sum over
        all steps in bits per value, estimated by `steps` times the drawn one's, and trains the variance alone. This is
        RESCALED_MSE of the code of IDDPM, whose factor steps / 1000 is `vlb_weight` 0.001; DiT has MSE, without the
        factor, which is the same for its 1000 steps.
        """
        k = self.step_of(t)  # [L, 1]
        prediction = prediction.float()
        mean, values = prediction.chunk(2, dim=-1) if self.outputs == 2 else (prediction, None)  # [L, P] each
        simple = (mean - self.chain.target(data, noise, k)).square().mean(-1)  # [L]
        if self.config.min_snr_gamma:
            simple = simple * at(self.min_snr_weight(), k).squeeze(-1)
        if values is None:
            return simple
        vlb = self.chain.vlb_bits(mean.detach(), values, data, noisy, k).mean(-1)  # [L]
        return simple + self.config.vlb_weight * self.config.steps * vlb

    def min_snr_weight(self) -> Tensor:
        """[steps] fp64: min(snr, gamma) of the error of data, in terms of what is predicted (Hang et al. 2023)."""
        snr = self.chain.snr
        share = {"data": torch.ones_like(snr), "noise": snr, "velocity": snr + 1}[self.config.prediction]
        return snr.clamp(max=self.config.min_snr_gamma) / share

    @torch.no_grad()
    def bits_per_dimension(self, predict: Predict, data: list[Tensor], noise_of: NoiseOf) -> list[float]:
        """The whole variational bound of each tensor, of any shape, in bits per value: prior, divergences, code length.

        The model is asked once for every step of the chain, from the last to the first.
        """
        totals = [self.chain.prior_bits(x).mean() for x in data]
        for step, k in enumerate(reversed(range(self.config.steps))):
            index = torch.full((), k, device=data[0].device)
            noisy = [self.chain.corrupt(x, noise_of(step, i, x), index) for i, x in enumerate(data)]
            for i, (prediction, values) in enumerate(predict(noisy, k / self.config.steps)):
                totals[i] = totals[i] + self.chain.vlb_bits(prediction, values, data[i], noisy[i], index).mean()
        return [total.item() for total in totals]
