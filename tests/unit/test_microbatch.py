"""A sample is trained alike wherever it lies; the loss is the mean over the batch of the samples' means."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from data_pipelines.batches.loader import Sample
from data_pipelines.buckets import Bucket
from data_pipelines.samples.latents import Latent
from megasora.diffusion.flow import FlowConfig
from megasora.diffusion.gaussian import GaussianConfig
from megasora.diffusion.objective import build_objective
from megasora.microbatch import MicroBatch, Recipe, build_microbatch, patches_of, tokens_of, training_loss
from megasora.models.packing import PackedRow, unpatchify
from megasora.models.text import Text

RECIPE = Recipe(
    seed=1, segment=2, objective=build_objective("flow", FlowConfig(), GaussianConfig()), flow=FlowConfig(), shift=3.0,
    tasks={"text": 1.0}, drop_captions=0.0, null=Text(torch.full((1, 8), -1.0), torch.zeros(0)), patch=(1, 2, 2), chunk=0,
    global_batch=3, device=torch.device("cpu"),
)  # fmt: skip


def sample(position: int, frames: int = 1, size: int = 4) -> Sample:
    generator = torch.Generator().manual_seed(position)
    mean = torch.randn(4, frames, size, size, generator=generator)
    text = torch.randn(2 + position % 3, 8, generator=generator)
    latent = Latent(mean, torch.full_like(mean, -30.0), text, torch.zeros(0), fps=24.0, label=position % 5)
    return Sample(position, f"s{position}", Bucket(frames, size, size), latent)


LOSS = training_loss(RECIPE)
SAMPLES = [sample(10), sample(11, frames=3), sample(12, size=6)]


def target(batch: MicroBatch) -> Tensor:
    """The velocity of the flow."""
    return batch.noise - batch.data


class Constant(nn.Module):
    """Predicts zero, so that the loss is known."""

    def forward(self, row: PackedRow) -> Tensor:
        return torch.zeros_like(row.tokens)


def build(samples: list[Sample], recipe: Recipe, length: int = 64) -> MicroBatch:
    return build_microbatch(samples, recipe, length)


def test_a_sample_is_the_same_wherever_it_lies() -> None:
    together = build(SAMPLES, RECIPE)
    for i, one in enumerate(SAMPLES):
        alone = build([one], RECIPE)
        a, b = together.row.video.offsets[i : i + 2]
        assert torch.equal(together.row.tokens[a:b], alone.row.tokens[: b - a])
        assert torch.equal(target(together)[a:b], target(alone)[: b - a])
        assert torch.equal(together.row.timestep[i], alone.row.timestep[0])


@pytest.mark.parametrize("change", [{"seed": 7}, {"segment": 7}])
def test_noise_and_timestep_follow_seed_segment_and_position(change: dict[str, int]) -> None:
    here, there = (build(SAMPLES[:1], r) for r in (RECIPE, replace(RECIPE, **change)))
    moved = build([replace(SAMPLES[0], position=99)], RECIPE)
    for other in (there, moved):
        assert not torch.equal(here.row.tokens, other.row.tokens)
        assert here.row.timestep[0] != other.row.timestep[0]


def test_noise_and_target_satisfy_the_flow() -> None:
    batch = build(SAMPLES, RECIPE)
    for i, one in enumerate(SAMPLES):
        a, b = batch.row.video.offsets[i : i + 2]
        t = batch.row.timestep[i]
        # x_t - t · v = data, whatever the noise was.
        data = unpatchify(batch.row.tokens[a:b] - t * target(batch)[a:b], one.latent.mean.shape[1:], RECIPE.patch)
        torch.testing.assert_close(data, one.latent.mean, rtol=1e-4, atol=1e-4)
        noise = batch.row.tokens[a:b] + (1 - t) * target(batch)[a:b]
        assert 0.7 < noise.std() < 1.3


def test_the_loss_is_the_mean_of_the_samples_means() -> None:
    batch = build(SAMPLES, RECIPE)
    offsets = batch.row.video.offsets
    means = [target(batch)[a:b].square().mean() for a, b in pairwise(offsets[:4])]
    assert LOSS(Constant(), batch).item() == pytest.approx(torch.stack(means).mean().item(), rel=1e-5)
    split = [LOSS(Constant(), build(part, RECIPE)) for part in (SAMPLES[:1], SAMPLES[1:])]
    assert sum(split).item() == pytest.approx(LOSS(Constant(), batch).item(), rel=1e-5)
    assert batch.weight[offsets[3] :].abs().max() == 0


def test_captions_are_dropped_as_often_as_asked() -> None:
    recipe = replace(RECIPE, drop_captions=0.25, global_batch=1)
    dropped = sum(torch.equal(build([sample(i)], recipe, length=4).row.text, RECIPE.null.tokens) for i in range(1000))
    assert 200 < dropped < 300  # 250 ± 3.6 sigma
    assert torch.equal(build(SAMPLES[:1], RECIPE).row.text, SAMPLES[0].latent.text)


def test_the_posterior_is_sampled() -> None:
    flat = torch.zeros(4, 1, 32, 32)
    wide = replace(SAMPLES[0].latent, mean=flat, logvar=flat + 2)
    batch = build([replace(SAMPLES[0], latent=wide)], RECIPE, length=256)
    data = batch.row.tokens - batch.row.timestep[0] * target(batch)
    assert data.var().item() == pytest.approx(torch.e**2, rel=0.1)


def test_tokens_of_a_bucket() -> None:
    assert tokens_of(Bucket(1, 256, 256), (4, 8, 8), (1, 2, 2)) == 256
    assert tokens_of(Bucket(17, 480, 832), (4, 8, 8), (1, 2, 2)) == 5 * 30 * 52
    assert tokens_of(Bucket(81, 480, 832), (4, 8, 8), (1, 2, 2)) == 32_760  # as Wan counts 81 frames at 480p


def test_each_position_has_noise_of_its_own() -> None:
    def noise(position: int) -> Tensor:
        batch = build([replace(SAMPLES[1], position=position)], RECIPE)
        return (batch.row.tokens + (1 - batch.row.timestep[0]) * target(batch))[:12].flatten()

    correlation = torch.corrcoef(torch.stack([noise(p) for p in range(40)])) - torch.eye(40)
    assert correlation.abs().max() < 0.5  # 192 numbers: seven sigma


def test_the_posterior_and_the_noise_are_independent() -> None:
    flat = torch.zeros(4, 1, 32, 32)
    one = replace(SAMPLES[0], latent=replace(SAMPLES[0].latent, mean=flat, logvar=flat))
    batch = build([one], RECIPE, length=256)
    t = batch.row.timestep[0]
    data, noise = batch.row.tokens - t * target(batch), batch.row.tokens + (1 - t) * target(batch)
    assert torch.corrcoef(torch.stack([data.flatten(), noise.flatten()]))[0, 1].abs() < 0.1  # 4096 numbers: six sigma


def test_the_stages_shift_reaches_the_timestep() -> None:
    one, three = (torch.logit(build(SAMPLES, replace(RECIPE, shift=s)).row.timestep[:3]) for s in (1.0, 3.0))
    torch.testing.assert_close(three - one, torch.full((3,), math.log(3.0)), rtol=1e-4, atol=1e-4)


def test_each_sample_has_its_own_text() -> None:
    row = build(SAMPLES, RECIPE).row
    for one, (a, b) in zip(SAMPLES, pairwise(row.caption.offsets[:4]), strict=True):
        assert torch.equal(row.text[a:b], one.latent.text)


def test_given_frames_are_clean_at_timestep_zero_and_without_loss() -> None:
    recipe = replace(RECIPE, tasks={"image": 1.0}, global_batch=1)
    batch = build([sample(11, frames=3)], recipe)
    row, first = batch.row, 4  # tokens of a frame
    assert row.runs.lengths[:2] == (first, 2 * first)
    assert row.timestep[0] == 0 < row.timestep[1]
    assert torch.equal(row.tokens[:first], batch.data[:first])
    assert not torch.allclose(row.tokens[first : 3 * first], batch.data[first : 3 * first])
    assert batch.weight[:first].abs().max() == 0
    torch.testing.assert_close(batch.weight[first : 3 * first], torch.full((2 * first,), 1 / (2 * first)))
    # An image, alone, is always made of noise.
    assert build([sample(10)], recipe).weight[:4].min() > 0


def test_a_chunk_has_a_timestep_of_its_own() -> None:
    batch = build([sample(11, frames=3)], replace(RECIPE, chunk=2))
    assert batch.row.runs.lengths[:2] == (8, 4)
    whole = build([sample(11, frames=3)], RECIPE)
    assert batch.row.timestep[0] == whole.row.timestep[0] != batch.row.timestep[1]
    assert torch.equal(batch.row.tokens[:8], whole.row.tokens[:8])


def test_a_classifier_sees_clean_samples_and_their_classes() -> None:
    recipe = replace(RECIPE, objective=None, drop_captions=1.0)  # drops are for guidance
    batch = build(SAMPLES, recipe)
    assert torch.equal(batch.row.tokens, batch.data)
    assert batch.row.label.tolist() == [0, 1, 2, -1]  # the last is padding
    logits = torch.randn(4, 5)
    expected = nn.functional.cross_entropy(logits[:3], torch.tensor([0, 1, 2]))
    loss = training_loss(recipe)(lambda row: logits, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_every_timestep_at_a_quantile() -> None:
    batch = build(SAMPLES, replace(RECIPE, quantile=0.5, shift=1.0))
    torch.testing.assert_close(batch.row.timestep[:3], torch.full((3,), 0.5))


def test_patches_count_as_the_model_does() -> None:
    assert patches_of(Bucket(81, 480, 832), (4, 8, 8), (1, 2, 2)) == (21, 30, 52)
