"""Writes and reads ledgers (a JSON line for each record) and slimformer.json, the facts of an exported folder.

A ledger is only ever added to, a row in one write, so that a run killed at any moment loses one row at most. A torn or foreign
line, and one whose numbers cannot be, is skipped with a warning: no row stops a report on the others.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from slimformer.errors import DataError, ModelError, OutputError, output_errors
from slimformer.files import read_small, write_text
from slimformer.measuring.records import Facts, Record
from slimformer.measuring.timing import Timing
from slimformer.reporting.words import plain, shortened

_log = logging.getLogger(__name__)
FACTS_FILE = "slimformer.json"
FAMILY_FILE = "frontier.json"  # a folder with it holds a family of models
LEDGER = "ledger.jsonl"
_LARGEST = 1 << 32  # bytes of a ledger


def write_facts(folder: Path, facts: Facts) -> None:
    """Writes slimformer.json into an exported folder."""
    write_text(folder / FACTS_FILE, json.dumps(asdict(facts), indent=2, sort_keys=True) + "\n")


def read_facts(folder: Path) -> Facts | None:
    """slimformer.json of a folder, None if there is none; ModelError if it cannot be read."""
    file = folder / FACTS_FILE
    if not os.path.isfile(file):
        return None
    try:
        return cast(Facts, _reader(Facts).validate_python(json.loads(read_small(file))))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {_first_line(error)}", help="copy the whole folder again.") from None


@cache
def _reader(kind: type[Any]) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ", ".join(lines[1:3]) if len(lines) > 1 else (lines or [type(error).__name__])[0]


def append_record(path: Path, record: Record) -> None:
    """Adds a row at the end of a ledger, in one write: if it is killed at any moment, this row at most is lost."""
    line = json.dumps(asdict(record), sort_keys=True).encode() + b"\n"
    with output_errors(path):
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


def read_records(paths: Iterable[Path]) -> list[Record]:
    """The rows of one or more ledgers, in order: those of `read_ledgers`."""
    return [record for rows in read_ledgers(paths).values() for record in rows]


def read_ledgers(paths: Iterable[Path]) -> dict[Path, list[Record]]:
    """The rows of each ledger; a row that stands there twice, or in several ledgers, counts once.

    A torn or foreign line, and one with numbers that cannot be, is skipped with a warning. DataError if a file cannot be read.
    """
    seen: set[bytes] = set()
    records: dict[Path, list[Record]] = {}
    for path in paths:
        rows = records.setdefault(path, [])
        try:
            lines = read_small(Path(path), _LARGEST).split(b"\n")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(
                f"the ledger {path} cannot be read: {reason}.", help="name a run folder or a ledger.jsonl."
            ) from None
        for number, line in enumerate(lines, 1):
            if not line.strip() or line in seen:
                continue
            try:
                rows.append(_record_of(line))
                seen.add(line)
            except (ValueError, ArithmeticError, TypeError, RecursionError) as error:
                reason = shortened(plain(_first_line(error)), 160)
                what = "was cut off while it was written" if number == len(lines) else f"is no record ({reason})"
                _log.warning("%s, line %d %s; skipped.", path, number, what)
    return records


def groups(records: Iterable[Record]) -> dict[tuple[str, str, str, str, str], list[Record]]:
    """The records by what they must share to stand in one table: the teacher's name and weights, task, split and metric."""
    parts: dict[tuple[str, str, str, str, str], list[Record]] = {}
    for record in records:
        key = (record.model, record.teacher, record.task, record.split, record.metric)
        parts.setdefault(key, []).append(record)
    return parts


def several_teachers(records: Iterable[Record]) -> bool:
    """Whether teachers of one name have different weights, so that a name alone would mislead."""
    weights = {(record.model, record.task): {record.teacher} for record in records}
    return any(record.teacher not in weights[record.model, record.task] for record in records)


def by_run(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records by the run that they come from, in order."""
    runs: dict[str, list[Record]] = {}
    for record in records:
        runs.setdefault(record.run, []).append(record)
    return runs


# -- What a row may hold -----------------------------------------------------------------------------------------------------

_RANGES = {"accuracy": (0, 1), "f1": (0, 1), "f1_macro": (0, 1), "exact": (0, 1)} | dict.fromkeys(
    ("matthews", "pearson", "spearman"), (-1, 1)
)
_LARGEST = 2**62  # of any number in a row: beyond it lie mistakes only


def _record_of(line: bytes) -> Record:
    """The record in a line of JSON; ValueError says what of it cannot be."""
    data = json.loads(line)
    json.dumps(data, ensure_ascii=False).encode()  # half a surrogate could not be written to a page
    record = cast(Record, _reader(Record).validate_python(data))
    wrong = next(_mistakes(record), "")
    if wrong:
        raise ValueError(wrong)
    return record


def _mistakes(record: Record) -> Iterator[str]:
    """What cannot be in a record, as far as reports compute with it or show it."""
    if record.metric not in record.scores:
        yield f"no score for its metric '{record.metric}'"
        return
    for name, score in record.scores.items():
        low, high = _RANGES.get(name, (-_LARGEST, _LARGEST))
        if not (low <= score <= high or (name != record.metric and math.isnan(score))):
            yield f"a score of {score:g} in {name}"
    for name, value in _numbers(record):
        if value is not None and not 0 <= value < _LARGEST:
            yield f"{name} is {value:g}"
    try:
        datetime.fromisoformat(record.date)
    except ValueError:
        yield f"no date, but '{record.date}'"
    for interval in (record.loss, *record.versus.values()):
        ends = (interval.value, interval.low, interval.high) if interval else (0.0,)
        if not all(abs(end) < _LARGEST or math.isnan(end) for end in ends) or math.isnan(ends[0]) or ends[1:2] > ends[2:]:
            yield "an interval without a finite value, or with its ends the wrong way round"
    for ratio in (*record.speed.values(), *((record.forecast.speed,) if record.forecast else ())):
        if not 0 < ratio.low <= ratio.median <= ratio.high < _LARGEST:
            yield f"a speed of {ratio.median:g}, from {ratio.low:g} to {ratio.high:g}"
    if any(layer.heads > layer.heads_of or layer.neurons > layer.neurons_of for layer in record.layers):
        yield "a layer that keeps more than it had"
    for timing in record.timings:
        yield from _timing_mistakes(timing)


def _numbers(record: Record) -> Iterator[tuple[str, float | None]]:
    """The numbers of a record that are 0 or above, by name."""
    names = ("examples", "seed", "train_examples", "params", "encoder_params", "encoder_nonzero", "weights_bytes", "size_bytes")
    for name in (*names, "hidden_units", "hidden_units_of", "macs", "minutes", "threads", "peak_rss_bytes"):
        yield name, getattr(record, name)
    yield from (("cores", record.environment.cores), ("memory_bytes", record.environment.memory_bytes))
    if record.target:
        yield from (("the speed asked for", record.target.speedup or -1), ("the loss allowed", record.target.max_loss))
    if record.forecast:
        yield from (("rounds of the trial", record.forecast.rounds), ("loss in the trial", abs(record.forecast.loss)))
    if record.chance is not None:
        yield "chance", abs(record.chance)
    for layer in record.layers:
        yield from ((name, getattr(layer, name)) for name in ("heads", "heads_of", "neurons", "neurons_of"))


def _timing_mistakes(timing: Timing) -> Iterator[str]:
    """What cannot be in the raw times of a workload."""
    sizes, lengths, load = timing.sizes, timing.lengths, timing.load
    if not sizes or not timing.samples_ms or any(len(samples) != len(sizes) for samples in timing.samples_ms):
        yield f"times of '{timing.workload}' that are not one for each of its {len(sizes)} batches"
        return
    samples = np.asarray(timing.samples_ms, dtype=np.float64)  # (rounds, batches)
    if not (np.isfinite(samples).all() and (samples >= 0).all() and (samples.sum(axis=1) > 0).all()):
        yield f"times of '{timing.workload}' that are not above 0"
    numbers = (lengths.mean, lengths.p50, lengths.p95, lengths.max, load.busy_cores, load.waited_seconds)
    counts = (
        timing.examples,
        timing.tokens,
        timing.warmup,
        timing.lead,
        timing.threads - 1,
        timing.batch_size - 1,
        min(sizes) - 1,
        max(sizes),
    )
    if not all(0 <= number < _LARGEST for number in (*numbers, *counts)):
        yield f"a length, load or count of '{timing.workload}' that cannot be"
