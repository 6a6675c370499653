"""Every family trains through the one trainer, on the same latents, and learns them; the generators then sample."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save, save_file

from data_pipelines.buckets import BucketConfig
from data_pipelines.shards.tars import ShardWriter
from megasora.cli import main
from megasora.encoders import make_manifest, open_stage
from megasora.models.text import SmallTextEncoder
from megasora.observe.metrics import history
from megasora.schema import EncodeConfig

# The pixels themselves are the latents: two classes of flat colour, as images and as clips.
SAMPLES = 12
GAUSSIAN = {"objective": "gaussian", "gaussian": {"variance": "learned_range", "schedule": "cosine"}}
SMALL = {"width": 48, "depth": 2, "heads": 4, "channels": 3, "patch": [1, 4, 4]}
FAMILIES: dict[str, dict[str, Any]] = {
    "video_dit": {"model": {"ffn": 96, "text_width": 16}},
    "video_dit-chunks": {"model": {"ffn": 96, "text_width": 16, "temporal": "chunk_causal", "chunk": 2, "window": 1}},
    "mmdit": {"model": {"ffn": 96, "text_width": 16, "pooled_width": 16, "single_depth": 2, "axes": [4, 4, 4]}},
    "stdit": {"model": {"ffn": 96, "text_width": 16, "learn_sigma": True}, **GAUSSIAN},
    "dit": {"model": {"ffn": 96, "classes": 2, "learn_sigma": True}, **GAUSSIAN},
    "dit-cross": {"model": {"ffn": 96, "classes": 2, "design": "cross_attention"}, "objective": "gaussian"},
    "vit": {"model": {"ffn": 96, "classes": 2, "image_size": 16}, "objective": "classify"},
    "vivit": {
        "model": {"ffn": 96, "classes": 2, "image_size": 16, "frames": 6, "patch": [2, 4, 4]}, "objective": "classify",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("latents")
    generator = torch.Generator().manual_seed(0)
    encoder = SmallTextEncoder.create(["a red wall", "a blue wall"], width=16)
    encoder.save(directory / "text")
    texts = encoder.encode(["a red wall", "a blue wall", ""])
    with ShardWriter(directory, samples_per_shard=6) as writer:
        for i in range(SAMPLES):
            label = i % 2
            colour = torch.tensor([0.8, -0.6, 0.1] if label else [-0.7, 0.2, 0.6]).view(3, 1, 1, 1)
            mean = colour + 0.05 * torch.randn(3, 6, 16, 16, generator=generator)
            tensors = {"mean": mean, "logvar": torch.full_like(mean, -30.0), "text": texts[label].tokens,
                       "pooled": texts[label].pooled}  # fmt: skip
            facts = {"kind": "video", "frames": 6, "fps": 8.0, "height": 16, "width": 16, "temporal_compression": 1,
                     "caption_tokens": len(texts[label].tokens), "label": label}  # fmt: skip
            writer.write({"__key__": f"s{i:03d}", "json": facts, "safetensors": save(tensors)})
    made = EncodeConfig(vae="pixels", text=str(directory / "text"), output=str(directory), latent_dtype="float32")
    buckets = BucketConfig(resolutions=(16,), frames=(1, 6), aspects=("1:1",), multiple=16)
    manifest = make_manifest(open_stage(made, torch.device("cpu")), encoder, made, [buckets])
    (directory / "latents.json").write_text(json.dumps(manifest))
    null = texts[2]
    save_file({"null_text": null.tokens, "pooled": null.pooled}, directory / "null_text.safetensors")
    return directory


def write_config(name: str, latents: Path, where: Path) -> Path:
    family = name.partition("-")[0]
    chosen = FAMILIES[name]
    frames = [6] if family == "vivit" else [1] if family == "vit" else [1, 6]
    config = {"optim": {"lr": 3e-3, "warmup": 5, "ema": 0.9}} | chosen | {
        "model": SMALL | {"family": family} | chosen["model"],
        "run": {"dir": str(where / "run"), "seed": 3},
        "data": {"path": str(latents), "global_batch": 8, "capacity": 256},
        "encode": {"vae": "pixels"},
        "stages": [{
            "steps": 40, "tasks": {"text": 0.7, "image": 0.2, "extend": 0.1},
            "buckets": {"resolutions": [16], "frames": frames, "aspects": ["1:1"], "multiple": 16},
        }],
        "eval": {"loss_every": 40, "samples": 4, "quantiles": [0.3, 0.7]},
        "checkpoint": {"every": 40},
        "sample": {"frames": 1 if family == "vit" else 6, "height": 16, "width": 16, "steps": 8, "guidance": 1.5},
        "observe": {"tensorboard": False},
    }  # fmt: skip
    (where / "run.yaml").write_text(yaml.safe_dump(config))
    return where / "run.yaml"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_and_samples(name: str, latents: Path, tmp_path: Path) -> None:
    config = write_config(name, latents, tmp_path)
    assert main(["train", "--config", str(config)]) == 0
    losses = [line["loss"] for line in history(tmp_path / "run")]
    assert len(losses) == 40
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    (evaluated,) = (event for event in events if event["event"] == "eval")
    bucket = "1x16x16" if name == "vit" else "6x16x16"
    assert evaluated["loss"] > 0 < evaluated[f"loss_{bucket}"]
    assert {"loss_q0.30", "loss_q0.70"} <= evaluated.keys() or name in ("vit", "vivit")
    conditions = ['--sample.prompts=["a red wall", "a blue wall"]', "--sample.labels=[0, 1]"]
    code = main(["sample", "--config", str(config), *conditions])
    if name.startswith("vi") and not name.startswith("video"):
        assert code == 2  # a classifier makes no videos
        return
    assert code == 0
    (made,) = (tmp_path / "run" / "samples").iterdir()
    assert sorted(path.name for path in made.iterdir()) == ["00.mp4", "01.mp4", "contact-sheet.png"]
