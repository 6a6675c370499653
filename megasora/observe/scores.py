"""How good generated videos are, by local models: CLIP's agreement with the prompt, FVD's distance to real ones."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.video.files import decode, probe
from data_pipelines.video.reader import Undecodable
from megasora.errors import ConfigError

CLIP_FRAMES = 8  # of a video, evenly spaced
# CLIP's, of pixels in [0, 1]
MEAN, DEVIATION = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@torch.no_grad()
def clip_score(directory: str, videos: Sequence[np.ndarray], captions: Sequence[str]) -> float:
    """100 times the mean cosine of frames and captions (Hessel et al. 2021, without their factor and floor).

    videos uint8 [T, H, W, 3]. Raises ConfigError naming eval.clip.
    """
    try:
        from transformers import CLIPModel, CLIPTokenizer
    except ImportError:
        raise ConfigError(f"eval.clip: {directory} needs transformers: pip install 'megasora[encoders]'") from None
    try:
        # Nothing is downloaded, and weights in pickles are refused.
        model: Any = CLIPModel.from_pretrained(directory, local_files_only=True, use_safetensors=True)  # nosec B615
        tokenizer = CLIPTokenizer.from_pretrained(directory, local_files_only=True)  # nosec B615
    except (OSError, ValueError) as error:
        raise ConfigError(f"eval.clip={directory}: {' '.join(str(error).split())}") from None
    model.eval()
    side, longest = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings
    scores = []
    for video, caption in zip(videos, captions, strict=True):
        tokens = tokenizer([caption], max_length=longest, truncation=True, return_tensors="pt")
        output = model(pixel_values=clip_pixels(video, side), **tokens)
        scores.append(torch.cosine_similarity(output.image_embeds, output.text_embeds).mean().item())
    return 100 * float(np.mean(scores))


def clip_pixels(video: np.ndarray, side: int) -> Tensor:
    """uint8 [T, H, W, 3] -> at most CLIP_FRAMES frames as CLIP sees them, [n, 3, side, side]: scaled, the centre cut out."""
    chosen = np.linspace(0, len(video) - 1, min(CLIP_FRAMES, len(video))).round().astype(int)
    pixels = torch.from_numpy(video[chosen]).permute(0, 3, 1, 2).float() / 255  # [n, 3, H, W]
    H, W = pixels.shape[2:]
    size = [max(side, round(length * side / min(H, W))) for length in (H, W)]
    pixels = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (pixels[:, :, top : top + side, left : left + side] - mean) / deviation


@torch.no_grad()
def fvd(file: str, reference: str, videos: Sequence[np.ndarray]) -> float:
    """Frechet distance of features (Unterthiner et al. 2018) between the videos and those in a directory, cut to their size.

    `file` is a TorchScript model that turns [1, 3, T, H, W] in [-1, 1] into features. Raises ConfigError naming eval.fvd.
    """
    try:
        model = torch.jit.load(file).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"eval.fvd={file}: {str(error).splitlines()[0]}") from None
    made = torch.stack([features(model, video) for video in videos])  # [n, F]
    real = torch.stack([features(model, video) for video in real_videos(reference, videos[0].shape)])
    return frechet_distance(made, real)


def features(model: torch.nn.Module, video: np.ndarray) -> Tensor:
    """uint8 [T, H, W, 3] -> [F] fp64."""
    pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    return model(pixels).double().flatten()


def real_videos(directory: str, shape: Sequence[int]) -> Iterator[np.ndarray]:
    """The first frames of every video of a directory, cut to a shape [T, H, W, 3]. Raises ConfigError when there are not two."""
    T, H, W, _ = shape
    found = 0
    for path in sorted(Path(directory).glob("*")):
        try:
            if path.is_file() and probe(path).frames >= T:
                yield decode(path, frames=T, height=H, width=W)
                found += 1
        except Undecodable:
            continue
    if found < 2:
        raise ConfigError(
            f"eval.fvd_reference={directory}: {found} videos of {T} frames or more; at least two are needed"
        )


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between the Gaussians of two sets of features [n, F]: |mean - mean|² + tr(A + B - 2·sqrt(A·B)) (Heusel et al. 2017)."""
    A, B = (torch.atleast_2d(torch.cov(x.T)) for x in (a, b))
    # The trace of the square root of A·B is the sum of the roots of its eigenvalues, which are those of a positive matrix.
    roots = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt()
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * roots.sum()).item()
