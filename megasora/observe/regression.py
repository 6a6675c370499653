"""Has a step become slower? Two results of `megasora bench`, each in units of its own machine's matrix product."""

import json
import math
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from megasora.errors import CheckFailed, ConfigError

LEAST = 0.03  # a difference below it is none
NOTCH = 1.58  # McGill, Tukey, Larsen 1978: medians whose intervals of this width do not touch differ


def read_result(file: str) -> dict[str, Any]:
    """An earlier result to compare with. Raises ConfigError when it is none."""
    try:
        old = json.loads(Path(file).read_text())
        assert isinstance(old, dict)
        assert len(normalised(old)) > 2
    except OSError as error:
        raise ConfigError(f"bench.against={file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AssertionError):
        raise ConfigError(
            f"bench.against={file}: not a result of this version's `megasora bench` with three rounds or more"
        ) from None
    return old


def normalised(result: dict[str, Any]) -> list[float]:
    """A round's step in FLOPs of the matrix product that was measured just before it: a slower clock is no slower code."""
    return [one["step_time_s"] * one["gemm_flops"] for one in result["rounds"]]


def half_width(values: list[float]) -> float:
    """Of the interval around the median of a few rounds, relative to it."""
    if len(values) < 2:
        return 0.0
    first, _, third = quantiles(values, n=4)
    return NOTCH * (third - first) / math.sqrt(len(values)) / median(values)


def compare(result: dict[str, Any], old: dict[str, Any], name: str) -> str:
    """How much slower, in words. Raises CheckFailed when that is more than the noise of both and more than 3 %."""
    before, after = normalised(old), normalised(result)
    slower = median(after) / median(before) - 1
    noise = math.hypot(half_width(before), half_width(after))
    words = f"step_time_s: {100 * abs(slower):.1f} % {'slower' if slower > 0 else 'faster'} than {name}"
    if slower > max(noise, LEAST):
        raise CheckFailed(f"{words}, beyond the noise of {100 * noise:.1f} %")
    return f"{words}; noise {100 * noise:.1f} %"
