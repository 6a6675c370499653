"""Commands of megasora run by megasora: `accept`, `parity` and sweeps of `bench` start others and read what they print."""

import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from megasora.errors import ConfigError
from megasora.observe.logs import log

OF_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "MEGASORA_LAUNCHER")


def megasora(*words: str, nproc: int = 0) -> list[str]:
    """The command line of a verb, by this interpreter; with `nproc` on so many processes of this machine."""
    launcher = ["launch", "local", "--nproc", str(nproc)] if nproc else []
    return [sys.executable, "-m", "megasora", *launcher, *words]


def outcome(command: Sequence[str], threads: int = 0) -> dict[str, Any]:
    """A command's exit code, seconds and JSON object; of one that failed its last line, of one that prints no object its text. It
    does not take itself for a worker of this process's launcher, and has `threads` for each of its own unless the environment
    says."""
    log.info("%s", shlex.join(command).partition(" -m ")[2])
    begin = time.monotonic()
    alone = {name: value for name, value in os.environ.items() if not name.startswith(OF_LAUNCHER)}
    if threads:
        alone = {"OMP_NUM_THREADS": str(threads)} | alone
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
    found: dict[str, Any] = {"exit": done.returncode, "seconds": round(time.monotonic() - begin, 1)}
    if done.returncode:
        found["error"] = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
    result = last_object(done.stdout)
    return found | ({"text": done.stdout.strip()} if result is None else {"result": result})


def last_object(text: str) -> dict[str, Any] | None:
    """The last line that is a JSON object; libraries print lines of their own behind it, as NCCL does with NCCL_DEBUG=INFO."""
    for line in reversed(text.splitlines()):
        with suppress(ValueError):
            if isinstance(found := json.loads(line), dict):
                return found
    return None


def choices(sweep: Sequence[str]) -> list[tuple[str, ...]]:
    """["a=1;2", "b=3"] -> [("--a=1", "--b=3"), ("--a=2", "--b=3")]. Raises ConfigError."""
    axes = []
    for axis in sweep:
        key, separator, values = axis.partition("=")
        if not separator or not key or not values:
            raise ConfigError(f"--sweep={axis}: KEY=VALUE;VALUE is expected")
        axes.append([f"--{key}={value}" for value in values.split(";")])
    return list(itertools.product(*axes))
