"""Buckets: their shapes, and which of them a sample is trained in."""

import random
from collections import Counter

import pytest

from data_pipelines.buckets import (
    Bucket,
    BucketConfig,
    buckets_of,
    choose,
    choose_frames,
    choose_size,
    frame_size,
    latent_ladder,
    raw_ladder,
    shares,
)


@pytest.mark.parametrize("resolution", [64, 112, 256, 480, 768])
@pytest.mark.parametrize("aspect", ["21:9", "16:9", "4:3", "1:1", "3:4", "9:16"])
def test_sizes_fit_the_area_and_the_grid(resolution: int, aspect: str) -> None:
    height, width = frame_size(resolution, aspect, 16)
    assert height % 16 == width % 16 == 0
    assert height * width <= resolution**2
    columns, rows = (int(part) for part in aspect.split(":"))
    assert 0.7 < (width / height) / (columns / rows) < 1.4


def test_256_square_is_itself() -> None:
    assert frame_size(256, "1:1", 16) == (256, 256)


def test_a_clip_goes_to_the_nearest_shape_that_it_fills() -> None:
    config = BucketConfig(resolutions=(128, 256), frames=(1, 9, 17))
    assert choose_frames(config, 16) == 9
    assert choose_frames(config, 400) == 17
    assert choose_frames(BucketConfig(frames=(9,)), 8) is None
    portrait, landscape = choose_size(config, 256, 1920, 1080), choose_size(config, 256, 1080, 1920)
    assert portrait is not None
    assert portrait[0] > portrait[1]
    assert landscape == frame_size(256, "16:9", 16)


def test_nothing_is_enlarged_beyond_the_limit() -> None:
    config = BucketConfig(resolutions=(128, 256), frames=(1,), aspects=("1:1",), upscale=1.25)
    assert raw_ladder(config, 1, 102, 102) == ()
    assert choose(raw_ladder(config, 1, 103, 103), (0, 0)) == (0, Bucket(1, 128, 128))
    assert choose(raw_ladder(config, 1, 205, 205), (0, 0)) == (0, Bucket(1, 256, 256))
    assert choose(raw_ladder(config, 1, 2000, 204), (0, 0)) == (0, Bucket(1, 128, 128))  # by the side that grows most


def test_a_latent_is_cut_in_time_never_in_space() -> None:
    config = BucketConfig(resolutions=(128,), frames=(1, 9))
    height, width = frame_size(128, "16:9", 16)
    assert choose(latent_ladder(config, ((17, height, width),)), (0, 0)) == (0, Bucket(9, height, width))
    assert choose(latent_ladder(config, ((1, height, width),)), (0, 0)) == (0, Bucket(1, height, width))
    assert latent_ladder(config, ((17, height + 16, width + 64),)) == ()


def test_of_several_latents_the_largest_that_fits_is_taken() -> None:
    config = BucketConfig(resolutions=(64, 128), frames=(1, 9), aspects=("1:1",))
    ladder = latent_ladder(config, ((9, 32, 32), (9, 64, 64), (1, 128, 128), (9, 256, 256)))
    assert choose(ladder, (0, 0)) == (2, Bucket(1, 128, 128))
    assert choose(latent_ladder(config, ((9, 64, 64), (0, 128, 128))), (0, 0)) == (0, Bucket(9, 64, 64))


def test_what_is_not_kept_moves_to_a_smaller_bucket_and_nothing_is_lost() -> None:
    config = BucketConfig(
        resolutions=(256, 64, 128), frames=(1, 9, 17), aspects=("1:1",), keep_resolutions=(0.5, 0.1, 0.25),
        keep_frames=(0.0, 1.0, 0.3),
    )  # fmt: skip
    ladder = raw_ladder(config, 17, 300, 300)
    draw = random.Random(3)
    found = Counter(choose(ladder, (draw.random(), draw.random()))[1] for _ in range(40_000))
    expected = {
        Bucket(frames, side, side): by_side * by_frames
        for side, by_side in ((256, 0.5), (128, 0.5 * 0.25), (64, 0.5 * 0.75))
        for frames, by_frames in ((17, 0.3), (9, 0.7))
    }
    assert found.keys() == expected.keys()
    for bucket, share in expected.items():
        assert abs(found[bucket] / 40_000 - share) < 5 * (share / 40_000) ** 0.5
    for (variant, bucket), share in shares(ladder).items():
        assert (variant, share) == (0, pytest.approx(expected.get(bucket, 0.0)))
    small = raw_ladder(config, 1, 64, 64)  # the smallest keeps all, whatever its share
    assert {choose(small, (draw.random(), draw.random()))[1] for _ in range(100)} == {Bucket(1, 64, 64)}


def test_all_buckets_and_bad_values() -> None:
    config = BucketConfig(resolutions=(128,), frames=(1, 17), aspects=("1:1", "16:9"))
    assert [str(b) for b in buckets_of(config)] == ["1x96x160", "1x128x128", "17x96x160", "17x128x128"]
    wrongs = ({"aspects": ("16/9",)}, {"frames": (0,)}, {"resolutions": ()}, {"upscale": 0.9}, {"keep_frames": (0.5,)},
              {"keep_resolutions": (1.5,)})  # fmt: skip
    for wrong in wrongs:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            BucketConfig(**wrong)
