"""`megasora accept`: one record of everything that a new cluster must pass."""

import json

import pytest

from megasora.verbs.accept import read_record
from megasora.verbs.accept import table as verb_table
from tests.integration.conftest import Road

SMALL = ["--bench.warmup=1", "--bench.steps=2", "--processes=2", "--layout=tp2"]


def test_a_machine_is_accepted(road: Road) -> None:
    record = road.directory / "accepted.json"
    done = road.run("accept", *SMALL, f"--output={record}")
    found = json.loads(record.read_text())
    assert json.loads(done.stdout) == found
    assert found["accepted"]
    assert [part["layout"] for part in found["parts"]["parity"]["result"]["layouts"]] == ["tp2"]
    assert found["parts"]["bench"]["result"]["layout"] == "dp1,tp2"
    assert set(found["parts"]) == {"doctor", "kernels", "parity", "bench"}
    kernels = found["parts"]["kernels"]
    row = verb_table([read_record(record)])
    assert row.count("| passed") == 3 + ("skipped" not in kernels)


@pytest.mark.long
def test_what_failed_is_named(road: Road) -> None:
    bad = road.run("accept", *SMALL, "--model.heads=3", code=1)
    assert "megasora: not accepted: parity, bench; " in bad.stderr
    assert "3 heads do not divide by tp" in bad.stderr
