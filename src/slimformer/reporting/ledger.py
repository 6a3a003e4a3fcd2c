"""Says what a compression lost and gained: ledger rows, the frontier over them, a table, a page and a model card.

The one idea: a number is only shown with its circumstances, so everything is drawn from `Record`s, one JSON line each, and
whether ours beats the rivals is computed, not claimed. Nothing here measures (`bench.py`); `page.py`
and `card.py` write what is decided here for people.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from slimformer.errors import DataError, ModelError, OutputError
from slimformer.measuring.machine import Environment
from slimformer.running.bench import SINGLE, SORTED, Ratio, Timing
from slimformer.saving.files import speaking, write_text

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from slimformer.core.anatomy import Anatomy
    from slimformer.core.plan import Plan
    from slimformer.running.bench import Measurement
    from slimformer.tasks.base import Example

log = logging.getLogger(__name__)

FACTS = "slimformer.json"
LEDGER = "ledger.jsonl"
MEGA = 1e6  # bytes in the MB that is shown


class Role(StrEnum):
    """What a row stands for in a comparison."""

    TEACHER_FP32 = "teacher-fp32"  # the baseline of every ratio
    TEACHER_INT8 = "teacher-int8"
    OPENVINO_INT8 = "openvino-int8"
    SMALL_DENSE = "small-dense"
    TEACHER_TORCH = "teacher-torch"
    OURS = "ours"
    OTHER = "other"


RIVALS = {
    Role.TEACHER_INT8: "the teacher in ONNX Runtime dynamic int8",
    Role.OPENVINO_INT8: "the teacher in OpenVINO int8",
    Role.SMALL_DENSE: "a smaller dense model distilled with the same budget",
}


@dataclass(frozen=True)
class Interval:
    """A difference with the bounds that hold 95 % of its resamples."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Layer:
    """What is left of one layer; zero heads or neurons: that sublayer is gone."""

    name: str
    heads: int
    heads_of: int
    neurons: int
    neurons_of: int


@dataclass(frozen=True)
class Target:
    """What was asked for: times faster at batch 32, and points of the metric that may be lost."""

    speedup: float
    max_loss: float


@dataclass(frozen=True)
class Record:
    """One model in one file on one runtime, measured once: a row of the ledger. None where a number is not known."""

    name: str
    role: str
    model: str  # the teacher, by name
    task: str
    split: str
    metric: str
    scores: Mapping[str, float]
    date: str
    environment: Environment
    precision: str = ""
    file: str = ""
    higher_is_better: bool = True
    examples: int = 0  # scored
    loss: Interval | None = None  # points of the metric below the baseline; negative: better than it
    versus: Mapping[str, Interval] = field(default_factory=dict)  # points below each rival, by its name
    chosen: bool = False  # the file that ships, picked on examples held aside
    target: Target | None = None
    seed: int | None = None
    train_examples: int | None = None
    params: int | None = None
    encoder_params: int | None = None  # weights of the encoder's Linear layers, embeddings left out
    encoder_nonzero: int | None = None  # of them, those that are not exactly 0
    weights_bytes: int | None = None  # of all tensors as model.safetensors holds them, zeros left out where there are many
    size_bytes: int | None = None
    macs: int | None = None  # per average example, encoder only: theory, never to be read as speed
    layers: tuple[Layer, ...] = ()
    timings: tuple[Timing, ...] = ()
    baseline: str = ""  # name of the row that the speeds compare with, of the same run
    speed: Mapping[str, Ratio] = field(default_factory=dict)  # workload -> times faster than the baseline
    minutes: float | None = None
    threads: int | None = None  # that it was made with in those minutes; timings say theirs
    peak_rss_bytes: int | None = None
    recipe: str = ""
    plan: str = ""
    notes: tuple[str, ...] = ()

    @property
    def score(self) -> float:
        """The task's own metric."""
        return self.scores[self.metric]

    @property
    def quality(self) -> float:
        """The score turned so that more is better."""
        return self.score if self.higher_is_better else -self.score

    def times_faster(self, batch: int = 32) -> Ratio | None:
        """Speed over the baseline at batch 1 or at the larger batch; None where it was not timed."""
        for timing in self.timings:
            if (timing.batch_size == 1) == (batch == 1):
                return self.speed.get(timing.workload)
        return self.speed.get(SINGLE if batch == 1 else SORTED)


@dataclass(frozen=True)
class Facts:
    """slimformer.json of an exported folder: what the files do not say themselves."""

    best: str  # file name
    task: Mapping[str, Any]  # as in a recipe
    max_length: int
    metric: str
    name: str = ""
    model: str = ""
    params: int | None = None
    encoder_params: int | None = None
    encoder_nonzero: int | None = None
    weights_bytes: int | None = None
    macs: int | None = None
    seed: int | None = None
    train_examples: int | None = None
    minutes: float | None = None
    threads: int | None = None
    peak_rss_bytes: int | None = None
    layers: tuple[Layer, ...] = ()
    recipe: str = ""
    plan: str = ""
    fitted: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # file name -> options of the task found for it

    def of_record(self) -> dict[str, Any]:
        """The fields that a record of any of these files shares."""
        sizes = ("params", "encoder_params", "encoder_nonzero", "weights_bytes", "macs")
        making = ("seed", "train_examples", "minutes", "threads", "peak_rss_bytes")
        return {name: getattr(self, name) for name in (*sizes, *making, "layers", "recipe", "plan")}


def today() -> str:
    """Now, in UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0).isoformat()


def write_facts(folder: Path, facts: Facts) -> None:
    """Writes slimformer.json into an exported folder."""
    write_text(folder / FACTS, json.dumps(asdict(facts), indent=2, sort_keys=True) + "\n")


def read_facts(folder: Path) -> Facts | None:
    """slimformer.json of a folder, None where there is none; ModelError where it cannot be read."""
    file = folder / FACTS
    if not file.is_file():
        return None
    try:
        return cast(Facts, _reader(Facts).validate_python(json.loads(file.read_text(encoding="utf-8"))))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {_first_line(error)}", help="copy the whole folder again.") from None


def layers(anatomy: Anatomy, plan: Plan) -> tuple[Layer, ...]:
    """What `plan` leaves of each layer of the dense `anatomy`."""
    from slimformer.core.anatomy import Kind

    found = []
    for number in range(len(anatomy.layers)):
        kept = {Kind.HEADS: (0, 0), Kind.NEURONS: (0, 0)}
        for site in anatomy.sites.values():
            if site.layer == number and site.kind in kept:
                gone = site.sublayer is not None and plan.keep.get(site.sublayer) == ()
                kept[site.kind] = (0 if gone else len(plan.keep.get(site.id, range(site.size))), site.size)
        found.append(Layer(str(number), *kept[Kind.HEADS], *kept[Kind.NEURONS]))
    return tuple(found)


# -- The ledger --------------------------------------------------------------------------------------------------------------


@cache
def _reader(kind: type[Any]) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ", ".join(lines[1:3]) if len(lines) > 1 else (lines or [type(error).__name__])[0]


def append(path: Path, record: Record) -> None:
    """Adds a row at the end of a ledger, in one write: killed at any moment, it loses this row at most."""
    line = json.dumps(asdict(record), sort_keys=True).encode() + b"\n"
    with speaking(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            end = os.fstat(handle).st_size
            # A row torn by an earlier kill must not swallow this one.
            torn = end > 0 and os.pread(handle, 1, end - 1) != b"\n"
            data = b"\n" + line if torn else line
            if os.write(handle, data) != len(data):
                raise OutputError(f"cannot write all of a row to {path}: the disk is full.", help="free some space.")
            os.fsync(handle)
        finally:
            os.close(handle)


def read(paths: Iterable[Path]) -> list[Record]:
    """The rows of one or more ledgers, in order; a torn or foreign line is skipped with a warning. DataError without a file."""
    records = []
    for path in paths:
        try:
            lines = Path(path).read_bytes().split(b"\n")
        except OSError as error:
            raise DataError(
                f"the ledger {path} cannot be read: {error.strerror}.", help="name a run folder or a ledger.jsonl."
            ) from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = _reader(Record).validate_python(json.loads(line))
                if record.metric not in record.scores:
                    raise ValueError(f"no score for its metric '{record.metric}'")
                records.append(record)
            except (ValueError, RecursionError) as error:
                what = "was cut off while it was written" if number == len(lines) else f"is no record ({_first_line(error)})"
                log.warning("%s, line %d %s; skipped.", path, number, what)
    return records


# -- Judging -----------------------------------------------------------------------------------------------------------------


def bootstrap(credit_a: np.ndarray, credit_b: np.ndarray, seed: int, rounds: int = 10_000) -> tuple[float, float, float]:
    """Mean of `credit_a - credit_b` and the 2.5 and 97.5 percentiles of its paired bootstrap (Efron 1979).

    Credits are per example, on the same examples in the same order: (examples,).
    """
    a, b = np.asarray(credit_a, dtype=np.float64), np.asarray(credit_b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"credits of the same examples are needed, got {a.shape} and {b.shape}")
    difference = a - b  # (examples,)
    draw = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // len(difference))  # bounds memory at 16 MB of indices
    means = np.concatenate(
        [
            difference[draw.integers(0, len(difference), (min(chunk, rounds - start), len(difference)))].mean(axis=1)
            for start in range(0, rounds, chunk)
        ]
    )  # (rounds,)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def frontier(records: Iterable[Record], cost: Callable[[Record], float]) -> list[Record]:
    """The records that no other beats: none is as good at no more cost, and better or cheaper. Cheapest first.

    Equal ones all stay; records without a finite cost or quality are left out.
    """
    known = [item for item in records if math.isfinite(cost(item)) and math.isfinite(item.quality)]
    known.sort(key=lambda item: (cost(item), -item.quality))
    front: list[Record] = []
    best, best_cost = -math.inf, math.inf
    for item in known:
        if item.quality > best or (item.quality == best and cost(item) == best_cost):
            front.append(item)
            best, best_cost = item.quality, cost(item)
    return front


def slowness(record: Record) -> float:
    """Time relative to the baseline at batch 32: a cost for `frontier`; infinite where it was not timed."""
    found = record.times_faster(32)
    return 1 / found.median if found else math.inf


def megabytes(record: Record) -> float:
    """Size in MB: a cost for `frontier`; infinite where it is not known."""
    return math.inf if record.size_bytes is None else record.size_bytes / MEGA


@dataclass(frozen=True)
class Verdict:
    """One sentence on how a record stands, and whether it is good news (None: neither)."""

    good: bool | None
    text: str
    measured: bool = True  # False: there is nothing to judge by


def choice(records: Sequence[Record]) -> Record | None:
    """Our record that speaks for a group: the chosen file, the latest where there are several; else the last of ours."""
    ours = [record for record in records if record.role == Role.OURS]
    chosen = [record for record in ours if record.chosen] or ours
    return max(chosen, key=lambda record: record.date) if chosen else None


def judge(record: Record) -> Verdict:
    """Whether a record meets its target, and by how much it does or does not.

    A bound on the loss counts as kept where the interval of the loss reaches it, and the sentence says when only that holds.
    """
    name, loss, fast = record.metric.replace("_", " "), record.loss, record.times_faster(32)
    if loss is None or fast is None:
        return Verdict(None, f"{record.name} was not measured against the dense teacher.", measured=False)
    if record.target is None:
        return Verdict(
            None, f"{times_text(fast.median)} as fast at batch 32, {points_text(loss.value)} of {name} {lost_text(loss.value)}."
        )
    target = record.target
    parts = []
    fast_enough = fast.median >= target.speedup
    parts.append(
        f"{fast.median:.2f} times as fast at batch 32 where {target.speedup:g} was asked"
        + ("" if fast_enough else f", {100 * (1 - fast.median / target.speedup):.0f} % short")
    )
    clearly, within = loss.value <= target.max_loss, loss.low <= target.max_loss
    said = f"{points_text(loss.value)} of {name} {lost_text(loss.value)} where at most {target.max_loss:g} was asked"
    if within and not clearly:
        said += f"; the 95 % interval ({interval_text(loss)}) reaches the bar: within the noise of {record.examples} examples"
    elif not within:
        said += f", {points_text(loss.value - target.max_loss)} too many (95 % interval {interval_text(loss)})"
    parts.append(said)
    met = fast_enough and within
    return Verdict(met, ("Target met: " if met else "Target not met: ") + "; ".join(parts) + ".")


def against(ours: Record, records: Sequence[Record]) -> list[Verdict]:
    """How ours stands against each kind of rival at equal quality, in words; a rival that was not measured is named too.

    Qualities count as equal where the 95 % interval of their paired difference holds zero.
    """
    verdicts = []
    for role, words in RIVALS.items():
        rivals = [record for record in records if record.role == role]
        if not rivals:
            verdicts.append(Verdict(None, f"Not measured: {words}.", measured=False))
        verdicts.extend(_duel(ours, rival, words) for rival in rivals)
    return verdicts


def _duel(ours: Record, rival: Record, words: str) -> Verdict:
    mine, other = ours.times_faster(32), rival.times_faster(32)
    who = f"{words} ({rival.name})"
    if mine is None or other is None or ours.baseline != rival.baseline:
        return Verdict(None, f"Not timed in the same run: {who}.", measured=False)
    speed = mine.median / other.median
    apart = mine.low > other.high or other.low > mine.high
    versus = ours.versus.get(rival.name)
    points = 100 * (rival.quality - ours.quality)  # above zero: ours is worse
    equal = versus.low <= 0 <= versus.high if versus else points == 0
    interval = f" (95 %: {_told(versus.low)} to {_told(versus.high)})" if versus else " (no interval: not paired by example)"
    quality = f"{points_text(points)} {'worse' if points > 0 else 'better'}{interval}" if points else f"as good{interval}"
    if equal and points:
        quality += ", equal within the noise"
    pace = f"{speed:.2f}x its speed" + ("" if apart else ", too close to call")
    if speed > 1 and apart and (equal or points <= 0):
        return Verdict(True, f"Beats {who}: {pace}, {quality}.")
    if points < 0 and not equal and (speed >= 1 or not apart):
        return Verdict(True, f"Beats {who}: {quality}, {pace}.")
    if speed > 1 and apart:
        return Verdict(False, f"Does not beat {who} at equal quality: {pace}, but {quality}.")
    if points < 0 and not equal:
        return Verdict(None, f"Neither beats the other: against {who} ours is {quality}, at {pace}.")
    return Verdict(False, f"Does not beat {who}: {pace}, {quality}.")


def _told(points: float) -> str:
    return f"{abs(points):.1f} {'worse' if points > 0 else 'better'}"


def tally(verdicts: Sequence[Verdict]) -> str:
    """How many of the rivals that were measured ours beats, in a sentence; empty where none was."""
    judged = [verdict for verdict in verdicts if verdict.measured]
    won = sum(verdict.good is True for verdict in judged)
    if not judged:
        return ""
    return f"At equal quality it beats {won} of the {len(judged)} rivals measured."


@dataclass(frozen=True)
class Changed:
    """An example that two models answer differently. `gain` is the new answer's credit minus the old one's."""

    id: str
    texts: tuple[str, ...]
    gold: str
    before: str
    after: str
    gain: float


def changed(measurement: Measurement, examples: Sequence[Example], before: str, after: str) -> tuple[Changed, ...]:
    """The examples that entries `before` and `after` answer differently, the largest losses first, then the largest gains."""
    gains = measurement.credits[after] - measurement.credits[before]
    found = [
        Changed(example.id, tuple(example.texts), "" if example.answer is None else str(example.answer), old, new, float(gain))
        for example, old, new, gain in zip(
            examples, measurement.answers[before], measurement.answers[after], gains, strict=True
        )
        if old != new
    ]
    return tuple(sorted(found, key=lambda item: (item.gain >= 0, -abs(item.gain))))


# -- Words and numbers -------------------------------------------------------------------------------------------------------


def times_text(value: float) -> str:
    return f"{value:.1f} times" if value < 10 else f"{value:.0f} times"


def points_text(value: float) -> str:
    text = f"{abs(value):.1f}"
    return f"{text} point" if text == "1.0" else f"{text} points"


def lost_text(value: float) -> str:
    return "lost" if value >= 0 else "gained"


def interval_text(interval: Interval) -> str:
    return f"{signed(interval.low)} to {signed(interval.high)}"


def signed(value: float) -> str:
    return "0.0" if abs(value) < 0.05 else f"{value:+.1f}".replace("-", "−")


def mb_text(size: int | None) -> str:
    return "" if size is None else f"{size / MEGA:.1f}"


def count_text(value: int | None) -> str:
    if value is None:
        return ""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return str(value)


def shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def layers_text(record: Record) -> str:
    """What is kept of a record's layers, in a sentence or two; empty where that is not known."""
    if not record.layers:
        return ""
    heads, heads_of = sum(layer.heads for layer in record.layers), sum(layer.heads_of for layer in record.layers)
    neurons, neurons_of = sum(layer.neurons for layer in record.layers), sum(layer.neurons_of for layer in record.layers)
    gone = sum((layer.heads == 0) + (layer.neurons == 0) for layer in record.layers)
    whole_gone = f" {gone} of {2 * len(record.layers)} sublayers are gone altogether." if gone else ""
    return f"{heads} of {heads_of} heads and {neurons:,} of {neurons_of:,} FFN neurons are kept.{whole_gone}"


def groups(records: Iterable[Record]) -> dict[tuple[str, str, str, str], list[Record]]:
    """Records that may stand in one table: same teacher, task, split and metric."""
    found: dict[tuple[str, str, str, str], list[Record]] = {}
    for record in records:
        found.setdefault((record.model, record.task, record.split, record.metric), []).append(record)
    return found


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


def report(run_folders: Sequence[Path], out: Path) -> list[Record]:
    """All records of the run folders (or ledgers) named, and report.html on them in `out`; what `slimformer report` does."""
    from slimformer.reporting.page import Details, page

    ledgers = []
    for folder in map(Path, run_folders):
        found = [folder] if folder.is_file() else sorted(folder.glob(LEDGER)) or sorted(folder.glob(f"*/{LEDGER}"))
        if not found:
            log.warning("%s holds no %s; skipped.", folder, LEDGER)
        ledgers.extend(found)
    records = read(dict.fromkeys(ledgers))
    if not records:
        raise DataError(
            f"no records in {', '.join(map(str, run_folders)) or 'nothing'}.",
            help="name run folders: they hold a ledger.jsonl after `slimformer compress` or `slimformer run`.",
        )
    page(records, Details(command="slimformer report " + " ".join(map(str, run_folders))), Path(out) / "report.html")
    return records
