"""Turns the records of one comparison into a `Section`: the words, figures and cells that the report's template shows.

What is true is decided in `verdicts`, and `templates/report.html` says where things stand; nothing is judged or laid out here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slimformer.measuring.records import Record, Standing
from slimformer.measuring.timing import Ratio
from slimformer.reporting.circumstances import Fact, circumstances, cost_facts
from slimformer.reporting.figures import Figure, layers_figure, size_figure, speed_figure
from slimformer.reporting.ledger import by_run
from slimformer.reporting.verdicts import (
    Verdict,
    against,
    choice,
    doubts,
    frontier,
    judge,
    likely_speed,
    slowness,
    tally,
    worthless,
)
from slimformer.reporting.words import (
    count_text,
    interval_text,
    layers_text,
    listed,
    lost_text,
    mb_text,
    points_text,
    ratio_text,
    signed,
    size_text,
    times_text,
)

Cells = tuple[str, ...]
NONE = "–"  # stands for a number that is not known


@dataclass(frozen=True)
class Section:
    """All that the template needs of one comparison.

    `tiles` are label, figure and remark; `rows` are style and cells; `runs` are name, verdict and tally of each, if there are several.
    """

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
    written: tuple[Cells, ...]
    seeds: tuple[Cells, ...]
    runs: tuple[tuple[str, Verdict, str], ...]
    doubts: tuple[str, ...]
    cost: tuple[Fact, ...]
    circumstances: tuple[Fact, ...]


def section_of(records: Sequence[Record], *, weights: bool = False) -> Section:
    """The section of records that may stand in one table. Of several runs it judges each by its own rows.

    `weights`: its title names the teacher's weights, because another section has a teacher of the same name.
    """
    first, runs = records[0], by_run(records)
    several = len(runs) > 1
    ours = None if several else choice(records)
    metric = first.metric.replace("_", " ")
    rivals = tuple(against(ours, records)) if ours else ()
    standings = tuple((run, *_standing(rows)) for run, rows in runs.items()) if several else ()
    columns = ("model", "precision", metric, "points lost", "MB", "× batch 32", "× batch 1")
    counted = [record for record in records if record.params or record.encoder_params or record.macs]
    return Section(
        title=" · ".join(
            part for part in (first.model, first.teacher if weights else "", first.task, f"{first.split} split") if part
        ),
        metric=metric,
        headline=_runs_headline(tuple(runs)) if several else _headline(ours, records),
        verdict=_best_runs(runs, metric) if several else judge(ours, records) if ours else Verdict(None, _NO_OURS),
        tally=tally(rivals),
        tiles=_tiles(ours, records, metric) if ours else (),
        rivals=rivals,
        warnings=_warnings(records),
        speed_figure=speed_figure(records),
        size_figure=size_figure(records),
        layers_figure=layers_figure(ours),
        layers_words=layers_text(ours) if ours else "",
        columns=(
            *(("run",) if several else ()),
            *columns,
            "ms at 32: p50\u00a0/\u00a0p95",
            "ms at 1: p50\u00a0/\u00a0p95",
        ),
        rows=tuple(
            (_style(record, choice(rows)), (*((run,) if several else ()), *cells_of(record)))
            for run, rows in runs.items()
            for record in rows
        ),
        counted=tuple(
            (
                f"{record.run}: {record.name}" if several else record.name,
                *(count_text(count) or NONE for count in (record.params, record.encoder_params, record.macs)),
            )
            for record in counted
        ),
        written=written_rows(records, several),
        seeds=_seeds(records),
        cost=cost_facts(ours) if ours else (),
        circumstances=circumstances(records),
        runs=standings,
        doubts=tuple(doubts(records)),
    )


_NO_OURS = "No model of ours is among these records."


def _standing(rows: Sequence[Record]) -> tuple[Verdict, str]:
    """The verdict on one of several runs, and how it stands against its rivals."""
    ours = choice(rows)
    return (judge(ours, rows), tally(against(ours, rows))) if ours else (Verdict(None, _NO_OURS), "")


def _runs_headline(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{len(names)} runs side by side: {shown}"


def _best_runs(runs: Mapping[str, Sequence[Record]], metric: str) -> Verdict:
    """Which runs no other beats, by the file that ships of each."""
    ours = [record for rows in runs.values() if (record := choice(rows)) is not None]
    front = [record.run for record in frontier(ours, slowness)]
    if not front:
        return Verdict(None, _NO_OURS)
    return Verdict(
        None,
        f"By the file that ships, no other run is both faster and better in {metric} than {listed(front)}. Speeds are those over "
        "each run's own baseline; small differences may be noise.",
    )


def _headline(ours: Record | None, records: Sequence[Record]) -> str:
    if ours is None:
        return f"{len(records)} models side by side"
    speed, loss, metric = likely_speed(ours), ours.loss, ours.metric.replace("_", " ")
    lost = f"{points_text(loss.value)} of {metric} {lost_text(loss.value)}" if loss else "loss not measured"
    if speed is None:
        return f"Speed not measured, {lost}"
    sure = speed.high <= 1.1 * speed.median and speed.low >= speed.median / 1.1
    spread = "" if sure else f" ({speed.low:.1f} to {speed.high:.1f})"
    pace = f"{times_text(speed.median)} as fast{spread}"
    return f"{'Worse than doing nothing: ' if worthless(ours, records) else ''}{pace}, {lost}"


def _tiles(ours: Record, records: Sequence[Record], metric: str) -> tuple[tuple[str, str, str], ...]:
    base = next((record for record in records if record.role == Standing.TEACHER_FP32), None)
    tiles = []
    for label, batch in (("batch 32, sorted by length", 32), ("batch 1, in order", 1)):
        if speed := ours.times_faster(batch):
            remark = f"80 % of rounds within {speed.low:.2f}–{speed.high:.2f}"
            tiles.append((f"Speed, {label}", f"{speed.median:.2f}×", remark))
    was = f"teacher {base.score:.4f}" if base else ""
    span = f"; lost {signed(ours.loss.value)} points, 95 % interval {interval_text(ours.loss)}" if ours.loss else ""
    tiles.append((metric[0].upper() + metric[1:], f"{ours.score:.4f}", was + span))
    if ours.size_bytes and base and base.size_bytes:
        sizes = f"teacher {size_text(base.size_bytes)}; ours is {ratio_text(ours.size_bytes, base.size_bytes)}"
        tiles.append(("File", size_text(ours.size_bytes), sizes))
    return tuple(tiles)


def _warnings(records: Sequence[Record]) -> tuple[str, ...]:
    warnings = []
    machines = {(record.environment.cpu, record.environment.cores) for record in records}
    if len(machines) > 1:
        warnings.append("These rows come from different machines: speeds compare only within one of them.")
    seeds = {record.seed for record in records if record.role == Standing.OURS and record.seed is not None}
    if len(seeds) == 1:
        warnings.append("One seed only: another seed can move the score by about one standard error.")
    return tuple(warnings)


def _style(record: Record, ours: Record | None) -> str:
    if record is ours:
        return "chosen"
    return "ours" if record.role == Standing.OURS else ""


def cells_of(record: Record) -> tuple[str, ...]:
    """A row of a page's table: name, precision, score, points lost, megabytes, speeds at batch 32 and 1, milliseconds of both."""

    def times(ratio: Ratio | None) -> str:
        return f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})" if ratio else NONE

    def spent(batch: int) -> str:
        timing = record.timing_at(batch)
        return f"{timing.p50_ms:.2f} / {timing.p95_ms:.2f}" if timing else NONE

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


def written_rows(records: Sequence[Record], several: bool = False) -> tuple[Cells, ...]:
    """Of models that write texts, for each number of beams: its score, texts a second, and p50 and p95 of the milliseconds of one.

    `several`: their names begin with that of their run. Without such a model there is no row.
    """
    rows = []
    for record in records:
        beams = dict.fromkeys(timing.beams for timing in record.timings if timing.beams is not None)
        for count in beams:
            own = [timing for timing in record.timings if timing.beams == count]
            large, single = (next((timing for timing in own if (timing.batch_size == 1) == one), None) for one in (False, True))
            first = count == next(iter(beams))
            score = record.score if first else record.scores.get(f"{record.metric}_at_{count}_beam")
            rows.append(
                (
                    f"{record.run}: {record.name}" if several else record.name,
                    str(count),
                    NONE if score is None else f"{score:.4f}",
                    *(NONE if timing is None else f"{timing.per_second:.1f}" for timing in (large, single)),
                    *(NONE if timing is None else f"{timing.p50_ms:.2f} / {timing.p95_ms:.2f}" for timing in (large, single)),
                )
            )
    return tuple(rows)


def _seeds(records: Sequence[Record]) -> tuple[tuple[str, ...], ...]:
    """Name, seeds, and mean (lowest to highest) of score, loss and speed, for rows that were run with several seeds."""
    repeated: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        if record.seed is not None:
            repeated.setdefault((record.name, record.role, record.precision), []).append(record)

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
        for (name, _, _), rows in repeated.items()
        if 1 < len({record.seed for record in rows}) == len(rows)  # two rows with one seed are not one model, but two
    )
