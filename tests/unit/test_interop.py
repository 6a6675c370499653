"""Our models against other people's with the same random weights: outputs, and weights there and back."""

import pytest
import torch
from torch import Tensor, nn

from megasora.models.interop import wan
from megasora.models.interop.names import Rename, export_weights, import_weights
from megasora.models.packing import Item, PackedRow, in_patches, pack, patchify, unpatchify
from megasora.models.video_dit import VideoDiT, VideoDiTConfig


def noisy(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random: nothing that a wrong name could hide behind stays zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def row_of(
    latent: Tensor, patch: tuple[int, int, int], t: float, text: Tensor, pooled: Tensor | None = None
) -> PackedRow:
    """One latent [C, T, H, W] at time t."""
    shape = in_patches(latent.shape[1:], patch)
    pooled = torch.zeros(0) if pooled is None else pooled
    return pack([Item(patchify(latent, patch), shape, torch.full((shape[0],), t), text, pooled)])


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert theirs.std() > 1e-2, "nothing to compare"
    assert (ours - theirs).norm() / theirs.norm() <= tolerance


def assert_round_trip(ours: nn.Module, theirs: nn.Module, table: list[Rename], blocks: int) -> None:
    exported = export_weights(ours.state_dict(), table, blocks)
    original = theirs.state_dict()
    assert exported.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(exported[name], tensor), name


def test_wan() -> None:
    from diffusers import WanTransformer3DModel

    config = VideoDiTConfig(width=48, depth=2, heads=2, ffn=80, channels=4, text_width=24)
    theirs = noisy(WanTransformer3DModel(**wan.to_diffusers(config)))
    ours = VideoDiT(config)
    table = wan.weight_map(config)
    ours.load_state_dict(import_weights(theirs.state_dict(), table, config.depth))
    latent, text = torch.randn(4, 3, 6, 8), torch.randn(7, 24)
    with torch.no_grad():
        expected = theirs(latent[None], torch.tensor([371.0]), text[None]).sample[0]
        found = unpatchify(ours(row_of(latent, config.patch, 0.371, text)), latent.shape[1:], config.patch)
    assert_close(found, expected)
    assert_round_trip(ours, theirs, table, config.depth)


def test_a_map_says_what_is_missing_or_left_over() -> None:
    table = [Rename("a.{i}", "b.{i}")]
    with pytest.raises(KeyError, match=r"b\.1"):
        import_weights({"b.0": torch.ones(1)}, table, 2)
    with pytest.raises(ValueError, match=r"no place.*c"):
        import_weights({"b.0": torch.ones(1), "c": torch.ones(1)}, table, 1)
