"""Schedules: how far a ramp has come and which steps are due, worked by hand."""

from __future__ import annotations

import pytest

from slimformer.methods._schedules import crosses, cubic_decay, cubic_ramp, linear_ramp, updates_due
from slimformer.methods.base import Progress


def test_the_linear_ramp_rises_evenly_and_stays():
    assert [linear_ramp(Progress(step, 10), 0.5) for step in (0, 1, 5, 9)] == [0, 0.2, 1, 1]
    assert linear_ramp(Progress(0, 10), 0.0) == 1.0


def test_the_cubic_decay_is_steep_first():
    assert [cubic_decay(done) for done in (0.0, 0.5, 1.0)] == [1, 0.125, 0]


def test_a_hundred_updates_evenly_one_a_step_at_most():
    assert [updates_due(Progress(step, 400), 100, 0.0)[0] for step in (0, 3, 4, 399, 400)] == [0, 0, 1, 99, 100]
    assert [updates_due(Progress(step, 7), 100, 0.0) for step in (1, 7)] == [(1, 7), (7, 7)]
    assert [updates_due(Progress(step, 2), 5, 0.5) for step in (0, 1, 2)] == [(0, 1), (1, 1), (1, 1)]
    assert updates_due(Progress(1, 1), 5, 0.9) == (1, 1)  # all of one step is cool-down: it still has its update
    assert [updates_due(Progress(step, 100), 10, 0.5)[0] for step in (4, 5, 49, 50, 100)] == [0, 1, 9, 10, 10]


@pytest.mark.parametrize(
    ("every", "total", "steps"),
    [(0.2, 10, [2, 4, 6, 8]), (0.5, 3, [2]), (0.2, 3, [1, 2]), (0.3, 10, [3, 6, 9]), (1.0, 10, []), (0.1, 1, [])],
)
def test_reweighting_fires_at_shares_of_the_training_however_short(every, total, steps):
    assert [step for step in range(1, total + 1) if crosses(Progress(step, total), every)] == steps


def test_the_cubic_ramp_by_hand():
    steps = [cubic_ramp(Progress(step, 100), 0.1, 0.5) for step in (0, 10, 20, 30, 50, 90, 100)]
    assert steps == pytest.approx([0, 0, 1 - 0.75**3, 1 - 0.5**3, 1, 1, 1])
    assert [cubic_ramp(Progress(step, 4), 0.0, 1.0) for step in (0, 1)] == [0, 1]
