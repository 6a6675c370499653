import pytest

from data_pipelines.buckets import (
    Bucket,
    BucketConfig,
    buckets_of,
    choose_frames,
    choose_latent_bucket,
    choose_size,
    frame_size,
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
    assert portrait[0] > portrait[1]
    assert landscape == frame_size(256, "16:9", 16)


def test_a_latent_is_cut_in_time_never_in_space() -> None:
    config = BucketConfig(resolutions=(128,), frames=(1, 9))
    height, width = frame_size(128, "16:9", 16)
    assert choose_latent_bucket(config, 17, height, width) == Bucket(9, height, width)
    assert choose_latent_bucket(config, 1, height, width) == Bucket(1, height, width)
    assert choose_latent_bucket(config, 17, height + 16, width + 64) is None


def test_all_buckets_and_bad_values() -> None:
    config = BucketConfig(resolutions=(128,), frames=(1, 17), aspects=("1:1", "16:9"))
    assert [str(b) for b in buckets_of(config)] == ["1x96x160", "1x128x128", "17x96x160", "17x128x128"]
    for wrong in ({"aspects": ("16/9",)}, {"frames": (0,)}, {"resolutions": ()}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            BucketConfig(**wrong)
