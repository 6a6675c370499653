"""Spikes: losses and gradient norms far above what this run has shown of late."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

SIGMA = 1.4826  # of a normal distribution: median absolute deviations
FLOOR = 0.02  # share of the median that a deviation is at least taken for: a flat history is no reason for alarm


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """What a step counts as a spike, and what is done about it: before its update, which its gradients would make.

    `record` writes down its samples. `skip` makes no update of them either. `rollback` also takes back the updates since the
    newest checkpoint and goes on behind these samples (Chowdhery et al. 2022, PaLM, section 5.1).
    """

    policy: Literal["record", "skip", "rollback"] = "record"
    threshold: float = 12.0  # deviations above the median, of the loss or of the gradient norm
    window: int = 64  # steps that the median is of; none is called before half of them are seen

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold={self.threshold}: a positive number is expected")
        if self.window < 8:
            raise ValueError(f"window={self.window}: at least 8")


class SpikeWatch:
    """Remembers (loss, gradient norm) of the steps that were no spikes. All ranks have the same numbers, so the same verdicts.
    After half a window of spikes without a step between them it takes them for a new level: it forgets, and begins again."""

    def __init__(self, config: SpikeConfig, recent: Sequence[Sequence[float]] = (), in_a_row: int = 0) -> None:
        self.config, self.in_a_row = config, in_a_row
        self.recent: deque[tuple[float, float]] = deque(((loss, norm) for loss, norm in recent), maxlen=config.window)

    def judge(self, loss: float, grad_norm: float) -> str:
        """What is out of bounds, in words; empty where nothing is. What is not out of bounds is remembered."""
        if len(self.recent) >= self.config.window // 2:
            for name, value, history in zip(
                ("loss", "gradient norm"), (loss, grad_norm), zip(*self.recent, strict=True), strict=True
            ):
                middle = median(history)
                deviation = max(SIGMA * median(abs(past - middle) for past in history), FLOOR * abs(middle))
                if value > middle + self.config.threshold * deviation:
                    self.in_a_row += 1
                    if self.in_a_row >= self.config.window // 2:
                        self.recent.clear()
                    return f"{name} {value:.4g}, of late {middle:.4g} +- {deviation:.2g}"
        self.in_a_row = 0
        self.recent.append((loss, grad_norm))
        return ""
