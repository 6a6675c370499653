"""What the second engine is told, and what it refuses: one line that names the key and the nearest that works."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megasora.cli import main
from megasora.engines import deepspeed_config
from megasora.engines.deepspeed_config import DeepSpeedConfig, build_json, check_engine
from megasora.engines.optim import OptimConfig
from megasora.engines.torch_native import EngineConfig
from megasora.errors import ConfigError
from megasora.parallel.layout import ParallelConfig, parse_layout

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
CPU = torch.device("cpu")
Write = Callable[[dict[str, Any]], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(value: dict[str, Any]) -> str:
        (tmp_path / "ds.json").write_text(json.dumps(value))
        return str(tmp_path / "ds.json")

    return written


def told(file: str = "", layout: str = "dp2,zero2", precision: str = "fp32", **options: Any) -> dict[str, Any]:
    section, optim = DeepSpeedConfig(json=file, **options), OptimConfig(clip=0.5, lr=1e-3)
    return build_json(section, optim, EngineConfig(precision=precision), parse_layout(layout), CPU, 8)  # type: ignore[arg-type]


def test_clipping_and_precision_are_always_said() -> None:
    found = told()
    assert found["gradient_clipping"] == 0.5
    assert found["zero_optimization"]["stage"] == 2
    assert found["torch_autocast"] == {"enabled": False}
    assert not found["bf16"]["enabled"]
    lower = told(precision="bf16", layout="dp2,zero3")["torch_autocast"]
    assert lower == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert told(offload="all", layout="dp2,zero3")["zero_optimization"]["offload_param"] == {
        "device": "cpu", "pin_memory": False
    }  # fmt: skip


def test_a_plain_json_is_merged(write: Write) -> None:
    theirs = {
        "train_batch_size": 8, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": 0.5, "bf16": {"enabled": "auto"},
        "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.9, 0.95]}},
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000},
        "wall_clock_breakdown": True,
    }  # fmt: skip
    found = told(write(theirs))
    assert found["zero_optimization"]["overlap_comm"] is True
    assert found["zero_optimization"]["reduce_bucket_size"] == 1000
    assert found["zero_optimization"]["allgather_bucket_size"] > 1000
    assert found["wall_clock_breakdown"] is True
    assert "optimizer" not in found
    assert "train_batch_size" not in found


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping=1.0: optim.clip says 0.5"),
        ({"train_batch_size": 32}, "train_batch_size=32: data.global_batch says 8"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage=3: parallel.layout says 2"),
        ({"bf16": {"enabled": True}}, "bf16.enabled=true: precision.precision"),
        ({"optimizer": {"params": {"lr": 0.1}}}, "optimizer.params.lr=0.1: optim.lr says 0.001"),
        ({"optimizer": {"type": "Lamb"}}, 'optimizer.type="Lamb": optim.name says "AdamW"'),
        ({"scheduler": {"type": "WarmupLR"}}, "optim.schedule"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "deepspeed.offload says null"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "ZeRO++ needs GPUs"),
        ({"zero_optimisation": {"stage": 2}}, "is no key that this engine passes on; those are aio,"),
    ],
)
def test_a_contradiction_is_one_line(theirs: dict[str, Any], said: str, write: Write) -> None:
    with pytest.raises(ConfigError) as caught:
        told(write(theirs))
    assert said in str(caught.value)
    assert str(caught.value).startswith("deepspeed.json=")


@pytest.mark.parametrize(("text", "said"), [(None, "No such file"), ("{", "not JSON"), ("3", "a JSON object")])
def test_a_file_that_is_none(text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match=said):
        told(str(tmp_path / "ds.json"))


def refusal(layout: str, section: dict[str, Any] | None = None, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_engine(
            DeepSpeedConfig(**section or {}), options.get("optim", OptimConfig()), options.get("precision", EngineConfig()),
            options.get("parallel", ParallelConfig()), parse_layout(layout), CPU, 8,
        )  # fmt: skip
    return str(caught.value)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the libraries were there: what is refused does not depend on them."""
    monkeypatch.setattr(deepspeed_config, "find_spec", lambda name: name)


@pytest.mark.usefixtures("installed")
def test_what_it_refuses_names_what_works() -> None:
    assert "pipelines belong to engine=torch_native; engine=deepspeed has none; nearest is dp4" in refusal("pp2,dp2")
    bf16 = refusal("dp2", precision=EngineConfig(precision="bf16"))
    assert "wrong in bf16" in bf16
    assert bf16.endswith("nearest is dp2,zero1")
    assert refusal("hsdp2x2,zero3").endswith("nearest is dp4,zero3")
    assert refusal("dp2", {"offload": "optimizer"}).endswith("nearest is dp2,zero1")
    assert refusal("dp2,zero2", {"offload": "all"}).endswith("nearest is dp2,zero3")
    assert refusal("dp2", {"checkpoints": True}).endswith("nearest is dp2,zero1")
    assert "optim.name=muon" in refusal("dp2,zero1", optim=OptimConfig(name="muon"))
    assert "precision.fp8=row" in refusal("dp2,zero1", precision=EngineConfig(precision="bf16", fp8="row"))
    assert "selective" in refusal("dp2,zero3", parallel=ParallelConfig(recompute="selective"))
    assert refusal("dp2,zero1", parallel=ParallelConfig(compile=True)).startswith("parallel.compile=true: belongs to")


@pytest.mark.usefixtures("installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which sequence parallelism works")
def test_sequence_parallelism_of_megatron_core_wants_a_gpu() -> None:
    assert refusal("dp2,tp2,zero1").endswith("needs a GPU; nearest is dp2,tp2:nosp,zero1")


def test_a_missing_library_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(deepspeed_config, "find_spec", lambda name: None)
    assert main(["parity", "--config", str(DEMO), "--layout=dp2,zero1", "--engine=deepspeed"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "pip install -c constraints.txt 'megasora[deepspeed]'" in err
