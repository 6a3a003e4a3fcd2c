"""What makes a compression quick and says nothing on what it does: one look at a budget, and speeds that are counted, not timed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from slimformer.core.cost import group
from slimformer.families.base import Subject
from slimformer.measuring.latency import GROUPS, Levels
from slimformer.running.candidate import teacher_candidate
from slimformer.running.scale import Scale, Speeds, by_table


def int8_alone_is_slow(*args: Any, **options: Any) -> Any:
    """The uncut model in int8 as a candidate of no speed: the times of so small models would choose at random whether to cut."""
    whole = teacher_candidate(*args, **options)
    return replace(whole, trials=tuple(replace(trial, speed_32=1e-6) for trial in whole.trials))


def hurry(patch: pytest.MonkeyPatch) -> None:
    """Two levels of latency, one look at a budget, no waiting; a cut is always needed, and no clock says who is delivered."""
    patch.setattr("psutil.cpu_percent", lambda **_: 0.0)  # in a process of its own, which conftest does not reach
    patch.setattr("slimformer.measuring.latency.SHARES", (1.0, 0.0))
    patch.setattr("slimformer.running.outline.PROBES", 1)
    patch.setattr("slimformer.running.search.CLEARLY", float("inf"))
    patch.setattr("slimformer.running.search.teacher_candidate", int8_alone_is_slow)
    patch.setattr("slimformer.running.recipe.RIVALS", ("teacher-int8", "small-dense"))


def count_speeds(patch: pytest.MonkeyPatch, levels: Levels | None = None) -> None:
    """A model is as many times as fast as a table says (None: as it has fewer heads and neurons): no file is written to be timed."""

    def speed(scale: Scale, small: Subject) -> Speeds:
        return by_table(small.anatomy, levels or counted(scale.bundle.subject))

    patch.setattr("slimformer.running.stages.measure_levels", lambda subject, *_: levels or counted(subject))
    patch.setattr(Scale, "_timed", speed)


def counted(subject: Subject) -> Levels:
    """A latency table by which each head and neuron takes as long as the others of its kind, and nothing else takes long."""
    anatomy = subject.anatomy
    sizes: dict[str, list[int]] = {}
    for site in anatomy.units:
        sizes.setdefault(group(anatomy, site), []).append(site.size)
    table = {name: {units: units / max(found) for units in {1, max(found)}} for name, found in sizes.items()}
    inside = sum(size / max(found) for found in sizes.values() for size in found)
    table = {part: table.get(f"last_{part}", {}) for part in GROUPS[:2]} | table  # of a single layer
    return Levels(0.1 * inside, 1.1 * inside, **{name: table.get(name, {}) for name in GROUPS})
