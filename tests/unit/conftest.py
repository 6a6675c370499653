"""Processes and servers that tests share; each starts when the first of them asks."""

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


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of a server that speaks S3. One for all tests: clients are kept, and know only the first address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """That endpoint, which clients find by the environment."""
    for name, value in {"ENDPOINT_URL": s3_server, "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y",
                        "DEFAULT_REGION": "us-east-1"}.items():  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    return s3_server
