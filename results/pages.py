"""The common part of the drawn pages: a run, as read from its ledger, and the pieces of Markdown that all pages share."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from slimformer.measuring.records import Record, Standing
from slimformer.reporting.ledger import LEDGER, groups, read_records
from slimformer.reporting.verdicts import choice
from slimformer.reporting.words import interval_text, signed

HOME = Path(__file__).resolve().parent
METHODS = "methods"  # the folder of the tables that compare methods


@dataclass(frozen=True)
class Run:
    """One ledger, and the rows in it that are of one teacher, task, split and metric."""

    folder: Path  # relative to results/
    records: tuple[Record, ...]

    @property
    def name(self) -> str:
        return self.folder.as_posix()

    @property
    def claim(self) -> str:
        """The name without its seed: runs that share it repeat each other with other seeds."""
        return re.sub(r"-seed\d+$", "", self.name)

    @property
    def ours(self) -> Record | None:
        """The file that ships."""
        return choice([record for record in self.records if record.role == Standing.OURS])


def runs_of(folder: Path, home: Path = HOME) -> list[Run]:
    """All runs under a folder, by name; of rows with one name the last counts, since a ledger is only ever added to."""
    found = []
    for ledger in sorted(folder.rglob(LEDGER)):
        for part in groups(read_records([ledger])).values():
            last = {record.name: record for record in part}
            found.append(Run(ledger.parent.relative_to(home), tuple(last.values())))
    return found


# -- Parts of pages ----------------------------------------------------------------------------------------------------------


def spread(part: Sequence[Run], pick: Callable[[Run], Record | None] = lambda run: run.ours) -> list[str]:
    """Mean and range over seeds, for claims that were run with more than one; of the file that ships, or of another."""
    rows = []
    for claim in dict.fromkeys(run.claim for run in part):
        ours = [pick(run) for run in part if run.claim == claim]
        chosen = [record for record in ours if record is not None]
        if len({record.seed for record in chosen}) < 2:
            continue
        speeds: Mapping[int, list[float]] = {
            batch: [ratio.median for record in chosen if (ratio := record.times_faster(batch))] for batch in (32, 1)
        }
        rows.append(
            (
                re.sub(rf"^{METHODS}/\w+/[^/]+/", "", claim),
                ", ".join(str(record.seed) for record in chosen),
                _range([record.score for record in chosen], "{:.4f}"),
                _range([record.loss.value for record in chosen if record.loss], "{:+.1f}"),
                _range(speeds[32], "{:.2f}"),
                _range(speeds[1], "{:.2f}"),
            )
        )
    if not rows:
        return []
    head = ("run", "seeds", "score: mean (range)", "points lost", "× batch 32", "× batch 1")
    return ["### Over seeds", "", *table(head, rows), ""]


def _range(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    return f"{form.format(fmean(values))} ({form.format(min(values))} to {form.format(max(values))})".replace("-", "−")


def interval(record: Record) -> str:
    """Points lost, with their interval."""
    return f"{signed(record.loss.value)} ({interval_text(record.loss)})" if record.loss else ""


def turns(found: Iterable[Run], up: str = "../") -> tuple[str, ...]:
    """What has to be said of the times at batch 1 if rows were timed before each turn began with a text that is not timed."""
    leads = {run.name: {timing.lead for record in run.records for timing in record.timings} for run in found}
    before = sorted(name for name, seen in leads.items() if 0 in seen)
    if not before:
        return ()
    since = sorted(name for name, seen in leads.items() if seen and 0 not in seen)
    apart = ", ".join(f"`{Path(name).name}`" for name in since)
    return (
        f"**× batch 1**{f' of all rows but {apart}' if apart else ''} was timed right behind another file, whose weights had taken the "
        "place of its own in the processor's caches. Alone in a process, a small file is up to twice as fast "
        f"([decision 46]({up}decisions/0046-turns.md)).",
    )


def row_times(record: Record, batch: int) -> str:
    """Times faster than the baseline, with the spread over rounds."""
    found = record.times_faster(batch)
    if found is None:
        return ""
    return f"{found.median:.2f}" if found.low == found.high else f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"


def wrapped(text: str, width: int = 126) -> list[str]:
    """A paragraph as lines of at most `width` characters; code and links are not torn."""
    whole = re.sub(r"`[^`]*`|\[[^\]]*\]\([^)]*\)|\d %", lambda part: part[0].replace(" ", "\0"), text)
    lines = textwrap.wrap(whole, width, break_on_hyphens=False, break_long_words=False)
    return [line.replace("\0", " ") for line in lines]


def bullets(texts: Iterable[str]) -> list[str]:
    """A Markdown list, its lines wrapped."""
    return [f"{'  ' if number else '- '}{line}" for text in texts for number, line in enumerate(wrapped(text, 124))]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def safe(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", " ".join(text.split()))
