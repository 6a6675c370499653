"""What is cleared away when all tests have run: xdist's workers end at once, without Python's exit functions."""

import sys
from collections.abc import Iterator
from multiprocessing import forkserver

import pytest

from megasora.cluster.agent import sweep_heartbeats


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    sweep_heartbeats(60)  # of launchers that tests have killed
    forkserver._forkserver._stop()  # and waits for it
    if "wandb" in sys.modules:  # makes these when it is imported
        sys.modules["wandb.sdk.data_types._private"].MEDIA_TMP.cleanup()
        sys.modules["wandb"].Artifact._TMP_DIR.cleanup()
