"""The plan of a run's time: what fits into a budget, what is left out for it, and what is said at the end."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from slimformer.data.material import spaced_rows
from slimformer.errors import RecipeError
from slimformer.log import Log
from slimformer.running.schedule import (
    RESERVE,
    Diet,
    Pace,
    Part,
    Schedule,
    Sizes,
    all_steps,
    copies_of,
    cut_step,
    diet_for,
    duration,
    forecast,
    passes_within,
    savings,
    teaching,
    timing,
)
from slimformer.tasks.base import Features
from slimformer.training.stage import Train

INTENTS = Sizes(layers=6, train_tokens=98_000, train_rows=5_400, validation_tokens=10_000, dev_tokens=25_000, tuned=False)
SST2 = Sizes(layers=6, train_tokens=900_000, train_rows=66_000, validation_tokens=50_000, dev_tokens=22_000, tuned=True)
PACE = Pace(step=1 / 1700, read=1 / 5000)
FULL = Diet(tune_passes=5.0, passes=12.0)


@pytest.mark.parametrize("sizes", [INTENTS, SST2])
@pytest.mark.parametrize("minutes", [5, 10, 30, 120])
def test_a_plan_fits_its_budget_and_uses_it(sizes: Sizes, minutes: int) -> None:
    full = replace(FULL, tune_passes=0.0 if sizes.tuned else 5.0)
    diet = diet_for(sizes, PACE, full, (3.0,), 60.0 * minutes, 32)
    needed = sum(forecast(sizes, PACE, diet, 3.0).values())
    assert needed <= 60 * minutes * 1.001
    assert diet == full or needed > 0.85 * 60 * minutes


def test_more_minutes_never_train_less() -> None:
    diets = [diet_for(INTENTS, PACE, FULL, (3.0,), 60.0 * minutes, 32) for minutes in (5, 8, 13, 21, 34, 55, 89)]
    for short, long in pairwise(diets):
        assert long.tune_passes >= short.tune_passes
        assert long.examples >= short.examples
        assert long.bench_seconds >= short.bench_seconds
        assert long.rival >= short.rival
    assert diets[-1] == FULL


def test_too_few_minutes_are_refused_with_the_least_that_works() -> None:
    with pytest.raises(RecipeError, match=r"too few on this machine") as refused:
        diet_for(INTENTS, PACE, FULL, (3.0,), 30.0, 32)
    least = int(str(refused.value).rpartition("--minutes ")[2].rstrip("."))
    diet_for(INTENTS, PACE, FULL, (3.0,), 60.0 * least * (1 - RESERVE), 32)


def test_levels_share_the_time_and_too_few_minutes_name_the_speeds_they_suffice_for() -> None:
    full, aims = replace(FULL, tune_passes=0.0), (2.0, 4.0, 8.0)
    one, three = (forecast(SST2, PACE, full, *some) for some in ((2.0,), aims))
    steps = [cut_step(PACE, aim) for aim in aims]
    reading = SST2.train_tokens * 5 * PACE.read  # rows and four copies, once for all levels
    assert one[Part.DISTILLING] == pytest.approx(reading + 12 * SST2.train_tokens * steps[0])
    assert three[Part.DISTILLING] == pytest.approx(reading + 12 * SST2.train_tokens * sum(steps))
    assert all_steps(PACE, aims, rival=True) == pytest.approx(sum(steps) + steps[0] + steps[1])  # as long as the middle level
    assert three[Part.TRYING] == pytest.approx(4 * one[Part.TRYING])  # the uncut model's files ship too
    diet = diet_for(SST2, PACE, full, aims, 3600.0, 32)
    assert 0.85 * 3600 < sum(forecast(SST2, PACE, diet, *aims).values()) <= 3600.001
    short = diet_for(SST2, PACE, full, aims, 1500.0, 32)
    assert short.examples < diet_for(SST2, PACE, full, (4.0,), 1500.0, 32).examples  # each level weighs anew
    assert diet.passes < diet_for(SST2, PACE, full, (4.0,), 3600.0, 32).passes
    with pytest.raises(RecipeError) as refused:
        diet_for(SST2, PACE, full, aims, 300.0, 32)
    least, fewer = str(refused.value).rpartition("--minutes ")[2].split(", or --speedups ")
    assert fewer == "2."
    diet_for(SST2, PACE, full, aims, 60.0 * int(least) * (1 - RESERVE), 32)
    diet_for(SST2, PACE, full, (2.0,), 300.0, 32)


def test_few_passes_go_over_fewer_rows_so_that_the_teacher_reads_less() -> None:
    step = cut_step(PACE, 3.0)
    whole = teaching(SST2, PACE, 2.0, step) - 2 * SST2.train_tokens * step
    half = teaching(SST2, PACE, 1.0, step) - SST2.train_tokens * step
    assert whole == pytest.approx(SST2.train_tokens * PACE.read)
    assert half == pytest.approx(whole / 2)
    passes = passes_within(SST2, PACE, 300.0, 12.0, 2 * step)
    assert teaching(SST2, PACE, passes, 2 * step) == pytest.approx(300.0, rel=1e-3)
    assert passes_within(SST2, PACE, 1e9, 12.0, 2 * step) == 12.0
    assert [copies_of(passes) for passes in (2.0, 5.9, 6.0, 12.0, 40.0)] == [0, 0, 2, 4, 4]


def test_timing_of_little_data_ends_before_its_seconds() -> None:
    assert timing(INTENTS.dev_tokens, PACE, 60.0) == 120.0
    few = replace(INTENTS, dev_tokens=550, validation_tokens=600)
    quick = Pace(1 / 8000, 1 / 24000)
    assert timing(few.dev_tokens, quick, 60.0) == pytest.approx(2 * 6 * 31 * 550 / 24000)
    assert forecast(few, quick, FULL, 3.0)[Part.MEASURING] < 20


def test_what_is_left_out_is_said() -> None:
    assert savings(FULL, FULL, None, INTENTS) == []
    lean = Diet(tune_passes=1.0, passes=1.0, examples=300, tries=1, rival=False, bench_seconds=10.0)
    assert savings(FULL, lean, 2_700, INTENTS) == [
        "the model is tuned for 1 epochs, not 5",
        "distillation makes 2 passes over 2,700 of 5,400 rows, not 12",
        "no smaller dense rival is trained",
        "1 budget is planned, not up to 3, and no search for matrices that int8 had better leave in float",
        "importance is measured on 300 examples, not 2,048",
        "each workload is timed for 10 seconds at the end, not 60",
    ]


def test_time_counts_on_after_a_kill_and_is_compared_with_what_was_announced(tmp_path: Path) -> None:
    with Schedule(tmp_path, 10.0, Log(tmp_path)) as first, first.part(Part.TUNING):
        pass
    (tmp_path / "schedule" / "seconds").write_text("240")
    with Schedule(tmp_path, 10.0, Log(tmp_path)) as again:
        assert again.spent == pytest.approx(240, abs=5)
        assert again.left == pytest.approx(600 * (1 - RESERVE) - 240, abs=5)
        again.announce({Part.TUNING: 100.0, Part.MEASURING: 50.0})
        again._taken = {Part.TUNING: 150.0}
        assert again.slowness(Part.TUNING, Part.MEASURING) == 1.5
        assert again.slowness(Part.RIVAL) == 1.0
        assert again.taken(Part.RIVAL) == 0.0
        assert again.taken(Part.TUNING) == 150.0
        again.compare()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines if line["kind"] == "say"] == [
        "about 2.5 minutes in all: tuning the model 1.7 minutes, measuring side by side 50 seconds.",
        "it took 4.0 minutes, announced were 2.5 minutes; by part (announced): tuning the model 2.5 minutes (1.7 minutes).",
    ]
    assert Schedule(tmp_path / "free", None, Log(None)).left == float("inf")


def test_seconds_in_words() -> None:
    assert [duration(seconds) for seconds in (0.4, 60, 100, 6000)] == ["0 seconds", "60 seconds", "1.7 minutes", "1.7 hours"]


def test_some_rows_are_spaced_over_all() -> None:
    features = Features({"input_ids": [np.arange(n + 1) for n in range(10)], "labels": list(range(10))}, list(range(10)), 0, 0)
    some = spaced_rows(features, 4)
    assert some.columns["labels"] == [0, 3, 6, 9]
    assert list(some.example) == [0, 3, 6, 9]
    assert spaced_rows(features, 10) is features
    assert Train(rows=4).rows == 4
    with pytest.raises(RecipeError):
        Train(rows=0)
