"""When a benchmark says that the code became slower."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from megasora.errors import CheckFailed, ConfigError
from megasora.observe.regression import compare, read_result


def result(step: float, noise: float, seed: int, clock: float = 1.0) -> dict[str, Any]:
    """Rounds on a machine whose clock drifts: the step and the matrix product drift alike, and each has noise of its own."""
    chance = random.Random(seed)
    rounds = []
    for _ in range(5):
        speed = clock * chance.uniform(0.7, 1.0)
        rounds.append({"step_time_s": step / speed * (1 + chance.gauss(0, noise)), "gemm_flops": 1e12 * speed})
    return {"rounds": rounds}


def test_ten_repeats_of_the_same_code_pass_and_a_tenth_is_caught() -> None:
    for seed in range(10):
        old = result(1.0, 0.01, seed)
        compare(result(1.0, 0.01, 100 + seed, clock=0.6), old, "old")
        with pytest.raises(CheckFailed, match=r"step_time_s: .* slower than old, beyond the noise"):
            compare(result(1.1, 0.01, 100 + seed, clock=1.3), old, "old")


def test_what_noise_can_do_is_no_regression() -> None:
    old, new = result(1.0, 0.3, 1), result(1.1, 0.3, 2)
    assert "noise" in compare(new, old, "old")


@pytest.mark.parametrize("text", ["{}", "[1]", "no json", json.dumps({"schema": 1, "step_time_s": 1.0}),
                                  json.dumps({"rounds": [{"step_time_s": 1.0, "gemm_flops": 1.0}]})])  # fmt: skip
def test_what_is_no_result_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"bench.against=.*old.json: not a result"):
        read_result(str(file))
    with pytest.raises(ConfigError, match="No such file"):
        read_result(str(tmp_path / "nowhere.json"))
