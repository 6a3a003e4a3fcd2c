"""Schedules that methods share: how far a ramp has come, and which steps are due, as functions of `Progress`.

They are shares of the training, not numbers of steps, so that one option fits short runs and long ones. The schedule of the
learning rate belongs to training, which comes after methods: `training.loop.rate`.
"""

from __future__ import annotations

import math

from slimformer.methods.base import Progress


def linear_ramp(progress: Progress, over: float) -> float:
    """Rises evenly from 0 to 1 over the first share `over` of the steps, then stays; with 0 it is 1 from the start."""
    return min(1.0, progress.fraction / over) if over else 1.0


def cubic_decay(done: float) -> float:
    """(1 - done)^3: falls from 1 to 0, fast at first, flat at the end (Zhu, Gupta: To prune, or not to prune, 2017, eq. 1)."""
    return (1 - done) ** 3


def cubic_ramp(progress: Progress, warmup: float, cooldown: float) -> float:
    """Rises as 1 - (1 - t)^3, from 0 at the end of the warm-up share of the steps to 1 where the cool-down share begins."""
    begin, end = warmup * progress.total, (1 - cooldown) * progress.total
    if progress.step <= begin:
        return 0.0
    if progress.step >= end:
        return 1.0
    return float(1 - cubic_decay((progress.step - begin) / (end - begin)))


def updates_due(progress: Progress, updates: int, cooldown: float) -> tuple[int, int]:
    """How many updates are due by now, and of how many: evenly over the steps before the cool-down, one a step at most."""
    end = max(1, round((1 - cooldown) * progress.total))
    total = min(updates, end)
    return min(progress.step, end) * total // end, total


def crosses(progress: Progress, every: float) -> bool:
    """Whether the step just done crossed a multiple of `every`, a share of the training; the end does not count."""
    if progress.step >= progress.total:
        return False
    before, after = ((step / progress.total) / every + 1e-9 for step in (progress.step - 1, progress.step))
    return math.floor(after) > math.floor(before)
