"""The planner's closed forms against published numbers (tests/data/published.yaml)."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megasora.engines.optim import OptimConfig
from megasora.models.families import PRESETS
from megasora.models.flops import training_flops
from megasora.observe.hardware import DEVICES, GIB, Device
from megasora.parallel.layout import parse_layout
from megasora.planner.job import Job, Row
from megasora.planner.memory import memory
from megasora.planner.parameters import model_parameters
from megasora.planner.plan import flops_by_convention
from tests.megatron_formulas import GPT, activation_bytes, flops, step_seconds, with_gemm

PUBLISHED: dict[str, Any] = yaml.safe_load((Path(__file__).parents[1] / "data" / "published.yaml").read_text())


def rows(kind: str) -> Any:
    return [pytest.param(row, id=str(row.get("name", kind))) for row in PUBLISHED[kind]["rows"]]


def gpt(row: dict[str, Any], **more: Any) -> GPT:
    known = {name: row[name] for name in row.keys() & GPT.__dataclass_fields__.keys()}
    return GPT(**({"batch": 1} | known | more))


@pytest.mark.parametrize("row", rows("flops_per_token"))
def test_flops_of_a_token(row: dict[str, Any]) -> None:
    theirs = row["tflops"] * 1e12 / row["tokens_per_s"]
    ours = flops_by_convention(float(row["parameters"]), row["layers"], row["width"], row["tokens"])
    assert ours == pytest.approx(theirs, rel=PUBLISHED["flops_per_token"]["within"])


@pytest.mark.parametrize("row", rows("flops_per_sample"))
def test_flops_of_a_sample(row: dict[str, Any]) -> None:
    ours = training_flops(PRESETS[row["preset"]], tuple(row["shape"]), row["text"])
    assert ours == pytest.approx(row["tflop"] * 1e12, rel=PUBLISHED["flops_per_sample"]["within"])


@pytest.mark.parametrize("row", rows("zero"))
def test_states_under_zero(row: dict[str, Any]) -> None:
    """What each stage leaves on a rank. Theirs are 2 bytes of a weight, 2 of a gradient and 12 of Adam's states, ours 4, 4 and
    8: the planner's share of each is weighed with their bytes."""
    model, ranks, parameters = PRESETS["DiT-XL/2"], row["ranks"], float(row["parameters"])
    count = sum(p.count for p in model_parameters(model))
    for stage, gb in enumerate(row["gb"]):
        layout = parse_layout(f"dp{ranks},zero{stage}")
        parts = memory(
            Job(model=model, layout=layout, row=Row((), 128), rows=1, optim=OptimConfig(ema=0.0), precision="fp32")
        ).parts
        # Of stage 2 weights are whole in a step; FSDP has its shard of them besides.
        weights = parts["gathered weights"] if stage == 2 else parts["weights"]
        gradients = 1 / ranks if stage >= 2 else 1.0
        ours = parameters * (2 * weights / (4 * count) + 2 * gradients + 12 * parts["optimizer"] / (8 * count)) / 1e9
        assert round(ours, 1) == gb, stage


@pytest.mark.parametrize("row", rows("activations"))
def test_activations(row: dict[str, Any]) -> None:
    assert activation_bytes(gpt(row)) / GIB == pytest.approx(row["gib"], rel=PUBLISHED["activations"]["within"])


def fitted(cases: list[tuple[GPT, float]], device: Device) -> Device:
    """The device at the one efficiency with which predicted and measured seconds agree best (geometric mean)."""
    low, high = 0.05, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        error = 1.0
        for model, seconds in cases:
            error *= step_seconds(model, with_gemm(device, middle)) / seconds
        low, high = (middle, high) if error > 1 else (low, middle)
    return with_gemm(device, low)


def test_recomputation() -> None:
    found = PUBLISHED["recompute"]
    first = found["rows"][0]
    device = fitted([(gpt(first), first["selective"])], DEVICES["A100"])
    for row in found["rows"]:
        full, selective = (
            step_seconds(gpt(row, recompute=True, sequence_parallel=False), device),
            step_seconds(gpt(row), device),
        )
        print(row["name"], f"full {full:.2f} s ({row['full']}), selective {selective:.2f} s ({row['selective']})")
        assert full / selective == pytest.approx(row["full"] / row["selective"], rel=found["within"]), row["name"]
        assert selective == pytest.approx(row["selective"], rel=found["within"]), row["name"]


def test_throughput_of_megatron() -> None:
    found = PUBLISHED["throughput"]
    device, cases = DEVICES["H100"], []
    for row in found["rows"]:
        model = gpt(row, batch=row["batch"] // 48, sequence=4096, vocabulary=131_072)
        gpus = row["tensor"] * row["pipeline"]
        cases.append((row, model, gpus, flops(model) / gpus / (row["tflops"] * 1e12)))
    fit = fitted([(model, seconds) for row, model, _, seconds in cases if row["name"] in found["fitted"]], device)
    for row, model, gpus, _ in cases:
        ours = flops(model) / gpus / step_seconds(model, fit)
        print(row["name"], f"{ours / 1e12:.1f} TFLOP/s ({row['tflops']})")
        assert abs(ours - row["tflops"] * 1e12) / device.peaks["bf16"] < found["within_mfu"], row["name"]
