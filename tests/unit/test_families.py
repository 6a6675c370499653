"""Every preset by name: published counts, one namespace, one line for what does not fit."""

import json

import pytest

from megasora.cli import main
from megasora.models import families
from megasora.models.flops import FORWARD_MACS, forward_macs

PUBLISHED = {
    "DiT-XL/2": 675_129_632,
    "STDiT3-XL/2": 1_207_643_936,
    "Wan2.1-1.3B": 1_418_996_800,
    "Open-Sora-2.0": 11_891_178_560,
    "HunyuanVideo": 12_810_782_784,
    "vit-b16": 86_567_656,
}


def test_published_counts_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--list-presets", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {name: listed[name]["parameters"] for name in PUBLISHED} == PUBLISHED
    assert set(listed) == set(families.PRESETS)


def test_the_rest_of_plan_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 2
    assert "--list-presets" in capsys.readouterr().err


def test_no_family_is_half_there() -> None:
    assert families.CONFIGS.keys() == families.MODELS.keys() == FORWARD_MACS.keys()
    for name, config in families.PRESETS.items():
        assert families.CONFIGS[config.family] is type(config), name  # type: ignore[attr-defined]
        assert forward_macs(config, (2, 14, 14), 10) > 0


@pytest.mark.parametrize("family", families.CONFIGS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "heads=5: do not divide width 256; nearest is 4"),
        ({"patch": (1, 0, 2)}, r"patch=\[1, 0, 2\]: at least 1 each"),
        ({"depth": 0}, "depth=0: at least 1"),
        ({"attention": "fast"}, "attention=fast: is not one of"),
    ],
)
def test_numbers_that_do_not_fit(family: str, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        families.CONFIGS[family](**change)  # type: ignore[arg-type]
