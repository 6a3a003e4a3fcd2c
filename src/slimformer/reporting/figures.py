"""Turns records into the report's pictures: quality against speed, quality against size, what is kept of each layer.

Each picture is drawn twice, wide and narrow; the page shows the one that fits. A picture without enough numbers is ("", "").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np

from slimformer.measuring.records import Record, Standing
from slimformer.reporting.ledger import by_run
from slimformer.reporting.svg import Mark, Scatter, draw_bars, draw_scatter
from slimformer.reporting.verdicts import choice, frontier, megabytes, slowness

Figure = tuple[str, str]  # SVG, wide and narrow
CROWDED = 14  # with more points than these, those of ours behind the frontier get no label

_SHAPES: Mapping[str, str] = {
    Standing.OURS: "ours",
    Standing.TEACHER_FP32: "base",
    Standing.SMALL_DENSE: "small",
    Standing.CUT: "small",
}


@dataclass(frozen=True)
class _Axis:
    """A cost that quality is drawn against. `place` is where a record stands on it, `words` say the same in its tooltip."""

    label: str
    cost: Callable[[Record], float]
    place: Callable[[Record], float]
    words: str
    more_is_right: bool


_SPEED = _Axis(
    label="times faster than the dense teacher in fp32, batch 32 sorted by length, measured",
    cost=slowness,
    place=lambda record: 1 / slowness(record),
    words="{:.2f} times the baseline's speed",
    more_is_right=True,
)
_SIZE = _Axis("file size, MB", megabytes, megabytes, "{:.3g} MB", more_is_right=False)


@dataclass(frozen=True)
class _Point:
    """What one mark of a scatter stands for: a file of ours, or a rival with its rows of all runs."""

    rows: tuple[Record, ...]
    label: str
    style: str

    def x(self, axis: _Axis) -> float:
        return float(np.median([axis.place(record) for record in self.rows]))

    @property
    def y(self) -> float:
        return float(np.median([record.score for record in self.rows]))

    @property
    def spread(self) -> tuple[float, float] | None:
        speeds = [speed for record in self.rows if (speed := record.times_faster(32))]
        return (min(speed.low for speed in speeds), max(speed.high for speed in speeds)) if speeds else None


def speed_figure(records: Sequence[Record]) -> Figure:
    """Quality against measured speed at batch 32, with its spread, the frontier, and the goal if all runs have the same."""
    return _scatter(records, _SPEED)


def size_figure(records: Sequence[Record]) -> Figure:
    """Quality against the size of the file, with the frontier."""
    return _scatter(records, _SIZE)


def _scatter(records: Sequence[Record], axis: _Axis) -> Figure:
    known = [record for record in records if math.isfinite(axis.cost(record)) and math.isfinite(record.score)]
    if len(known) < 2:
        return ("", "")
    front = frontier(known, axis.cost)

    def mark(point: _Point) -> Mark:
        record, several = point.rows[0], len(point.rows) > 1
        where = f"{len(point.rows)} runs, medians" if several else record.run
        figures = f"{record.metric} {point.y:.4f}, {axis.words.format(point.x(axis))}"
        return Mark(
            x=point.x(axis),
            y=point.y,
            label=point.label,
            style=point.style,
            title=f"{record.name}{f' ({where})' if where else ''}: {figures}",
            spread=point.spread if axis is _SPEED else None,
        )

    scatter = Scatter(
        marks=[mark(point) for point in _points(known, {id(record) for record in front})],
        front=[(axis.place(record), record.score) for record in front],
        x_label=axis.label,
        y_label=records[0].metric.replace("_", " "),
        more_is_right=axis.more_is_right,
        asked=_asked(known) if axis is _SPEED else None,
    )
    return (draw_scatter(scatter, width=760, height=400), draw_scatter(scatter, width=360, height=340))


def _points(records: Sequence[Record], front: Set[int]) -> list[_Point]:
    """Our files each for itself, and each rival once, whatever the number of runs that measured it.

    Of several runs the file that ships bears the run's name, and the other files none; of a single run every file bears its own.
    """
    runs, rivals, points = by_run(records), dict[tuple[str, str], list[Record]](), []
    for run, rows in runs.items():
        ours = choice(rows)
        for record in rows:
            style = _SHAPES.get(record.role, "rival")
            if style != "ours":
                rivals.setdefault((record.role, record.name), []).append(record)
            elif len(runs) > 1:
                points.append(_Point((record,), run if record is ours else "", "chosen" if record is ours else style))
            else:
                named = record is ours or len(records) <= CROWDED or id(record) in front
                points.append(_Point((record,), record.name if named else "", "chosen" if record is ours else style))
    for (role, name), rows in rivals.items():
        points.append(_Point(tuple(rows), name, _SHAPES.get(role, "rival")))
    return points


def _asked(records: Sequence[Record]) -> tuple[float, float] | None:
    """The speed and the score that were asked for, if they can be drawn and are the same for all of ours."""
    base = next((record for record in records if record.role == Standing.TEACHER_FP32), None)
    ours = [record for record in records if record.role == Standing.OURS]
    goals = {record.target for record in ours}
    goal = goals.pop() if len(goals) == 1 else None
    if goal is None or base is None or not base.higher_is_better:
        return None
    return (goal.speedup, base.score - goal.max_loss / 100)


def layers_figure(ours: Record | None) -> Figure:
    """Heads and neurons that are kept of each layer."""
    if ours is None or not ours.layers:
        return ("", "")
    heads = [(layer.name, layer.heads, layer.heads_of) for layer in ours.layers]
    neurons = [(layer.name, layer.neurons, layer.neurons_of) for layer in ours.layers]
    panels = [("attention heads", heads), ("FFN neurons", neurons)]
    return (draw_bars(panels, width=760, columns=2), draw_bars(panels, width=360, columns=1))
