"""A device's efficiencies, fitted to what `bench` measured on it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasora.config import parse_config
from megasora.errors import ConfigError
from megasora.observe.hardware import Device, Efficiency, known_device, this_cpu
from megasora.parallel.layout import parse_layout
from megasora.planner.job import Job
from megasora.planner.mixture import find_mixture
from megasora.planner.plan import check_unit, job_of, recompute_of
from megasora.planner.step_time import Step, step_time
from megasora.training_data import open_data

COUNTED = ("forward_backward", "clip", "update")  # parts of a step in a report: what the planner predicts
FITTED = [field.name for field in fields(Efficiency) if field.name != "overlap"]
FIRMNESS = 0.02  # how much it costs to move an efficiency away from the others, against a relative error of a run


@dataclass(frozen=True)
class Run:
    """What one run of `bench` did, and seconds of its step at the peaks of the profile."""

    name: str
    job: Job
    steps: Sequence[Step]
    seconds: float

    def predicted(self, device: Device) -> float:
        return step_time(self.job, self.steps, device).seconds


def calibrate(files: Sequence[Path], text_tokens: int, firmness: float = FIRMNESS) -> tuple[Device, list[Run]]:
    """The device of some reports with the efficiencies at which predictions agree with them best. `text_tokens`: of a synthetic
    caption of `bench`. Raises ConfigError for a file that is no report, and for reports of different or unknown devices."""
    raw = [read_report(file) for file in files]
    device = device_of(files[0], raw[0])
    for file, report in zip(files, raw, strict=True):
        if device_of(file, report).name != device.name:
            raise ConfigError(f"--calibrate={file}: of another device than {files[0]}, a {device.name}")
        if device.name == "cpu":
            # The first run of a precision stands for all: others are in units of their own products.
            device.peaks.setdefault(report["config"]["precision"]["precision"], report["gemm_flops"])
    runs = [run_of(str(file), report, device, text_tokens) for file, report in zip(files, raw, strict=True)]
    source = {"efficiency": f"plan --calibrate of {len(runs)} runs of bench: {', '.join(run.name for run in runs)}"}
    fitted = fit(device, runs, firmness)
    return replace(fitted, sources=device.sources | source), runs


def read_report(file: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(file.read_text())
        [report["parts"][name] for name in COUNTED]
        [report[name] for name in ("layout", "world", "data", "gemm_flops")]
        [report["config"]["precision"]["precision"], report["machine"]["device"]]
    except OSError as error:
        raise ConfigError(f"--calibrate={file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"--calibrate={file}: not a report of bench (bench.output, or bench --json)") from None
    return report


def device_of(file: Path, report: dict[str, Any]) -> Device:
    """The profile to begin with: the known GPU of that name, or the CPU, with no peak yet. ConfigError for another GPU."""
    machine = report["machine"]
    if (known := known_device(machine["device"])) is None and machine.get("gpu"):  # older reports do not say
        raise ConfigError(
            f"--calibrate={file}: of {machine['device']}, whose peaks are not known: add its data sheet to DEVICES and "
            "NAMES in megasora/observe/hardware.py"
        )
    return known or this_cpu({}, report["world"])


def run_of(name: str, report: dict[str, Any], device: Device, text_tokens: int) -> Run:
    layout = parse_layout(report["layout"], report["world"])
    config = check_unit(parse_config(report["config"]), layout)
    data = None if report["data"] == "synthetic" else open_data(config, torch.device("cpu"))
    steps = find_mixture(config, config.stages[0], text_tokens, data).steps(layout)
    cpu = device.name == "cpu"
    scale = report["gemm_flops"] / device.peaks[config.precision.precision] if cpu else 1.0
    job = job_of(config, layout, steps, *recompute_of(config.parallel), kernels=not cpu)
    return Run(name, job, steps, scale * sum(report["parts"][part] for part in COUNTED))


def fit(device: Device, runs: Sequence[Run], firmness: float = FIRMNESS) -> Device:
    """Gauss-Newton on the logarithms of the efficiencies: least squares of the logarithms of predicted over measured seconds.

    All efficiencies may move alike for nothing; to leave the others costs `firmness`, so that a few runs do not decide about
    what they hardly contain.
    """
    n = len(FITTED)
    # The logarithms of the factors on each one's seconds, and their middle.
    longer = torch.zeros(n + 1, dtype=torch.float64)
    prior = firmness * torch.cat([torch.eye(n), -torch.ones(n, 1)], dim=1).double()
    for _ in range(30):
        here = errors(device, runs, longer)
        slopes = [(errors(device, runs, longer + 1e-3 * unit) - here) / 1e-3 for unit in torch.eye(n + 1).double()]
        system = torch.cat([torch.stack(slopes, dim=1), prior])
        target = -torch.cat([here, prior @ longer])
        step = torch.linalg.lstsq(system, target[:, None]).solution[:, 0].clamp(-1.0, 1.0)
        longer += step
        if step.abs().max() < 1e-4:
            break
    return moved(device, longer)


def errors(device: Device, runs: Sequence[Run], longer: Tensor) -> Tensor:
    """[runs] logarithms of predicted over measured seconds."""
    there = moved(device, longer)
    return torch.tensor([run.predicted(there) / run.seconds for run in runs], dtype=torch.float64).log()


def moved(device: Device, longer: Tensor) -> Device:
    """The device where what stands under each efficiency takes so much longer."""
    factors = dict(zip(FITTED, longer[:-1].exp().tolist(), strict=True))
    old = vars(device.efficiency)
    new = {name: old[name] * (f if name == "operation" else 1 / f) for name, f in factors.items()}
    return replace(device, efficiency=replace(device.efficiency, **new))
