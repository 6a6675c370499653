"""Has a step become slower? Two results of `megasora bench`, each in units of its own machine's matrix product."""

import json
from pathlib import Path
from typing import Any

from megasora.errors import CheckFailed, ConfigError
from megasora.observe.noise import difference, rank_limit


def read_result(file: str) -> dict[str, Any]:
    """An earlier result to compare with. Raises ConfigError when it is none."""
    try:
        old = json.loads(Path(file).read_text())
        assert isinstance(old, dict)
        old["step_time_s"], old["parts"]
        rounds = costs(old)
    except OSError as error:
        raise ConfigError(f"bench.against={file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AssertionError):
        raise ConfigError(f"bench.against={file}: not a result of `megasora bench`") from None
    if not rounds:
        raise ConfigError(f"bench.against={file}: schema {old.get('schema')}, which has no rounds to tell noise by; "
                          "measure it again with bench.output")  # fmt: skip
    return old


def check_rounds(old: dict[str, Any], rounds: int) -> None:
    """Raises ConfigError where so many rounds against those of an earlier result cannot tell noise from a difference."""
    if rank_limit(rounds, len(costs(old))) == 0:
        raise ConfigError(f"bench.rounds={rounds}: too few to tell noise, against {len(costs(old))}; 8 on each side do "
                          "(and bench.steps is at least as many)")  # fmt: skip


def costs(result: dict[str, Any]) -> list[float]:
    """Of each round: its step in units of the matrix product measured just before it. A slower clock is no slower code."""
    return [float(one["cost"]) for one in result.get("rounds", [])]


def compare(result: dict[str, Any], old: dict[str, Any], name: str, tolerance: float) -> str:
    """How much slower, in words. Raises CheckFailed when that is beyond the noise of the rounds and more than `tolerance`, which
    stands for what differs from process to process, and no round of one shows: where its memory lies, which core it has."""
    found = difference(costs(result), costs(old))
    words = (f"step_time_s: {100 * abs(found.slower):.1f} % {'slower' if found.slower > 0 else 'faster'} than {name} in units of "
             f"the same run's matrix product (95 %: {100 * found.low:+.1f} to {100 * found.high:+.1f} %)")  # fmt: skip
    if found.low > 0 and found.slower > tolerance:
        raise CheckFailed(f"{words}, above bench.tolerance={tolerance:g}")
    return words
