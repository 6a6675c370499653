"""Processes that the tests of the kernels share; each starts when the first of them asks."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """Triton's interpreter, corrected, with every memory access checked."""
    from tests.triton_interpreter import interpreter_process

    with interpreter_process() as pool:
        yield pool


@pytest.fixture(scope="session")
def h100() -> Iterator[ProcessPoolExecutor]:
    """Triton's compiler for sm_90a, without a GPU."""
    from tests.triton_stub import stub_process

    with stub_process() as pool:
        yield pool
