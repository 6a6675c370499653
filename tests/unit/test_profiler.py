"""What is read from a profile, on events made by hand."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from megasora.config import load_config
from megasora.errors import ConfigError
from megasora.observe.profiler import ProfileConfig, communication


@dataclass
class Range:
    start: float
    end: float


@dataclass
class Event:
    name: str
    time_range: Range
    is_async: bool = False
    cpu_children: list[Any] = field(default_factory=list)
    device_type: DeviceType = DeviceType.CPU
    is_user_annotation: bool = False


def test_what_is_hidden_is_what_this_rank_computes_meanwhile() -> None:
    outer = Event("aten::linear", Range(0, 100))
    events = [
        outer,
        Event("aten::mm", Range(0, 40)),
        Event("aten::mm", Range(30, 50)),  # another thread: counted once
        Event("c10d::allreduce_", Range(50, 60)),
        Event("gloo:all_reduce", Range(20, 80), is_async=True),
        Event("gloo:all_reduce", Range(70, 90), is_async=True),  # overlaps the first
        Event("gloo:send", Range(200, 300), is_async=True),
    ]
    outer.cpu_children = events[1:2]
    found = communication(events, torch.device("cpu"))
    assert found["all_reduce"] == pytest.approx({"calls": 2, "seconds": 70e-6, "hidden_s": 30e-6})
    assert found["p2p"] == pytest.approx({"calls": 1, "seconds": 100e-6, "hidden_s": 0.0})


def test_what_gloo_makes_of_an_all_reduce_has_the_name_of_the_call() -> None:
    events = [
        Event("gloo:all_reduce", Range(20, 80), is_async=True),
        Event("c10d::_reduce_scatter_base_", Range(10, 15)),
        Event("c10d::allreduce_", Range(16, 18)),
        Event("gloo:all_reduce", Range(90, 100), is_async=True),
        Event("c10d::wait", Range(18, 80)),
    ]
    found = communication(events, torch.device("cpu"))
    assert {kind: of["seconds"] for kind, of in found.items()} == pytest.approx(
        {"reduce_scatter": 60e-6, "all_reduce": 10e-6}
    )


def test_on_a_gpu_what_is_drawn_around_kernels_computes_nothing() -> None:
    gpu = torch.device("cuda", 0)
    events = [
        Event("ncclDevKernel_SendRecv(x)", Range(0, 10), device_type=DeviceType.CUDA),
        Event("FSDP::all_gather", Range(0, 10), device_type=DeviceType.CUDA, is_user_annotation=True),
        Event("gemm", Range(5, 30), device_type=DeviceType.CUDA),
        Event("aten::mm", Range(0, 4)),
    ]
    assert communication(events, gpu) == {"p2p": pytest.approx({"calls": 1, "seconds": 10e-6, "hidden_s": 5e-6})}


@pytest.mark.parametrize(("steps", "span"), [("10-12", (10, 12)), ("7", (7, 7)), ("", (0, -1))])
def test_steps_are_a_range(steps: str, span: tuple[int, int]) -> None:
    assert ProfileConfig(steps=steps).span == span


@pytest.mark.parametrize("steps", ["12-10", "0", "a-b", "3-", "1-2-3"])
def test_what_is_no_range_is_named(steps: str) -> None:
    with pytest.raises(ConfigError, match=f"profile.*steps={steps}"):
        load_config(None, [f"--profile.steps={steps}"])
