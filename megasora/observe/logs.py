"""Logging: every process into its own file of the run directory, the main one also to stderr."""

import logging
import warnings
from pathlib import Path

log = logging.getLogger("megasora")


def start_logging(run: Path | None, rank: int) -> None:
    """Sends `log` to stderr on rank 0 and, given a run directory, to logs/rank-XXXXX.log on every rank."""
    # Their successors came with torch 2.13; NVIDIA's images are older.
    warnings.filterwarnings(
        "ignore", message=r"`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated"
    )
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers.clear()
    if rank == 0:
        console = logging.StreamHandler()
        console.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(console)
    if run is not None:
        (run / "logs").mkdir(parents=True, exist_ok=True)
        file = _RankLog(run / "logs" / f"rank-{rank:05d}.log")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(file)


class _RankLog(logging.FileHandler):
    """A full disk costs its lines, without a traceback on stderr for each."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass
