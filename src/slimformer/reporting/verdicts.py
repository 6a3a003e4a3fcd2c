"""Judges records: which ones nothing beats, whether ours is of use, whether the goal is met, and how ours stands against each rival.

A conclusion is yes or no only if its interval says so; otherwise it is open. Tables and pages only show what is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from slimformer.measuring.records import Interval, Record, Standing
from slimformer.measuring.timing import Ratio, ratio
from slimformer.reporting.words import MEGABYTE, interval_text, lost_text, points_text, times_text
from slimformer.tasks._unlabelled import AGREEMENTS

RIVAL_WORDS = {
    Standing.TEACHER_INT8: "the teacher in ONNX Runtime dynamic int8",
    Standing.OPENVINO_INT8: "the teacher in OpenVINO int8",
    Standing.CTRANSLATE2_INT8: "the teacher in CTranslate2 int8",
    Standing.SMALL_DENSE: "a smaller dense model distilled with the same budget",
    Standing.CUT: "the model that was cut inside its layers, distilled with the same budget",
}

_EXAMPLES_APART = (
    1.1  # the speeds of one file may differ so much on validation and dev examples, whose texts have other lengths
)


class Conclusion(StrEnum):
    """What a measurement says to a question. It is open if the interval holds both a yes and a no."""

    YES = "yes"
    NO = "no"
    OPEN = "open"
    TIE = "tie"  # of two models: neither speed nor quality tells them apart


@dataclass(frozen=True)
class Verdict:
    """One sentence on how a record stands. Without a conclusion there was nothing to ask, or nothing to judge by."""

    conclusion: Conclusion | None
    text: str


# -- Speed with its uncertainty ----------------------------------------------------------------------------------------------

# The 10th to 90th percentile of n rounds is narrower than what 80 % of further rounds will be within: by this factor, if logarithms
# of speeds are normal. With two or three rounds it is the 95 % interval of the median, which is wider still.
_WIDER = {2: 20.0, 3: 4.5, 4: 2.3, 5: 1.9}


def likely(speed: Ratio, rounds: int) -> Ratio:
    """A speed with the interval that a further round falls into with 80 %, judged from the rounds there were.

    It is the spread of single rounds, not the error of their median, which shrinks with every round: a median of many rounds on a
    busy machine is as far off tomorrow as the rounds are apart. Few rounds make it wider; one says nothing.

    >>> likely(Ratio(3.0, 2.97, 3.03), 30), likely(Ratio(3.0, 2.97, 3.03), 3).high > 3.1
    (Ratio(median=3.0, low=2.966, high=3.034), True)
    """
    if rounds < 2:
        return Ratio(speed.median, 0.0, math.inf)
    factor = _WIDER.get(rounds, 1 + 4 / rounds)
    low, high = (speed.median * (end / speed.median) ** factor for end in (speed.low, speed.high))
    return Ratio(speed.median, round(low, 4), round(high, 4))


def likely_speed(record: Record) -> Ratio | None:
    """A record's `likely` speed at batch 32; None if it was not timed."""
    speed = record.times_faster(32)
    return None if speed is None else likely(speed, rounds_of(record))


def rounds_of(record: Record) -> int:
    """How many rounds a record's speed at batch 32 was taken from."""
    timing = record.timing_at(32)
    return timing.rounds if timing else 0


def doubts(records: Sequence[Record]) -> list[str]:
    """What makes all figures of a comparison less sure, to stand beside its headline: other work, or a teacher near chance."""
    base = next((record for record in records if record.role == Standing.TEACHER_FP32), None)
    said = [_busy_text(records)]
    if any(record.metric in AGREEMENTS for record in records):
        said.append(
            "No labels were read: the teacher's own answers are what is agreed with. That says how little the small model differs from "
            "it, and not how often either is right."
        )
    if base is not None and weak(base):
        said.append(
            f"Weak teacher: it scores {base.score:.4f}, and the best answer that is the same for every example {base.chance:.4f}; "
            "what loses nothing to it may still be worth nothing."
        )
    return [text for text in said if text]


def weak(teacher: Record) -> bool:
    """Whether a teacher is not clearly better than the best answer that is the same for every example."""
    noise = 1 / math.sqrt(max(1, teacher.examples))  # at most two standard errors of a share
    return teacher.chance is not None and teacher.higher_is_better and teacher.score - noise <= teacher.chance


def _busy_text(records: Iterable[Record]) -> str:
    loads = [(timing.load.busy_cores, record) for record in records for timing in record.timings if not timing.load.quiet]
    if not loads:
        return ""
    cores, record = max(loads, key=lambda load: load[0])
    return (
        f"Busy machine: other work took up to {cores:.1f} of {record.environment.cores} cores when these were timed, so the speeds are "
        "less sure."
    )


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


def dominator(record: Record, others: Iterable[Record]) -> Record | None:
    """One of the others that makes a record needless, the fastest of them; None if there is none.

    It is measured to be as fast and as good at least, and is surely faster or surely better: by the `likely` ratio of the rounds,
    or by the 95 % interval of the paired difference. A slower record that is measured to be better stays, however little better it
    is: a small difference is no proof of none. Both must come from one race in which each was compared with the other.
    """
    found = [other for other in others if other is not record and _dominates(other, record)]
    return max(found, key=lambda other: -slowness(other)) if found else None


def _dominates(other: Record, record: Record) -> bool:
    pace, quality = _speeds(record, other), _qualities(record, other)
    if pace is None or quality is None or other.quality < record.quality or slowness(other) > slowness(record):
        return False
    return pace.sign < 0 or quality.sign < 0


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


# -- Ours -----------------------------------------------------------------------------------------------------------------------


def worthless(record: Record, records: Iterable[Record]) -> str:
    """Why a record is worse than doing nothing; it is empty if it is not.

    So it is if it surely runs slower than the dense model in a file that is no smaller, without being better; or if it scores no
    more than the best answer that is the same for every example, and the dense model does.
    """
    base = next((row for row in records if row.name == record.baseline and row.run == record.run), None)
    speed, loss = likely_speed(record), record.loss
    noise = (loss.high - loss.low) / 200 if loss and math.isfinite(loss.high - loss.low) else 0.0
    at_chance = record.chance is not None and record.higher_is_better and record.score - noise <= record.chance
    if at_chance and (base is None or base.score - noise > (record.chance or 0.0)):
        return f"it scores {record.score:.4f}, and the best answer that is the same for every example {record.chance:.4f}"
    if base is None or base is record or speed is None or loss is None or not base.size_bytes or not record.size_bytes:
        return ""
    if speed.high < 1 and record.size_bytes > 0.98 * base.size_bytes and not loss.high < 0:
        return f"it is slower than the dense model in fp32 ({speed.median:.2f} times its speed), no smaller and no better"
    return ""


def judge(record: Record, records: Sequence[Record] = ()) -> Verdict:
    """Whether a record meets its goal, and by how much; `records` are the rows of its comparison.

    Yes: the 95 % interval of the loss and the `likely` speed both lie within the goal. No: one of them lies beyond it. Else the
    measurement cannot tell, and the goal is open. It is open too if the trials that chose the file answer otherwise, and their speed
    is further from this one than the spread of both. A record that is worse than doing nothing is a no, whatever the goal.
    """
    loss, speed = record.loss, likely_speed(record)
    if loss is None or speed is None:
        return Verdict(None, f"{record.name} was not measured against the dense teacher.")
    reason = worthless(record, records)
    answer = _goal(record, speed, loss) if record.target else _plain(record, speed, loss)
    return Verdict(Conclusion.NO, f"Worse than doing nothing: {reason}. {answer.text}") if reason else answer


def _plain(record: Record, speed: Ratio, loss: Interval) -> Verdict:
    lost = f"{points_text(loss.value)} of {record.metric.replace('_', ' ')} {lost_text(loss.value)}"
    remark = _forecast_remark(record, speed, None) if _differs(record, speed) else ""
    return Verdict(None, f"{times_text(speed.median)} as fast at batch 32, {lost}.{remark}")


def _goal(record: Record, speed: Ratio, loss: Interval) -> Verdict:
    assert record.target is not None
    asked, most, rounds = record.target.speedup, record.target.max_loss, rounds_of(record)
    fast, good = reached(speed, asked), within(loss.low, loss.high, most)
    forecast, remark = record.forecast, ""
    if forecast is not None:
        before = likely(forecast.speed, forecast.rounds)
        contradicted = _differs(record, speed) and reached(before, asked) is not fast
        fast = Conclusion.OPEN if contradicted else fast
        if contradicted or _differs(record, speed) or (before.median < asked) != (speed.median < asked):
            remark = _forecast_remark(record, speed, fast)
        if good is Conclusion.YES and forecast.loss > max(most, loss.high):
            remark += f" On validation examples {points_text(forecast.loss)} were lost."
    conclusion = all_of((fast, good))
    opening = {Conclusion.YES: "Goal met", Conclusion.NO: "Goal not met"}.get(conclusion, "Goal open")
    speed_remark = {Conclusion.NO: f", {100 * (1 - speed.median / asked):.0f} % short", Conclusion.OPEN: ", too close to call"}
    loss_remark = {
        Conclusion.NO: f", {points_text(loss.value - most)} too many",
        Conclusion.OPEN: f", too close to call on {record.examples:,} examples",
    }
    spread = (
        f"80 % interval of a round {speed.low:.2f} to {speed.high:.2f}, from {rounds} rounds" if rounds > 1 else "one round"
    )
    return Verdict(
        conclusion,
        f"{opening}: {speed.median:.2f} times as fast at batch 32 (asked: {asked:g}; {spread}){speed_remark.get(fast, '')}; "
        f"{points_text(loss.value)} of {record.metric.replace('_', ' ')} {lost_text(loss.value)} (asked: at most {most:g}; "
        f"95 % interval {interval_text(loss)}){loss_remark.get(good, '')}.{remark}",
    )


def _differs(record: Record, speed: Ratio) -> bool:
    """Whether the trial's speed is further from this one than the spread of both, and by more than the examples may make it."""
    if record.forecast is None:
        return False
    before = likely(record.forecast.speed, record.forecast.rounds)
    apart = before.high < speed.low or speed.high < before.low
    return apart and abs(math.log(before.median / speed.median)) > math.log(_EXAMPLES_APART)


def _forecast_remark(record: Record, speed: Ratio, fast: Conclusion | None) -> str:
    assert record.forecast is not None
    before = likely(record.forecast.speed, record.forecast.rounds)
    seen = f" The trial on validation examples measured {before.median:.2f} times"
    if not _differs(record, speed):
        return f"{seen}, within the spread of both."
    end = ": they disagree by more than their spread"
    return f"{seen}, the final bench {speed.median:.2f}{end}{', so the goal stays open' if fast is Conclusion.OPEN else ''}."


def reached(speed: Ratio, asked: float) -> Conclusion:
    """Whether a speed with its interval is at least the one asked for."""
    return Conclusion.YES if speed.low >= asked else Conclusion.NO if speed.high < asked else Conclusion.OPEN


def within(low: float, high: float, bound: float) -> Conclusion:
    """Whether everything between `low` and `high` is at most `bound`."""
    return Conclusion.YES if high <= bound else Conclusion.NO if low > bound else Conclusion.OPEN


def all_of(conclusions: Sequence[Conclusion]) -> Conclusion:
    """Whether all of several questions are answered with yes: no if one is a no, and open if one is open."""
    return next(word for word in (Conclusion.NO, Conclusion.OPEN, Conclusion.YES) if word in conclusions)


def findings(records: Sequence[Record]) -> list[str]:
    """How the file that ships stands, in a few sentences: its verdict, its rivals, and what makes the figures less sure."""
    ours = choice(records)
    if ours is None:
        return doubts(records)
    said = (judge(ours, records).text, tally(against(ours, records)), *doubts(records))
    return [text for text in said if text]


# -- The rivals --------------------------------------------------------------------------------------------------------------


def against(ours: Record, records: Sequence[Record]) -> list[Verdict]:
    """How ours stands against each rival of its run; a kind that was not measured is named too, and a rival counts once.

    Qualities count as equal if the 95 % interval of their paired difference holds zero, speeds if the `likely` ratio of the two holds 1.
    """
    verdicts, run = [], [record for record in records if record.run == ours.run]
    writes = any(timing.beams is not None for record in run for timing in record.timings)
    other = {
        Standing.SMALL_DENSE if any(record.role == Standing.CUT for record in run) else Standing.CUT,  # ours is one of the two
        Standing.OPENVINO_INT8 if writes else Standing.CTRANSLATE2_INT8,  # it runs no such models
    }
    for standing, words in RIVAL_WORDS.items():
        rivals = {record.name: record for record in run if record.role == standing}
        if not rivals and standing not in other:
            verdicts.append(Verdict(None, f"Not measured: {words}."))
        verdicts.extend(_duel(ours, rival, f"{words} ({rival.name})", records) for rival in rivals.values())
    return verdicts


def _duel(ours: Record, rival: Record, who: str, records: Sequence[Record]) -> Verdict:
    pace, quality = _speeds(ours, rival), _qualities(ours, rival)
    if pace is None:
        return Verdict(None, f"Not timed in the same run: {who}.")
    if quality is None:
        return Verdict(None, f"Not scored on the same examples in the same run: {who}.")
    words = f"{pace.words} and {quality.words}"
    if pace.sign >= 0 and quality.sign >= 0:
        if pace.sign == quality.sign == 0:
            return Verdict(Conclusion.TIE, f"Level with {who}: ours is {words}.")
        return Verdict(Conclusion.YES, f"Beats {who}: ours is {words}.")
    if pace.sign <= 0 and quality.sign <= 0:
        return Verdict(Conclusion.NO, f"Loses to {who}: ours is {words}.")
    trade = f"ours is {pace.words}, but {quality.words}"
    return Verdict(Conclusion.OPEN, f"Neither beats the other: against {who} {trade}. {_at_equal_speed(ours, rival, records)}")


@dataclass(frozen=True)
class _Difference:
    """Ours against a rival in one respect: 1 if ours is surely better, -1 if worse, 0 if that is within the noise."""

    sign: int
    words: str


def _speeds(ours: Record, rival: Record) -> _Difference | None:
    mine, other = ours.timing_at(32), rival.timing_at(32)
    if mine is None or other is None or (ours.baseline, ours.run) != (rival.baseline, rival.run):
        return None
    try:
        speed = likely(ratio(other, mine), mine.rounds)  # round by round, as both ran in turn
    except ValueError:
        return None  # two benches, of other examples
    if speed.low > 1:
        return _Difference(1, f"{speed.median:.2f} times as fast")
    if speed.high < 1:
        return _Difference(-1, f"slower ({speed.median:.2f} times its speed)")
    return _Difference(0, f"equally fast within the spread of the rounds ({speed.median:.2f} times its speed)")


def _qualities(ours: Record, rival: Record) -> _Difference | None:
    lost = ours.versus.get(rival.name)  # points that ours lies below the rival
    if lost is None or not all(map(math.isfinite, (lost.value, lost.low, lost.high))):
        return None
    if lost.high < 0:
        return _Difference(1, f"{points_text(lost.value)} better (95 % interval {-lost.high:.1f} to {-lost.low:.1f})")
    if lost.low > 0:
        return _Difference(-1, f"{points_text(lost.value)} worse (95 % interval {lost.low:.1f} to {lost.high:.1f})")
    if max(-lost.low, lost.high) < 0.05:
        return _Difference(0, "as good")
    middle = (
        "no difference" if abs(lost.value) < 0.05 else f"{points_text(lost.value)} {'worse' if lost.value > 0 else 'better'}"
    )
    ends = f"{abs(lost.high):.1f} worse to {abs(lost.low):.1f} better"
    return _Difference(0, f"as good within the noise ({middle}; 95 % interval {ends})")


def _at_equal_speed(ours: Record, rival: Record, records: Sequence[Record]) -> str:
    """Who wins at the rival's speed, if a file of ours was measured that is at least as fast; else, who wins at ours."""
    files = [
        (quality.sign, record)
        for record in records
        if record.role == Standing.OURS
        and record.run == rival.run
        and (pace := _speeds(record, rival)) is not None
        and pace.sign >= 0
        and (quality := _qualities(record, rival)) is not None
    ]
    if not files:
        return "At the speed of ours, ours wins; no file of ours was measured at the rival's speed."
    sign, best = max(files, key=lambda file: (file[0], file[1].quality))
    if sign < 0:
        return "At the rival's speed the rival wins; no model of its kind was measured at the speed of ours."
    return f"At the rival's speed {best.name} {'wins' if sign > 0 else 'is as good within the noise'}."


_TALLIED = {
    Conclusion.YES: "beats",
    Conclusion.TIE: "is level with",
    Conclusion.OPEN: "trades speed for quality with",
    Conclusion.NO: "loses to",
}


def tally(verdicts: Sequence[Verdict]) -> str:
    """How many of the measured rivals ours beats, in a sentence; empty if none was measured."""
    known = [verdict.conclusion for verdict in verdicts if verdict.conclusion is not None]
    if len(known) == 1:
        return f"Ours {_TALLIED[known[0]]} the one rival that was measured."
    counts = {word: known.count(conclusion) for conclusion, word in _TALLIED.items() if conclusion in known}
    return (
        f"Of {len(known)} rivals measured ours {', '.join(f'{word} {count}' for word, count in counts.items())}."
        if known
        else ""
    )
