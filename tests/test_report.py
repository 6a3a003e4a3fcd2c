"""Records, the ledger, the frontier, what is said of them, and the page and the card that are drawn from them."""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, astuple, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_export import export

from slimformer.errors import DataError, ModelError, OutputError
from slimformer.measuring.machine import Environment, Load
from slimformer.measuring.records import Facts, Forecast, Goal, Interval, Layer, Record, Standing
from slimformer.measuring.scoring import bootstrap
from slimformer.measuring.timing import SINGLE, SORTED, Lengths, Ratio, Timing
from slimformer.reporting.answers import ChangedAnswer
from slimformer.reporting.card import Card, told_of, write_card
from slimformer.reporting.ledger import append_record, read_facts, read_records, write_facts
from slimformer.reporting.page import Details, report, write_page
from slimformer.reporting.svg import Mark, Scatter, draw_bars, draw_scatter, ticks
from slimformer.reporting.terminal import draw_table
from slimformer.reporting.verdicts import (
    Conclusion,
    Verdict,
    against,
    choice,
    doubts,
    findings,
    frontier,
    judge,
    likely,
    tally,
    worthless,
)
from slimformer.tasks.classification import Classification

MACHINE = Environment("Some CPU", 2, ("avx2",), 2**33, "Linux 6", "3.11.7", {"slimformer": "0.1.0", "numpy": "2.4"})
QUIET = Load(0.1, 0.5, 0.0, True)


ROUNDS = 12  # so many widen a spread of 2 % to 2.7 %


def timing(batch_size: int, ms: float, rounds: int = ROUNDS, load: Load = QUIET) -> Timing:
    name, size = (SINGLE, 1) if batch_size == 1 else (SORTED, 32)
    lengths = Lengths(20.0, 18.0, 40.0, 50)
    samples = tuple((ms * size * wobble, ms * size * wobble) for wobble in np.linspace(0.98, 1.02, rounds).tolist())
    return Timing(
        name, size, "in order", 2 * size, 40 * size, lengths, "onnxruntime", "1.31", "cpu", 2, 1, load, (size,) * 2, samples
    )


def record(name: str = "ours", score: float = 0.9, speed: float | None = 3.0, **fields: Any) -> Record:
    given: dict[str, Any] = {
        "name": name,
        "role": "ours",
        "model": "teacher",
        "task": "glue/sst2",
        "split": "dev",
        "metric": "accuracy",
        "scores": {"accuracy": score},
        "date": "2026-01-02T03:04:05+00:00",
        "environment": MACHINE,
        "examples": 872,
        "baseline": "teacher fp32",
        "size_bytes": 10_000_000,
    }
    if speed is not None:
        given["timings"] = (timing(1, 4 / speed), timing(32, 2 / speed))
        given["speed"] = {name: Ratio(speed, 0.98 * speed, 1.02 * speed) for name in (SINGLE, SORTED)}
    return Record(**{**given, **fields})


BASE = record("teacher fp32", 0.90, 1.0, role="teacher-fp32", precision="fused", size_bytes=90_000_000)


# -- The ledger --------------------------------------------------------------------------------------------------------------


def full() -> Record:
    return record(
        loss=Interval(0.5, -0.1, 1.2),
        versus={"rival": Interval(0.1, -0.2, 0.3)},
        target=Goal(3.0, 1.0),
        layers=(Layer("0", 3, 12, 100, 1536),),
        chosen=True,
        seed=7,
        minutes=12.5,
        notes=("6 of 6 attentions fused",),
    )


def test_a_record_survives_the_ledger_whole(tmp_path: Path) -> None:
    path = tmp_path / "run" / "ledger.jsonl"
    append_record(path, full())
    append_record(path, replace(BASE, scores={"accuracy": 0.9, "f1": float("nan")}))
    one, two = read_records([path])
    assert one == full()
    assert np.isnan(two.scores["f1"])
    assert isinstance(one.timings[0].samples_ms[0], tuple)


@given(cut=st.integers(1, 200), after=st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_torn_row_is_skipped_and_swallows_nothing(tmp_path_factory: pytest.TempPathFactory, cut: int, after: bool) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    append_record(path, record("first"))
    append_record(path, record("torn"))
    os.truncate(path, path.stat().st_size - 1 - cut)  # killed in the middle of the second row
    if after:
        append_record(path, record("third"))
    assert [found.name for found in read_records([path])] == (["first", "third"] if after else ["first"])


def test_what_is_skipped_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "ledger.jsonl"
    append_record(path, record("good"))
    lines = path.read_text()
    path.write_text('{"name": "half"}\n[]\n' + "[" * 100_000 + "\n\xff\n" + lines + lines[:50], encoding="latin-1")
    with caplog.at_level(logging.WARNING):
        assert [found.name for found in read_records([path])] == ["good"]
    said = [entry.getMessage() for entry in caplog.records]
    assert len(said) == 5
    assert "line 1 is no record" in said[0]
    assert "line 6 was cut off while it was written; skipped." in said[-1]
    with pytest.raises(DataError, match="cannot be read"):
        read_records([tmp_path / "none.jsonl"])


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values inside a row, those of containers too."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from leaves(item, (*path, key))


def mutated(path: tuple[Any, ...], value: Any) -> bytes:
    """The JSON of a full row with one value changed."""
    row = json.loads(json.dumps(asdict(full())))
    inner = row
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(row).encode()


PLACES = sorted(
    set(leaves(json.loads(json.dumps(asdict(replace(full(), timings=(timing(1, 0.5, 2), timing(32, 0.5, 2)))))))), key=str
)
ODD = (
    0,
    -1,
    0.5,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    2**63,
    "",
    "x",
    "\ud800",
    "\x1b[31m",
    None,
    [],
    {},
    [[1.0], []],
)


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("speed", SORTED, "median"), 0, "a speed of 0"),
        (("speed", SORTED, "high"), float("inf"), "a speed of"),
        (("speed", SORTED, "low"), 10**400, ""),
        (("scores", "accuracy"), float("nan"), "a score of nan"),
        (("scores", "accuracy"), 7.5, "a score of 7.5 in accuracy"),
        (("size_bytes",), -5, "size_bytes is -5"),
        (("examples",), 10**400, ""),
        (("date",), "yesterday", "no date, but 'yesterday'"),
        (("name",), "half \ud800", "surrogates"),
        (("target", "speedup"), float("inf"), "the speed asked for is inf"),
        (("loss", "low"), 9.0, "an interval"),
        (("layers", 0, "heads"), 13, "keeps more than it had"),
        (("timings", 1, "sizes"), [32], "one for each of its 1 batches"),
        (("timings", 1, "sizes"), [], "one for each of its 0 batches"),
        (("timings", 1, "sizes", 0), 0, "cannot be"),
        (("timings", 1, "samples_ms", 0), [1.0], "one for each of its 2 batches"),
        (("timings", 1, "samples_ms", 0, 0), -1.0, "not above 0"),
        (("timings", 1, "samples_ms"), [], "one for each"),
        (("timings", 1, "threads"), 0, "cannot be"),
    ],
)
def test_an_odd_row_is_skipped_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, path: tuple[Any, ...], value: Any, reason: str
) -> None:
    file = tmp_path / "ledger.jsonl"
    append_record(file, BASE)
    file.write_bytes(file.read_bytes() + mutated(path, value) + b"\n")
    with caplog.at_level(logging.WARNING):
        assert read_records([file]) == [BASE]
    (said,) = caplog.records
    assert f"{file}, line 2 is no record" in said.getMessage()
    assert reason in said.getMessage()
    assert len(said.getMessage()) < 300 + len(str(file))


def test_no_odd_value_in_a_row_stops_the_report_on_the_others(tmp_path: Path) -> None:
    draw = np.random.default_rng(7)
    lines = [
        mutated(PLACES[place], ODD[value])
        for place, value in zip(draw.integers(0, len(PLACES), 160), draw.integers(0, len(ODD), 160), strict=True)
    ]
    file = tmp_path / "run" / "ledger.jsonl"
    append_record(file, BASE)
    file.write_bytes(file.read_bytes() + b"\n".join(lines) + b"\n")
    logging.getLogger("slimformer").setLevel(logging.ERROR)
    records = report([file], tmp_path / "out")
    logging.getLogger("slimformer").setLevel(logging.NOTSET)
    assert 10 < len(records) < 120
    assert BASE.name in {row.name for row in records}
    text = check(tmp_path / "out" / "report.html").text
    assert not re.search(r"\b(nan|inf)\b", text.split("}")[-1])


def test_facts_come_back_and_broken_ones_are_told(tmp_path: Path) -> None:
    assert read_facts(tmp_path) is None
    facts = Facts("model.onnx", {"use": "classification"}, 128, "accuracy", params=5, layers=(Layer("0", 1, 2, 3, 4),))
    write_facts(tmp_path, facts)
    assert read_facts(tmp_path) == facts
    assert facts.of_record()["params"] == 5
    (tmp_path / "slimformer.json").write_text('{"best": 3}')
    with pytest.raises(ModelError, match=r"slimformer\.json cannot be read"):
        read_facts(tmp_path)


# -- Judging -----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=8))
def test_the_frontier_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    records = [record(str(number), score / 4, None, size_bytes=cost) for number, (cost, score) in enumerate(points)]

    def beaten(mine: Record) -> bool:
        return any(
            other.size_bytes <= mine.size_bytes
            and other.score >= mine.score
            and (other.size_bytes, other.score) != (mine.size_bytes, mine.score)
            for other in records
        )

    found = frontier(records, lambda item: float(item.size_bytes))
    assert {item.name for item in found} == {item.name for item in records if not beaten(item)}
    assert [item.size_bytes for item in found] == sorted(item.size_bytes for item in found)


def test_the_frontier_knows_metrics_where_less_is_better() -> None:
    records = [record(str(score), score, None, higher_is_better=False, size_bytes=size) for score, size in ((1.0, 5), (2.0, 9))]
    assert [item.name for item in frontier(records, lambda item: float(item.size_bytes))] == ["1.0"]


def test_bootstrap_of_cases_that_can_be_worked_by_hand() -> None:
    ones, zeros = np.ones(50), np.zeros(50)
    assert bootstrap(ones, zeros, 0) == Interval(1.0, 1.0, 1.0)
    assert bootstrap(ones, ones, 0) == Interval(0.0, 0.0, 0.0)
    # Of 400 pairs 40 differ, all the same way: mean 0.1, standard error sqrt(0.1 * 0.9 / 400) = 0.015.
    a = np.concatenate([np.ones(40), np.zeros(360)])
    found = bootstrap(a, np.zeros(400), 1)
    assert found.value == pytest.approx(0.1)
    assert found.low == pytest.approx(0.1 - 1.96 * 0.015, abs=0.004)
    assert found.high == pytest.approx(0.1 + 1.96 * 0.015, abs=0.004)


def test_bootstrap_is_paired() -> None:
    # Both are right on every other example: unpaired the interval would be wide, paired there is no difference at all.
    same = np.tile([0.0, 1.0], 100)
    assert bootstrap(same, same.copy(), 3) == Interval(0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="same examples"):
        bootstrap(same, same[:10], 0)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_bootstrap_is_symmetric(pairs: list[tuple[int, int]], seed: int) -> None:
    a, b = np.array(pairs, dtype=float).T
    found, turned = bootstrap(a, b, seed, resamples=400), bootstrap(b, a, seed, resamples=400)
    assert found.low <= found.value + 1e-12
    assert found.value <= found.high + 1e-12
    assert astuple(turned) == pytest.approx((-found.value, -found.high, -found.low), abs=1e-12)


@pytest.mark.parametrize(
    ("speed", "loss", "conclusion", "words"),
    [
        # Rounds lie within 2 % on either side, so a further one within 2.7 %; asked are 3 times as fast and at most 1 point lost.
        (
            3.6,
            Interval(0.4, -0.6, 0.9),
            Conclusion.YES,
            "Goal met: 3.60 times as fast at batch 32 (asked: 3; 80 % interval of a round 3.50 to 3.70, from 12 rounds); 0.4 points of "
            "accuracy lost (asked: at most 1; 95 % interval −0.6 to +0.9).",
        ),
        (3.6, Interval(0.4, -0.6, 1.0), Conclusion.YES, "Goal met"),  # the interval may reach the goal, not go beyond it
        (3.6, Interval(0.4, -0.6, 1.3), Conclusion.OPEN, "−0.6 to +1.3), too close to call on 872 examples."),
        (3.6, Interval(1.3, 0.2, 2.4), Conclusion.OPEN, "Goal open: 3.60 times"),
        (3.6, Interval(2.5, 1.1, 3.9), Conclusion.NO, "95 % interval +1.1 to +3.9), 1.5 points too many."),
        (3.07, Interval(0.4, -0.6, 0.9), Conclusion.OPEN, "2.99 to 3.15, from 12 rounds), too close to call; 0.4 points"),
        (2.98, Interval(0.4, -0.6, 0.9), Conclusion.OPEN, "Goal open: 2.98 times"),
        (2.4, Interval(0.4, -0.6, 0.9), Conclusion.NO, "2.34 to 2.46, from 12 rounds), 20 % short;"),
        (2.4, Interval(0.4, -0.6, 1.3), Conclusion.NO, "Goal not met"),  # what is open does not matter any more
        (3.6, Interval(0.4, float("nan"), float("nan")), Conclusion.OPEN, "Goal open"),
    ],
)
def test_a_goal_is_met_only_if_the_intervals_say_so(speed: float, loss: Interval, conclusion: Conclusion, words: str) -> None:
    verdict = judge(record(speed=speed, loss=loss, target=Goal(3.0, 1.0)))
    assert verdict.conclusion is conclusion
    assert words in verdict.text


def test_a_median_of_few_or_noisy_rounds_certifies_nothing() -> None:
    def conclusion(rounds: int, low: float, high: float) -> Conclusion | None:
        row = record(loss=Interval(0.0, -0.1, 0.1), target=Goal(3.0, 1.0), timings=(timing(32, 0.5, rounds),))
        return judge(replace(row, speed={SORTED: Ratio(4.65, low, high)})).conclusion

    assert conclusion(30, 4.5, 4.8) is Conclusion.YES
    assert conclusion(30, 0.52, 8.35) is Conclusion.OPEN  # what a busy machine gave, whose next bench said 1.97
    assert conclusion(3, 4.5, 4.8) is Conclusion.YES
    assert conclusion(3, 4.2, 5.2) is Conclusion.OPEN  # the same spread of 30 rounds would do
    assert conclusion(30, 4.2, 5.2) is Conclusion.YES
    assert conclusion(1, 4.65, 4.65) is Conclusion.OPEN


@pytest.mark.parametrize("rounds", [2, 3, 4, 5, 7, 12, 30])
def test_a_further_round_is_within_the_likely_speed_four_times_in_five(rounds: int) -> None:
    draw = np.random.default_rng(rounds)
    hits = 0
    for _ in range(1500):
        *seen, further = np.exp(draw.normal(1.0, 0.1, rounds + 1))
        low, median, high = np.percentile(seen, [10, 50, 90])
        expected = likely(Ratio(float(median), float(low), float(high)), rounds)
        hits += expected.low <= further <= expected.high
    assert hits / 1500 >= 0.76


@pytest.mark.parametrize(
    ("trial", "final", "conclusion", "words"),
    [
        # The trial said "1.85 of 3, not found", and the final bench 4.65: one of them is wrong.
        (
            1.85,
            4.65,
            Conclusion.OPEN,
            "measured 1.85 times, the final bench 4.65: they disagree by more than their spread, so the goal stays",
        ),
        (3.4, 2.4, Conclusion.OPEN, "stays open"),
        (3.3, 3.9, Conclusion.YES, "disagree by more than their spread."),  # both reach the goal; that they differ is said
        (3.5, 3.6, Conclusion.YES, "95 % interval −0.1 to +0.1)."),
        (2.98, 3.1, Conclusion.YES, "measured 2.98 times, within the spread of both."),
        (1.85, 2.4, Conclusion.NO, "disagree by more"),
    ],
)
def test_a_trial_that_contradicts_the_bench_keeps_the_goal_open(
    trial: float, final: float, conclusion: Conclusion, words: str
) -> None:
    forecast = Forecast(Ratio(trial, 0.97 * trial, 1.03 * trial), 12, 0.1)
    row = record(speed=final, loss=Interval(0.0, -0.1, 0.1), target=Goal(3.0, 1.0), forecast=forecast)
    verdict = judge(row)
    assert verdict.conclusion is conclusion
    assert verdict.text.endswith(words) or words in verdict.text


def test_a_loss_in_the_trial_that_was_too_large_is_said() -> None:
    row = record(loss=Interval(0.2, -0.4, 0.8), target=Goal(2.0, 1.0), forecast=Forecast(Ratio(3.0, 2.95, 3.05), 12, 2.4))
    assert judge(row).text.endswith("On validation examples 2.4 points were lost.")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        # A cut without enough training: slower, larger, at chance; it was handed over as a success.
        (
            {"speed": 0.58, "score": 0.5, "chance": 0.5},
            "it scores 0.5000, and the best answer that is the same for every example 0.5000",
        ),
        ({"speed": 3.0, "score": 0.52, "chance": 0.5}, "it scores 0.5200"),
        (
            {"speed": 0.58, "score": 0.88, "size_bytes": 91_000_000},
            "slower than the dense model in fp32 (0.58 times its speed), no smaller",
        ),
    ],
)
def test_a_result_that_is_worse_than_doing_nothing_says_so_first(fields: dict[str, Any], words: str) -> None:
    row = record(loss=Interval(90 - 100 * fields["score"], -1.0, 3.0), **fields)
    verdict = judge(row, [BASE, row])
    assert verdict.conclusion is Conclusion.NO
    assert verdict.text.startswith("Worse than doing nothing: ")
    assert words in verdict.text
    assert findings([BASE, row])[0] == verdict.text


@pytest.mark.parametrize(
    ("fields", "loss"),
    [
        ({"speed": 0.58, "size_bytes": 20_000_000}, 1.0),  # it is slower, but small
        ({"speed": 0.58, "size_bytes": 91_000_000}, -9.0),  # it is slower, but surely better
        ({"speed": 1.3, "size_bytes": 91_000_000}, 1.0),
        ({"speed": 3.0, "score": 0.9, "chance": 0.5}, 0.0),
        ({"speed": 3.0, "score": 0.5, "chance": 0.9}, 40.0),  # and the teacher is at chance itself: that is told of the teacher
    ],
)
def test_a_result_of_some_use_is_none_of_these(fields: dict[str, Any], loss: float) -> None:
    row = record(loss=Interval(loss, loss - 1, loss + 1), **fields)
    assert worthless(row, [BASE, row]) == ""
    assert worthless(BASE, [BASE, row]) == ""


def test_without_a_goal_or_a_baseline_there_is_no_answer() -> None:
    assert judge(BASE).conclusion is None
    verdict = judge(record(speed=3.6, loss=Interval(-0.4, -1.0, 0.2)))
    assert (verdict.conclusion, verdict.text) == (None, "3.6 times as fast at batch 32, 0.4 points of accuracy gained.")


def test_what_makes_all_figures_less_sure_stands_beside_the_verdict() -> None:
    busy = record(loss=Interval(0.0, -0.1, 0.1), timings=(timing(32, 0.5, load=Load(1.7, 2.0, 61.0, False)),))
    doubt = findings([BASE, busy])[-1]
    assert doubt == "Busy machine: other work took up to 1.7 of 2 cores when these were timed, so the speeds are less sure."
    weak = replace(BASE, scores={"accuracy": 0.53}, chance=0.52)
    assert findings([weak, record()])[-1].startswith("Weak teacher: it scores 0.5300")
    assert not doubts([replace(BASE, chance=0.5), record()])


def rival(score: float, speed: float, name: str = "int8") -> Record:
    return record(name, score, speed, role="teacher-int8")


@pytest.mark.parametrize(
    ("speed", "versus", "conclusion", "words"),
    [
        (
            2.0,
            Interval(0.0, -0.5, 0.5),
            Conclusion.YES,
            "Beats {}: ours is 1.50 times as fast and as good within the noise (no difference; 95 % "
            "interval 0.5 worse to 0.5 better).",
        ),
        (2.0, Interval(0.0, 0.0, 0.0), Conclusion.YES, "Beats {}: ours is 1.50 times as fast and as good."),
        (
            3.0,
            Interval(-3.3, -8.3, 0.0),
            Conclusion.TIE,
            "Level with {}: ours is equally fast within the spread of the rounds (1.00 times its "
            "speed) and as good within the noise (3.3 points better; 95 % interval 0.0 worse to 8.3 better).",
        ),
        (4.0, Interval(0.0, -0.5, 0.5), Conclusion.NO, "Loses to {}: ours is slower (0.75 times its speed) and as good"),
        (3.0, Interval(2.0, 1.0, 3.0), Conclusion.NO, "and 2.0 points worse (95 % interval 1.0 to 3.0)."),
        (
            3.0,
            Interval(-2.0, -3.0, -1.0),
            Conclusion.YES,
            "Beats {}: ours is equally fast within the spread of the rounds (1.00 times its "
            "speed) and 2.0 points better (95 % interval 1.0 to 3.0).",
        ),
        (
            2.0,
            Interval(2.0, 1.0, 3.0),
            Conclusion.OPEN,
            "Neither beats the other: against {} ours is 1.50 times as fast, but 2.0 points worse "
            "(95 % interval 1.0 to 3.0). At the rival's speed the rival wins; no model of its kind was measured at the speed of ours.",
        ),
        (
            4.0,
            Interval(-2.0, -3.0, -1.0),
            Conclusion.OPEN,
            "ours is slower (0.75 times its speed), but 2.0 points better (95 % interval 1.0 to "
            "3.0). At the speed of ours, ours wins; no file of ours was measured at the rival's speed.",
        ),
        (4.0, None, None, "Not scored on the same examples in the same run: {}."),
    ],
)
def test_a_duel_is_computed(speed: float, versus: Interval | None, conclusion: Conclusion | None, words: str) -> None:
    ours = record(score=0.90, speed=3.0, versus={} if versus is None else {"int8": versus})
    verdicts = against(ours, [BASE, rival(0.9, speed), ours])
    assert verdicts[0].conclusion is conclusion
    assert words.format("the teacher in ONNX Runtime dynamic int8 (int8)") in verdicts[0].text
    assert [verdict.text for verdict in verdicts[1:]] == [
        "Not measured: the teacher in OpenVINO int8.",
        "Not measured: a smaller dense model distilled with the same budget.",
    ]


def test_a_rival_at_another_speed_meets_the_file_of_ours_that_is_as_fast() -> None:
    ours = record(score=0.90, speed=3.0, chosen=True, versus={"int8": Interval(-2.0, -3.0, -1.0)})
    faster = record("ours, int8", 0.89, 4.2, versus={"int8": Interval(-1.0, -2.0, -0.2)})
    rows = [BASE, rival(0.88, 4.0), ours, faster]
    assert "At the rival's speed ours, int8 wins." in against(ours, rows)[0].text
    level = replace(faster, versus={"int8": Interval(-1.0, -2.0, 0.4)})
    assert "At the rival's speed ours, int8 is as good within the noise." in against(ours, [*rows[:3], level])[0].text


def test_rivals_are_counted_once_and_in_words() -> None:
    ours = record(score=0.90, speed=3.0, versus={"int8": Interval(0.0, -1.0, 1.0)}, run="a")
    base, slow = replace(BASE, run="a"), replace(rival(0.9, 2.0), run="a")
    verdicts = against(ours, [base, slow, slow, replace(slow, run="b"), ours])
    assert tally(verdicts) == "Ours beats the one rival that was measured."
    said = [Verdict(conclusion, "") for conclusion in (Conclusion.YES, Conclusion.TIE, Conclusion.NO, None, Conclusion.NO)]
    assert tally(said) == "Of 4 rivals measured ours beats 1, is level with 1, loses to 2."
    assert tally([Verdict(None, "")]) == ""


def test_the_chosen_file_speaks_for_the_run() -> None:
    early, late = record("early", chosen=True), record("late", chosen=True, date="2026-02-01T00:00:00+00:00")
    assert choice([BASE, late, early, record("other", date="2027-01-01T00:00:00+00:00")]) == late
    assert choice([BASE]) is None


# -- What people see ---------------------------------------------------------------------------------------------------------

NASTY = '<script>alert("x")</script> & [b]bold[/b] | `code`\n```'


def rows() -> list[Record]:
    return [
        BASE,
        record("int8", 0.895, 1.8, role=Standing.TEACHER_INT8, loss=Interval(0.5, -0.4, 1.4), size_bytes=23_000_000),
        record(
            NASTY,
            0.893,
            3.4,
            chosen=True,
            loss=Interval(0.7, -0.4, 1.8),
            layers=(Layer("0", 12, 12, 700, 1536), Layer("1", 0, 12, 96, 1536)),
            target=Goal(3.0, 1.0),
            params=14_000_000,
            macs=60_000_000,
            minutes=20.0,
            seed=0,
            versus={"int8": Interval(0.2, -0.5, 0.9)},
            size_bytes=15_000_000,
        ),
    ]


def test_the_table_fits_eighty_columns() -> None:
    from rich.console import Console

    long = record(
        "a name that goes on and on until it is far too long for a table", -0.5, 12.34, loss=Interval(-10.5, -12.5, -8.5)
    )
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(draw_table([*rows(), long], "title [/] with markup"))
    text = console.export_text()
    assert all(len(line) <= 80 for line in text.splitlines())
    for figure in ("0.8930", "+0.7 −0.4..+1.8", "15.0", "3.40", "12.34", "-0.5000", "−10.5 −12.5..−8.5", "[b]bold[/b]", "[/]"):
        assert figure in text
    assert "…" not in text


def test_the_table_keeps_tasks_apart() -> None:
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(draw_table([BASE, record("cola", 0.5, task="cola", metric="matthews", scores={"matthews": 0.5})]))
    text = console.export_text()
    assert "teacher, glue/sst2: accuracy" in text
    assert "teacher, cola: matthews" in text
    assert "2 threads;" in text


def test_each_run_of_a_table_is_named_though_it_is_alone_in_its_group() -> None:
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    timings = (replace(timing(32, 2.0), threads=1),)
    other = record("cola", 0.5, task="cola", metric="matthews", scores={"matthews": 0.5}, run="runs/b", timings=timings)
    console.print(draw_table([replace(BASE, run="runs/a"), other]))
    text = console.export_text()
    assert "runs/a:" in text
    assert "runs/b:" in text
    assert "1 or 2 threads;" in text


class Checker(HTMLParser):
    """Collects mistakes of nesting, what is loaded from elsewhere, and the text."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.mistakes: list[str] = []
        self.outside: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [f"{name}={value}" for name, value in attrs if name in {"src", "href", "srcset", "onclick", "onload"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.mistakes.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        self.text += data


def check(path: Path) -> Checker:
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    checker.close()
    assert not checker.mistakes
    assert not checker.open
    return checker


def test_the_page_is_whole_self_contained_and_escaped(tmp_path: Path) -> None:
    answers = tuple(ChangedAnswer(str(number), (NASTY, "second"), "good", "good", "bad", -1.0) for number in range(60))
    write_page(rows(), tmp_path / "report.html", Details(answers, "slimformer compress ./a"))
    found = check(tmp_path / "report.html")
    assert not found.outside
    assert "script" not in found.tags
    assert found.tags.count("svg") == 6  # three pictures, wide and narrow
    text = " ".join(found.text.split())
    assert (
        "Goal open: 3.40 times as fast at batch 32 (asked: 3; 80 % interval of a round 3.31 to 3.49, from 12 rounds); 0.7 points of "
        "accuracy lost"
    ) in text
    assert "Ours beats the one rival that was measured." in text
    assert "Beats the teacher in ONNX Runtime dynamic int8 (int8)" in text
    assert "Not measured: the teacher in OpenVINO int8." in text
    assert "12 of 24 heads and 796 of 3,072 FFN neurons are kept. 1 of 4 sublayers are gone altogether." in text
    assert '<script>alert("x")</script> & [b]bold[/b]' in text  # shown as it is, not run
    assert "60 examples: 60 got worse, 0 got better. The first 40 are shown." in text
    assert "Some CPU, 2 cores; avx2" in text
    lines = (tmp_path / "changed.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 60
    assert json.loads(lines[0])["texts"] == [NASTY, "second"]


def test_theory_and_measured_speed_share_no_table(tmp_path: Path) -> None:
    write_page(rows(), tmp_path / "report.html")
    tables = re.findall(r"<table.*?</table>", (tmp_path / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    assert sum("multiply-accumulates" in found for found in tables) == 1
    assert not any("multiply-accumulates" in found and "batch 32" in found for found in tables)


def test_a_page_of_little_still_stands(tmp_path: Path) -> None:
    write_page([record("only", speed=None, size_bytes=None)], tmp_path / "report.html")
    found = check(tmp_path / "report.html")
    assert "svg" not in found.tags
    assert not (tmp_path / "changed.jsonl").exists()
    with pytest.raises(DataError, match="no records"):
        write_page([], tmp_path / "none.html")


def test_report_gathers_runs_and_shows_seeds(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        for row in rows():
            ours = row.role == Standing.OURS
            append_record(
                tmp_path / f"run{seed}" / "ledger.jsonl",
                replace(row, name="ours", seed=seed, scores={"accuracy": 0.89 + seed / 100})
                if ours
                else replace(row, seed=seed),
            )
    append_record(tmp_path / "run0" / "ledger.jsonl", record("other task", task="glue/rte"))
    records = report([tmp_path / f"run{seed}" for seed in (0, 1, 2)], tmp_path / "out")
    assert len(records) == 10
    assert [row.run for row in records[3:]] == ["run0"] + ["run1"] * 3 + ["run2"] * 3
    found = check(tmp_path / "out" / "report.html")
    text = " ".join(found.text.split())
    assert "0.9000 (0.8900 to 0.9100)" in text
    assert found.tags.count("h1") == 2  # a part for each task
    assert "One seed only" not in text.split("glue/rte")[0]
    assert "3 runs side by side: run0, run1, run2" in text
    assert "no other run is both faster and better in accuracy than run2." in text
    assert "run1: Goal open: 3.40 times as fast" in text
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for name in ("int8", "teacher fp32", "run0", "run1", "run2"):  # in each of two pictures, wide and narrow
        assert len(re.findall(rf'<text class="point[^>]*>{name}<', html)) == 4, name
    with pytest.raises(DataError, match="no records in"):
        report([tmp_path / "out"], tmp_path / "nothing")


def test_a_report_never_takes_the_place_of_a_runs_own_page(tmp_path: Path) -> None:
    append_record(tmp_path / "a" / "run" / "ledger.jsonl", BASE)
    append_record(tmp_path / "b" / "run" / "ledger.jsonl", replace(BASE, seed=3))
    append_record(tmp_path / "b" / "run" / "ledger.jsonl", replace(BASE, seed=3))  # a row that stands there twice
    (tmp_path / "a" / "run" / "report.html").write_text("its own")
    runs = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    with pytest.raises(OutputError, match="is the page that a run wrote") as refused:
        report(runs, tmp_path / "a" / "run")
    assert "choose another folder as --out" in str(refused.value)
    with pytest.raises(OutputError, match="is a file"):
        report(runs, tmp_path / "a" / "run" / "report.html")
    assert (tmp_path / "a" / "run" / "report.html").read_text() == "its own"
    assert [row.run for row in report(runs, tmp_path / "out")] == ["a/run", "b/run"]
    assert len(report(str(runs[0]), tmp_path / "out")) == 1
    assert [row.run for row in report([*runs, runs[0]], tmp_path / "out")] == [
        "a/run",
        "b/run",
    ]  # a run named twice counts once


def test_labels_of_a_crowded_picture_are_not_printed_over_each_other() -> None:
    draw = np.random.default_rng(3)
    marks = [
        Mark(x, y, f"a run of some name {number}", "chosen", "") for number, (x, y) in enumerate(draw.normal(4, 0.02, (14, 2)))
    ]
    for width, height in ((760, 400), (360, 340)):
        svg = draw_scatter(Scatter(marks, [], "speed", "accuracy", more_is_right=True), width, height)
        places = re.findall(r'<text class="point[^"]*" x="([\d.-]+)" y="([\d.-]+)" text-anchor="(\w+)">([^<]*)<', svg)
        boxes = []
        for x, y, anchor, label in places:
            wide = 6.5 * len(label)
            left = float(x) - {"start": 0.0, "end": wide, "middle": wide / 2}[anchor]
            boxes.append((left, float(y) - 10, left + wide, float(y)))
        for a, b in itertools.combinations(boxes, 2):
            assert min(a[2], b[2]) <= max(a[0], b[0]) + 1 or min(a[3], b[3]) <= max(a[1], b[1]) + 1


def test_a_noisy_round_hides_neither_points_nor_names() -> None:
    """Five runs on a busy machine: bars of 30 times the speed do not press the points together, and each run keeps its name."""
    runs = [
        ("small", 2.6, 0.97, 3.1),
        ("gates", 1.6, 0.93, 15.0),
        ("kron", 0.6, 0.5, 12.0),
        ("ks", 0.8, 0.58, 11.0),
        ("k3", 1.5, 0.98, 6.0),
    ]
    marks = [Mark(x, y, name, "chosen", "", (0.1, high)) for name, x, y, high in runs]
    marks += [Mark(1.0, 0.97, "dense fp32", "base", ""), Mark(1.1, 0.97, "dense int8", "rival", "", (0.1, 31.0))]
    for width in (760, 360):
        svg = draw_scatter(Scatter(marks, [], "speed", "accuracy", more_is_right=True), width, 400)
        for name, *_ in runs:
            assert f">{name}</text>" in svg
        ends = [float(x) for x in re.findall(r'class="spread" x1="[\d.]+" x2="([\d.]+)"', svg)]
        assert len(ends) == 6
        assert max(ends) <= width
        right, left = (float(x) for x in re.findall(r'class="m-chosen" cx="([\d.]+)"', svg)[1:5:3])
        assert (width - 76) / 4 < right - left  # of 2.0 times the speed


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_ticks_are_few_round_and_inside(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert 1 <= len(found) <= 12
    assert all(low - 1e-6 <= value <= low + span + 1e-6 for value in found)
    steps = {round((b - a) / span, 6) for a, b in itertools.pairwise(found)}
    assert len(steps) <= 2  # equal but for rounding


@given(
    st.lists(st.tuples(st.floats(0.1, 100), st.floats(-1, 1), st.text(max_size=8)), min_size=1, max_size=10),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_figures_stay_inside_their_frame(points: list[tuple[float, float, str]], wide: bool) -> None:
    marks = [Mark(x, y, label, "rival", label) for x, y, label in points]
    width = 760 if wide else 360
    svg = draw_scatter(Scatter(marks, [(x, y) for x, y, _ in points], "x < 3", "y & z", more_is_right=True), width, 340)
    assert not re.search(r'="[^"]*nan', svg)
    places = [float(value) for value in re.findall(r' (?:c?x)="(-?[\d.]+)"', svg)]
    assert all(-1 <= place <= width + 1 for place in places)
    checker = Checker()
    checker.feed(svg)
    assert not checker.mistakes


def test_bars_show_what_is_gone() -> None:
    svg = draw_bars([("heads", [("0", 3, 12), ("1", 0, 12)])], width=360, columns=1)
    assert "3 of 12" in svg
    assert ">gone<" in svg
    assert svg.count('class="kept"') == 1


# -- The model card ----------------------------------------------------------------------------------------------------------


TASK = Classification(kind="classes", labels=("bad", "good"))


def make_card(folder: Path, **changes: Any) -> str:
    ours = replace(rows()[2], name="small | model", file="model_quantized.onnx", precision="int8_dynamic")
    code = TASK.snippet(folder, ours.file, [("great film",), ('dull "dull" ```',)], 16)
    return write_card(folder, Card(ours, (BASE, ours), code, **changes))


def test_the_snippet_of_the_card_runs_without_us(tmp_path: Path) -> None:
    folder = export(tmp_path / "model", ("model.onnx", "model_quantized.onnx"))
    make_card(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert len(blocks) == 1
    assert len([line for line in blocks[0].splitlines() if line.strip()]) == 13
    for part in ("intra_op_num_threads", 'allow_spinning", "0"', "np.int64"):
        assert part in blocks[0]
    assert "slimformer" not in blocks[0]
    refuse = "import sys\nsys.modules.update(slimformer=None, torch=None, transformers=None)\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", refuse + blocks[0]], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # The two texts have different lengths: only padding with the right id and mask gives these two.
    assert done.stdout.strip() == "['good', 'bad']"


def test_the_card_tells_the_hub(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    folder = export(tmp_path / "model", ("model_quantized.onnx",))
    text = make_card(folder, base_model="owner/bert")
    told = ModelCard(text).data
    assert (told.base_model, told.base_model_relation, told.pipeline_tag) == ("owner/bert", "quantized", "text-classification")
    assert (told.library_name, told.metrics) == ("onnx", ["accuracy"])
    assert {"onnx", "slimformer", "pruned", "int8"} <= set(told.tags)
    assert told.eval_results[0].metric_value == 0.893
    assert told.eval_results[0].dataset_split == "dev"
    assert r"# small \| model" in text
    assert r"| small \| model | 0.8930 | +0.7 (−0.4 to +1.8) | 15.0 | 3.40 | 3.40" in text
    assert "datasets" not in told.to_dict()
    known = ModelCard(make_card(folder, data="owner/reviews", license="mit", language=("en",))).data
    assert (known.datasets, known.license, known.language) == (["owner/reviews"], "mit", ["en"])
    assert known.eval_results[0].dataset_type == "owner/reviews"
    plain = ModelCard(make_card(folder, base_model="./my-bert")).data
    assert plain.base_model is None
    assert "base_model_relation" not in plain.to_dict()


def test_the_card_names_the_runtime_that_reads_the_file_and_escapes_no_more_than_it_must(tmp_path: Path) -> None:
    folder = export(tmp_path / "model", ("model_quantized.onnx",))
    text = make_card(folder, notes=("opset 20, IR version 9: needs ONNX Runtime 1.17 or newer", "a (b) c_d *e* 1. f"))
    assert "`pip install 'onnxruntime>=1.17' tokenizers numpy`" in text
    assert "- a (b) c_d \\*e\\* 1. f" in text
    shown = make_card(export(tmp_path / "two"), notes=("# a", "1. b", "- c", "2026-01-02", "-0.3 points", "x_"))
    for line in ("- \\# a", "- 1\\. b", "- \\- c", "- 2026-01-02", "- -0.3 points", "- x\\_"):
        assert f"\n{line}\n" in shown


def test_a_card_of_no_use_is_not_found_by_its_task(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    folder = export(tmp_path / "model", ("model_quantized.onnx",))
    ours = replace(rows()[2], file="model_quantized.onnx", scores={"accuracy": 0.5}, chance=0.6)
    text = write_card(folder, Card(ours, (BASE, ours), "print()"))
    assert ModelCard(text).data.pipeline_tag is None
    assert "\nWorse than doing nothing: it scores 0.5000" in text


def test_license_and_language_are_those_of_the_base_model(tmp_path: Path) -> None:
    assert told_of(tmp_path) == {}
    for text, wanted in (
        ("---\nlicense: mit\nlanguage: en\n---\nhello", {"license": "mit", "language": ("en",)}),
        ("---\nlicense: [a]\nlanguage: [en, de]\n---\n", {"license": "", "language": ("en", "de")}),
        ("no metadata", {"license": "", "language": ()}),
        ("---\n: [\n---\n", {}),
    ):
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
        assert told_of(tmp_path) == wanted


def test_a_score_is_printed_as_a_number(tmp_path: Path) -> None:
    folder = export(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"id2label": {"0": "score"}, "problem_type": "regression"}))
    shown = Classification(kind="score").snippet(folder, "model.onnx", [("a", "b")], 16)
    assert 'print(session.run(["logits"], feeds)[0][:, 0])' in shown
    assert 'encode_batch([("a", "b")])' in shown
