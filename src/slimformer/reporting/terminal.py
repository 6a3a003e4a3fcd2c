"""Draws the table of a comparison for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slimformer.measuring.records import Record
from slimformer.reporting.ledger import groups
from slimformer.reporting.words import mb_text, shortened, signed

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def _row(record: Record) -> tuple[str | Text, ...]:
    from rich.text import Text

    large, single = record.times_faster(32), record.times_faster(1)
    times = [timing.p50_ms for timing in record.timings if timing.batch_size > 1]
    loss = record.loss
    return (
        Text(record.name, style="bold" if record.chosen else ""),
        f"{record.score:.4f}",
        f"{signed(loss.value)} {signed(loss.low)}..{signed(loss.high)}" if loss else "",
        mb_text(record.size_bytes),
        f"{large.median:.2f}" if large else "",
        f"{single.median:.2f}" if single else "",
        f"{times[0]:.2f}" if times else "",
    )


def table(records: Sequence[Record], title: str = "") -> Table:
    """A table for a terminal of 80 columns: quality, size and measured speed of each record. Theory stays out of it."""
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    parts = groups(records)
    metric = records[0].metric if len(parts) == 1 else "score"
    made = Table(
        title=escape(title) or None, title_justify="left", box=None, pad_edge=False, padding=(0, 1), header_style="bold"
    )
    made.add_column("model", overflow="fold")  # the one column that may wrap, so that no figure is cut off
    for head in (shortened(metric.replace("_", " "), 9), "points lost", "MB", "speed\nbatch 32", "speed\nbatch 1", "ms"):
        made.add_column(head, justify="right", no_wrap=True, vertical="bottom")
    for (model, task, _, group_metric), group in parts.items():
        if len(parts) > 1:
            made.add_row(Text(f"{model}, {task}: {group_metric}", style="underline"))
        for record in group:
            made.add_row(*_row(record))
    timed = [record for record in records if record.timings]
    if timed:
        first = timed[0].timings[0]
        made.caption_justify = "left"
        made.caption = escape(
            f"speed: times faster than {timed[0].baseline}, median of {first.rounds} rounds taken in turn; ms: p50 per example "
            f"at the larger batch; {first.threads} threads; points lost: with 95 % interval."
        )
    return made
