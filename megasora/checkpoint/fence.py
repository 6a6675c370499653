"""Who may write to a run: one job at a time, held by a claim in the run's directory.

A second job is refused as long as the first shows signs of life. A job that was put back into the queue supersedes what is
left of itself on a node that its scheduler gave up: that orphan finds its claim gone before it publishes anything.
"""

import os
import time
from pathlib import Path
from typing import Any

from data_pipelines.claims import Claim, Claims, modified
from megasora.errors import ConfigError, Superseded

WRITER = ".writer"  # the directory of claims in a run's


class Fence:
    """Held by one process of the job. `check` raises Superseded once another job has taken over."""

    def __init__(self, run: Path, claim: Claim) -> None:
        self.run, self._claim = run, claim

    def check(self) -> None:
        """Looks at the file system: before anything is published."""
        if not self._claim.held:
            raise Superseded(f"{self.run}: another job writes to this run now, so this one must not")

    def release(self) -> None:
        self._claim.__exit__()


def take_fence(run: Path, seconds: float) -> Fence:
    """Waits at most `seconds` for a sign of life of the job that holds `run`, if any. ConfigError if there is one."""
    directory = run / WRITER
    directory.mkdir(exist_ok=True)
    claims = Claims(directory, seconds, facts=job_facts(), supersedes=is_requeued)
    touched = None
    while (claim := claims.take("writer")) is None:
        path = claims.path("writer", claims.newest("writer"))
        try:
            before, touched = touched, modified(path)
        except FileNotFoundError:  # given back this moment
            continue
        if before is not None and touched != before:
            owner = claims.owner(path)
            raise ConfigError(
                f"run.dir={run}: process {owner.get('pid')} on {str(owner.get('machine')).split()[0]} is writing to it; "
                f"end that job first, or give another run.dir"
            )
        time.sleep(min(1.0, seconds / 20))
    claim.__enter__()
    return Fence(run, claim)


def job_facts() -> dict[str, Any]:
    """Which start of which job this is: how often the scheduler has put it back into the queue, and how often the launcher,
    which ends its workers first, has started them again."""
    return {
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "launcher": os.environ.get("MEGASORA_LAUNCHER", ""),
        "attempt": int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0),
    }


def is_requeued(owner: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether `owner` is an earlier start of the same job, or of the same launcher."""
    started, now = ((facts.get("restart", 0), facts.get("attempt", 0)) for facts in (owner, me))
    return started < now and any(me[name] and owner.get(name) == me[name] for name in ("job", "launcher"))
