"""The storm as a test: 20 rounds, every kind of fault."""

from pathlib import Path

import pytest

from tests.integration.fault_storm import FAULTS, storm


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_history_survives(tmp_path: Path) -> None:
    report = storm(20, 0, tmp_path / "storm")
    assert set(report["lost_by_fault"]) == {fault.__name__ for fault in FAULTS}
    assert report["runs"]["fixed"]["same_bits"]
