"""ViT and ViViT against transformers' with the same random weights: logits, counts, and weights there and back."""

import pytest
import torch
from torch import nn

from megasora.models.interop import vit
from megasora.models.interop.names import export_weights, import_weights
from megasora.models.packing import Item, in_patches, pack, patchify
from megasora.models.vit import PRESETS, ClassifierConfig, ViT, ViTConfig, ViViTConfig

CONFIGS = {
    "vit": ViTConfig(width=48, depth=2, heads=4, ffn=96, classes=7, image_size=32, patch=(1, 8, 8)),
    "vivit": ViViTConfig(width=48, depth=2, heads=4, ffn=96, classes=7, image_size=32, patch=(2, 8, 16), frames=6),
}


def their_model(config: ClassifierConfig) -> nn.Module:
    from transformers import ViTConfig as TheirViTConfig
    from transformers import ViTForImageClassification, VivitConfig, VivitForVideoClassification

    arguments = vit.to_transformers(config)
    if isinstance(config, ViViTConfig):
        return VivitForVideoClassification(VivitConfig(**arguments)).eval()
    return ViTForImageClassification(TheirViTConfig(**arguments)).eval()


def models(config: ClassifierConfig) -> tuple[nn.Module, ViT]:
    """Theirs with every parameter random, and ours with the same weights."""
    torch.manual_seed(0)
    theirs = their_model(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    ours = ViT(config)
    ours.load_state_dict(import_weights(theirs.state_dict(), vit.weight_map(config), config.depth))
    return theirs, ours


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_those_of_transformers(family: str) -> None:
    config = CONFIGS[family]
    theirs, ours = models(config)
    clips = torch.randn(3, 3, config.frames, 32, 32)  # [S, C, T, H, W]
    shape = in_patches(clips.shape[2:], config.patch)
    items = [
        Item(patchify(x, config.patch), shape, torch.zeros(shape[0]), torch.zeros(0, 0), torch.zeros(0)) for x in clips
    ]
    with torch.no_grad():
        expected = theirs(clips.transpose(1, 2) if family == "vivit" else clips[:, :, 0]).logits
        found = ours(pack(items))
    assert expected.std() > 1e-2, "nothing to compare"
    assert (found - expected).norm() / expected.norm() <= 1e-5


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_there_and_back_are_bit_equal(family: str) -> None:
    config = CONFIGS[family]
    theirs, ours = models(config)
    exported = export_weights(ours.state_dict(), vit.weight_map(config), config.depth)
    original = theirs.state_dict()
    assert exported.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(exported[name], tensor), name
    theirs.load_state_dict(exported)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_their_defaults_and_have_as_many_parameters(name: str) -> None:
    from transformers import ViTConfig as TheirViTConfig
    from transformers import VivitConfig

    config = PRESETS[name]
    defaults = VivitConfig() if isinstance(config, ViViTConfig) else TheirViTConfig()
    for key, value in vit.to_transformers(config).items():
        if key != "num_labels":  # 1,000 and 400 classes; theirs begin with 2
            assert getattr(defaults, key) == value, key
    with torch.device("meta"):
        ours, theirs = ViT(config), their_model(config)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_what_transformers_cannot_express_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^frames=2: "):
        vit.to_transformers(ViTConfig(frames=2))
    with pytest.raises(ValueError, match=r"^patch="):
        vit.to_transformers(ViTConfig(patch=(1, 16, 8)))
