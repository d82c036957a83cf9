"""Learning-rate schedules and clipping."""

import pytest

from speft_ds.optimizer import clip_factor, lr_factor


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_rises_to_one_and_every_step_moves(schedule):
    factor = lr_factor(schedule, num_steps=20, warmup_steps=4)
    values = [factor(step) for step in range(20)]
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(value > 0 for value in values)
    assert values[4:] == sorted(values[4:], reverse=True)
    assert factor(20) == pytest.approx(1.0 if schedule == "constant" else 0.0)


def test_linear_and_cosine_meet_halfway():
    for schedule in ("linear", "cosine"):
        assert lr_factor(schedule, 10, 0)(5) == pytest.approx(0.5)


def test_clip_factor():
    assert clip_factor(4.0, 1.0) == 0.25
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(4.0, None) == 1.0
