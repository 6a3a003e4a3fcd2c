"""Turns the records of one comparison into a `Section`: the words, figures and cells that the report's template shows.

What is true is decided in `verdicts`, and `templates/report.html` says where things stand; nothing is judged or laid out here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slimformer.measuring.records import Record, Standing
from slimformer.measuring.timing import Ratio
from slimformer.reporting.circumstances import Fact, circumstances, cost_facts
from slimformer.reporting.figures import Figure, layers_figure, size_figure, speed_figure
from slimformer.reporting.verdicts import Verdict, against, choice, judge, tally
from slimformer.reporting.words import (
    count_text,
    interval_text,
    layers_text,
    lost_text,
    mb_text,
    points_text,
    signed,
    times_text,
)

Cells = tuple[str, ...]
NONE = "–"  # stands for a number that is not known


@dataclass(frozen=True)
class Section:
    """All that the template needs of one comparison. `tiles` are label, figure and remark; `rows` are style and cells."""

    title: str
    metric: str
    headline: str
    verdict: Verdict
    tally: str
    tiles: tuple[tuple[str, str, str], ...]
    rivals: tuple[Verdict, ...]
    warnings: tuple[str, ...]
    speed_figure: Figure
    size_figure: Figure
    layers_figure: Figure
    layers_words: str
    columns: Cells
    rows: tuple[tuple[str, Cells], ...]
    counted: tuple[Cells, ...]
    seeds: tuple[Cells, ...]
    cost: tuple[Fact, ...]
    circumstances: tuple[Fact, ...]


def section_of(records: Sequence[Record]) -> Section:
    """The section of records that may stand in one table."""
    first, ours = records[0], choice(records)
    metric = first.metric.replace("_", " ")
    rivals = tuple(against(ours, records)) if ours else ()
    return Section(
        title=" · ".join(part for part in (first.model, first.task, f"{first.split} split") if part),
        metric=metric,
        headline=_headline(ours, metric) if ours else f"{len(records)} models side by side",
        verdict=judge(ours) if ours else Verdict(None, "No model of ours is among these records."),
        tally=tally(rivals),
        tiles=_tiles(ours, records, metric) if ours else (),
        rivals=rivals,
        warnings=_warnings(records),
        speed_figure=speed_figure(records, ours),
        size_figure=size_figure(records, ours),
        layers_figure=layers_figure(ours),
        layers_words=layers_text(ours) if ours else "",
        columns=(
            "model",
            "precision",
            metric,
            "points lost",
            "MB",
            "× batch 32",
            "× batch 1",
            "ms at 32: p50\u00a0/\u00a0p95",
            "ms at 1: p50\u00a0/\u00a0p95",
        ),
        rows=tuple((_style(record, ours), _cells(record)) for record in records),
        counted=tuple(
            (record.name, *(count_text(count) or NONE for count in (record.params, record.encoder_params, record.macs)))
            for record in records
            if record.params or record.encoder_params or record.macs
        ),
        seeds=_seeds(records),
        cost=cost_facts(ours) if ours else (),
        circumstances=circumstances(records),
    )


def _headline(ours: Record, metric: str) -> str:
    fast, loss = ours.times_faster(32), ours.loss
    pace = f"{times_text(fast.median)} as fast" if fast else "speed not measured"
    lost = f"{points_text(loss.value)} of {metric} {lost_text(loss.value)}" if loss else "loss not measured"
    return f"{pace[0].upper()}{pace[1:]}, {lost}"


def _tiles(ours: Record, records: Sequence[Record], metric: str) -> tuple[tuple[str, str, str], ...]:
    base = next((record for record in records if record.role == Standing.TEACHER_FP32), None)
    tiles = []
    for label, batch in (("batch 32, sorted by length", 32), ("batch 1, in order", 1)):
        if found := ours.times_faster(batch):
            remark = f"80 % of rounds within {found.low:.2f}–{found.high:.2f}"
            tiles.append((f"Speed, {label}", f"{found.median:.2f}×", remark))
    was = f"teacher {base.score:.4f}" if base else ""
    span = f"; lost {signed(ours.loss.value)} points, 95 % interval {interval_text(ours.loss)}" if ours.loss else ""
    tiles.append((metric[0].upper() + metric[1:], f"{ours.score:.4f}", was + span))
    if ours.size_bytes:
        times = (
            f"teacher {mb_text(base.size_bytes)} MB, {base.size_bytes / ours.size_bytes:.1f} times the size"
            if base and base.size_bytes
            else ""
        )
        tiles.append(("File", f"{mb_text(ours.size_bytes)} MB", times))
    return tuple(tiles)


def _warnings(records: Sequence[Record]) -> tuple[str, ...]:
    found = []
    busy = max(
        (timing.load.busy_cores for record in records for timing in record.timings if not timing.load.quiet), default=0.0
    )
    if busy:
        found.append(f"The machine was not quiet: other work took up to {busy:.1f} cores when timing began.")
    machines = {(record.environment.cpu, record.environment.cores) for record in records}
    if len(machines) > 1:
        found.append("These rows come from different machines: speeds compare only within one of them.")
    seeds = {record.seed for record in records if record.role == Standing.OURS and record.seed is not None}
    if len(seeds) == 1:
        found.append("One seed only: another seed can move the score by about one standard error.")
    return tuple(found)


def _style(record: Record, ours: Record | None) -> str:
    if record is ours:
        return "chosen"
    return "ours" if record.role == Standing.OURS else ""


def _cells(record: Record) -> tuple[str, ...]:
    def times(ratio: Ratio | None) -> str:
        return f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})" if ratio else NONE

    def spent(batch: int) -> str:
        for timing in record.timings:
            if (timing.batch_size == 1) == (batch == 1):
                return f"{timing.p50_ms:.2f} / {timing.p95_ms:.2f}"
        return NONE

    loss = f"{signed(record.loss.value)} ({interval_text(record.loss)})" if record.loss else NONE
    return (
        record.name,
        record.precision or NONE,
        f"{record.score:.4f}",
        loss,
        mb_text(record.size_bytes) or NONE,
        times(record.times_faster(32)),
        times(record.times_faster(1)),
        spent(32),
        spent(1),
    )


def _seeds(records: Sequence[Record]) -> tuple[tuple[str, ...], ...]:
    """Name, seeds, and mean (lowest to highest) of score, loss and speed, for rows that were run with several seeds."""
    found: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        if record.seed is not None:
            found.setdefault((record.name, record.role, record.precision), []).append(record)

    def spread(values: Sequence[float], digits: int) -> str:
        if not values:
            return NONE
        return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})".replace("-", "−")

    return tuple(
        (
            name,
            ", ".join(str(seed) for seed in sorted({record.seed for record in rows if record.seed is not None})),
            spread([record.score for record in rows], 4),
            spread([record.loss.value for record in rows if record.loss], 1),
            spread([ratio.median for record in rows if (ratio := record.times_faster(32))], 2),
        )
        for (name, _, _), rows in found.items()
        if len({record.seed for record in rows}) > 1
    )
