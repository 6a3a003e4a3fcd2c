"""Turns records into the report's pictures: quality against speed, quality against size, what is kept of each layer.

Each picture is drawn twice, wide and narrow; the page shows the one that fits. A picture without enough numbers is ("", "").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from slimformer.measuring.records import Record, Standing
from slimformer.reporting.svg import Mark, Scatter, draw_bars, draw_scatter
from slimformer.reporting.verdicts import frontier, megabytes, slowness

Figure = tuple[str, str]  # SVG, wide and narrow
CROWDED = 14  # with more points than these, those of ours behind the frontier get no label

_SHAPES: Mapping[str, str] = {Standing.OURS: "ours", Standing.TEACHER_FP32: "base", Standing.SMALL_DENSE: "small"}


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
_SIZE = _Axis("file size, MB", megabytes, megabytes, "{:.1f} MB", more_is_right=False)


def speed_figure(records: Sequence[Record], ours: Record | None) -> Figure:
    """Quality against measured speed at batch 32, with its spread, the frontier, and the goal of `ours`."""
    return _scatter(records, ours, _SPEED)


def size_figure(records: Sequence[Record], ours: Record | None) -> Figure:
    """Quality against the size of the file, with the frontier."""
    return _scatter(records, ours, _SIZE)


def _scatter(records: Sequence[Record], ours: Record | None, axis: _Axis) -> Figure:
    known = [record for record in records if math.isfinite(axis.cost(record)) and math.isfinite(record.score)]
    if len(known) < 2:
        return ("", "")
    front = frontier(known, axis.cost)
    labelled = {id(record) for record in (known if len(known) <= CROWDED else front)}

    def mark(record: Record) -> Mark:
        style = _SHAPES.get(record.role, "rival")
        speed = record.times_faster(32) if axis is _SPEED else None
        return Mark(
            x=axis.place(record),
            y=record.score,
            label=record.name if id(record) in labelled or record is ours or style != "ours" else "",
            style="chosen" if record is ours else style,
            title=f"{record.name}: {record.metric} {record.score:.4f}, {axis.words.format(axis.place(record))}",
            spread=(speed.low, speed.high) if speed else None,
        )

    scatter = Scatter(
        marks=[mark(record) for record in known],
        front=[(axis.place(record), record.score) for record in front],
        x_label=axis.label,
        y_label=records[0].metric.replace("_", " "),
        more_is_right=axis.more_is_right,
        asked=_asked(known, ours) if axis is _SPEED else None,
    )
    return (draw_scatter(scatter, width=760, height=400), draw_scatter(scatter, width=360, height=340))


def _asked(records: Sequence[Record], ours: Record | None) -> tuple[float, float] | None:
    """The speed and the score that were asked for, if they can be drawn."""
    base = next((record for record in records if record.role == Standing.TEACHER_FP32), None)
    if ours is None or ours.target is None or base is None or not ours.higher_is_better:
        return None
    return (ours.target.speedup, base.score - ours.target.max_loss / 100)


def layers_figure(ours: Record | None) -> Figure:
    """Heads and neurons that are kept of each layer."""
    if ours is None or not ours.layers:
        return ("", "")
    heads = [(layer.name, layer.heads, layer.heads_of) for layer in ours.layers]
    neurons = [(layer.name, layer.neurons, layer.neurons_of) for layer in ours.layers]
    panels = [("attention heads", heads), ("FFN neurons", neurons)]
    return (draw_bars(panels, width=760, columns=2), draw_bars(panels, width=360, columns=1))
