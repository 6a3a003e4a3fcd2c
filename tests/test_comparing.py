"""`compare`: what is shortened, which recipes go on, what the time allows, and one comparison from end to end."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tiny_folder import recipe_in as recipe
from tiny_folder import write_home

from slimformer.errors import RecipeError
from slimformer.log import Log
from slimformer.measuring.machine import environment
from slimformer.measuring.records import Forecast, Interval, Record
from slimformer.measuring.timing import SINGLE, SORTED, Ratio
from slimformer.methods.distillation import Distillation
from slimformer.methods.fisher import Fisher
from slimformer.methods.layers import Layers
from slimformer.running import shapes
from slimformer.running.comparing import (
    Budget,
    Comparison,
    Tried,
    _check,
    _from_model,
    _students,
    beaten_by,
    compare_recipes,
    short_run,
)
from slimformer.running.fresh import Fresh
from slimformer.running.recipe import Bench, Recipe
from slimformer.running.shapes import StudentShape, timed_shapes, worth_trying
from slimformer.tasks.classification import Classification
from slimformer.training.stage import Calibrate, Train

ROW = Record("ours", "ours", "my-bert", "reviews", "dev", "accuracy", {"accuracy": 0.9}, "2026-01-02", environment())


def tried(name: str, loss: float, fast: float, single: float, megabytes: float) -> Tried:
    ratios = {SORTED: Ratio(fast, fast, fast), SINGLE: Ratio(single, single, single)}
    row = replace(
        ROW,
        forecast=Forecast(Ratio(fast, fast, fast), 10, loss),
        loss=Interval(loss + 1, loss, loss + 2),
        speed=ratios,
        size_bytes=int(megabytes * 1e6),
    )
    return Tried(name, "kept", "", row, 1.0)


def test_one_is_beaten_only_if_another_is_as_good_in_everything() -> None:
    base = tried("base", 1.0, 4.0, 2.0, 10.0)
    for better in (tried("a", 0.9, 4.0, 2.0, 10.0), tried("b", 1.0, 4.1, 2.0, 10.0), tried("c", 1.0, 4.0, 2.1, 10.0)):
        assert beaten_by(base, [base, better]) is better
        assert beaten_by(better, [base, better]) is None
    assert beaten_by(base, [base, tried("same", 1.0, 4.0, 2.0, 10.0)]) is None
    for other in (tried("d", 1.1, 9.0, 9.0, 1.0), tried("e", 0.0, 3.9, 9.0, 1.0), tried("f", 0.0, 9.0, 1.9, 1.0)):
        assert beaten_by(base, [base, other]) is None
    assert beaten_by(base, [base, tried("g", 0.0, 9.0, 9.0, 10.1)]) is None
    assert beaten_by(base, [base, Tried("h", "failed")]) is None


def test_a_short_run_has_a_part_of_the_passes_and_no_rivals() -> None:
    stages = (Calibrate(Fisher(keep=0.5)), Train(epochs=2.0, methods=(Distillation(),)), Train(steps=100), Train(steps=1))
    short = short_run(Recipe("model", Classification(data="data"), stages, bench=Bench(seconds=60.0)), 0.25)
    assert short.stages[0] == stages[0]
    assert short.stages[1] == replace(stages[1], epochs=0.5)
    assert [stage.steps for stage in short.stages[2:]] == [25, 1]  # type: ignore[union-attr]
    assert short.bench == Bench(rivals=(), seconds=5.0)


def test_the_time_allows_the_first_run_and_those_that_would_end() -> None:
    now = [0.0]
    left = Budget(60.0, lambda: now[0], 0.0)
    assert left.allows(30.0, 0.5)
    now[0] = 600.0  # ten minutes
    assert left.allows(20.0, 0.5)
    assert not left.allows(20.1, 0.5)
    assert left.allows(50.0, 1.0)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return write_home(tmp_path)


@pytest.mark.slow
def test_recipes_that_cannot_be_compared_are_named_together(home: Path) -> None:
    good = recipe(home, Calibrate(Fisher(keep=0.5)))
    out = home / "out"
    with pytest.raises(RecipeError, match="two recipes or more"):
        compare_recipes([good], out, hours=1)
    (home / "one.yaml").write_text(good.to_yaml(), encoding="utf-8")
    with pytest.raises(RecipeError, match="two recipes are called one"):
        compare_recipes([home / "one.yaml", home / "one.yaml"], out, hours=1)
    other = replace(good, task=Classification(data=str(home / "data"), max_length=8))
    gone = replace(good, model=str(home / "nowhere"))
    with pytest.raises(RecipeError) as error:
        compare_recipes([good, other, gone], out, hours=1)
    assert "recipe-2: another task or other data than recipe-1" in str(error.value)
    assert "recipe-3: " in str(error.value)
    assert not out.exists()


@pytest.mark.slow
def test_a_comparison_runs_whole_what_nothing_beats_and_resumes(home: Path) -> None:
    tuning = Train(epochs=1.0)
    chains = {
        "half": recipe(home, tuning, Calibrate(Fisher(keep=0.6)), Train(epochs=1.0, methods=(Distillation(),))),
        "shallow": recipe(home, tuning, Calibrate(Layers(keep=0.4))),
    }
    files = []
    for name, chain in chains.items():
        files.append(home / f"{name}.yaml")
        files[-1].write_text(replace(chain, model="gone", teacher=None).seen_from(home).to_yaml(), encoding="utf-8")

    def compared() -> Comparison:
        """By a clock that is a minute further each time it is asked: after the short runs there is time for one more."""
        minutes = count()
        options: dict[str, Any] = {"hours": 0.24, "part": 0.5, "model": home / "model", "wait_seconds": 0.0}
        return compare_recipes(files, home / "out", clock=lambda: 60.0 * next(minutes), **options)

    found = compared()
    assert [item.name for item in found.tried] == ["half", "shallow"]
    assert sorted(item.end for item in found.tried) in (["kept", "no time"], ["beaten", "kept"])
    assert len(found.kept) == 1
    assert (home / "out" / "report.html").is_file()
    for item in found.kept:
        folder = home / "out" / "whole" / item.name
        assert (folder / "ledger.jsonl").is_file()
        assert item.record is not None
        assert item.record.loss is not None
    assert "no other beats: " in found.lines()[-1]
    assert all(item.name in "\n".join(found.lines()) for item in found.tried)
    before = {path: path.stat().st_mtime_ns for path in (home / "out").rglob("ledger.jsonl")}
    (home / "out" / "seconds").write_text("840.0", encoding="utf-8")  # the hours are used up: no other run begins
    again = compared()
    assert all(item.minutes > 0 for item in again.kept)
    assert {item.name: round(item.minutes, 1) for item in again.tried} == {
        item.name: round(item.minutes, 1) for item in found.tried
    }
    assert [item.name for item in again.kept] == [item.name for item in found.kept]
    assert before == {path: path.stat().st_mtime_ns for path in (home / "out").rglob("ledger.jsonl")}


def test_a_student_keeps_its_shape_and_learns_from_the_model_that_is_named(home: Path) -> None:
    student = Recipe(
        Fresh("bert", config={"num_hidden_layers": 1}),
        Classification(data=str(home / "data")),
        (Train(epochs=1.0, methods=(Distillation(hidden=0.0),)),),
        teacher="elsewhere",
    )
    moved = _from_model(student, home / "model")
    assert moved == replace(student, teacher=str(home / "model"))
    plain = recipe(home, Train(epochs=1.0), Calibrate(Fisher()))
    assert _from_model(plain, "there") == replace(plain, model="there", stages=plain.stages[1:])


@pytest.mark.slow
def test_shapes_of_students_are_timed_and_the_fast_ones_for_their_size_are_tried(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "DEPTHS", (0.5,))
    monkeypatch.setattr(shapes, "WIDTHS", (0.25, 1.0))
    first = recipe(home, Train(epochs=3.0))
    timed = timed_shapes(home / "model", first.task, Log(None))
    assert [(shape.name, shape.config["num_attention_heads"]) for shape in timed] == [("bert-2x8", 1), ("bert-2x32", 4)]
    assert all(shape.ms > 0 for shape in timed)
    made = _students({"first": first}, home / "model", 2, None, Log(None), home / "out")
    assert 1 <= len(made) <= 2
    for name, item in made.items():
        assert isinstance(item.model, Fresh)
        assert name.startswith("bert-")
        assert item.teacher == str(home / "model")
        assert item.stages[0].epochs == 3.0  # type: ignore[union-attr]
    _check(made)
    monkeypatch.setattr(shapes, "WIDTHS", (0.5,))  # they are not timed again
    assert _students({"first": first}, home / "model", 2, None, Log(None), home / "out") == made
    with pytest.raises(RecipeError, match="students are made from a model"):
        compare_recipes([first, first], home / "out", hours=1, students=2)


def test_a_shape_that_another_beats_is_not_tried() -> None:
    timed = [
        StudentShape("small", {}, 10, 1.0),
        StudentShape("slow", {}, 10, 1.5),
        StudentShape("large", {}, 30, 3.0),
        StudentShape("lean", {}, 20, 2.0),
    ]
    assert [shape.name for shape in worth_trying(timed, 9)] == ["small", "lean", "large"]
    assert [shape.name for shape in worth_trying(timed, 1)] == ["lean"]
    assert [shape.name for shape in worth_trying(timed, 2)] == ["small", "large"]


def test_what_there_is_no_time_for_is_told(home: Path) -> None:
    chains = [recipe(home, Calibrate(Fisher(keep=0.6))), recipe(home, Calibrate(Fisher(keep=0.5)))]
    found = compare_recipes(chains, home / "out", hours=1e-6, wait_seconds=0.0)
    assert [item.end for item in found.tried] == ["no time", "no time"]
    assert "no time left: it needs some" in found.lines()[0]
    assert found.lines()[-1] == "no other beats: none"
