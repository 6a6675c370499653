"""STDiT against diffusers' Latte with the same random weights: outputs, counts, and weights there and back."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from megasora.models.interop import latte
from megasora.models.interop.names import export_weights, import_weights
from megasora.models.packing import Item, in_patches, pack, patchify
from megasora.models.stdit import PRESETS, STDiT, STDiTConfig

SMALL = replace(PRESETS["Latte-XL/2-T2V"], width=48, depth=2, heads=4, ffn=192, text_width=24, base_size=4)


def models(config: STDiTConfig, frames: int) -> tuple[nn.Module, STDiT]:
    """Theirs with every parameter random, and ours with the same weights."""
    from diffusers import LatteTransformer3DModel

    torch.manual_seed(0)
    theirs = LatteTransformer3DModel(**latte.to_diffusers(config, frames)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    ours = STDiT(config)
    ours.load_state_dict(import_weights(theirs.state_dict(), latte.weight_map(config), config.depth))
    return theirs, ours


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8), (4, 6, 12)], ids=["square", "image", "wide"])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_outputs_are_those_of_diffusers(shape: tuple[int, int, int], learn_sigma: bool) -> None:
    config = replace(SMALL, learn_sigma=learn_sigma)
    theirs, ours = models(config, frames=shape[0])
    latent, text = torch.randn(4, *shape), torch.randn(7, 24)
    patches = in_patches(shape, config.patch)
    row = pack([Item(patchify(latent, config.patch), patches, torch.full((shape[0],), 0.371), text, torch.zeros(0))])
    with torch.no_grad():
        expected = theirs(latent[None], torch.tensor([371]), text[None]).sample[0]  # [C or 2·C, T, H, W]
        found = ours(row)
    expected = torch.cat([patchify(part, config.patch) for part in expected.split(4)], dim=1)
    assert expected.std() > 1e-2, "nothing to compare"
    assert (found - expected).norm() / expected.norm() <= 1e-5


def test_weights_there_and_back_are_bit_equal() -> None:
    theirs, ours = models(SMALL, frames=2)
    exported = export_weights(ours.state_dict(), latte.weight_map(SMALL), SMALL.depth)
    original = theirs.state_dict()
    assert exported.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(exported[name], tensor), name
    theirs.load_state_dict(exported)


def test_the_preset_has_as_many_parameters_as_diffusers() -> None:
    from diffusers import LatteTransformer3DModel

    config = PRESETS["Latte-XL/2-T2V"]
    with torch.device("meta"):
        theirs = LatteTransformer3DModel(**latte.to_diffusers(config))
        ours = STDiT(config)
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters()) == 1_057_246_880


@pytest.mark.parametrize(
    "change",
    [{"qk_norm": True}, {"time_position": "rope"}, {"ffn": 100}, {"patch": (2, 2, 2)}, {"base_size": 64}],
    ids=lambda change: next(iter(change)),
)
def test_what_latte_cannot_express_is_named(change: dict) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(change))}="):
        latte.to_diffusers(replace(SMALL, **change))
