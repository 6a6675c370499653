"""One clip, learned by heart: what `sample` then draws is that clip."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from data_pipelines.prepare.demo_clips import draw_clip
from data_pipelines.video.files import decode
from data_pipelines.video.write import encode_mp4
from megasora.cli import main

CAPTION = "A red circle moves right."
FRAMES, HEIGHT, WIDTH = 9, 48, 80


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * math.log10(255**2 / np.square(a.astype(float) - b.astype(float)).mean())


def road(tmp_path: Path, clips: dict[str, np.ndarray], captions: dict[str, str], stage: dict[str, Any]) -> Path:
    """The config of a run that learns a few clips by heart, with everything before `train` done."""
    (tmp_path / "raw").mkdir()
    for name, clip in clips.items():
        encode_mp4(clip, 8, tmp_path / "raw" / f"{name}.mp4", crf=10)
        (tmp_path / "raw" / f"{name}.txt").write_text(captions[name])
    config = {
        "run": {"dir": str(tmp_path / "run")},
        "prepare": {
            "input": str(tmp_path / "raw"),
            "output": str(tmp_path / "shards"),
            "min_frames": FRAMES,
            "crf": 10,
        },
        "vae": {"width": 16, "multipliers": [1, 2, 2]},
        "train_vae": {"steps": 60, "batch": 2, "frames": FRAMES, "size": 48, "lr": 1e-3},
        "encode": {
            "input": str(tmp_path / "shards"),
            "output": str(tmp_path / "latents"),
            "vae": str(tmp_path / "vae"),
        },
        "data": {"path": str(tmp_path / "latents"), "global_batch": 4, "capacity": 256},
        "model": {"width": 96, "depth": 3, "heads": 4, "ffn": 384, "text_width": 32, "position": "rope+sincos"},
        "optim": {"name": "muon", "lr": 1e-2, "warmup": 20, "ema": 0.95, "final_lr": 0.02},
        "stages": [stage | {"buckets": {"resolutions": [64], "frames": [FRAMES], "aspects": ["5:3"]}}],
        "checkpoint": {"every": stage["steps"]},
        "sample": {
            "prompts": [CAPTION],
            "frames": FRAMES,
            "height": HEIGHT,
            "width": WIDTH,
            "steps": 16,
            "guidance": 1.0,
        },
    }
    file = tmp_path / "overfit.yaml"
    file.write_text(yaml.safe_dump(config))
    for verb in ("prepare", "train-vae", "encode"):
        assert main([verb, "--config", str(file)]) == 0
    return file


def test_after_overfitting_one_clip_the_sample_resembles_it(tmp_path: Path) -> None:
    clip = draw_clip("circle", "red", "right", HEIGHT, WIDTH, FRAMES)
    file = road(tmp_path, {"circle": clip}, {"circle": CAPTION}, {"steps": 400})
    assert main(["train", "--config", str(file)]) == 0
    assert main(["sample", "--config", str(file), f"--sample.output={tmp_path / 'drawn'}"]) == 0
    drawn = decode(tmp_path / "drawn/00.mp4", frames=FRAMES, height=HEIGHT, width=WIDTH)
    # A grey picture, or the clip standing still, are no reproduction.
    still = np.broadcast_to(clip.mean(0).astype(np.uint8), clip.shape)
    assert psnr(drawn, clip) > psnr(still, clip) + 3
    assert psnr(drawn, clip) > 24  # the VAE alone reaches 28

    assert main(["train", "--config", str(file), f"--run.dir={tmp_path / 'one'}", "--run.steps=1"]) == 0
    given = [f"--run.dir={tmp_path / 'one'}", f"--sample.output={tmp_path / 'untrained'}"]
    assert main(["sample", "--config", str(file), *given]) == 0
    untrained = decode(tmp_path / "untrained/00.mp4", frames=FRAMES, height=HEIGHT, width=WIDTH)
    assert psnr(untrained, clip) < psnr(drawn, clip) - 5


@pytest.mark.long
def test_after_overfitting_two_clips_a_first_frame_says_which_one_goes_on(tmp_path: Path) -> None:
    """Without any caption: both are the empty one."""
    clips = {
        "circle": draw_clip("circle", "red", "right", HEIGHT, WIDTH, FRAMES),
        "square": draw_clip("square", "blue", "left", HEIGHT, WIDTH, FRAMES),
    }
    stage = {"steps": 600, "tasks": {"image": 1.0}, "drop_captions": 1.0}
    file = road(tmp_path, clips, {"circle": CAPTION, "square": "A blue square moves left."}, stage)
    assert main(["train", "--config", str(file)]) == 0
    for name, clip in clips.items():
        Image.fromarray(clip[0]).save(tmp_path / f"{name}.png")
        given = [f"--sample.first={tmp_path / name}.png", '--sample.prompts=[""]', f"--sample.output={tmp_path / name}"]
        assert main(["sample", "--config", str(file), *given]) == 0
        drawn = decode(tmp_path / name / "00.mp4", frames=FRAMES, height=HEIGHT, width=WIDTH)
        still = np.broadcast_to(clip[:1], clip.shape)
        assert psnr(drawn, clip) > psnr(still, clip) + 3
        assert psnr(drawn, clip) > 24
