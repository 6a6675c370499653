"""ViT and ViViT as classifiers of packed rows: published counts, packing, positions, initial state."""

from dataclasses import replace

import pytest
import torch

from megasora.models.packing import Item, PackedRow, in_patches, pack, patchify
from megasora.models.vit import PRESETS, ClassifierConfig, ViT, ViTConfig, ViViTConfig, forward_macs
from tests.gradients import assert_same_gradients

CONFIGS = {
    "vit": ViTConfig(width=48, depth=2, heads=4, ffn=96, channels=4, classes=7, image_size=8, patch=(1, 2, 2)),
    "vivit": ViViTConfig(
        width=48, depth=2, heads=4, ffn=96, channels=4, classes=7, image_size=4, patch=(2, 2, 2), frames=6
    ),
}


@pytest.mark.parametrize("name, parameters", [("vit-b16", 86_567_656), ("vivit-b16x2", 88_954_000)])
def test_published_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in ViT(PRESETS[name]).parameters()) == parameters


def test_published_flops() -> None:
    assert forward_macs(PRESETS["vit-b16"], (1, 14, 14), 0) / 1e9 == pytest.approx(17.56, rel=1e-3)  # torchvision's


@pytest.mark.parametrize("family", CONFIGS)
def test_closed_form_counts_what_torch_counts(family: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, row = small_model(CONFIGS[family]), pack([make_item(CONFIGS[family], 0)])
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(row)
    assert counter.get_total_flops() == 2 * forward_macs(model.config, row.shapes[0], 0)


def small_model(config: ClassifierConfig) -> ViT:
    """Zero-initialised parameters get noise: else most of what is compared is zero."""
    torch.manual_seed(0)
    model = ViT(config)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def make_item(config: ClassifierConfig, seed: int) -> Item:
    generator = torch.Generator().manual_seed(seed)
    clip = torch.randn(4, config.frames, config.image_size, config.image_size, generator=generator)
    shape = in_patches(clip.shape[1:], config.patch)
    return Item(
        patchify(clip, config.patch), shape, torch.zeros(shape[0]), torch.zeros(0, 0), torch.zeros(0), label=seed
    )


def make_row(config: ClassifierConfig, capacity: int | None = None) -> PackedRow:
    return pack([make_item(config, i) for i in range(3)], capacity)


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_equals_one_by_one_in_outputs_and_every_gradient(family: str) -> None:
    config = CONFIGS[family]
    model, row = small_model(config), make_row(config, capacity=60)
    packed = model(row)
    assert packed.shape == (4, 7)  # three samples and padding
    target = torch.randn(3, 7, generator=torch.Generator().manual_seed(9))
    (packed[:3] * target).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for i in range(3):
        alone = model(pack([make_item(config, i)]))
        assert torch.allclose(alone[0], packed[i], rtol=1e-5, atol=1e-5)
        (alone * target[i]).sum().backward()
    assert_same_gradients(model, gradients, lambda name: name.endswith("k.bias"))


@pytest.mark.parametrize("family", CONFIGS)
def test_samples_do_not_see_each_other(family: str) -> None:
    model, row = small_model(CONFIGS[family]), make_row(CONFIGS[family], capacity=60)
    before = model(row)
    row.tokens[row.video.offsets[1] : row.video.offsets[2]] += 1.0
    after = model(row)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.allclose(before[1], after[1])


@pytest.mark.parametrize("family", CONFIGS)
def test_the_place_of_a_patch_matters(family: str) -> None:
    model, item = small_model(CONFIGS[family]), make_item(CONFIGS[family], 0)
    swapped = replace(item, patches=item.patches.flip(0))
    assert not torch.allclose(model(pack([item])), model(pack([swapped])), atol=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_initial_state_prefers_no_class(family: str) -> None:
    torch.manual_seed(0)
    model = ViT(CONFIGS[family])
    model.init_weights()
    assert model(make_row(CONFIGS[family])).abs().max() == 0
    for name, parameter in model.named_parameters():
        assert (parameter.abs().max() == 0) == (name.endswith("bias") or name in ("cls", "head.weight")), name


def test_samples_of_another_grid_are_refused() -> None:
    vit, vivit = small_model(CONFIGS["vit"]), small_model(CONFIGS["vivit"])
    with pytest.raises(ValueError, match=r"^shape=\[3, 2, 2\] .*\[1, 4, 4\]"):
        vit(make_row(CONFIGS["vivit"]))
    with pytest.raises(ValueError, match=r"^shape=\[1, 4, 4\] .*\[3, 2, 2\]"):
        vivit(make_row(CONFIGS["vit"], capacity=60))
    alone = Item(torch.zeros(8, 16), (1, 1, 8), torch.zeros(1), torch.zeros(0, 0), torch.zeros(0))
    with pytest.raises(ValueError, match=r"^shape=\[1, 1, 8\]"):
        vit(pack([alone]))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": 5}, r"^heads=5: .*nearest is 4"),
        ({"image_size": 9}, r"^image_size=9: .*nearest is 8"),
        ({"frames": 7}, r"^frames=7: .*nearest is 8"),
        ({"classes": 0}, r"^classes=0: at least 1"),
        ({"learn_sigma": True}, r"^learn_sigma=True"),
        ({"text_width": 3}, r"^text_width=3"),
    ],
)
def test_bad_configs_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIGS["vivit"], **changes)
