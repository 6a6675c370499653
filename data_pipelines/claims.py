"""Who of many workers, on many machines, does which piece of work: agreed on by files in a directory that all of them see.

A claim is a file that appears by one hard link, which is atomic on NFS too, and that its owner touches while it lives. One that
is not touched for a while is stale. Its successor is a file with the next number, again one link: of several workers that find
it stale, one wins. Ages are differences between two times of the file server, so clocks need not agree.
"""

import json
import os
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self


class Lost(Exception):
    """Another worker has taken over what this one was at."""


class Claims:
    """The claims in a directory, which may come to be and go at any time.

    `seconds`: after so long without a touch a claim is stale. That of a process of this machine that is gone is stale at once,
    and so is one of which `supersedes(its facts, ours)` says so; `facts` are more to write into a claim.
    """

    def __init__(
        self,
        directory: Path,
        seconds: float,
        facts: dict[str, Any] | None = None,
        supersedes: Callable[[dict[str, Any], dict[str, Any]], bool] | None = None,
    ) -> None:
        self.directory, self.seconds, self.supersedes = directory, seconds, supersedes
        self.token = secrets.token_hex(8)
        me = {"machine": this_machine(), "pid": os.getpid(), "born": birth(os.getpid()), "token": self.token}
        self._me: dict[str, Any] = (facts or {}) | me

    def take(self, work: str) -> "Claim | None":
        """The claim on a piece of work, to be used in a `with`; None while another worker has it, or was faster."""
        newest = self.newest(work)
        if newest >= 0 and not self._is_stale(self.path(work, newest)):
            return None
        private, claim = self.directory / f".{self.token}", self.path(work, newest + 1)
        try:
            private.write_text(json.dumps(self._me))
            with suppress(FileExistsError):  # NFS may say so of our own link, too: what the file says decides
                claim.hardlink_to(private)
            private.unlink()
        except FileNotFoundError:  # the directory went: all work is done
            return None
        return Claim(self, work, newest + 1) if self.owner(claim).get("token") == self.token else None

    def path(self, work: str, number: int) -> Path:
        return self.directory / f"{work}.{number}"

    def newest(self, work: str) -> int:
        """The number of the claim that counts; -1: nobody has claimed it."""
        try:
            names = os.listdir(self.directory)  # noqa: PTH208 - names are all that is wanted
        except FileNotFoundError:
            return -1
        numbers = [name.removeprefix(f"{work}.") for name in names if name.startswith(f"{work}.")]
        return max((int(number) for number in numbers if number.isdigit()), default=-1)

    def owner(self, claim: Path) -> dict[str, Any]:
        """Who made a claim; empty where the file says nothing or is gone."""
        try:
            found = json.loads(claim.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _is_stale(self, claim: Path) -> bool:
        owner = self.owner(claim)
        if owner.get("machine") == self._me["machine"] and birth(owner["pid"]) != owner["born"]:
            return True
        if self.supersedes is not None and self.supersedes(owner, self._me):
            return True
        try:
            touched = modified(claim)
            probe = self.directory / f".{self.token}.now"
            probe.write_text("")
            now = modified(probe)
            probe.unlink()
        except FileNotFoundError:  # given back this very moment
            return False
        return now - touched > self.seconds


class Claim:
    """One piece of work that is this worker's while `held`. Leaving the `with` gives it back."""

    def __init__(self, claims: Claims, work: str, number: int) -> None:
        self.work, self._claims, self._number = work, claims, number
        self.path = claims.path(work, number)
        self._over, self._lost = threading.Event(), False
        self._touching = threading.Thread(target=self._touch, name=f"claim {work}", daemon=True)

    @property
    def held(self) -> bool:
        """Whether it still counts. Asks the file system: before publishing, rather than for every sample."""
        self._look()
        return not self._lost

    @property
    def lost(self) -> bool:
        """Whether another worker was seen to have taken over; costs nothing."""
        return self._lost

    def _look(self) -> None:
        self._lost = self._lost or self._claims.newest(self.work) != self._number

    def _touch(self) -> None:
        while not self._lost and not self._over.wait(self._claims.seconds / 10):
            with suppress(OSError):  # the next touch may succeed
                self._look()
                os.utime(self.path)

    def __enter__(self) -> Self:
        self._touching.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._touching.join()
        for number in range(self._number + 1):  # not what came after it
            self._claims.path(self.work, number).unlink(missing_ok=True)


def modified(path: Path) -> float:
    """When a file was last touched, by the clock of its server. Opening it makes NFS ask anew."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime


def this_machine() -> str:
    """Names the host, its boot and its process table. Where those cannot be known, it is unlike any other."""
    try:
        boot, table = (
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            str(Path("/proc/self/ns/pid").readlink()),
        )
    except OSError:
        boot, table = secrets.token_hex(8), ""
    return f"{socket.gethostname()} {boot} {table}"


def birth(process: int) -> str:
    """When a process of this machine began, in ticks since boot; empty when it is gone. A number may be used again."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]
