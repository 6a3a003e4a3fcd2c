"""Judges records: which ones nothing beats, whether the goal is met, and how ours stands against each rival.

Whether ours beats a rival is computed from paired intervals, not claimed. Tables and pages only show what is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from slimformer.measuring.records import Record, Standing
from slimformer.reporting.words import MEGABYTE, interval_text, lost_text, points_text, times_text

RIVAL_WORDS = {
    Standing.TEACHER_INT8: "the teacher in ONNX Runtime dynamic int8",
    Standing.OPENVINO_INT8: "the teacher in OpenVINO int8",
    Standing.SMALL_DENSE: "a smaller dense model distilled with the same budget",
}


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
    return math.inf if record.size_bytes is None else record.size_bytes / MEGABYTE


@dataclass(frozen=True)
class Verdict:
    """One sentence on how a record stands, and whether it is good news (None: neither)."""

    good: bool | None
    text: str
    measured: bool = True  # False: there is nothing to judge by


def choice(records: Sequence[Record]) -> Record | None:
    """Our record that speaks for a group: the chosen file, the latest where there are several; else the last of ours."""
    ours = [record for record in records if record.role == Standing.OURS]
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
    for role, words in RIVAL_WORDS.items():
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
