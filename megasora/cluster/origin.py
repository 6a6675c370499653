"""Who started this process, and when: what a run's history needs to tell restarts apart and to account for the time."""

import os
import socket
import time
from pathlib import Path
from typing import Any


def node_name() -> str:
    """What this machine is called: by SLURM, where it started this process, else by itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def origin() -> dict[str, Any]:
    """`began`: seconds since the epoch; `host`; under SLURM `job` and `slurm_restarts`; under the launcher `restarts`."""
    facts: dict[str, Any] = {"began": round(process_start(), 3), "host": node_name()}
    if "SLURM_JOB_ID" in os.environ:
        facts["job"] = os.environ["SLURM_JOB_ID"]
        facts["slurm_restarts"] = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        facts["restarts"] = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    return facts


def process_start() -> float:
    """When this process was started, seconds since the epoch: proc(5), stat, field 22."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
