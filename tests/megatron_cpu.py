"""megatron-core without a GPU. It asks CUDA for the device of its sequence-parallel buffers; here that is the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch


@contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """One function is replaced, and only where there is no CUDA: on a GPU the real one must run."""
    assert not torch.cuda.is_available(), "there is a GPU: test on it, not on this"
    with patch("torch.cuda.current_device", lambda: torch.device("cpu")):
        yield
