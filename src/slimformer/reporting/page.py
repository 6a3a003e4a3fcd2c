"""Writes report.html: one self-contained page on a set of records, wide or narrow, light or dark, without scripts.

The one idea: this file turns records into words and figures (`_Section`), `templates/report.html` puts them on the page and
`figures.py` draws. What is true is decided in `report.py`; nothing is judged here.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np

from slimformer.errors import DataError
from slimformer.measuring.records import Record, Standing
from slimformer.measuring.timing import Ratio
from slimformer.reporting.answers import ChangedAnswer, shortened_answer
from slimformer.reporting.ledger import LEDGER, groups, read_records
from slimformer.reporting.svg import Mark, bars, scatter
from slimformer.reporting.verdicts import Verdict, against, choice, frontier, judge, megabytes, slowness, tally
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
from slimformer.saving.files import write_text

_log = logging.getLogger(__name__)

SHOWN = 40  # changed answers on the page; all of them are in changed.jsonl


@dataclass(frozen=True)
class Details:
    """What the page shows beyond the records: changed answers, and the command that made it."""

    changed: tuple[ChangedAnswer, ...] = ()
    command: str = ""


@dataclass(frozen=True)
class _Section:
    """All that the template needs of one group of records."""

    title: str
    metric: str
    headline: str
    state: str  # "met", "missed" or "none"
    summary: str
    tiles: tuple[tuple[str, str, str], ...]  # label, figure, remark
    verdicts: tuple[Verdict, ...]
    warnings: tuple[str, ...]
    speed_figure: tuple[str, str]  # wide and narrow
    size_figure: tuple[str, str]
    layers_figure: tuple[str, str]
    layers_words: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]  # style, cells
    counted: tuple[tuple[str, ...], ...]
    seeds: tuple[tuple[str, ...], ...]
    cost: tuple[tuple[str, str], ...]
    circumstances: tuple[tuple[str, str], ...]


def page(records: Sequence[Record], details: Details, path: Path) -> None:
    """Writes a self-contained HTML page on the records, and changed.jsonl beside it where answers changed.

    One section per teacher and task. DataError where there is no record.
    """
    from jinja2 import Environment as Jinja
    from jinja2 import PackageLoader, StrictUndefined

    if not records:
        raise DataError("there are no records to report on.", help="run `slimformer compress` or `slimformer bench` first.")
    jinja = Jinja(
        loader=PackageLoader("slimformer.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = [shortened_answer(item) for item in details.changed[:SHOWN]]
    html = jinja.get_template("report.html").render(
        sections=[_section(group) for group in groups(records).values()],
        changed=shown,
        changed_total=len(details.changed),
        changed_lost=sum(item.gain < 0 for item in details.changed),
        changed_won=sum(item.gain > 0 for item in details.changed),
        command=details.command,
        date=max(record.date for record in records)[:10],
        version=records[-1].environment.packages.get("slimformer", ""),
    )
    write_text(path, html)
    if details.changed:
        lines = "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in details.changed)
        write_text(path.with_name("changed.jsonl"), lines)


def _section(records: Sequence[Record]) -> _Section:
    first = records[0]
    ours = choice(records)
    base = next((record for record in records if record.role == Standing.TEACHER_FP32), None)
    metric = first.metric.replace("_", " ")
    verdict = judge(ours) if ours else Verdict(None, "No model of ours is among these records.")
    verdicts = tuple(against(ours, records)) if ours else ()
    return _Section(
        title=" · ".join(part for part in (first.model, first.task, f"{first.split} split") if part),
        metric=metric,
        headline=_headline(ours, metric) if ours else f"{len(records)} models side by side",
        state={True: "met", False: "missed", None: "none"}[verdict.good],
        summary=f"{verdict.text} {tally(verdicts)}".strip(),
        tiles=_tiles(ours, base, metric) if ours else (),
        verdicts=verdicts,
        warnings=_warnings(records),
        speed_figure=_scatter(records, ours, slowness, "speed"),
        size_figure=_scatter(records, ours, megabytes, "size"),
        layers_figure=_bars(ours),
        layers_words=layers_text(ours) if ours else "",
        columns=(
            "model",
            "precision",
            metric,
            "points lost",
            "MB",
            "× batch 32",
            "× batch 1",
            "ms at 32: p50 / p95",
            "ms at 1: p50 / p95",
        ),
        rows=tuple((_style(record, ours), _cells(record)) for record in records),
        counted=tuple(
            (record.name, count_text(record.params), count_text(record.encoder_params), count_text(record.macs))
            for record in records
            if record.params or record.encoder_params or record.macs
        ),
        seeds=_seeds(records),
        cost=cost_facts(ours),
        circumstances=circumstances(records),
    )


def _headline(ours: Record, metric: str) -> str:
    fast, loss = ours.times_faster(32), ours.loss
    pace = f"{times_text(fast.median)} as fast" if fast else "speed not measured"
    lost = f"{points_text(loss.value)} of {metric} {lost_text(loss.value)}" if loss else "loss not measured"
    return f"{pace[0].upper()}{pace[1:]}, {lost}"


def _tiles(ours: Record, base: Record | None, metric: str) -> tuple[tuple[str, str, str], ...]:
    tiles = []
    for label, batch in (("batch 32, sorted by length", 32), ("batch 1, in order", 1)):
        if found := ours.times_faster(batch):
            tiles.append((f"Speed, {label}", f"{found.median:.2f}×", f"80 % of rounds within {found.low:.2f}–{found.high:.2f}"))
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
    return {Standing.OURS: "ours", Standing.TEACHER_FP32: "base"}.get(cast(Standing, record.role), "")


def _cells(record: Record) -> tuple[str, ...]:
    def times(found: Ratio | None) -> str:
        return f"{found.median:.2f} ({found.low:.2f}–{found.high:.2f})" if found else "–"

    def spent(batch: int) -> str:
        for timing in record.timings:
            if (timing.batch_size == 1) == (batch == 1):
                return f"{timing.p50_ms:.2f} / {timing.p95_ms:.2f}"
        return "–"

    loss = f"{signed(record.loss.value)} ({interval_text(record.loss)})" if record.loss else "–"
    return (
        record.name,
        record.precision or "–",
        f"{record.score:.4f}",
        loss,
        mb_text(record.size_bytes) or "–",
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
            return "–"
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


def cost_facts(ours: Record | None) -> tuple[tuple[str, str], ...]:
    if ours is None:
        return ()
    found = []
    if ours.minutes is not None:
        on = f" on {ours.threads} thread{'s' * (ours.threads != 1)}" if ours.threads else ""
        found.append(("Compression took", f"{ours.minutes:.1f} minutes{on}"))
    if ours.peak_rss_bytes is not None:
        found.append(("Peak memory of it", f"{ours.peak_rss_bytes / 2**30:.1f} GiB"))
    if ours.train_examples is not None:
        found.append(("Training examples", f"{ours.train_examples:,}"))
    if ours.seed is not None:
        found.append(("Seed", str(ours.seed)))
    return tuple(found)


def circumstances(records: Sequence[Record]) -> tuple[tuple[str, str], ...]:
    last = records[-1]
    machine = last.environment
    found = [
        ("Processor", f"{machine.cpu}, {machine.cores} cores; {', '.join(machine.flags) or 'flags unknown'}"),
        ("Memory", f"{machine.memory_bytes / 2**30:.1f} GiB"),
        ("System", f"{machine.os}, Python {machine.python}"),
        ("Packages", ", ".join(f"{name} {version}" for name, version in machine.packages.items())),
        ("Scored on", f"{last.examples:,} examples of the {last.split} split"),
    ]
    engines = sorted(
        {f"{item.runtime} {item.version}, {item.threads} threads, {item.device}" for r in records for item in r.timings}
    )
    if engines:
        found.append(("Engines", "; ".join(engines)))
    for item in last.timings:
        found.append(
            (
                item.workload[0].upper() + item.workload[1:],
                f"{item.examples} examples in {len(item.sizes)} batches, {item.rounds} rounds in turn after {item.warmup} of "
                f"warm-up; {item.lengths.mean:.1f} tokens on average, median {item.lengths.p50:.0f}, 95 % up to "
                f"{item.lengths.p95:.0f}, longest {item.lengths.max}",
            )
        )
    for item in last.timings[:1]:
        found.append(
            (
                "Load before timing",
                f"others used {item.load.busy_cores:g} cores; load average {item.load.average:g}; "
                f"waited {item.load.waited_seconds:.0f} s",
            )
        )
    for label, values in (
        ("Recipe", {record.recipe for record in records if record.recipe}),
        ("Plan", {record.plan for record in records if record.plan}),
        ("Measured", {record.date for record in records}),
    ):
        if values:
            found.append((label, ", ".join(sorted(values))))
    return tuple(found)


def _bars(ours: Record | None) -> tuple[str, str]:
    if ours is None or not ours.layers:
        return ("", "")
    heads = [(layer.name, layer.heads, layer.heads_of) for layer in ours.layers]
    neurons = [(layer.name, layer.neurons, layer.neurons_of) for layer in ours.layers]
    panels = [("attention heads", heads), ("FFN neurons", neurons)]
    return (bars(panels, width=760, columns=2), bars(panels, width=360, columns=1))


def _scatter(records: Sequence[Record], ours: Record | None, cost: Callable[[Record], float], kind: str) -> tuple[str, str]:
    """Quality against a cost, the frontier drawn: wide and narrow; empty where fewer than two records have both numbers."""
    known = [record for record in records if math.isfinite(cost(record)) and math.isfinite(record.score)]
    if len(known) < 2:
        return ("", "")
    front = frontier(known, cost)
    on_front = {id(record) for record in front}

    def place(record: Record) -> float:
        return 1 / cost(record) if kind == "speed" else cost(record)

    def mark(record: Record) -> Mark:
        fast = record.times_faster(32)
        style = {Standing.OURS: "ours", Standing.TEACHER_FP32: "base", Standing.SMALL_DENSE: "small"}.get(
            cast(Standing, record.role), "rival"
        )
        plain = len(known) > 14 and id(record) not in on_front and record is not ours and style == "ours"
        return Mark(
            x=place(record),
            y=record.score,
            label="" if plain else record.name,
            style="chosen" if record is ours else style,
            spread=(fast.low, fast.high) if kind == "speed" and fast else None,
            title=f"{record.name}: {record.metric} {record.score:.4f}, "
            + (f"{place(record):.2f} times the baseline's speed" if kind == "speed" else f"{place(record):.1f} MB"),
        )

    asked = None
    base = next((record for record in known if record.role == Standing.TEACHER_FP32), None)
    if kind == "speed" and ours is not None and ours.target is not None and base is not None and ours.higher_is_better:
        asked = (ours.target.speedup, base.score - ours.target.max_loss / 100)
    label = (
        "times faster than the dense teacher in fp32, batch 32 sorted by length, measured"
        if kind == "speed"
        else "file size, MB"
    )
    marks, line = [mark(record) for record in known], [(place(record), record.score) for record in front]
    metric = records[0].metric.replace("_", " ")
    wide = scatter(marks, line, label, metric, width=760, height=400, asked=asked, more_is_right=kind == "speed")
    narrow = scatter(marks, line, label, metric, width=360, height=340, asked=asked, more_is_right=kind == "speed")
    return (wide, narrow)


def report(run_folders: Sequence[Path], out: Path) -> list[Record]:
    """All records of the run folders (or ledgers) named, and report.html on them in `out`; what `slimformer report` does."""
    ledgers = []
    for folder in map(Path, run_folders):
        found = [folder] if folder.is_file() else sorted(folder.glob(LEDGER)) or sorted(folder.glob(f"*/{LEDGER}"))
        if not found:
            _log.warning("%s holds no %s; skipped.", folder, LEDGER)
        ledgers.extend(found)
    records = read_records(dict.fromkeys(ledgers))
    if not records:
        raise DataError(
            f"no records in {', '.join(map(str, run_folders)) or 'nothing'}.",
            help="name run folders: they hold a ledger.jsonl after `slimformer compress` or `slimformer run`.",
        )
    page(records, Details(command="slimformer report " + " ".join(map(str, run_folders))), Path(out) / "report.html")
    return records
