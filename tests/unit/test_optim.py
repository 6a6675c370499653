"""Muon against torch's own; the learning rate against its definition."""

from itertools import pairwise

import pytest
import torch

from megasora.engines.muon import Muon, orthogonalise
from megasora.engines.optim import OptimConfig, build_optimizers, learning_rate
from megasora.models.video_dit import VideoDiT, VideoDiTConfig


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32)])
def test_muon_follows_torch_muon(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    a = Muon([ours], lr=0.02, momentum=0.95, weight_decay=0.1)
    b = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        gradient = torch.randn(shape)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # torch computes in bfloat16


def test_orthogonalised_singular_values_are_about_one() -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(24, 60, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_every_parameter_has_one_optimizer_and_only_matrices_of_blocks_are_muons() -> None:
    model = VideoDiT(VideoDiTConfig(width=32, depth=2, heads=2, ffn=64))
    adamw, muon = build_optimizers(dict(model.named_parameters()), OptimConfig(name="muon", weight_decay=0.1))
    owned = [p for o in (adamw, muon) for g in o.param_groups for p in g["params"]]
    assert len(owned) == len(set(owned)) == len(list(model.parameters()))
    matrices = {p for g in muon.param_groups for p in g["params"]}
    names = {name for name, p in model.named_parameters() if p in matrices}
    assert len(names) == 20
    assert all(name.startswith("blocks.") and name.endswith("weight") for name in names)
    undecayed = {p for g in adamw.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    assert all(p.ndim == 1 for p in undecayed)


def test_the_rate_warms_up_and_falls_along_a_cosine() -> None:
    config = OptimConfig(warmup=10, final_lr=0.1)
    rates = [learning_rate(config, 1.0, step, 110) for step in range(120)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == rates[119] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert learning_rate(OptimConfig(warmup=0, schedule="constant"), 0.5, 99, 100) == 0.5
