"""`slimformer verify` answers for a pipeline whether a small model is still good enough: yes or no, with the figures.

It is `bench` with a question. The answer is that of the measured values; whether their intervals say the same stands beside it, and
`sure` demands that they do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimformer.errors import RecipeError
from slimformer.measuring.records import Record
from slimformer.reporting.verdicts import Conclusion, doubts, likely, reached, rounds_of, within
from slimformer.reporting.words import MEGABYTE
from slimformer.running.bench import bench
from slimformer.tasks.base import Task

VERDICT_VERSION = 1
_WORDS = {Conclusion.YES: "yes", Conclusion.NO: "no", Conclusion.OPEN: "too close to call"}


@dataclass(frozen=True)
class Check:
    """One question: a bound, what was measured, and the bounds of its interval. `sure` is what the interval alone would answer."""

    what: str
    asked: float
    measured: float
    low: float
    high: float
    met: bool
    sure: Conclusion


@dataclass(frozen=True)
class Verification:
    """The answers, and the rows that they were taken from: the model to compare with first.

    Attributes:
        met: Whether every check is met; with `sure`, whether every interval says so.
        checks: The questions that were asked.
        records: The rows of the comparison.
        doubts: What makes the figures less sure, such as other work on the machine.
    """

    met: bool
    checks: tuple[Check, ...]
    records: tuple[Record, ...]
    doubts: tuple[str, ...] = ()

    def as_json(self) -> str:
        """The verdict for a program: `met`, each check, and both models with scores, bytes and speeds."""
        found: dict[str, Any] = {
            "version": VERDICT_VERSION,
            "met": self.met,
            "checks": [asdict(check) for check in self.checks],
            "metric": self.records[0].metric,
            "examples": self.records[0].examples,
            "models": [_told(record) for record in self.records],
            "doubts": list(self.doubts),
            "date": self.records[0].date,
        }
        return json.dumps(found, indent=1)

    def lines(self) -> list[str]:
        """The verdict in lines of a terminal: what was compared and on how many examples first, the answer last."""
        base, small = self.records
        compared = f"{small.name} against {base.name}, {base.metric.replace('_', ' ')} on {base.examples:,} examples:"
        told = [
            f"{check.what} {check.measured:.3g}, asked {check.asked:g}: {'met' if check.met else 'not met'} "
            f"(interval {check.low:.3g} to {check.high:.3g}: {_WORDS[check.sure]})"
            for check in self.checks
        ]
        return [compared, *told, *self.doubts, "met" if self.met else "not met"]

    def as_markdown(self) -> str:
        """The verdict as a table for a pull request."""
        base, small = self.records
        lines = [
            f"**{'Met' if self.met else 'Not met'}**: {_safe(small.name)} against {_safe(base.name)}, {base.metric.replace('_', ' ')} "
            f"on {base.examples:,} examples.",
            "",
            "| | asked | measured | interval | met | by its interval |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {check.what} | {check.asked:g} | {check.measured:.3g} | {check.low:.3g} to {check.high:.3g} | "
            f"{'yes' if check.met else 'no'} | {_WORDS[check.sure]} |"
            for check in self.checks
        ]
        return "\n".join([*lines, *(f"\n{doubt}" for doubt in self.doubts)]) + "\n"


def verify(
    small: str | Path,
    against: str | Path,
    task: Task | None = None,
    *,
    max_loss: float | None = None,
    min_speedup: float | None = None,
    max_mb: float | None = None,
    batch: int = 32,
    sure: bool = False,
    **options: Any,
) -> Verification:
    """Measures a model beside another, in turn, and answers whether it keeps to the bounds.

    Args:
        small: The model in question: a folder, or an .onnx file.
        against: The model that it stands in for: likewise, or a transformers folder.
        task: As in `bench`; by default the one that a folder was made for.
        max_loss: Points of the metric that may be lost.
        min_speedup: How many times as fast it has to be, at `batch`.
        max_mb: Megabytes that its file may have.
        batch: 1, or any other number for the larger batch.
        sure: Met only if the 95 % interval of the loss and the likely speed lie within the bounds, not the measured values alone.
        **options: Those of `bench`, such as seconds and threads.

    Returns:
        The answers with their figures.

    Raises:
        RecipeError: Nothing is asked, or a bound is out of range.
        ModelError: As in `bench`.

    Example:
        >>> from slimformer.running.verify import verify
        >>> found = verify("small", "dense", max_loss=100, seconds=1, wait_seconds=0)
        >>> found.met, found.checks[0].what
        (True, 'points lost')
    """
    bounds = {"max_loss": max_loss, "min_speedup": min_speedup, "max_mb": max_mb}
    if all(bound is None for bound in bounds.values()):
        raise RecipeError("nothing is asked of the model.", help="give max_loss, min_speedup or max_mb, or several of them.")
    wrong = [
        f"{name}: {bound:g} is not above 0"
        for name, bound in bounds.items()
        if name != "max_loss" and bound is not None and bound <= 0
    ]
    if wrong:
        raise RecipeError("these bounds cannot be kept.", facts=wrong, help="correct these values.")
    measurement = bench([against, small], task, **options)
    base, record = measurement.records[0], measurement.records[1]
    checks = tuple(_checks(record, bounds, batch))
    met = all((check.sure is Conclusion.YES) if sure else check.met for check in checks)
    return Verification(met, checks, (base, record), tuple(doubts(measurement.records)))


def _checks(record: Record, bounds: Mapping[str, float | None], batch: int) -> list[Check]:
    checks = []
    most, least, megabytes = bounds["max_loss"], bounds["min_speedup"], bounds["max_mb"]
    if most is not None and record.loss is not None:
        value, low, high = record.loss.value, record.loss.low, record.loss.high
        checks.append(Check("points lost", most, value, low, high, value <= most, within(low, high, most)))
    speed = record.times_faster(batch)
    if least is not None and speed is not None:
        speed = likely(speed, rounds_of(record))
        name = f"times as fast, batch {1 if batch == 1 else 32}"
        checks.append(Check(name, least, speed.median, speed.low, speed.high, speed.median >= least, reached(speed, least)))
    if megabytes is not None and record.size_bytes is not None:
        size = record.size_bytes / MEGABYTE
        answer = Conclusion.YES if size <= megabytes else Conclusion.NO
        checks.append(Check("MB", megabytes, size, size, size, size <= megabytes, answer))
    return checks


def _told(record: Record) -> dict[str, Any]:
    speeds = {f"batch {batch}": speed.median for batch in (1, 32) if (speed := record.times_faster(batch))}
    return {
        "name": record.name,
        "file": record.file,
        "score": record.score,
        "scores": dict(record.scores),
        "size_bytes": record.size_bytes,
        "times_as_fast": speeds,
    }


def _safe(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
