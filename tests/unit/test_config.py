"""What a config promises: types, nearest keys, bases, presets, snapshots of every resolved file."""

import json
from pathlib import Path

import pytest
import yaml

from megasora.cli import main
from megasora.config import flatten, load_config, to_dict
from megasora.errors import ConfigError
from megasora.schema import Config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
GOLDEN = ROOT / "tests" / "data" / "configs"
DEMO = ROOT / "configs" / "demo.yaml"


def test_scientific_notation_is_a_float() -> None:
    config = load_config(DEMO, ["--optim.lr=1e-4"])
    assert config.optim.lr == 1e-4
    assert isinstance(config.optim.lr, float)


def test_the_unknown_key_exits_2_with_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    assert main(["train", "--config", str(DEMO), "--optim.lrr=1e-4", f"--run.dir={tmp_path}/run"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "optim.lrr=1e-4" in err
    assert "did you mean optim.lr?" in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--opt.lr=1", "did you mean opti"),
        ("--data.globalbatch=8", "did you mean data.global_batch"),
        ("--lr=1", "did you mean optim.lr"),
        ("--stages.1.bucket.frames=[1]", "did you mean stages.1.buckets"),
        ("--optim.lr=fast", "optim.lr=fast: input should be a valid number"),
        ("--run.steps=1.5", "run.steps=1.5"),
        ("--run.steps=0", "run.steps=0"),
        ("--model.preset=Wan2.1-13B", "did you mean Wan2.1-1.3B"),
        ("--model.heads=5", "model.heads=5: do not divide width 256; nearest is 4"),
        ("--model.attention=fast", "model.attention"),
        ("--optim=3", "optim=3: a section with keys is expected"),
        ("--optim.lr.x=3", "optim.lr"),
        ("--stages.7.lr=1", "stages.7.lr"),
        ("--engine=deep", "engine=deep"),
        ("--optim.lr", "--section.key=value"),
        ("--run.steps=true", "run.steps"),
        ("--run.dir=", "run.dir="),
        ("--optim.lr=nan", "optim.lr=nan"),
        ("--bench.tolerance=nan", "bench.tolerance=nan"),
        ("--optim.betas=[0.9,2]", "optim.betas.1=2.0"),
        ("--model.heads=0", "model.heads=0"),
        ("--model.family=dti", "did you mean dit?"),
        ("--model.family=dit", "model.position=rope+sincos: unknown key"),
        ("--model.preset=DiT-XL/3", "did you mean DiT-XL/"),
        ("--model.learn_sigma=true", "model.learn_sigma=true: goes together with objective=gaussian"),
        ("--objective=classify", "objective=classify: model.family=video_dit learns by flow or gaussian"),
        ("--stages.0.tasks={imag: 1}", "stages.0.tasks.imag: no such task, the nearest is image"),
        ("--sample.sampler=ddim", "sample.sampler=ddim: objective=flow has euler, heun"),
        ("--vae.preset=4x8x9", "did you mean 4x8x8?"),
        ("--gaussian.steps=1", "gaussian.steps=1"),
        ("--sample.steps=0", "sample.steps=0"),
        ("--sample.prompts=abc", "a list is expected, as in --sample.prompts=[abc]"),
        ("--stages.0.drop_captions=2", "stages.0.drop_captions=2.0"),
        ("--observe.every=0", "observe.every=0"),
        ("--bench.steps=0", "bench.steps=0"),
        ("--model.patch=[1,2]", "model.patch"),
        ("--precision.fp8_gather=true", "fp8_gather=true: weights are gathered as fp8 with precision.fp8=tensor"),
        ("--checkpoint.keep_best=1", "checkpoint.keep_best=1: goes by the loss of eval.loss_every"),
        ("--checkpoint.durable_every=5", "durable_every=5: there is no `durable` to copy to"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(DEMO, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key", ["data.path", "encode.input", "checkpoint.durable", "run.init_from", "data.pth", "sample.prompts.0", "run"]
)
@pytest.mark.parametrize(
    "address", ["s3://AKIA1:sec/ret@bucket/x", "https://user:secret@host:80/x", "http://a:1secret@h"]
)
def test_an_address_with_a_password_is_refused_and_not_repeated(key: str, address: str) -> None:
    value = f"[{address!r}]" if key.endswith(".0") else address
    with pytest.raises(ConfigError, match=f"^{key}: the address has a password") as error:
        load_config(DEMO, [f"--{key.removesuffix('.0')}={value}"])
    assert "secret" not in str(error.value)
    assert "sec/ret" not in str(error.value)


@pytest.mark.parametrize(
    "address", ["s3://bucket/a:b@c", "http://host:8080/a@b", "ftp://user@host/x", "http://host:80"]
)
def test_an_address_without_one_is_none(address: str) -> None:
    assert load_config(DEMO, [f"--data.path={address}"]).data.path == address


def test_types_come_from_the_field() -> None:
    config = load_config(DEMO, ["--run.dir=123", "--run.steps=7", "--run.allow_change=[stages]", "--stages.1.lr=null",
                                '--sample.prompts=["a, b", c]', "--observe.tensorboard=false", "--run.resume=none"])  # fmt: skip
    assert config.run.dir == "123"
    assert config.run.steps == 7
    assert config.run.allow_change == ("stages",)
    assert config.stages[1].lr is None
    assert config.sample.prompts == ("a, b", "c")
    assert config.observe.tensorboard is False


def test_bases_merge_and_presets_fill(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("optim: {lr: 1.0, warmup: 5}\nmodel: {preset: Wan2.1-1.3B, depth: 2}\n")
    (tmp_path / "run.yaml").write_text("base: base.yaml\noptim: {lr: 2.0}\n")
    config = load_config(tmp_path / "run.yaml", ["--model.ffn=64"])
    assert (config.optim.lr, config.optim.warmup) == (2.0, 5)
    assert (config.model.width, config.model.depth, config.model.ffn) == (1536, 2, 64)


def test_a_preset_brings_its_family(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: {preset: DiT-S/4, depth: 2}\nobjective: gaussian\ngaussian: {variance: learned_range}\n"
    )
    config = load_config(tmp_path / "run.yaml", ["--model.design=adaln"])
    assert (config.model.family, config.model.patch, config.model.classes) == ("dit", (1, 4, 4), 1000)
    assert (config.model.depth, config.model.design) == (2, "adaln")


def test_the_vaes_preset_is_its_compression() -> None:
    config = load_config(None, ["--vae.preset=8x32x32", "--vae.width=8"])
    assert (config.vae.compression, config.vae.width) == ((8, 32, 32), 8)


def test_bases_that_go_round_are_named(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}.yaml\n")
    with pytest.raises(ConfigError, match=r"base=a.yaml: .*c.yaml names a file that lies over it"):
        load_config(tmp_path / "a.yaml", [])


@pytest.mark.parametrize("text", ["[1, 2]", "optim: [", "optim: null", "base: missing.yaml", "base: run.yaml"])
def test_bad_files_are_one_line_with_the_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "run.yaml", [])
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_yaml_is_named_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("run: {seed: 3\nmodel:\n")
    with pytest.raises(ConfigError, match=r'^--config .*run\.yaml: .* in ".*run\.yaml", line 2, column 6$'):
        load_config(tmp_path / "run.yaml", [])


def test_a_resolved_config_repeats_the_run(tmp_path: Path) -> None:
    config = load_config(DEMO, ["--optim.lr=3e-5"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert load_config(tmp_path / "config.yaml", []) == config


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_golden_snapshot(file: Path) -> None:
    """A changed default shows as a changed snapshot: write it anew with `python -m tests.unit.test_config`."""
    golden = json.loads((GOLDEN / f"{file.stem}.json").read_text())
    assert flatten(to_dict(load_config(file, []))) == golden


def test_defaults_are_valid() -> None:
    assert load_config(None, []) == Config()


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for file in CONFIGS:
        resolved = flatten(to_dict(load_config(file, [])))
        (GOLDEN / f"{file.stem}.json").write_text(json.dumps(resolved, indent=0) + "\n")
