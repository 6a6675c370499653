"""Scores of videos against transformers and scipy."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from data_pipelines.video.write import encode_mp4
from megasora.errors import ConfigError
from megasora.observe.scores import clip_pixels, clip_score, frechet_distance, fvd


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights, and a tokenizer of letters."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    directory = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (directory / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(directory).save_pretrained(directory)
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shared, "vocab_size": len(words), "max_position_embeddings": 12, "eos_token_id": 53, "bos_token_id": 52}
    vision = {**shared, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(directory)
    return directory


def noise(frames: int, seed: int, height: int = 40, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def test_clips_score_is_the_cosine_of_its_logits(clip: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    video = noise(3, 1)
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    with torch.no_grad():
        output = model(pixel_values=clip_pixels(video, 32), **tokenizer(["a cat"], return_tensors="pt"))
    expected = 100 * (output.logits_per_image / model.logit_scale.exp()).mean().item()
    assert clip_score(str(clip), [video], ["a cat"]) == pytest.approx(expected, rel=1e-4)
    assert clip_score(str(clip), [video], ["a dog"]) != pytest.approx(expected, rel=1e-4)


def test_pixels_are_scaled_as_clips_processor_does() -> None:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    smooth = np.linspace(0, 255, 40 * 64 * 3).reshape(1, 40, 64, 3).astype(np.uint8)
    expected = torch.as_tensor(np.asarray(processor(list(smooth), return_tensors="np")["pixel_values"]))
    assert (clip_pixels(smooth, 32) - expected).abs().max() < 0.05  # theirs rounds to whole grey levels


def test_frechet_distance_is_the_formula_by_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    b = b @ torch.randn(6, 6, generator=generator, dtype=torch.float64) + 1
    A, B = (np.cov(x.numpy().T) for x in (a, b))
    expected = ((a.mean(0) - b.mean(0)).square().sum() + np.trace(A + B - 2 * sqrtm(A @ B).real)).item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


class Means(torch.nn.Module):
    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return video.mean((2, 3, 4))


def test_fvd_reads_a_model_and_real_videos(tmp_path: Path) -> None:
    torch.jit.script(Means()).save(str(tmp_path / "features.pt"))
    (tmp_path / "real").mkdir()
    for i, level in enumerate((60, 120, 200)):
        encode_mp4(np.full((9, 40, 64, 3), level, np.uint8), 8, tmp_path / "real" / f"{i}.mp4")
    same = [np.full((9, 40, 64, 3), level, np.uint8) for level in (60, 120, 200)]
    model, real = str(tmp_path / "features.pt"), str(tmp_path / "real")
    near = fvd(model, real, same)
    assert near < 1e-3 < fvd(model, real, [video // 2 for video in same])
    with pytest.raises(ConfigError, match=r"eval.fvd_reference=.*at least two"):
        fvd(model, real, [noise(10, 1), noise(10, 2)])
    with pytest.raises(ConfigError, match=r"eval\.fvd="):
        fvd(str(tmp_path / "none.pt"), real, same)
