"""Judges records: which ones nothing beats, whether the goal is met, and how ours stands against each rival.

A conclusion is yes or no only if its interval says so; otherwise it is open. Tables and pages only show what is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from slimformer.measuring.records import Interval, Record, Standing
from slimformer.reporting.words import MEGABYTE, interval_text, lost_text, points_text, times_text

RIVAL_WORDS = {
    Standing.TEACHER_INT8: "the teacher in ONNX Runtime dynamic int8",
    Standing.OPENVINO_INT8: "the teacher in OpenVINO int8",
    Standing.SMALL_DENSE: "a smaller dense model distilled with the same budget",
}


class Conclusion(StrEnum):
    """What a measurement says to a question. It is open if the interval holds both a yes and a no."""

    YES = "yes"
    NO = "no"
    OPEN = "open"


@dataclass(frozen=True)
class Verdict:
    """One sentence on how a record stands. Without a conclusion there was nothing to ask, or nothing to judge by."""

    conclusion: Conclusion | None
    text: str


# -- What nothing beats ------------------------------------------------------------------------------------------------------


def frontier(records: Iterable[Record], cost: Callable[[Record], float]) -> list[Record]:
    """The records that no other beats, the cheapest first: none is as good at no more cost, and better or cheaper.

    Equal ones all stay; records without a finite cost or quality are left out.
    """
    known = [record for record in records if math.isfinite(cost(record)) and math.isfinite(record.quality)]
    known.sort(key=lambda record: (cost(record), -record.quality))
    front: list[Record] = []
    best, best_cost = -math.inf, math.inf
    for record in known:
        if record.quality > best or (record.quality == best and cost(record) == best_cost):
            front.append(record)
            best, best_cost = record.quality, cost(record)
    return front


def slowness(record: Record) -> float:
    """Time relative to the baseline at batch 32: a cost for `frontier`; infinite if it was not timed."""
    speed = record.times_faster(32)
    return 1 / speed.median if speed else math.inf


def megabytes(record: Record) -> float:
    """Size in MB: a cost for `frontier`; infinite if it is not known."""
    return math.inf if record.size_bytes is None else record.size_bytes / MEGABYTE


def choice(records: Sequence[Record]) -> Record | None:
    """Our record that speaks for a group: the latest chosen file, or the latest of ours if none was chosen."""
    ours = [record for record in records if record.role == Standing.OURS]
    chosen = [record for record in ours if record.chosen] or ours
    return max(chosen, key=lambda record: record.date) if chosen else None


# -- The goal ----------------------------------------------------------------------------------------------------------------


def judge(record: Record) -> Verdict:
    """Whether a record meets its goal, and by how much.

    Yes: the 95 % interval of the loss and the spread of the speed over rounds both lie within the goal. No: one of them lies
    beyond it. Else the measurement cannot tell, and the goal is open.
    """
    metric, loss, speed = record.metric.replace("_", " "), record.loss, record.times_faster(32)
    if loss is None or speed is None:
        return Verdict(None, f"{record.name} was not measured against the dense teacher.")
    lost = f"{points_text(loss.value)} of {metric} {lost_text(loss.value)}"
    if record.target is None:
        return Verdict(None, f"{times_text(speed.median)} as fast at batch 32, {lost}.")
    asked, most = record.target.speedup, record.target.max_loss
    fast, good = within(1 / speed.high, 1 / speed.low, 1 / asked), within(loss.low, loss.high, most)
    conclusion = all_of((fast, good))
    opening = {Conclusion.YES: "Goal met", Conclusion.NO: "Goal not met", Conclusion.OPEN: "Goal open"}[conclusion]
    speed_remark = {
        Conclusion.YES: "",
        Conclusion.NO: f", {100 * (1 - speed.median / asked):.0f} % short",
        Conclusion.OPEN: ", too close to call",
    }[fast]
    loss_remark = {
        Conclusion.YES: "",
        Conclusion.NO: f", {points_text(loss.value - most)} too many",
        Conclusion.OPEN: f", too close to call on {record.examples:,} examples",
    }[good]
    rounds = f"80 % of rounds {speed.low:.2f} to {speed.high:.2f}"
    interval = f"95 % interval {interval_text(loss)}"
    return Verdict(
        conclusion,
        f"{opening}: {speed.median:.2f} times as fast at batch 32 (asked: {asked:g}; {rounds}){speed_remark}; "
        f"{lost} (asked: at most {most:g}; {interval}){loss_remark}.",
    )


def within(low: float, high: float, bound: float) -> Conclusion:
    """Whether everything between `low` and `high` is at most `bound`."""
    return Conclusion.YES if high <= bound else Conclusion.NO if low > bound else Conclusion.OPEN


def all_of(conclusions: Sequence[Conclusion]) -> Conclusion:
    """Whether all of several questions are answered with yes: no if one is a no, and open if one is open."""
    return next(word for word in (Conclusion.NO, Conclusion.OPEN, Conclusion.YES) if word in conclusions)


# -- The rivals --------------------------------------------------------------------------------------------------------------


def against(ours: Record, records: Sequence[Record]) -> list[Verdict]:
    """How ours stands against each kind of rival at equal quality; a rival that was not measured is named too.

    Qualities count as equal if the 95 % interval of their paired difference holds zero.
    """
    verdicts = []
    for standing, words in RIVAL_WORDS.items():
        rivals = [record for record in records if record.role == standing]
        if not rivals:
            verdicts.append(Verdict(None, f"Not measured: {words}."))
        verdicts.extend(_duel(ours, rival, f"{words} ({rival.name})") for rival in rivals)
    return verdicts


def _duel(ours: Record, rival: Record, who: str) -> Verdict:
    mine, other = ours.times_faster(32), rival.times_faster(32)
    if mine is None or other is None or ours.baseline != rival.baseline:
        return Verdict(None, f"Not timed in the same run: {who}.")
    speed = mine.median / other.median
    apart = mine.low > other.high or other.low > mine.high
    versus = ours.versus.get(rival.name)
    points = 100 * (rival.quality - ours.quality)  # above zero: ours is worse
    equal = versus.low <= 0 <= versus.high if versus else points == 0
    pace = f"{speed:.2f}x its speed" + ("" if apart else ", too close to call")
    quality = _quality_words(points, versus, equal)
    faster, better = speed > 1 and apart, points < 0 and not equal
    if faster and (equal or points <= 0):
        return Verdict(Conclusion.YES, f"Beats {who}: {pace}, {quality}.")
    if better and (speed >= 1 or not apart):
        return Verdict(Conclusion.YES, f"Beats {who}: {quality}, {pace}.")
    if faster:
        return Verdict(Conclusion.NO, f"Does not beat {who} at equal quality: {pace}, but {quality}.")
    if better:
        return Verdict(Conclusion.OPEN, f"Neither beats the other: against {who} ours is {quality}, at {pace}.")
    return Verdict(Conclusion.NO, f"Does not beat {who}: {pace}, {quality}.")


def _quality_words(points: float, versus: Interval | None, equal: bool) -> str:
    """Ours against a rival: how many points better or worse, with the interval."""
    interval = f" (95 %: {_better_text(versus.low)} to {_better_text(versus.high)})" if versus else _UNPAIRED
    if abs(points) < 0.05 and equal:
        return f"as good{interval}"
    words = f"{points_text(points)} {'worse' if points > 0 else 'better'}{interval}"
    return f"{words}, equal within the noise" if equal else words


_UNPAIRED = " (no interval: not paired by example)"


def _better_text(points: float) -> str:
    return f"{abs(points):.1f} {'worse' if points > 0 else 'better'}"


def tally(verdicts: Sequence[Verdict]) -> str:
    """How many of the measured rivals ours beats, in a sentence; empty if none was measured."""
    known = [verdict.conclusion for verdict in verdicts if verdict.conclusion is not None]
    return f"At equal quality it beats {known.count(Conclusion.YES)} of the {len(known)} rivals measured." if known else ""
