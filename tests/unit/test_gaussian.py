"""The Gaussian diffusion against diffusers' schedulers, Bayes' rule on Gaussians, and bounds that are known."""

import itertools
import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from megasora.diffusion.gaussian import Chain, Gaussian, GaussianConfig, betas, code_length
from megasora.diffusion.objective import Objective

PREDICTIONS = ("noise", "velocity", "data")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")
THEIR_SCHEDULE = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def scheduler(schedule: str) -> DDPMScheduler:
    return DDPMScheduler(beta_schedule=THEIR_SCHEDULE[schedule])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_corrupt_and_velocity_are_those_of_diffusers(schedule: str) -> None:
    theirs, ours = scheduler(schedule), Gaussian(GaussianConfig(schedule=schedule, prediction="velocity"))
    data, noise = torch.randn(1000, 7), torch.randn(1000, 7)
    k = torch.arange(1000)
    t = (k / 1000)[:, None]
    assert torch.allclose(betas(ours.config).float(), theirs.betas, rtol=1e-4)
    assert torch.allclose(ours.corrupt(data, noise, t), theirs.add_noise(data, noise, k), atol=2e-5)
    target = ours.chain.target(data, noise, k[:, None])
    assert torch.allclose(target, theirs.get_velocity(data, noise, k), atol=2e-5)


@pytest.mark.parametrize("steps", [100, 4000])
def test_any_number_of_linear_steps_ends_in_the_same_noise(steps: int) -> None:
    reference = Gaussian(GaussianConfig()).chain.alpha_bar
    chain = Gaussian(GaussianConfig(steps=steps)).chain
    assert chain.alpha_bar[-1].log().item() == pytest.approx(reference[-1].log().item(), rel=0.12)
    assert chain.alpha_bar[steps // 2 - 1].log().item() == pytest.approx(reference[499].log().item(), rel=0.12)


def test_timesteps_are_uniform_steps() -> None:
    objective: Objective = Gaussian(GaussianConfig(steps=10))
    z = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    t = objective.draw(z, shift=3.0)
    assert t.dtype == torch.float32
    expected = [math.floor(10 * 0.5 * (1 + math.erf(value / math.sqrt(2)))) / 10 for value in z[:1000].tolist()]
    assert t[:1000].tolist() == pytest.approx(expected)
    share = torch.bincount((t * 10).round().long()) / len(z)
    assert torch.allclose(share, torch.full((10,), 0.1), atol=0.004)
    assert objective.draw(torch.tensor([-40.0, 40.0]), 1.0).tolist() == pytest.approx([0.0, 0.9])
    assert objective.draw(torch.randn(2, 3), 1.0).shape == (2, 3)


@pytest.mark.parametrize("steps", [7, 1000, 4000])
def test_every_timestep_is_known_again(steps: int) -> None:
    k = torch.arange(steps)
    assert torch.equal(Gaussian(GaussianConfig(steps=steps)).step_of((k.double() / steps).float()), k)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_posterior_by_bayes_rule(schedule: str) -> None:
    config = GaussianConfig(schedule=schedule)
    chain, beta = Gaussian(config).chain, betas(config)
    data, noisy = 0.7, -1.3
    for k in (1, 2, 500, 998):
        # Prior N(√ā·data, 1 - ā) of x_{k-1}, likelihood N(x_k; √α·x_{k-1}, β): precisions add.
        before, alpha = torch.prod(1 - beta[:k]).item(), 1 - beta[k].item()
        precision = 1 / (1 - before) + alpha / beta[k].item()
        mean = (math.sqrt(before) * data / (1 - before) + math.sqrt(alpha) * noisy / beta[k].item()) / precision
        ours = chain.posterior_mean(torch.tensor(data), torch.tensor(noisy), torch.tensor(k))
        assert ours.item() == pytest.approx(mean, rel=1e-5)
        assert chain.posterior_variance[k].item() == pytest.approx(1 / precision, rel=1e-9)
        assert chain.beta[k].item() == pytest.approx(beta[k].item(), rel=1e-9)
    assert chain.posterior_variance[0] == 0
    assert chain.posterior_mean(torch.tensor(data), torch.tensor(noisy), torch.tensor(0)).item() == pytest.approx(data)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_prediction_gives_the_data(prediction: str) -> None:
    chain = Gaussian(GaussianConfig(prediction=prediction)).chain
    data, noise, k = torch.randn(1000, 5), torch.randn(1000, 5), torch.arange(1000)[:, None]
    noisy = chain.corrupt(data, noise, k)
    found = chain.data_of(chain.target(data, noise, k), noisy, k)
    assert torch.allclose(found, data, atol=1e-4)


def test_learned_variance_lies_between_posterior_and_beta() -> None:
    chain = Gaussian(GaussianConfig(variance="learned_range")).chain
    k = torch.arange(1, 1000)
    for value, expected in (
        (-1.0, chain.posterior_variance[1:]),
        (1.0, chain.beta[1:]),
        (0.0, (chain.posterior_variance * chain.beta).sqrt()[1:]),
    ):
        variance = chain.log_variance(k, torch.full((999,), value)).exp()
        assert torch.allclose(variance, expected.float(), rtol=1e-5)
    with pytest.raises(ValueError, match="learned_range"):
        chain.log_variance(k, None)


@pytest.mark.parametrize("prediction, variance", [*itertools.product(PREDICTIONS, VARIANCES)])
def test_loss_against_distributions(prediction: str, variance: str) -> None:
    config = GaussianConfig(steps=200, prediction=prediction, variance=variance, vlb_weight=0.01)
    objective, chain = Gaussian(config), Gaussian(config).chain
    generator = torch.Generator().manual_seed(1)
    k = torch.arange(1, 200)
    t = (k / 200)[:, None]
    data, noise = torch.randn(2, 199, 6, generator=generator)
    noisy = objective.corrupt(data, noise, t)
    output = torch.randn(199, 6 * objective.outputs, generator=generator).requires_grad_()
    mean, values = output[:, :6].double(), output[:, 6:].double()

    a, b = chain.alpha_bar[k, None].sqrt(), (1 - chain.alpha_bar[k, None]).sqrt()
    target = {"noise": noise, "velocity": a * noise - b * data, "data": data}[prediction]
    expected = (mean - target).square().mean(-1)
    if variance == "learned_range":
        frozen = mean.detach()
        x = noisy.double()
        guess = {"noise": (x - b * frozen) / a, "velocity": a * x - b * frozen, "data": frozen}[prediction]
        small, large = chain.posterior_variance[k, None], chain.beta[k, None]
        learned = large ** ((values + 1) / 2) * small ** ((1 - values) / 2)
        before, beta = chain.alpha_bar[k - 1, None], chain.beta[k, None]
        shares = before.sqrt() * beta / b**2, (1 - beta).sqrt() * (1 - before) / b**2
        truth = Normal(shares[0] * data.double() + shares[1] * x, small.sqrt())
        model = Normal(shares[0] * guess + shares[1] * x, learned.sqrt())
        expected = expected + 0.01 * 200 * kl_divergence(truth, model).mean(-1) / math.log(2)

    loss = objective.loss(output, data, noise, noisy, t)
    assert loss.shape == (199,)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss.double(), expected, rtol=1e-3)
    (ours,) = torch.autograd.grad(loss.sum(), output, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected.sum(), output)
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)  # the bound leaves the mean's prediction alone


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_the_error_of_data_alike(prediction: str) -> None:
    config = GaussianConfig(prediction=prediction, min_snr_gamma=5.0)
    objective = Gaussian(config)
    k = torch.arange(0, 1000, 10)
    t = (k / 1000)[:, None]
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 100, 8, generator=generator)
    guess = data + 0.1 * torch.randn(100, 8, generator=generator)
    noisy = objective.corrupt(data, noise, t)
    # The prediction that means `guess`: the target of the noise that would have led from there to `noisy`.
    a = objective.chain.alpha_bar[k, None]
    implied = (noisy - a.sqrt() * guess) / (1 - a).sqrt()
    loss = objective.loss(objective.chain.target(guess, implied.float(), k[:, None]), data, noise, noisy, t)
    snr = compute_snr(scheduler("linear"), k)
    assert torch.allclose(loss, snr.clamp(max=5) * (guess - data).square().mean(-1), rtol=5e-3)


def test_min_snr_leaves_the_bound_alone() -> None:
    data, noise, output = torch.randn(4, 6), torch.randn(4, 6), torch.randn(4, 12)
    t = torch.tensor([0.1, 0.2, 0.5, 0.9])[:, None]
    losses = {}
    for gamma, weight in itertools.product((0.0, 5.0), (0.0, 0.001)):
        config = GaussianConfig(variance="learned_range", min_snr_gamma=gamma, vlb_weight=weight)
        noisy = Gaussian(config).corrupt(data, noise, t)
        losses[gamma, weight] = Gaussian(config).loss(output, data, noise, noisy, t)
    bound = losses[0.0, 0.001] - losses[0.0, 0.0]
    assert torch.allclose(losses[5.0, 0.001] - losses[5.0, 0.0], bound, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(losses[5.0, 0.0], losses[0.0, 0.0])


def test_code_length_is_the_mass_of_a_bin() -> None:
    deviation = 0.013
    edges = torch.arange(-400, 401, dtype=torch.float64) * 2 / 255
    length = code_length(edges.float(), torch.tensor(2 * math.log(deviation)))
    normal = Normal(torch.zeros((), dtype=torch.float64), deviation)
    mass = normal.cdf(edges + 1 / 255) - normal.cdf(edges - 1 / 255)
    likely = mass > 1e-10
    assert torch.allclose(length[likely].double(), -mass[likely].log(), rtol=1e-5)
    assert torch.exp(-length).sum().item() == pytest.approx(1.0, abs=1e-5)
    # Far away, where no mass is left in fp32, it is a number still, and says which way is better.
    error = torch.tensor([-2.0, 2.0, 30.0], requires_grad=True)
    log_variance = torch.full((3,), 2 * math.log(0.01), requires_grad=True)
    far = code_length(error, log_variance)
    slope, widening = torch.autograd.grad(far.sum(), (error, log_variance))
    inner = (error.detach().abs() - 1 / 255) / 0.01
    assert torch.allclose(far.detach(), inner.square() / 2, rtol=0.01)
    assert torch.equal(slope.sign(), error.sign())
    assert (widening < 0).all()


def spread(n: int) -> Tensor:
    """[n] numbers that lie as those of a standard normal should, with its mean and variance."""
    z = Normal(0.0, 1.0).icdf((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    return (z / z.std(correction=0)).float()


def gaussian_data(chain: Chain, mean: float, deviation: float, noisy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Data ~ N(mean, deviation²): the best prediction for each x_k, fp64, and the variance of data given x_k."""
    a, s2 = chain.alpha_bar[k], deviation**2
    total = a * s2 + 1 - a
    guess = mean + a.sqrt() * s2 / total * (noisy.double() - a.sqrt() * mean)
    implied = (noisy.double() - a.sqrt() * guess) / (1 - a).sqrt()
    prediction = {"noise": implied, "data": guess, "velocity": a.sqrt() * implied - (1 - a).sqrt() * guess}
    return prediction[chain.prediction], s2 * (1 - a) / total


@pytest.mark.parametrize("prediction, variance", [*zip(PREDICTIONS, VARIANCES, strict=True), ("noise", "fixed_small")])
def test_bound_of_a_gaussian_is_the_sum_of_known_terms(prediction: str, variance: str) -> None:
    steps, mean, deviation = 60, 0.4, 0.6
    config = GaussianConfig(steps=steps, schedule="cosine", prediction=prediction, variance=variance)
    objective, chain = Gaussian(config), Gaussian(config).chain
    generator = torch.Generator().manual_seed(0)
    z = spread(20_000)
    data = mean + deviation * z
    visited = []

    def predict(x: list[Tensor], t: float) -> list[tuple[Tensor, Tensor | None]]:
        k = torch.tensor(round(t * steps))
        visited.append(int(k))
        found = gaussian_data(chain, mean, deviation, x[0], k)[0].float()
        return [(found, torch.full_like(found, 0.3) if variance == "learned_range" else None)]

    total = objective.bits_per_dimension(
        predict, [data], lambda step, i, x: z[torch.randperm(len(z), generator=generator)]
    )
    assert visited == list(reversed(range(steps)))

    a = chain.alpha_bar[-1]
    second_moment = mean**2 + deviation**2
    expected = 0.5 * (a * second_moment + (1 - a) - 1 - torch.log(1 - a))  # of the prior, in nats
    for k in range(1, steps):
        _, doubt = gaussian_data(chain, mean, deviation, torch.zeros(1), torch.tensor(k))
        beta, small, before = chain.beta[k], chain.posterior_variance[k], chain.alpha_bar[k - 1]
        p = {"fixed_small": small, "fixed_large": beta, "learned_range": beta**0.65 * small**0.35}[variance]
        share = before.sqrt() * beta / (1 - chain.alpha_bar[k])
        expected = expected + 0.5 * (torch.log(p / small) + small / p - 1 + share**2 * doubt / p)
    # The last: the mass of the bin around data, whose distance from the best guess is N(0, doubt).
    _, doubt = gaussian_data(chain, mean, deviation, torch.zeros(1), torch.tensor(0))
    small, beta = chain.posterior_variance[1], chain.beta[0]
    p = {"fixed_small": small, "fixed_large": small, "learned_range": beta**0.65 * small**0.35}[variance]
    error, normal = doubt.sqrt() * z.double(), Normal(torch.zeros((), dtype=torch.float64), p.sqrt())
    expected = expected - torch.log(normal.cdf(error + 1 / 255) - normal.cdf(error - 1 / 255)).mean()
    assert total == [pytest.approx(expected.item() / math.log(2), abs=0.006)]


def test_bound_of_the_true_reverse_chain_is_the_entropy() -> None:
    # A Gaussian's reverse steps are Gaussian. With their mean and variance, which lies in the learned range, nothing is
    # lost: the bound is the entropy of data in bins of 2/255, 0.5·log2(2πe·s²) - log2(2/255).
    mean, deviation, steps = -0.3, 0.5, 1000
    objective = Gaussian(GaussianConfig(steps=steps, variance="learned_range"))
    chain = objective.chain
    generator = torch.Generator().manual_seed(0)
    z = spread(8_000)

    def predict(x: list[Tensor], t: float) -> list[tuple[Tensor, Tensor | None]]:
        k = torch.tensor(round(t * steps))
        prediction, doubt = gaussian_data(chain, mean, deviation, x[0], k)
        log_variance = torch.log(chain.posterior_variance[k] + chain.data_share[k] ** 2 * doubt)
        share = (log_variance - chain.log_small[k]) / (chain.log_large[k] - chain.log_small[k])
        assert 0 <= share <= 1
        return [(prediction.float(), (2 * share - 1).float().expand_as(x[0]))]

    (bits,) = objective.bits_per_dimension(
        predict, [mean + deviation * z], lambda step, i, x: z[torch.randperm(len(z), generator=generator)]
    )
    entropy = 0.5 * math.log2(2 * math.pi * math.e * deviation**2) - math.log2(2 / 255)
    assert bits == pytest.approx(entropy, abs=0.003)


def test_bound_is_one_number_for_each_tensor() -> None:
    objective = Gaussian(GaussianConfig(steps=5))
    data = [torch.zeros(2, 3), torch.ones(4)]

    def predict(x: list[Tensor], t: float) -> list[tuple[Tensor, Tensor | None]]:
        return [(torch.zeros_like(a), None) for a in x]

    def noise_of(step: int, i: int, like: Tensor) -> Tensor:
        return torch.full_like(like, step + 10.0 * i)

    together = objective.bits_per_dimension(predict, data, noise_of)
    first = objective.bits_per_dimension(predict, data[:1], noise_of)
    second = objective.bits_per_dimension(predict, data[1:], lambda step, i, x: noise_of(step, 1, x))
    assert together == first + second


def test_prior_is_the_divergence_from_noise() -> None:
    chain = Gaussian(GaussianConfig(steps=20, schedule="cosine")).chain.spaced(range(15))
    a, data = chain.alpha_bar[-1].item(), torch.randn(50)
    expected = kl_divergence(Normal(math.sqrt(a) * data, math.sqrt(1 - a)), Normal(0.0, 1.0)) / math.log(2)
    assert a > 0.1
    assert torch.allclose(chain.prior_bits(data), expected, rtol=1e-4)


@pytest.mark.parametrize("schedule, prediction", [*itertools.product(("linear", "cosine"), PREDICTIONS)])
def test_loss_and_gradient_are_finite_at_every_step(schedule: str, prediction: str) -> None:
    config = GaussianConfig(schedule=schedule, prediction=prediction, variance="learned_range", min_snr_gamma=5.0)
    objective = Gaussian(config)
    t = (torch.arange(1001) / 1000)[:, None].clamp(max=0.999)
    data, noise = 10 * torch.randn(1001, 4), torch.randn(1001, 4)
    noisy = objective.corrupt(data, noise, t)
    data[-1] = noise[-1] = noisy[-1] = 0  # padding
    output = (3 * torch.randn(1001, 8)).bfloat16().requires_grad_()
    loss = objective.loss(output, data, noise, noisy.bfloat16(), t)
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    assert (loss >= 0).all()


def test_respaced_chain_keeps_the_marginals() -> None:
    chain = Gaussian(GaussianConfig()).chain
    kept = [0, 10, 500, 999]
    spaced = chain.spaced(kept)
    assert torch.equal(spaced.alpha_bar, chain.alpha_bar[kept])
    assert torch.allclose(torch.cumprod(1 - spaced.beta, 0), chain.alpha_bar[kept], rtol=1e-12)


@pytest.mark.parametrize("wrong", [{"steps": 1}, {"vlb_weight": -0.1}, {"min_snr_gamma": math.nan}])
def test_config_names_the_key(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}="):
        GaussianConfig(**wrong)
