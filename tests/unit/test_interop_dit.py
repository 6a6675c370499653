"""DiT exported into diffusers' DiTTransformer2DModel: the same outputs, and weights there and back."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from megasora.models.dit import DiT, DiTConfig
from megasora.models.interop import dit
from megasora.models.interop.names import export_weights
from megasora.models.packing import Item, PackedRow, in_patches, pack, patchify

SMALL = DiTConfig(
    width=48, depth=2, heads=4, ffn=192, channels=4, classes=5, learn_sigma=True, time_period=dit.DIFFUSERS_TIME_PERIOD
)
SIDE, TIMES, LABELS = 8, [371, 12, 999], [3, 0, -1]


def models(config: DiTConfig) -> tuple[DiT, nn.Module]:
    """Ours with every parameter random, and theirs with the same weights."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    ours = DiT(config)
    ours.init_weights()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    theirs = DiTTransformer2DModel(**dit.to_diffusers(config, SIDE)).eval()
    theirs.load_state_dict(export_weights(ours.state_dict(), dit.weight_map(config), config.depth))
    return ours, theirs


def row_of(latents: torch.Tensor, config: DiTConfig) -> PackedRow:
    shape = in_patches(latents.shape[2:], config.patch)
    return pack(
        [
            Item(patchify(x, config.patch), shape, torch.tensor([t / 1000]), torch.zeros(0, 0), torch.zeros(0), label=c)
            for x, t, c in zip(latents, TIMES, LABELS, strict=True)
        ]
    )


def difference(ours: DiT, theirs: nn.Module) -> float:
    """Of their outputs for three latents, relative to theirs."""
    config, latents = ours.config, torch.randn(len(TIMES), 4, 1, SIDE, SIDE)
    labels = torch.tensor([c if c >= 0 else config.classes for c in LABELS])
    with torch.no_grad():
        expected = theirs(latents[:, :, 0], torch.tensor(TIMES), labels).sample[:, :, None]  # [S, C or 2·C, 1, H, W]
        found = ours(row_of(latents, config))  # [L, output_values]
    parts = [torch.cat([patchify(x, config.patch) for x in part]) for part in expected.split(4, dim=1)]
    expected = torch.cat(parts, dim=1)
    assert expected.std() > 1e-2, "nothing to compare"
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_outputs_are_those_of_diffusers(learn_sigma: bool, p: int) -> None:
    assert difference(*models(replace(SMALL, learn_sigma=learn_sigma, patch=(1, p, p)))) <= 1e-5


def test_the_papers_waves_of_the_timestep_are_a_switch_in_theirs() -> None:
    ours, theirs = models(replace(SMALL, time_period=10_000.0))
    assert difference(ours, theirs) > 1e-2
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    assert difference(ours, theirs) <= 1e-5


def test_weights_there_and_back_are_bit_equal() -> None:
    ours, theirs = models(SMALL)
    back = dit.from_diffusers(theirs.state_dict(), SMALL)
    assert back.keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(back[name], tensor), name


def test_embedders_that_differ_are_refused() -> None:
    _, theirs = models(SMALL)
    weights = theirs.state_dict()
    weights["transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"][0, 0] += 1
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.norm1\.emb\.class_embedder"):
        dit.from_diffusers(weights, SMALL)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"design": "adaln"}, "^design=adaln: .* adaln_zero"),
        ({"patch": (2, 2, 2)}, "^patch="),
        ({"ffn": 96}, "^ffn=96: .* 192"),
        ({"classes": 0}, "^classes=0"),
    ],
)
def test_what_diffusers_cannot_express_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dit.to_diffusers(replace(SMALL, **changes), SIDE)
