import pytest

from megasora.errors import ConfigError
from megasora.parallel.layout import parse_layout


@pytest.mark.parametrize(
    ("text", "world", "meaning", "written"),
    [
        ("auto", 1, (1, 1, 0), "dp1"),
        ("auto", 4, (1, 4, 2), "dp4,zero2"),
        ("dp2", 2, (2, 1, 0), "dp2"),
        ("zero0,dp2", 2, (2, 1, 0), "dp2"),
        ("zero3", 2, (1, 2, 3), "dp2,zero3"),
        ("dp4,zero2", 4, (1, 4, 2), "dp4,zero2"),
        ("hsdp2x2", 4, (2, 2, 3), "hsdp2x2,zero3"),
        ("zero2,hsdp2x4", 8, (2, 4, 2), "hsdp2x4,zero2"),
    ],
)
def test_layouts(text: str, world: int, meaning: tuple[int, int, int], written: str) -> None:
    layout = parse_layout(text, world)
    assert (layout.dp_replicate, layout.dp_shard, layout.zero) == meaning
    assert str(layout) == written
    assert parse_layout(written, world) == layout


@pytest.mark.parametrize(
    ("text", "world"),
    [
        ("dp3", 2),
        ("dq2", 2),
        ("dp2,dp2", 4),
        ("dp2,hsdp1x2", 4),
        ("tp2", 2),
        ("cp2x1", 2),
        ("pp2:1f1b", 2),
        ("zero1,dp2", 2),
    ],
)
def test_impossible_layouts_name_the_key_and_one_that_works(text: str, world: int) -> None:
    with pytest.raises(ConfigError, match=rf"parallel.layout={text}.*valid here: dp{world},zero2"):
        parse_layout(text, world)
