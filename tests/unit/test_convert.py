"""Checkpoints in other forms, and every byte of them: conversions lose nothing, and no damage goes unseen."""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megasora.checkpoint.contents import open_checkpoint
from megasora.checkpoint.convert import consolidate, differences
from megasora.checkpoint.fence import WRITER
from megasora.checkpoint.load import load, read_facts
from megasora.checkpoint.manifest import verify
from megasora.checkpoint.save import save
from megasora.config import load_config, to_dict
from megasora.diffusion.gaussian import betas
from megasora.errors import CheckFailed, CheckpointError, ConfigError
from megasora.export import copy_encoders, parity
from megasora.init_from import open_source
from megasora.models.families import build_model
from megasora.models.interop.dit import DIFFUSERS_TIME_PERIOD
from megasora.models.video_dit import VideoDiTConfig
from megasora.sampling import Generator, Prompt
from megasora.verbs import ckpt

FACTS = {"step": 7, "layout": "dp2", "recent": []}


def make(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model/a.weight": torch.randn(6, 4, generator=generator),
        "model/bf16": torch.randn(7, generator=generator).bfloat16(),
        "ema/a.weight": torch.randn(4, 6, generator=generator).t(),
        "optim/a.weight/step": torch.tensor(float(seed)),
        "optim/count": torch.tensor([seed, 2**40 + 1]),
    }


def call(*words: Any) -> None:
    parser = argparse.ArgumentParser()
    ckpt.add_arguments(parser)
    args = parser.parse_args([str(word) for word in words])
    args.overrides = []
    ckpt.run(args)


def loaded(path: Path, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    load(path, tensors)
    return tensors


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "run", 7, make(1), FACTS)
    call("convert", path, tmp_path / "whole")
    assert sorted(file.name for file in (tmp_path / "whole").iterdir()) == [
        "ema.safetensors", "facts.json", "manifest.json", "model.safetensors", "optim.safetensors"
    ]  # fmt: skip
    call("verify", tmp_path / "whole")
    for part in ("model", "ema", "optim"):  # as another reader of the format sees it
        for name, tensor in load_file(tmp_path / "whole" / f"{part}.safetensors").items():
            assert torch.equal(tensor, make(1)[f"{part}/{name}"])
    call("convert", tmp_path / "whole", tmp_path / "back")
    back = tmp_path / "back" / "step-00000007"
    assert read_facts(back)["layout"] == "dp2"
    assert all(torch.equal(tensor, make(1)[name]) for name, tensor in loaded(back, make(1)).items())
    call("diff", path, back)
    call("diff", tmp_path / "whole", back)
    with pytest.raises(ConfigError, match="is there already"):
        call("convert", path, tmp_path / "whole")
    capsys.readouterr()


def test_diff_names_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = save(tmp_path / "a", 7, make(1), FACTS)
    other = make(1)
    other["model/a.weight"] = other["model/a.weight"] * (1 + 1e-3)
    other["model/new"] = torch.zeros(3)
    other["ema/a.weight"] = torch.zeros(2)
    del other["optim/count"]
    b = save(tmp_path / "b", 7, other, FACTS)
    found = {d.name: d for d in differences(open_checkpoint(a), open_checkpoint(b)) if d.reason or d.relative}
    assert found["model/a.weight"].relative == pytest.approx(1e-3, rel=1e-3)
    assert found["model/a.weight"].largest == pytest.approx(
        float(make(1)["model/a.weight"].abs().max()) * 1e-3, rel=1e-3
    )
    assert found["model/new"].reason == f"only in {b}"
    assert found["optim/count"].reason == f"only in {a}"
    assert found["ema/a.weight"].reason == "[6, 4] and [2]"
    assert len(found) == 4
    with pytest.raises(CheckFailed, match="differ in 4 of 6 tensors"):
        call("diff", a, b, "--json")
    assert [d["name"] for d in json.loads(capsys.readouterr().out)["different"]] == sorted(found)


def test_average(tmp_path: Path) -> None:
    paths = [save(tmp_path / str(seed), seed, make(seed), FACTS) for seed in (1, 2)]
    call("average", *paths, "--output", tmp_path / "mean", "--weights", "3,1")
    kept = {name: tensor for name, tensor in make(1).items() if not name.startswith("optim/")}
    for name, tensor in loaded(tmp_path / "mean" / "step-00000002", kept).items():
        expected = 0.75 * make(1)[name].double() + 0.25 * make(2)[name].double()
        assert torch.equal(tensor, expected.to(tensor.dtype))
    with pytest.raises(ConfigError, match="2 numbers"):
        call("average", *paths, "--output", tmp_path / "mean2", "--weights", "1")
    with pytest.raises(ConfigError, match="step-00000002: is there already"):
        call("average", *paths, "--output", tmp_path / "mean")
    (tmp_path / "live" / WRITER).mkdir(parents=True)
    with pytest.raises(ConfigError, match="a run saves its own checkpoints here"):
        call("average", *paths, "--output", tmp_path / "live" / "checkpoints")
    other = save(tmp_path / "other", 3, {"model/a.weight": torch.zeros(1)}, FACTS)
    with pytest.raises(CheckpointError, match="is not what it is in"):
        call("average", paths[0], other, "--output", tmp_path / "mean3")


def test_500_changed_bytes_are_all_seen(tmp_path: Path) -> None:
    """Over every kind of file, sharded and consolidated: found, named, and nothing but a CheckpointError of one line."""
    sharded = save(tmp_path / "run", 7, make(1), FACTS)
    consolidate(open_checkpoint(sharded), tmp_path / "whole")
    files = [file for path in (sharded, tmp_path / "whole") for file in sorted(path.iterdir())]
    assert len({file.name for file in files}) == 7
    chance = random.Random(7)
    for i in range(500):
        file = files[i % len(files)]
        good = file.read_bytes()
        bad = bytearray(good)
        bad[chance.randrange(len(bad))] ^= chance.randrange(1, 256)
        file.write_bytes(bad)
        assert [problem.file for problem in verify(file.parent)] == [file.name]
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(file.parent)
        assert file.name in str(caught.value)
        assert "\n" not in str(caught.value)
        file.write_bytes(good)
    assert verify(sharded) == verify(tmp_path / "whole") == []


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, VideoDiTConfig, dict[str, torch.Tensor]]:
    """A checkpoint of a small VideoDiT whose every weight is random."""
    config = load_config(None, ["--model.width=48", "--model.depth=2", "--model.heads=2", "--model.ffn=80",
                                "--model.channels=4", "--model.text_width=24", "--sample.shift=3.0"])  # fmt: skip
    assert isinstance(config.model, VideoDiTConfig)
    generator = torch.Generator().manual_seed(3)
    model = build_model(config.model)
    state = {name: 0.1 * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    tensors = {f"{part}/{name}": tensor for part in ("model", "ema") for name, tensor in state.items()}
    path = save(tmp_path / "run", 9, tensors, {"step": 9, "config": to_dict(config)})
    return path, config.model, state


def test_an_export_opens_in_diffusers_and_samples_the_same(
    trained: tuple[Path, VideoDiTConfig, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

    from megasora.diffusion.flow import Flow, FlowConfig
    from megasora.models.text import Text
    from megasora.schema import SampleConfig

    path, model_config, state = trained
    call("export", path, tmp_path / "out", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["parity"] < 1e-5
    assert set(report["left_out"]) == {"vae", "text_encoder"}
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer").eval()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")

    settings = SampleConfig(steps=6, shift=3.0, guidance=4.0, frames=5)
    text, negative = torch.randn(5, 24), torch.randn(3, 24)
    model = build_model(model_config).eval()
    model.load_state_dict(state)
    generator = Generator(model, model_config, Flow(FlowConfig()), "flow", settings, torch.device("cpu"))
    prompt = Prompt(Text(text, torch.zeros(0)), Text(negative, torch.zeros(0)), seed=5)
    ours = generator.generate((4, 2, 8, 8), prompt)

    from megasora.seeding import normal

    latent = normal((4, 2, 8, 8), "sample", 5)[None]
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6))
    with torch.no_grad():
        for t in scheduler.timesteps:
            told = [theirs(latent, t[None], words[None]).sample for words in (text, negative)]
            latent = scheduler.step(told[1] + 4.0 * (told[0] - told[1]), t, latent).prev_sample
    assert ours.std() > 0.1
    assert float((latent[0] - ours).norm() / ours.norm()) < 1e-5


OTHERS = {
    "hunyuan": "family=mmdit depth=2 single_depth=1 heads=3 ffn=96 pooled_width=20 axes=[4,6,6] text=refiner text_width=24",
    "latte": "preset=Latte-XL/2-T2V depth=2 heads=4 ffn=192 text_width=24 base_size=4",
    "dit": f"family=dit depth=2 heads=4 ffn=192 classes=5 learn_sigma=true time_period={DIFFUSERS_TIME_PERIOD}",
}
CHAIN = ["--objective=gaussian", "--gaussian.variance=learned_range"]


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_go_to_diffusers_and_come_back(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import diffusers

    model = [f"--model.{setting}" for setting in f"{OTHERS[family]} width=48 channels=4".split()]
    config = load_config(None, model + CHAIN * (family != "hunyuan"))
    generator = torch.Generator().manual_seed(3)
    state = {
        name: 0.1 * torch.randn(p.shape, generator=generator)
        for name, p in build_model(config.model).named_parameters()
    }
    tensors = {f"{part}/{name}": tensor for part in ("model", "ema") for name, tensor in state.items()}
    path = save(tmp_path / "run", 9, tensors, {"step": 9, "config": to_dict(config)})
    call("export", path, tmp_path / "out", "--json")
    assert json.loads(capsys.readouterr().out)["parity"] < 1e-5
    scheduler = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    made = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    if config.objective == "gaussian":
        assert torch.allclose(made.betas.double(), betas(config.gaussian), atol=1e-8)
    source = open_source(tmp_path / "out", "model/")
    assert source.names == state.keys()
    assert (source.model.patch, source.model.channels) == (config.model.patch, 4)
    for name, tensor in state.items():
        assert torch.equal(source.read(name), tensor), name


def test_parity_sees_a_wrong_weight(
    trained: tuple[Path, VideoDiTConfig, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, config, state = trained
    call("export", path, tmp_path / "out")
    capsys.readouterr()
    found = parity(config, state | {"head.out.bias": state["head.out.bias"] + 0.1}, tmp_path / "out" / "transformer")
    assert found is not None
    assert found > 1e-3


def test_an_export_has_all_encoders_and_tokenizers_or_says_why(tmp_path: Path) -> None:
    """Of a pipeline's directory, as diffusers lays it out, and of encoders with their tokenizers inside."""
    there = {
        "published/text_encoder/config.json": '{"architectures": ["UMT5EncoderModel"]}',
        "published/tokenizer/spiece.model": "x",
        "published/tokenizer/tokenizer_config.json": '{"tokenizer_class": "T5Tokenizer"}',
        "clip/config.json": '{"architectures": ["CLIPTextModel"]}',
        "clip/vocab.json": "{}",
        "clip/merges.txt": "",
        "bare/config.json": '{"architectures": ["CLIPTextModel"]}',
    }
    for name, content in there.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)

    def copied(vae: str, *texts: str) -> tuple[dict[str, list[str]], dict[str, str]]:
        names = ",".join(str(tmp_path / text) for text in texts)
        target = tmp_path / f"out-{texts[-1].replace('/', '-')}"
        return copy_encoders(load_config(None, [f"--encode.vae={vae}", f"--encode.text={names}"]), target)

    parts, left_out = copied(str(tmp_path / "no-vae"), "published/text_encoder", "clip")
    assert parts == {
        "text_encoder": ["transformers", "UMT5EncoderModel"], "tokenizer": ["transformers", "T5Tokenizer"],
        "text_encoder_2": ["transformers", "CLIPTextModel"], "tokenizer_2": ["transformers", "AutoTokenizer"],
    }  # fmt: skip
    assert left_out == {"vae": f"{tmp_path / 'no-vae'}: is not here"}
    copies = {str(path.relative_to(tmp_path / "out-clip")) for path in (tmp_path / "out-clip").glob("tokenizer*/*")}
    assert copies == {
        "tokenizer/spiece.model", "tokenizer/tokenizer_config.json", "tokenizer_2/vocab.json", "tokenizer_2/merges.txt"
    }  # fmt: skip
    parts, left_out = copied("pixels", "gone", "bare")
    assert list(parts) == ["text_encoder_2"]
    assert left_out["vae"] == "pixels: diffusers has no class for it"
    assert left_out["text_encoder"] == f"{tmp_path / 'gone'}: is not here"
    assert left_out["tokenizer_2"].startswith(f"{tmp_path / 'bare'}: has none of tokenizer.json, ")


def test_what_has_no_class_in_diffusers_is_refused(tmp_path: Path) -> None:
    config = load_config(None, ["--model.temporal=chunk_causal", "--model.chunk=1", "--model.window=2"])
    path = save(tmp_path / "run", 9, {"ema/x": torch.zeros(1)}, {"step": 9, "config": to_dict(config)})
    with pytest.raises(ConfigError, match=r"model\.temporal=chunk_causal: Wan has full"):
        call("export", path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
