"""Videos of prompts: given pictures in, the sampler, the first stage's decoder, an mp4 and a contact sheet out."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipelines.video.files import decode, probe
from data_pipelines.video.reader import Undecodable
from data_pipelines.video.write import Mp4Writer, contact_sheet
from megasora.encoders import from_pixels, to_pixels
from megasora.errors import ConfigError
from megasora.models.families import chunk_of
from megasora.models.first_stage import FirstStage
from megasora.models.text import TextEncoder
from megasora.sampling import Generator, Given, LatentShape, Prompt, latent_shape, leading
from megasora.schema import SampleConfig

SHEET_COLUMNS = 6  # frames of a video on the contact sheet


def make_prompts(settings: SampleConfig, text: TextEncoder) -> list[tuple[str, Prompt]]:
    """(caption, prompt) of every video that the settings ask for: a prompt each, or a class each where there are only labels."""
    captions = list(settings.prompts) or [""] * len(settings.labels)
    if not captions:
        raise ConfigError('sample.prompts=[]: give at least one, as in --sample.prompts=["a rabbit in a meadow"]')
    labels = list(settings.labels) or [-1] * len(captions)
    if len(labels) != len(captions):
        raise ConfigError(f"sample.labels={labels}: as many as sample.prompts, {len(captions)}")
    *texts, negative = text.encode([*captions, settings.negative])
    prompts = [
        Prompt(one, negative, settings.seed + i, label)
        for i, (one, label) in enumerate(zip(texts, labels, strict=True))
    ]
    shown = [caption or f"class {label}" for caption, label in zip(captions, labels, strict=True)]
    return list(zip(shown, prompts, strict=True))


@torch.no_grad()
def render(generator: Generator, stage: FirstStage, prompt: Prompt) -> Iterator[np.ndarray]:
    """Stretches of uint8 [t, H, W, 3], settings.frames in all, in memory that does not grow with their number."""
    settings = generator.settings
    windows = not chunk_of(generator.config) and 0 < settings.window < settings.frames
    shape = first_shape(generator, stage)
    given = read_given(settings, stage, shape, generator.device)
    if windows:
        stretches: Iterable[Tensor] = generator.extend(
            shape, settings.frames, prompt, given,
            decode=lambda latent: stage.decode_long(latent[None])[0],
            encode=lambda video: stage.encode_long(video[None].clamp(-1, 1))[0][0],
        )  # fmt: skip
    elif chunk_of(generator.config):
        latents = (chunk[None] for chunk in generator.rollout(shape, prompt, given))
        stretches = (video[0] for video in stage.decode_stream(latents))
    else:
        stretches = [stage.decode_long(generator.generate(shape, prompt, given)[None])[0]]
    for video in stretches:
        yield to_pixels(video).numpy()


def first_shape(generator: Generator, stage: FirstStage) -> LatentShape:
    """The latent that is made first: the whole, or one window of a longer video. Raises ConfigError for sizes that cannot be."""
    settings, patch = generator.settings, generator.config.patch
    if chunk_of(generator.config) or not 0 < settings.window < settings.frames:
        return latent_shape(settings, "frames", stage.latent_channels, stage.compression, patch)
    latent_shape(settings, "overlap", stage.latent_channels, stage.compression, patch)
    if settings.last or settings.loop:
        raise ConfigError(
            f"sample.last={settings.last or settings.first}: a video longer than sample.window has no known end"
        )
    return latent_shape(settings, "window", stage.latent_channels, stage.compression, patch)


@torch.no_grad()
def read_given(settings: SampleConfig, stage: FirstStage, shape: LatentShape, device: torch.device) -> Given | None:
    """The frames that settings.first, last, loop and extend name, as latents. Raises ConfigError for a file that cannot be."""
    if not (settings.first or settings.last or settings.extend):
        return None
    T, t = shape[1], stage.compression[0]

    def encode(key: str, file: str, frames: int, repeat: int = 1) -> Tensor:
        try:
            video = decode(Path(file), frames=frames, height=settings.height, width=settings.width)
        except (Undecodable, OSError) as error:
            raise ConfigError(f"sample.{key}={file}: {error}") from None
        pixels = from_pixels(torch.from_numpy(np.repeat(video, repeat, axis=0)))
        return stage.encode_long(pixels[None].to(device))[0][0]  # the mean, [C, T, H, W]

    given = leading(torch.zeros(shape[0], 0, *shape[2:], device=device), shape)
    if settings.extend:
        given = leading(encode("extend", settings.extend, _extended(settings, T, t)), shape)
    elif settings.first:
        given = leading(encode("first", settings.first, 1), shape)
    last = settings.first if settings.loop else settings.last
    if last:
        # A latent frame is t pixel frames: the picture stands still in them.
        given.latent[:, -1] = encode("first" if settings.loop else "last", last, 1, repeat=1 + t)[:, -1]
        given.mask[-1] = True
    return given


def _extended(settings: SampleConfig, T: int, t: int) -> int:
    """How many frames of the video sample.extend to go on from: as many as make whole latent frames and leave one to make."""
    try:
        frames = probe(Path(settings.extend)).frames
    except (Undecodable, OSError) as error:
        raise ConfigError(f"sample.extend={settings.extend}: {error}") from None
    latent = 1 + (frames - 1) // t
    return 1 + (min(latent, T - 1) - 1) * t


def write_video(stretches: Iterable[np.ndarray], settings: SampleConfig, path: Path) -> np.ndarray:
    """An mp4, written as frames come; returns a few of them for a contact sheet."""
    wanted = set(np.linspace(0, settings.frames - 1, min(SHEET_COLUMNS, settings.frames)).round().astype(int).tolist())
    kept, number = [], 0
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = Mp4Writer(path, fps=settings.fps, height=settings.height, width=settings.width)
    for stretch in stretches:
        for frame in stretch:
            writer.add(frame)
            if number in wanted:
                kept.append(frame.copy())
            number += 1
    writer.close()
    return np.stack(kept)


def write_videos(videos: Sequence[tuple[str, np.ndarray]], wanted: SampleConfig, directory: Path) -> None:
    """Of each (caption, uint8 [T, H, W, 3]) an mp4, and the contact sheet."""
    previews = [write_video([video], wanted, directory / f"{i:02d}.mp4") for i, (_, video) in enumerate(videos)]
    write_sheet(previews, [caption for caption, _ in videos], directory)


def write_sheet(previews: Sequence[np.ndarray], captions: Sequence[str], directory: Path) -> Path:
    sheet = directory / "contact-sheet.png"
    contact_sheet(list(previews), list(captions), sheet, SHEET_COLUMNS)
    return sheet
