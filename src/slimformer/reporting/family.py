"""A family of models of several speeds: what is kept of it in frontier.json, its table at 80 columns, its page with the curve.

Which model is dominated was decided where the family was measured (`running/frontier.py`); here it is told. What a user may pick is
chosen by held examples alone, never by the split that is reported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimformer.errors import ModelError
from slimformer.files import read_small, write_text
from slimformer.measuring.records import Record, Standing
from slimformer.reporting.circumstances import circumstances
from slimformer.reporting.figures import Figure
from slimformer.reporting.ledger import FAMILY_FILE, LEDGER, append_record, read_records
from slimformer.reporting.page import PAGE, rendered
from slimformer.reporting.sections import NONE, cells_of
from slimformer.reporting.svg import Mark, Scatter, draw_scatter
from slimformer.reporting.verdicts import doubts, megabytes, slowness
from slimformer.reporting.verdicts import frontier as best_of
from slimformer.reporting.words import mb_text, plain, points_text, shortened, signed

if TYPE_CHECKING:
    from rich.table import Table

    from slimformer.measuring.latency import Levels


@dataclass(frozen=True)
class HeldResult:
    """What a model's best file did before the final race: points lost on held examples, and times as fast as the dense model at batch 32
    and at batch 1."""

    loss: float
    speed_32: float
    speed_1: float


@dataclass(frozen=True)
class FamilyPoint:
    """One model of a family.

    Attributes:
        name: What it is called: "4x", "uncut", "3-layers".
        row: The name of the row of its best file.
        aim: The speed that it was made for; None if it was made for none.
        megabytes: The size of its file that it was made for; None if it was made for none.
        folder: Where it was delivered, in the folder of the family; "" if it was dropped.
        held: What it did before the final race; choices are made by it.
        size_bytes: Bytes of its best file.
        measured: Times as fast as the dense model at batch 32 in the final bench.
        predicted: The same before it was trained, by the latency table and an untrained model of its budget; None for the uncut model, by
            whose file the table is scaled.
        beaten_by: The row that makes it needless; "" if there is none.
        elsewhere: Whether the table is that of another machine, so that the prediction says nothing of this one.
        measured_1: Like `measured`, at batch 1.
        predicted_1: Like `predicted`, at batch 1; None if the table was not timed for it.
    """

    name: str
    row: str
    aim: float | None
    folder: str
    held: HeldResult
    size_bytes: int
    measured: float | None = None
    predicted: float | None = None
    beaten_by: str = ""
    elsewhere: bool = False
    measured_1: float | None = None
    predicted_1: float | None = None
    megabytes: float | None = None

    @property
    def error(self) -> float | None:
        """How much more time was predicted than measured at batch 32, in percent of what was measured."""
        return self._error(self.predicted, self.measured)

    @property
    def error_1(self) -> float | None:
        """The same at batch 1."""
        return self._error(self.predicted_1, self.measured_1)

    def _error(self, predicted: float | None, measured: float | None) -> float | None:
        if predicted is None or measured is None or self.elsewhere:
            return None
        return 100 * (measured / predicted - 1)


@dataclass(frozen=True)
class ModelFamily:
    """What a run for a family leaves.

    Attributes:
        out: Its folder.
        points: The models, those that were dropped included, from the slowest aim to the fastest.
        notes: Sentences on the speeds that have no model, and on whose they are.
        max_loss: Points that may be lost by what is recommended.
        records: All rows of the bench, the dense model first.
        command: The command that made it.
        levels: The latency table by which budgets were counted.
    """

    out: Path
    points: tuple[FamilyPoint, ...]
    notes: tuple[str, ...] = ()
    max_loss: float = 1.0
    records: tuple[Record, ...] = field(default=(), repr=False)
    command: str = ""
    levels: Levels | None = None

    @property
    def kept(self) -> tuple[FamilyPoint, ...]:
        """The models that nothing makes needless."""
        return tuple(point for point in self.points if not point.beaten_by)

    @property
    def picks(self) -> dict[str, str]:
        """What to take within the loss, by what is wanted: chosen on held examples, among the models that are kept."""
        good = [point for point in self.kept if point.held.loss <= self.max_loss]
        if not good:
            return {}
        return {
            "fastest at batch 32": max(good, key=lambda point: point.held.speed_32).name,
            "fastest at batch 1": max(good, key=lambda point: point.held.speed_1).name,
            "smallest file": min(good, key=lambda point: point.size_bytes).name,
        }

    def record_of(self, point: FamilyPoint) -> Record:
        """The row of a model's best file."""
        return next(record for record in self.records if record.name == point.row)

    def advice(self) -> str:
        """What to take, in a sentence."""
        if not self.kept:
            return "No model of this family is worth its loss: rivals that need no training are as good and as fast."
        if not self.picks:
            least = min(self.kept, key=lambda point: point.held.loss)
            return (
                f"No model loses at most {points_text(self.max_loss)} on held examples; {least.name} loses least, "
                f"{points_text(least.held.loss)}."
            )
        chosen = "; ".join(f"{wish}: {name}" for wish, name in self.picks.items())
        return f"Within {points_text(self.max_loss)} on held examples: {chosen}."

    def dropped(self) -> list[str]:
        """A sentence for each model that was dropped, and what is to be said of speeds."""
        rows = {record.name: record for record in self.records}
        return [*(_why(point, rows) for point in self.points if point.beaten_by), *self.notes]

    def lines(self) -> list[str]:
        """What stands below the table, in lines of a terminal."""
        return [*self.dropped(), *doubts(self.records), self.advice()]


def _why(point: FamilyPoint, rows: Mapping[str, Record]) -> str:
    """Why a model was dropped."""
    own, other = rows[point.row], rows[point.beaten_by]
    better = own.versus[other.name].value if other.name in own.versus else 0.0
    quality = "as good" if abs(better) < 0.05 else f"{points_text(better)} better"
    return f"{point.name} is dropped: {other.name} is {slowness(own) / slowness(other):.2f} times as fast and {quality}."


# -- Files -----------------------------------------------------------------------------------------------------------------------


def write_family(family: ModelFamily) -> None:
    """Fills the family's folder: the ledger, the page, and last frontier.json, which says that all is there."""
    ledger = family.out / LEDGER
    ledger.unlink(missing_ok=True)  # a run that was killed here measures anew
    for record in family.records:
        append_record(ledger, record)
    write_text(family.out / PAGE, family_page(family))
    data = {
        "points": [
            asdict(point)
            | {
                name: None if error is None else round(error, 1)
                for name, error in zip(("error_percent", "error_1_percent"), _errors(point), strict=True)
            }
            | _figures(family, point)
            for point in family.points
        ],
        "picks": family.picks,
        **{name: getattr(family, name) for name in ("notes", "max_loss", "command")},
        "levels": family.levels.to_data() if family.levels else None,
    }
    write_text(family.out / FAMILY_FILE, json.dumps(data, indent=1) + "\n")


def _figures(family: ModelFamily, point: FamilyPoint) -> dict[str, Any]:
    """The measured figures of a model, for a program."""
    record = family.record_of(point)
    speeds = {f"speed_{batch}": asdict(speed) for batch in (32, 1) if (speed := record.times_faster(batch))}
    return {"scores": dict(record.scores), "lost": asdict(record.loss) if record.loss else None, **speeds}


def read_family(out: Path) -> ModelFamily:
    """The family in the folder of a finished run; ModelError if there is none, or if its file cannot be read."""
    from pydantic import TypeAdapter, ValidationError

    from slimformer.measuring.latency import Levels

    try:
        data = json.loads(read_small(out / FAMILY_FILE, 1 << 24))
        points = TypeAdapter(tuple[FamilyPoint, ...]).validate_python(data["points"])
        return ModelFamily(
            out,
            points,
            tuple(map(str, data["notes"])),
            float(data["max_loss"]),
            tuple(read_records([out / LEDGER])),
            str(data["command"]),
            TypeAdapter(Levels | None).validate_python(data["levels"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ValidationError):
        raise ModelError(
            f"{out} holds no family that can be read.", help="name the --out of a `slimformer frontier`."
        ) from None


# -- The terminal ----------------------------------------------------------------------------------------------------------------


def draw_family(family: ModelFamily) -> Table:
    """A rich table of 80 columns: rivals and models, with how far off the times were that had been predicted."""
    from rich.table import Table
    from rich.text import Text

    metric = shortened(family.records[0].metric.replace("_", " "), 9)
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column("model", overflow="fold")
    for head in (metric, "points lost", "MB", "speed\nat 32", "speed\nat 1", "off\nat 32", "off\nat 1"):
        table.add_column(head, justify="right", no_wrap=True, vertical="bottom")
    points = {point.row: point for point in family.points}
    for record in family.records:
        point = points.get(record.name)
        large, single, loss = record.times_faster(32), record.times_faster(1), record.loss
        style = "" if point is None else "dim" if point.beaten_by else "bold"
        table.add_row(
            Text(plain(record.name), style=style),
            f"{record.score:.4f}",
            f"{signed(loss.value)} {signed(loss.low)}..{signed(loss.high)}" if loss else "",
            mb_text(record.size_bytes),
            f"{large.median:.2f}" if large else "",
            f"{single.median:.2f}" if single else "",
            *(percent_text(error, "") for error in _errors(point)),
        )
    return table


def _errors(point: FamilyPoint | None) -> tuple[float | None, float | None]:
    """Of the times at batch 32 and at batch 1."""
    return (None, None) if point is None else (point.error, point.error_1)


def percent_text(error: float | None, none: str) -> str:
    """An error with its sign, in whole percent.

    >>> percent_text(-4.2, ""), percent_text(None, "")
    ('−4 %', '')
    """
    return none if error is None else f"{error:+.0f} %".replace("-", "−")


# -- The page --------------------------------------------------------------------------------------------------------------------


def family_page(family: ModelFamily) -> str:
    """A self-contained page: the curves, the table, the way to each card, and what was dropped."""
    records, points = family.records, {point.row: point for point in family.points}
    first = records[0]
    return rendered(
        "family.html",
        title=" · ".join((first.model, first.task, f"{first.split} split")),
        headline=_headline(family),
        advice=family.advice(),
        doubts=doubts(records),
        dropped=family.dropped(),
        figure=family_figure(family),
        sizes=sizes_figure(family),
        table=levels_figure(family.levels),
        metric=first.metric.replace("_", " "),
        rows=[_row(record, points.get(record.name), first) for record in records],
        circumstances=circumstances(records),
        command=family.command,
        date=max(record.date for record in records)[:10],
        version=records[-1].environment.packages.get("slimformer", ""),
    )


def _headline(family: ModelFamily) -> str:
    speeds = [point.measured for point in family.kept if point.measured is not None]
    count = len(family.kept)
    models = f"{count} model{'s' * (count != 1)} that nothing beats"
    return f"{models}, {min(speeds):.1f} to {max(speeds):.1f} times as fast" if len(speeds) > 1 else models


def _row(record: Record, point: FamilyPoint | None, base: Record) -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
    """Style, link, and the cells before and after the link of one row of the page's table."""
    style = "" if point is None else "beaten" if point.beaten_by else "ours"
    name, _, *figures = cells_of(record)
    speeds = (point.predicted, point.predicted_1) if point else (None, None)
    cells: list[str] = []
    for batch, predicted, error in zip((32, 1), speeds, _errors(point), strict=True):
        cells += (_expected(record, base, batch, predicted), percent_text(error, NONE))
    return style, point.folder if point else "", (name,), (*figures[:5], *cells)


def _expected(record: Record, base: Record, batch: int, predicted: float | None) -> str:
    """Milliseconds of a text at a batch size, by a predicted speed and as measured, both over the dense model's time."""
    dense, speed = base.timing_at(batch), record.times_faster(batch)
    if not dense or not predicted or not speed:
        return NONE
    times = (dense.p50_ms / faster for faster in (predicted, speed.median))
    return " / ".join(f"{ms:.3g}" if ms >= 1 else f"{ms:.2g}" for ms in times)


def family_figure(family: ModelFamily) -> Figure:
    """Quality with its interval against measured speed at batch 32; a click on a model leads to its own page."""
    points = {point.row: point for point in family.points}
    known = [record for record in family.records if record.times_faster(32) is not None]
    if len(known) < 2:
        return ("", "")
    scatter = Scatter(
        marks=[_mark(record, points.get(record.name), known[0]) for record in known],
        front=[(1 / slowness(record), record.score) for record in best_of(known, slowness)],
        x_label="times faster than the dense teacher in fp32, batch 32 sorted by length, measured",
        y_label=known[0].metric.replace("_", " "),
        more_is_right=True,
    )
    return (draw_scatter(scatter, width=760, height=420), draw_scatter(scatter, width=360, height=360))


def sizes_figure(family: ModelFamily) -> Figure:
    """Quality with its interval against the bytes of the file, without what was dropped and the dense model, which is far off."""
    points = {point.row: point for point in family.points}
    dropped = {point.row for point in family.points if point.beaten_by}
    base, *others = family.records
    known = [record for record in others if record.times_faster(32) and record.size_bytes and record.name not in dropped]
    if len(known) < 2:
        return ("", "")
    scatter = Scatter(
        marks=[replace(_mark(record, points.get(record.name), base), x=megabytes(record), spread=None) for record in known],
        front=[(megabytes(record), record.score) for record in best_of(known, megabytes)],
        x_label="megabytes of the file",
        y_label=base.metric.replace("_", " "),
        more_is_right=False,
    )
    return (draw_scatter(scatter, width=760, height=320), draw_scatter(scatter, width=360, height=320))


def levels_figure(levels: Levels | None) -> tuple[Figure, ...]:
    """A picture for each group of sublayers that the latency table was timed for: milliseconds against the units that are left."""
    tables = [(32, levels), (1, levels.single)] if levels else []
    groups = [(batch, *group) for batch, table in tables if table for group in replace(table, single=None).to_data().items()]
    return tuple(_timed(name, times, batch) for batch, name, times in groups if isinstance(times, Mapping))


def _timed(name: str, times: Mapping[int, float], batch: int) -> Figure:
    what = name.replace("_", " ")
    points = [(0.0, 0.0), *((float(units), ms) for units, ms in sorted(times.items()))]
    marks = [Mark(units, ms, f"{ms:.3g}", "ours", f"{units:.0f} {what}: {ms:.4g} ms") for units, ms in points[1:]]
    scatter = Scatter(
        marks=[Mark(0.0, 0.0, "", "ours", f"no {what}: the sublayer is gone"), *marks],
        front=points,
        x_label=f"{what} that are left in a sublayer",
        y_label=f"ms of a text, batch {batch}, int8",
        more_is_right=True,
        joined=True,
    )
    return (draw_scatter(scatter, width=520, height=240), draw_scatter(scatter, width=360, height=240))


_STYLES: Mapping[str, str] = {Standing.TEACHER_FP32: "base", Standing.SMALL_DENSE: "small"}


def _mark(record: Record, point: FamilyPoint | None, base: Record) -> Mark:
    speed, loss = record.times_faster(32), record.loss
    assert speed is not None
    ours = "beaten" if point and point.beaten_by else "chosen"
    ends = sorted(base.quality - end / 100 for end in (loss.low, loss.high)) if loss else []
    rise = tuple(end if record.higher_is_better else -end for end in ends)
    figures = f"{record.metric} {record.score:.4f}, {speed.median:.2f} times the baseline's speed"
    return Mark(
        x=speed.median,
        y=record.score,
        label=record.name,
        style=_STYLES.get(record.role, "rival" if point is None else ours),
        title=f"{record.name}: {figures}{'; dropped' if point and point.beaten_by else ''}",
        spread=(speed.low, speed.high),
        rise=(min(rise), max(rise)) if rise else None,
        link=f"{point.folder}/{PAGE}" if point and point.folder else "",
    )
