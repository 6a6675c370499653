import os
import signal
import subprocess
import sys
import time
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.errors import BadSample
from data_pipelines.workers import WorkerDied, WorkerPool


@dataclass(frozen=True)
class Answer:
    name: str
    clip: np.ndarray


def squares(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int64) ** 2


def several(seed: int) -> dict[str, object]:
    rng = np.random.default_rng(seed)
    return {
        "large": [rng.normal(size=(300, 400)), rng.integers(0, 255, (7, 100, 300), np.uint8)],
        "answer": Answer("of a class", rng.normal(size=100_000).astype(np.float32)),
        "small": (np.arange(3), seed, "text", b"bytes", None),
        "columns": np.asfortranarray(rng.normal(size=(300, 400))),
        "every other": rng.normal(size=(400, 400))[::2, ::2],
        "none": np.empty((0, 5)),
    }


def process() -> int:
    return os.getpid()


def bad(key: str) -> None:
    raise BadSample(key, "on purpose")


def unsendable() -> None:
    raise ValueError(lambda: 1)


def sleep(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raise_signals() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    return os.getpid()


def threads() -> tuple[int, str]:
    import torch

    return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX"
    except OSError:
        return False


def entries(directory: str) -> set[str]:
    return {path.name for path in Path(directory).iterdir()}


def shared_memory() -> set[str]:
    # Those that Python names; others have theirs there.
    return {name for name in entries("/dev/shm") if name.startswith("psm_")}


def gone(pids: list[int], seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while any(map(lives, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(lives, pids))


def same(one: object, other: object) -> bool:
    if isinstance(one, Answer):
        return same(vars(one), vars(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    return one == other


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(2) as pool:
        yield pool


def test_without_workers_jobs_run_in_this_process():
    with WorkerPool(0) as pool:
        assert pool.submit(process).result() == os.getpid()
        assert same(pool.submit(several, 1).result(), several(1))
        with pytest.raises(BadSample):
            pool.submit(bad, "clip").result()
    with pytest.raises(ValueError, match="workers=-1"):
        WorkerPool(-1)


def test_results_are_those_of_this_process_and_can_be_written_to(pool):
    assert pool.submit(process).result() != os.getpid()
    futures = [pool.submit(several, seed) for seed in range(20)]
    for seed, future in enumerate(futures):
        found = future.result()
        assert same(found, several(seed))
        found["large"][0][:] = 0  # its memory is not used again for another result
    assert all(not future.result()["large"][0].any() for future in futures)
    huge = pool.submit(squares, 5_000_000).result()  # more than is kept between jobs
    assert (huge == squares(5_000_000)).all()
    assert same(pool.submit(several, 3).result(), several(3))


def test_errors_are_those_of_the_job(pool):
    with pytest.raises(BadSample, match="clip: on purpose") as caught:
        pool.submit(bad, "clip").result()
    assert (caught.value.key, caught.value.reason) == ("clip", "on purpose")
    assert "test_workers.py" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="ValueError"):
        pool.submit(unsendable).result()
    with pytest.raises(Exception, match="pickle"):
        pool.submit(lambda: 1)
    with pytest.raises(TypeError, match="positional"):
        pool.submit(bad).result()


def test_one_thread_each(pool):
    assert pool.submit(threads).result() == (1, "1")


def test_a_dead_worker_costs_its_own_job_alone(pool):
    futures = [
        pool.submit(die if number in (3, 4, 11) else sleep, *([] if number in (3, 4, 11) else [0.01]))
        for number in range(20)
    ]
    for number, future in enumerate(futures):
        if number in (3, 4, 11):
            with pytest.raises(WorkerDied, match="SIGKILL"):
                future.result()
        else:
            assert future.result()


def test_a_worker_killed_from_outside_is_replaced(pool):
    for busy in (True, False):
        first, second = pool.submit(sleep, 0.3), pool.submit(sleep, 0.3)
        if busy:
            time.sleep(0.1)
            victim = next(iter(pool._running)).process.pid
        else:
            victim = first.result()
            second.result()
        os.kill(victim, signal.SIGKILL)
        outcomes = [future.exception() for future in (first, second)]
        assert sum(isinstance(outcome, WorkerDied) for outcome in outcomes) == busy
        time.sleep(0.05)
        assert victim not in {pool.submit(sleep, 0.05).result() for _ in range(6)}


def test_signals_to_the_whole_group_are_the_parents(pool):
    assert lives(pool.submit(raise_signals).result())


def test_close_leaves_nothing():
    files = len(entries("/proc/self/fd"))
    pool = WorkerPool(2)
    pids = {pool.submit(sleep, 0.05).result() for _ in range(4)}
    running = [pool.submit(sleep, 60) for _ in range(2)]
    waiting = [pool.submit(sleep, 60) for _ in range(3)]
    time.sleep(0.1)
    begin = time.monotonic()
    pool.close()
    assert time.monotonic() - begin < 5
    assert gone(list(pids))
    assert all(isinstance(future.exception(), WorkerDied) for future in running)
    assert all(future.cancelled() for future in waiting)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(process)
    pool.close()
    assert len(entries("/proc/self/fd")) <= files + 1  # multiprocessing keeps one to a tracker of its own


def memory(pid: int) -> int:
    """KiB that a process has in memory, what it shares too."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def test_a_thousand_jobs_leave_no_memory_and_no_files_behind(pool):
    shared = shared_memory()

    def several_hundred(count: int) -> None:
        for _ in range(count // 20):
            wait([pool.submit(squares, 50_000) for _ in range(20)])

    several_hundred(200)
    files, resident = len(entries("/proc/self/fd")), memory(os.getpid())
    several_hundred(1000)  # 400 MB in all
    assert len(entries("/proc/self/fd")) == files
    assert memory(os.getpid()) < resident + 30_000
    assert shared_memory() <= shared


PARENT = """
import sys, time
sys.path[:0] = {path!r}
from data_pipelines.workers import WorkerPool
from tests.unit.test_workers import sleep, squares
if __name__ == "__main__":
    pool = WorkerPool(2)
    pool.submit(squares, 100_000).result()
    print(*{{future.result() for future in [pool.submit(sleep, 0.3) for _ in range(2)]}}, flush=True)
    pool.submit(sleep, 60)
    {end}
"""


@pytest.mark.parametrize("end", ["time.sleep(60)", "sys.exit(0)", "raise ValueError"])
def test_workers_end_with_their_parent(tmp_path, end):
    shared = shared_memory()
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(path=[str(Path(__file__).parents[2])], end=end))
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    if "sleep" in end:  # one is in the middle of a job, the other waits
        time.sleep(0.1)
        assert all(map(lives, pids))
        parent.kill()
    parent.wait(10)
    assert gone(pids)
    assert shared_memory() <= shared
