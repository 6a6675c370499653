"""What is given to a video (pictures, a clip), and how its frames are written."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.video.files import decode, probe
from data_pipelines.video.write import encode_mp4
from megasora.encoders import from_pixels
from megasora.errors import ConfigError
from megasora.models.first_stage import FirstStage
from megasora.models.text import Text
from megasora.models.vae import VAEConfig
from megasora.rendering import make_prompts, read_given, write_video
from megasora.sampling import Given
from megasora.schema import SampleConfig
from tests.unit.test_vae import build

SHAPE = (16, 5, 4, 6)  # of 17 frames of 32x48
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stage() -> FirstStage:
    return build(VAEConfig(width=4, multipliers=(1, 2, 2)))


def settings(**given: object) -> SampleConfig:
    return SampleConfig(frames=17, height=32, width=48, **given)  # type: ignore[arg-type]


def picture(path: Path, seed: int) -> str:
    noise = np.random.default_rng(seed).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return str(path)


def given(stage: FirstStage, **what: object) -> Given:
    found = read_given(settings(**what), stage, SHAPE, CPU)
    assert found is not None
    assert found.latent.shape == SHAPE
    return found


def encoded(stage: FirstStage, file: str, frames: int = 1, repeat: int = 1) -> torch.Tensor:
    pixels = np.repeat(decode(Path(file), frames=frames, height=32, width=48), repeat, axis=0)
    with torch.no_grad():
        return stage.encode(from_pixels(torch.from_numpy(pixels))[None])[0][0]


def test_nothing_is_given_unless_asked(stage: FirstStage) -> None:
    assert read_given(settings(), stage, SHAPE, CPU) is None


def test_a_first_and_a_last_picture(stage: FirstStage, tmp_path: Path) -> None:
    first, last = picture(tmp_path / "a.png", 1), picture(tmp_path / "b.png", 2)
    found = given(stage, first=first, last=last)
    assert found.mask.tolist() == [True, False, False, False, True]
    torch.testing.assert_close(found.latent[:, :1], encoded(stage, first))
    torch.testing.assert_close(found.latent[:, -1], encoded(stage, last, repeat=5)[:, 1])  # standing still
    assert given(stage, last=last).mask.tolist() == [False] * 4 + [True]


def test_a_loop_ends_as_it_begins(stage: FirstStage, tmp_path: Path) -> None:
    first = picture(tmp_path / "a.png", 1)
    found = given(stage, first=first, loop=True)
    assert found.mask.tolist() == [True, False, False, False, True]
    torch.testing.assert_close(found.latent[:, -1], encoded(stage, first, repeat=5)[:, 1])


@pytest.mark.parametrize(("frames", "known"), [(3, 1), (5, 2), (11, 3), (40, 4)])
def test_a_video_goes_on_from_another(stage: FirstStage, tmp_path: Path, frames: int, known: int) -> None:
    """From as many frames as make whole latent frames, and something is left to make."""
    clip = np.random.default_rng(3).integers(0, 256, (frames, 32, 48, 3), dtype=np.uint8)
    encode_mp4(clip, 8, tmp_path / "clip.mp4")
    found = given(stage, extend=str(tmp_path / "clip.mp4"))
    assert found.mask.tolist() == [i < known for i in range(5)]
    expected = encoded(stage, str(tmp_path / "clip.mp4"), frames=1 + 4 * (known - 1))
    torch.testing.assert_close(found.latent[:, :known], expected, rtol=1e-4, atol=1e-4)


def test_a_picture_that_is_none_is_named(stage: FirstStage, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ConfigError, match=r"sample\.first=.*a\.png"):
        given(stage, first=str(tmp_path / "a.png"))


class Says:
    """A text encoder that gives a caption's length."""

    width, pooled_width = 1, 0

    def encode(self, captions: list[str]) -> list[Text]:
        return [Text(torch.full((1, 1), float(len(c))), torch.zeros(0)) for c in captions]

    def fingerprint(self) -> str:
        return ""


def test_prompts_and_classes() -> None:
    made = make_prompts(SampleConfig(prompts=("ab", "abc"), negative="x", seed=7), Says())
    assert [(c, p.text.tokens.item(), p.negative.tokens.item(), p.seed, p.label) for c, p in made] == [
        ("ab", 2, 1, 7, -1),
        ("abc", 3, 1, 8, -1),
    ]
    assert [(c, p.label) for c, p in make_prompts(SampleConfig(labels=(4, 9)), Says())] == [
        ("class 4", 4),
        ("class 9", 9),
    ]
    with pytest.raises(ConfigError, match=r"sample\.prompts=\[\]"):
        make_prompts(SampleConfig(), Says())


def test_frames_are_written_as_they_come(tmp_path: Path) -> None:
    frames = np.stack([np.full((32, 48, 3), 10 * i, np.uint8) for i in range(17)])
    preview = write_video(iter([frames[:1], frames[1:9], frames[9:]]), settings(fps=8.0), tmp_path / "out" / "00.mp4")
    about = probe(tmp_path / "out" / "00.mp4")
    assert (about.frames, about.fps) == (17, 8)
    assert preview[:, 0, 0, 0].tolist() == [0, 30, 60, 100, 130, 160]
