"""Weights of one model fitted to another: what each rule means for what the model computes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from megasora.checkpoint.save import save
from megasora.config import load_config, to_dict
from megasora.errors import CheckpointError, ConfigError
from megasora.init_from import Report, Source, fit_weights, is_source, open_source
from megasora.models.dit import DiTConfig
from megasora.models.families import build_model
from megasora.models.interop.classes import DIT
from megasora.models.interop.names import export_weights
from megasora.models.packing import patchify, unpatchify
from megasora.models.video_dit import VideoDiTConfig

SMALL = VideoDiTConfig(width=48, depth=2, heads=2, ffn=80, channels=4, text_width=24)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(p.shape, generator=generator) for n, p in build_model(SMALL).named_parameters()}


def fit(weights: dict[str, Tensor], model: VideoDiTConfig, rules: dict[str, str]) -> tuple[dict[str, Tensor], Report]:
    source = Source(frozenset(weights), weights.__getitem__, SMALL)
    return fit_weights(source, model, rules)


def embedded(weights: dict[str, Tensor], latent: Tensor, model: VideoDiTConfig) -> Tensor:
    return F.linear(patchify(latent, model.patch), weights["patch_embed.weight"], weights["patch_embed.bias"])


def put_out(weights: dict[str, Tensor], hidden: Tensor, shape: tuple[int, int, int], model: VideoDiTConfig) -> Tensor:
    return unpatchify(F.linear(hidden, weights["head.out.weight"], weights["head.out.bias"]), shape, model.patch)


def test_what_fits_goes_over_as_it_is(weights: dict[str, Tensor]) -> None:
    found, report = fit(weights | {"gone.weight": torch.ones(1)}, SMALL, {})
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert report == Report(matched=list(weights), unused=["gone.weight"])


def test_inflated_a_still_picture_gives_what_it_gave(weights: dict[str, Tensor]) -> None:
    model = replace(SMALL, patch=(2, 2, 2))
    found, report = fit(weights, model, {"patch_embed.weight": "inflate", "head.out.*": "repeat"})
    assert report.adapted == {"patch_embed.weight": "inflate", "head.out.weight": "repeat", "head.out.bias": "repeat"}
    picture = torch.randn(4, 1, 4, 6)
    still = picture.expand(4, 2, 4, 6)
    torch.testing.assert_close(embedded(found, still, model), embedded(weights, picture, SMALL), rtol=1e-5, atol=1e-5)
    hidden = torch.randn(6, 48)
    torch.testing.assert_close(
        put_out(found, hidden, (2, 4, 6), model), put_out(weights, hidden, (1, 4, 6), SMALL).expand(4, 2, 4, 6)
    )


def test_new_channels_are_zero_in_every_pixel(weights: dict[str, Tensor]) -> None:
    model = replace(SMALL, channels=6)
    found, _ = fit(weights, model, {"patch_embed.weight": "zero", "head.out.*": "zero"})
    latent = torch.randn(6, 1, 4, 6)
    torch.testing.assert_close(embedded(found, latent, model), embedded(weights, latent[:4], SMALL))
    hidden = torch.randn(6, 48)
    out = put_out(found, hidden, (1, 4, 6), model)
    torch.testing.assert_close(out[:4], put_out(weights, hidden, (1, 4, 6), SMALL))
    assert not out[4:].any()


def test_more_blocks_repeat_or_begin_anew(weights: dict[str, Tensor]) -> None:
    model = replace(SMALL, depth=5)
    found, report = fit(weights, model, {"blocks.[23].*": "repeat", "blocks.4.*": "new"})
    for name in weights:
        if name.startswith("blocks.1."):
            assert torch.equal(found[name.replace("blocks.1.", "blocks.3.")], weights[name])
    assert set(report.new) == {
        name for name, _ in build_model(model).named_parameters() if name.startswith("blocks.4.")
    }
    assert not set(report.new) & found.keys()
    assert len(report.matched) == len(weights)
    _, report = fit(weights, replace(SMALL, depth=1), {})
    assert report.unused == sorted(name for name in weights if name.startswith("blocks.1."))


def test_without_a_rule_it_is_refused(weights: dict[str, Tensor]) -> None:
    for model, said in (
        (replace(SMALL, depth=3), r"blocks\.2\.\S+ is not there; give run\.init_rules"),
        (replace(SMALL, channels=6), r"patch_embed\.weight is \[48, 16\] there, \[48, 24\] here"),
        (replace(SMALL, patch=(1, 4, 1)), r"patch_embed\.weight"),  # of the same size, but of another meaning
    ):
        with pytest.raises(ConfigError, match=said):
            fit(weights, model, {})


def test_other_heads_are_refused_and_other_settings_named(weights: dict[str, Tensor]) -> None:
    """No shape tells of them."""
    with pytest.raises(ConfigError, match=r"run\.init_from: 2 heads there, model\.heads=4 here"):
        fit(weights, replace(SMALL, heads=4), {})
    _, report = fit(weights, replace(SMALL, eps=1e-5, position="rope+sincos", preset="x", attention="sdpa"), {})
    assert report.settings == ["position rope there, rope+sincos here", "eps 1e-06 there, 1e-05 here"]
    wider = replace(SMALL, width=96, heads=4)  # every weight goes by its rule
    assert fit(weights, wider, {"*": "repeat"})[1].settings == ["heads 2 there, 4 here"]


def test_a_dit_whose_blocks_have_embedders_of_their_own_is_refused(tmp_path: Path) -> None:
    model = DiTConfig(width=48, depth=2, heads=4, ffn=192, channels=4, classes=5)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": DIT.name, **DIT.arguments(model, (1, 4, 4))}))
    ours = {name: torch.randn(p.shape) for name, p in build_model(model).named_parameters()}
    theirs = {name: t.clone() for name, t in export_weights(ours, DIT.weight_map(model), model.depth).items()}
    save_file(theirs, tmp_path / "model.safetensors")
    assert torch.equal(open_source(tmp_path, "model/").read("label_embed.weight"), ours["label_embed.weight"])
    theirs["transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"] += 1
    save_file(theirs, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="one embedder for all blocks"):
        open_source(tmp_path, "model/")


def test_sources(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    config = load_config(None, ["--model.channels=4"])
    tensors = {
        f"{part}{name}": tensor + i for i, part in enumerate(("model/", "ema/")) for name, tensor in weights.items()
    }
    path = save(tmp_path, 3, tensors, {"config": to_dict(config)})
    for i, part in enumerate(("model/", "ema/")):
        source = open_source(path, part)
        assert (source.model.patch, source.model.channels) == ((1, 2, 2), 4)
        assert torch.equal(source.read("patch_embed.bias"), weights["patch_embed.bias"] + i)
    assert is_source(path)
    assert not is_source(tmp_path)
