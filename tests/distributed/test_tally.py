"""The loss by bucket and by quantile, from ranks that have other samples, against the samples' losses one by one."""

import math
from dataclasses import replace
from statistics import NormalDist, mean

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megasora.microbatch import build_microbatch, draw_frames, training_loss
from megasora.observe.tally import Tally
from tests.harness import run_distributed
from tests.unit.test_microbatch import RECIPE, SAMPLES, Constant, sample

BUCKETS = ["1x4x4", "3x4x4", "1x6x6", "9x9x9"]
STEPS = [[*SAMPLES, sample(13)], [sample(20 + i, frames=3 if i % 2 else 1) for i in range(4)]]
WHOLE = replace(RECIPE, global_batch=4)
CHUNKED = replace(WHOLE, chunk=1, tasks={"text": 1.0, "image": 1.0})  # frames with timesteps of their own, some given


def quantile_of(timestep: Tensor) -> str:
    """A timestep is a sigmoid of z, which is normal, with a shift of 3."""
    t = timestep.double().item()
    place = NormalDist().cdf(math.log(t / (3 * (1 - t)))) if t else 0.0  # a given frame, which counts nothing
    return f"q{(int(place * 5) + 0.5) / 5:.2f}"


def shares() -> list[dict[str, float]]:
    """Two steps, of which each rank has two samples and sees its rows in two parts; then nothing more."""
    tally = Tally(BUCKETS, torch.device("cpu"))
    found = []
    for recipe in (WHOLE, CHUNKED):
        loss_of = training_loss(recipe, tally)
        for step in STEPS:
            mine = step[2 * dist.get_rank() :][:2]
            # The samples fill 16, so that the cut goes through one.
            micro = build_microbatch(mine, recipe, 16, tally)
            plain = training_loss(recipe)(Constant(), build_microbatch(mine, recipe, 16))
            assert torch.equal(training_loss(recipe, tally)(Constant(), replace(micro, groups=None)), plain)
            halves = [loss_of(Constant(), micro.part(half, 2, 1)) for half in (0, 1)]
            assert sum(halves).item() == pytest.approx(plain.item(), rel=1e-5)  # type: ignore[union-attr]
        found.append(tally.take())
    return [*found, tally.take()]


def test_means_of_buckets_and_quantiles_over_ranks_and_steps() -> None:
    (whole, chunked, empty), other = run_distributed(shares, 2)
    assert other == [whole, chunked, empty]
    assert empty == {}
    by_name: dict[str, list[float]] = {}
    for one in (one for step in STEPS for one in step):
        micro = build_microbatch([one], WHOLE, 64)
        loss = 4 * training_loss(WHOLE)(Constant(), micro).item()
        for name in (f"bucket_{one.bucket}", quantile_of(micro.row.timestep[0])):
            by_name.setdefault(name, []).append(loss)
    assert whole == pytest.approx({name: mean(losses) for name, losses in by_name.items()}, rel=1e-5)
    assert len([name for name in whole if name[0] == "q"]) > 2
    assert "bucket_9x9x9" not in whole
    # Of chunks, which have places of their own, and of frames that are given: tokens count as they do in the loss.
    sums: dict[str, list[tuple[float, float]]] = {}
    for one in (one for step in STEPS for one in step):
        micro = build_microbatch([one], CHUNKED, 64)
        tokens = (one.bucket.height // 2) * (one.bucket.width // 2)
        shape = (one.bucket.frames, one.bucket.height // 2, one.bucket.width // 2)
        timesteps, given, _ = draw_frames(shape, one.latent.mean.shape[1:], CHUNKED, (1, 2, one.position))
        losses = (micro.noise - micro.data).square().mean(-1)
        for frame in range(one.bucket.frames):
            for token in range(frame * tokens, (frame + 1) * tokens):
                weight = 0.0 if given[frame] else micro.weight[token].item()
                sums.setdefault(quantile_of(timesteps[frame]), []).append((losses[token].item() * weight, weight))
    expected = {
        name: sum(loss for loss, _ in of) / sum(weight for _, weight in of)
        for name, of in sums.items()
        if sum(weight for _, weight in of)
    }
    assert {name: value for name, value in chunked.items() if name[0] == "q"} == pytest.approx(expected, rel=1e-5)
