"""The flags that all ranks agree on at every step."""

import pytest
import torch

from speft_ds.comm import signals
from speft_ds.training.checkpoint.step_flags import StepFlags


@pytest.fixture
def group(monkeypatch):
    """This process as one of three ranks, of whom nobody was asked to stop."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(signals, "_reasons", [])


def test_flags_are_those_of_any_rank_and_all_written_that_of_all(group):
    written = []
    flags = StepFlags(lambda: bool(written), every=5)
    assert flags.local() == [0, 0, 0]
    assert [flags.is_time(done) for done in (4, 5, 10)] == [False, True, True]
    signals._reasons.append("received SIGTERM")
    written.append(True)
    assert flags.local() == [1, 0, 1]
    flags.reduce(torch.tensor([0.0, 0.0, 2.0]))
    assert not (flags.stop or flags.all_written or flags.is_time(4))
    flags.reduce(torch.tensor([1.0, 1.0, 3.0]))
    assert flags.stop and flags.all_written and flags.is_time(4)


def test_the_clock_of_rank_0_decides_when_a_checkpoint_is_due(group, monkeypatch):
    flags = StepFlags(lambda: False, every="1min")
    assert flags.local()[1] == 0
    flags.since -= 61
    assert flags.local()[1] == 1
    monkeypatch.setenv("RANK", "1")
    assert flags.local()[1] == 0
    flags.restart()
    monkeypatch.setenv("RANK", "0")
    assert flags.local()[1] == 0
