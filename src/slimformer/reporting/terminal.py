"""Draws tables for a terminal of 80 columns: a comparison, and what could be cut in a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slimformer.measuring.records import Record
from slimformer.reporting.inspection import Inspection
from slimformer.reporting.ledger import by_run, groups, several_teachers
from slimformer.reporting.words import mb_text, plain, shortened, signed

if TYPE_CHECKING:
    from rich.table import Table


def draw_table(records: Sequence[Record], title: str = "") -> Table:
    """A rich table with quality, size and measured speed of each record. Theory stays out of it."""
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    parts, twins = groups(records), several_teachers(records)
    metric = records[0].metric if len(parts) == 1 else "score"
    table = Table(
        title=escape(title) or None, title_justify="left", box=None, pad_edge=False, padding=(0, 1), header_style="bold"
    )
    folders = {record.name.rpartition("/")[0] for record in records}
    folder = f"{folders.pop()}/" if len(folders) == 1 and folders != {""} else ""  # said once: a long name wraps at 80 columns
    # No other column may wrap: no figure is cut off.
    table.add_column(f"model in {plain(folder)}" if folder else "model", overflow="fold")
    for head in (shortened(metric.replace("_", " "), 9), "points lost", "MB", "speed\nbatch 32", "speed\nbatch 1", "ms"):
        table.add_column(head, justify="right", no_wrap=True, vertical="bottom")
    several = sum(len(by_run(part)) for part in parts.values()) > 1
    for (model, weights, task, _, part_metric), part in parts.items():
        if len(parts) > 1:
            table.add_row(Text(plain(f"{model}{f' ({weights})' * twins}, {task}: {part_metric}"), style="underline"))
        runs = by_run(part)
        for run, rows in runs.items():
            if several and run:
                table.add_row(Text(f"{plain(run)}:", style="italic"))
            for record in rows:
                name = Text(plain(record.name.removeprefix(folder)), style="bold" if record.chosen else "")
                table.add_row(name, *_cells(record))
    timed = [record for record in records if record.timings]
    if timed:
        rounds = sorted({timing.rounds for record in timed for timing in record.timings})
        count = " to ".join(map(str, dict.fromkeys((rounds[0], rounds[-1]))))
        table.caption_justify = "left"
        counts = sorted({timing.threads for record in timed for timing in record.timings})
        threads, baseline = " or ".join(map(str, counts)), timed[0].baseline.removeprefix(folder)
        table.caption = escape(
            f"speed: times faster than {baseline}, median of {count} rounds taken in turn; ms: p50 per example at the "
            f"larger batch; {threads} thread{'s' * (counts[-1] != 1)}; points lost: with 95 % interval."
        )
    return table


def _cells(record: Record) -> tuple[str, ...]:
    """All but the name."""
    large, single = record.times_faster(32), record.times_faster(1)
    timing = record.timing_at(32)
    loss = record.loss
    return (
        f"{record.score:.4f}",
        f"{signed(loss.value)} {signed(loss.low)}..{signed(loss.high)}" if loss else "",
        mb_text(record.size_bytes),
        f"{large.median:.2f}" if large else "",
        f"{single.median:.2f}" if single else "",
        f"{timing.p50_ms:.2f}" if timing else "",
    )


def draw_inspection(found: Inspection) -> Table:
    """A rich table with a row for each layer of an inspected model."""
    from rich.markup import escape
    from rich.table import Table

    written = "" if found.beams is None else f", and as many written on {found.beams} beam{'s' * (found.beams > 1)}"
    notes = [
        f"MACs of one example of {found.length} tokens{written}. A plan names what it cuts: encoder.0.heads, encoder.0.ffn."
    ]
    if found.sites_cut:
        notes.append(f"{found.sites_cut} sites are cut already.")
    if found.matrices_factored:
        notes.append(f"{found.matrices_factored} matrices are factored: no unit can be cut there.")
    if found.words:
        notes.append(f"Words that go on, layer by layer: {', '.join(f'{100 * share:.0f} %' for share in found.words)}.")
    if found.exits:
        notes.append(f"Inputs may leave after {', '.join(map(str, found.exits))} layers.")
    if found.apart:
        notes.append(f"In the first {found.apart} layers, the two segments of an input attend apart.")
    if found.patterns:
        told = "; ".join(f"layer {layer}: {rules}" for layer, rules in found.patterns)
        notes.append(f"Heads that attend by a pattern, the rest as they learned: {told}.")
    title = escape(f"{found.name}: {found.model_class}, {found.model_parameters:,} parameters")
    table = Table(title=title, caption=" ".join(notes))
    for head in ("layer", "heads", "neurons", "parameters", "MACs", "share of MACs"):
        table.add_column(head, justify="right")
    for layer in found.layers:
        share = f"{layer.macs / found.macs:.1%}" if found.macs else ""
        units = (str(count) if count is not None else "none" for count in (layer.heads, layer.neurons))
        table.add_row(layer.name, *units, f"{layer.parameters:,.0f}", f"{layer.macs / 1e6:,.1f} M", share)
    table.add_section()
    table.add_row("all else", "", "", f"{found.other_parameters:,.0f}", "", "")
    table.add_row("total", "", "", f"{found.parameters:,.0f}", f"{found.macs / 1e6:,.1f} M", "")
    return table
