"""What is installed is written down in several places, which agree: pyproject.toml, constraints, lock, notices."""

import re
import tomllib

import pytest

from tests.integration.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s;+]+)", re.M)


def names(requirements: list[str]) -> set[str]:
    """Normal ones, without versions and extras."""
    found = (re.split(r"[\[<>=! ]", requirement)[0] for requirement in requirements)
    return {normal(name) for name in found} - {"megasora"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str) -> dict[str, str]:
    """Versions by name; of torch 2.13.0+cpu, 2.13.0."""
    return {normal(name): version for name, version in PIN.findall((ROOT / file).read_text())}


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_each_requirement_is_in_the_lock_and_in_the_notices(extra: str | None) -> None:
    wanted = names(PROJECT["dependencies"] if extra is None else EXTRAS[extra])
    assert wanted
    if extra != "gpu":  # compiled for CUDA: the lock is of the CPU build
        assert wanted - pins("requirements.lock").keys() == set()
    notices = set(re.findall(r"[a-z0-9][a-z0-9-]+", (ROOT / "THIRD_PARTY_NOTICES.md").read_text().lower()))
    assert wanted - notices == set()


def test_the_lock_has_the_versions_of_the_constraints_and_a_hash_for_each() -> None:
    lock, constraints = pins("requirements.lock"), pins("constraints.txt")
    assert {name: lock.get(name) for name in constraints} == constraints
    for line in (ROOT / "requirements.lock").read_text().replace("\\\n", "").splitlines():
        assert line.startswith("#") or re.fullmatch(r"\S+==\S+( ; [^#]+?)?( +--hash=sha256:[0-9a-f]{64})+", line), line[
            :80
        ]
