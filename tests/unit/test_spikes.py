"""What counts as a spike."""

import random

import pytest

from megasora.observe.spikes import SpikeConfig, SpikeWatch


def test_a_spike_is_far_above_what_was_and_is_not_remembered() -> None:
    chance = random.Random(0)
    watch = SpikeWatch(SpikeConfig(window=32, threshold=10))
    assert watch.judge(1e9, 1e9) == ""  # nothing to compare with
    watch = SpikeWatch(SpikeConfig(window=32, threshold=10))
    verdicts = [watch.judge(chance.gauss(1, 0.1), chance.gauss(2, 0.3)) for _ in range(2000)]
    assert not any(verdicts)  # ten deviations: never by chance
    before = list(watch.recent)
    assert watch.judge(1.0, 2 + 0.3 * 20).startswith("gradient norm 8, of late")
    assert watch.judge(1 + 0.1 * 20, 2.0).startswith("loss 3, of late")
    assert list(watch.recent) == before
    assert watch.judge(1.2, 2.3) == ""
    assert watch.judge(0.0, 0.0) == ""  # below is none


def test_a_few_spikes_do_not_move_the_threshold() -> None:
    """Why a median: with a mean and a standard deviation these five would hide the sixth."""
    chance = random.Random(1)
    recent = [(chance.gauss(1, 0.1), 1.0) for _ in range(27)] + [(50.0, 1.0)] * 5
    assert SpikeWatch(SpikeConfig(window=32), recent).judge(20.0, 1.0).startswith("loss 20")


def test_it_goes_on_where_it_was() -> None:
    chance = random.Random(2)
    steps = [(chance.gauss(1, 0.1), chance.gauss(2, 0.3) + 30 * (i == 70)) for i in range(100)]
    whole = SpikeWatch(SpikeConfig())
    verdicts = [whole.judge(*step) for step in steps]
    first = SpikeWatch(SpikeConfig())
    resumed = [first.judge(*step) for step in steps[:60]]
    second = SpikeWatch(SpikeConfig(), [list(pair) for pair in first.recent])
    assert [*resumed, *(second.judge(*step) for step in steps[60:])] == verdicts
    assert [i for i, verdict in enumerate(verdicts) if verdict] == [70]


def test_a_lasting_change_is_a_new_level() -> None:
    """A stage of larger videos, say: the first steps are spikes, and not every one from there on."""
    chance = random.Random(3)
    steps = [(chance.gauss(1, 0.1) + 20 * (i >= 50), 1.0) for i in range(120)] + [(500.0, 1.0)]
    watch = SpikeWatch(SpikeConfig(window=16))
    verdicts = [bool(watch.judge(*step)) for step in steps[:53]]
    resumed = SpikeWatch(SpikeConfig(window=16), watch.recent, watch.in_a_row)
    verdicts += [bool(resumed.judge(*step)) for step in steps[53:]]
    assert [i for i, verdict in enumerate(verdicts) if verdict] == [*range(50, 58), 120]
    single = [(1.0, 1.0), (1.0, 1.0), (90.0, 1.0)] * 40  # never two in a row: no new level
    apart = SpikeWatch(SpikeConfig(window=16))
    assert sum(bool(apart.judge(*step)) for step in single) > 30


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="threshold"):
        SpikeConfig(threshold=0)
    with pytest.raises(ValueError, match="window"):
        SpikeConfig(window=2)
