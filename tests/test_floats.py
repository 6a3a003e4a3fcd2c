"""Which matrices stay in float: the search on cases worked by hand, verdicts with reasons, and real files rescued by it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tiny_folder import write_data, write_model

from slimformer.core.plan import Plan
from slimformer.data.material import prepare
from slimformer.errors import RecipeError
from slimformer.exporters._onnx import mixed
from slimformer.exporters._onnx.mixed import int8_speedups, product_graph, products_at, search_floats
from slimformer.exporters.base import FILES, SHIPPED, Artifact, Exporter, FileKind, MixedPrecision, Variant
from slimformer.exporters.onnx import Onnx, OnnxDraft, quantized_matrices
from slimformer.families.base import subject_of
from slimformer.forms.base import ProductShape
from slimformer.log import Log
from slimformer.measuring.machine import Quiet
from slimformer.measuring.sessions import open_session
from slimformer.running import rescue
from slimformer.running.bundle import Bundle, Made, Run
from slimformer.running.candidate import Candidate, candidate_of
from slimformer.running.exports import export_files, read_notes
from slimformer.running.reader import parse_recipe
from slimformer.running.recipe import Export
from slimformer.running.runner import run as run_recipe
from slimformer.running.trials import Judge, Reference, Trial, judge_of
from slimformer.saving import checkpoint
from slimformer.tasks.classification import Classification

GAINS = {"a": 2.0, "b": 3.0, "c": 0.9, "d": 2.5, "e": 2.0}
COST = {"a": 1.0, "b": 6.0, "c": 0.5, "d": 2.0, "e": 0.0}  # squared error that each makes in int8; points lost are the same


class Clock:
    """Time that passes only where something is tried: a second each."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def preflight(allowed: float, seconds: float = 1000.0) -> tuple[MixedPrecision, list[tuple[str, ...]]]:
    """The search among five points that do not disturb each other, and all that it looked at for the loss."""
    clock = Clock()
    seen: list[tuple[str, ...]] = []

    def error(kept: Sequence[str]) -> float:
        clock.now += 1
        return sum(cost for point, cost in COST.items() if point not in kept)

    def loss(kept: Sequence[str]) -> float:
        seen.append(tuple(kept))
        return error(kept)

    return search_floats(GAINS, error, loss, allowed, seconds=seconds, clock=clock), seen


def test_where_all_int8_is_good_only_the_slow_one_stays() -> None:
    choice, seen = preflight(allowed=9.0)
    assert choice.floats == ("c",)
    assert choice.loss == 9.0
    assert choice.within
    assert seen == [("c",)]
    reasons = {verdict.point: str(verdict) for verdict in choice.assignments}
    assert reasons["c"] == "c: float; int8 is 0.90 times as fast on this machine"
    assert reasons["a"] == "a: int8; 2.00 times as fast on this machine"


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [(8.9, ("b", "c")), (3.0, ("b", "c")), (2.9, ("b", "c", "d")), (0.0, ("a", "b", "c", "d"))],
)
def test_the_costliest_stay_as_few_as_need_be(allowed: float, expected: tuple[str, ...]) -> None:
    choice, _ = preflight(allowed)
    assert choice.floats == expected
    assert choice.within
    assert choice.loss == sum(cost for point, cost in COST.items() if point not in expected)
    reasons = {verdict.point: str(verdict) for verdict in choice.assignments}
    assert reasons["b"] == "b: float; in int8 it makes 67% of the outputs' squared error, and the file loses too much"
    assert reasons["e"] == "e: int8; 2.00 times as fast on this machine, 0% of the outputs' squared error"
    assert [verdict.point for verdict in choice.assignments if not verdict.int8] == list(expected)


def test_where_nothing_is_within_the_loss_the_least_is_given_and_said() -> None:
    choice, _ = preflight(allowed=-1.0)
    assert not choice.within
    assert choice.floats == ("a", "b", "c", "d")  # e costs nothing: it is never tried in float
    assert choice.loss == 0.0


def test_time_is_limited_and_what_was_not_tried_is_told() -> None:
    choice, seen = preflight(
        allowed=0.0, seconds=6.0
    )  # one look at the loss, one at the error, then one point each until half is gone
    assert "e: int8; 2.00 times as fast on this machine; not tried in float, the time was up" in map(str, choice.assignments)
    assert not choice.within
    assert len(seen) <= 3


def test_any_number_of_points_is_searched_to_the_fewest() -> None:
    for count in range(1, 12):
        points = {f"p{number}": 2.0 for number in range(12)}

        def loss(kept: Sequence[str], count: int = count) -> float:
            return float(len(kept) < count)

        def error(kept: Sequence[str]) -> float:
            return float(12 - len(kept))

        assert len(search_floats(points, error, loss, 0.0, clock=Clock()).floats) == count


def test_gains_are_timed_once_a_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed, "SHAPE_ROUNDS", 3)
    built = []
    products = product_graph
    monkeypatch.setattr(mixed, "product_graph", lambda shape, small: (built.append((shape, small)), products(shape, small))[1])
    one, two, more_rows = (ProductShape(1, 32, 24),), (ProductShape(1, 32, 32),) * 2, (ProductShape(3, 32, 24),)
    found = int8_speedups([one, two, one, more_rows], 16, 1, tmp_path)
    assert found[0] == found[2]
    assert all(gain > 0 for gain in found)
    assert built == [(shape, small) for shape in (one, two, more_rows) for small in (False, True)]


def test_a_timed_product_computes_the_same_kind_of_thing(tmp_path: Path) -> None:
    for small in (False, True):
        path = tmp_path / f"{small}.onnx"
        path.write_bytes(product_graph((ProductShape(1, 8, 4), ProductShape(1, 8, 6)), small))
        found = open_session(path, 1)({"x": np.zeros((3, 8), dtype=np.float32)})
        assert [value.shape for value in found.values()] == [(3, 4), (3, 6)]
        assert quantized_matrices(path) == 2 * small


# -- Real files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Callable[[str], Run]]:
    home = tmp_path_factory.mktemp("home")
    source = write_model(home / "model")
    task = Classification(data=str(write_data(home / "data"))).bind(checkpoint.read_config(source))
    model = checkpoint.load(source)

    def run(name: str) -> Run:
        (home / name).mkdir(exist_ok=True)
        return Run(home / name, home / name, Log(home / name, quiet=True), threads=1, quiet=Quiet(0))

    return Bundle(subject_of(model), Plan(), prepare(task, source), subject_of(model)), run


@pytest.mark.slow
def test_every_matrix_of_a_model_gets_a_verdict(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, run = made
    monkeypatch.setattr(mixed, "int8_speedups", lambda every, *_: [0.5 if shapes[0].width == 24 else 2.0 for shapes in every])
    state = run("verdicts")
    judge = Judge(bundle.material, {}, Reference(1.0, None), 1, 0.0, state.log)
    # more than all right is not to be had; the time is ample, so that a busy machine tries as much as an idle one
    draft = rescue.draft_of(bundle)
    assert isinstance(draft, OnnxDraft)
    choice = rescue.mix_precision(draft, judge, state.root, -200.0, seconds=600.0)
    assert not choice.within
    assert [verdict.point for verdict in choice.assignments] == [point.id for point in draft.points]
    slow = [f"encoder.{layer}.ffn_out.input" for layer in range(3)]  # 24 wide: slow, said the clock
    assert [verdict.point for verdict in choice.assignments if "int8 is 0.50 times" in verdict.reason] == slow
    assert set(slow) <= set(choice.floats)
    assert any("squared error" in verdict.reason for verdict in choice.assignments)
    read = products_at(bundle.subject.model, draft.subject.anatomy.points["encoder.0.attention.input"].modules)
    assert read == (ProductShape(1, 32, 32),) * 3


@pytest.mark.slow
def test_a_model_whose_int8_files_lose_too_much_is_rescued_once(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, run = made
    state = run("rescue")
    monkeypatch.setattr("slimformer.measuring.machine.saturates", lambda _: True)
    judge = judge_of(bundle, state)
    judge_of(bundle, state)
    said = [json.loads(line).get("text", "") for line in (state.root / "log.jsonl").read_text().splitlines()]
    assert sum("no VNNI" in line and "reduce_range: true" in line for line in said) == 1  # once a run
    whole = candidate_of(Made(bundle), (), state.root / "whole", judge, state)
    assert read_notes(whole.folder)["model_quantized.onnx"]
    lost = [Trial(item.variant, item.score, 99.0, item.speed_32, item.speed_1, item.size_bytes) for item in whole.trials]
    lost[0] = Trial(Variant.FLOAT, 1.0, 0.0, 1e-9, 1e-9, 1)  # no test may fail by a speed: nothing is slower than this one
    bad = replace(whole, trials=tuple(lost))
    rescued = rescue.rescue(bad, judge, state, 20.0)
    assert rescued is not None
    assert rescued.best_int8(20.0).loss <= 20.0
    assert {trial.variant for trial in rescued.trials} == set(SHIPPED)
    notes = read_notes(rescued.folder)["model_quantized.onnx"]
    told = [note for note in notes if note.startswith("encoder.") and "; " in note]
    assert len(told) == 3 * 4
    assert sum(": float; " in note for note in notes) == len(rescued.floats)
    monkeypatch.setattr(rescue, "mix_precision", lambda *_: pytest.fail("it was kept"))
    assert rescue.rescue(bad, judge, state, 20.0) == rescued
    worse = replace(bad, trials=(Trial(Variant.FLOAT, 0.5, 50.0, 1.0, 1.0, 1), *lost[1:]))
    assert rescue.rescue(worse, judge, state, 20.0) is None  # the model itself loses too much


@pytest.mark.slow
def test_a_recipe_may_name_them(made: Any) -> None:
    bundle, run = made
    state = run("named")
    names = ("encoder.0.attention.input", "encoder.2.ffn_out.input")
    files = export_files(
        bundle.subject, bundle.material, state.root / "files", [Variant.INT8_FUSED], state.log, exporter=Onnx(floats=names)
    )
    assert quantized_matrices(files[Variant.INT8_FUSED]) == 19 - 4


@pytest.mark.slow
def test_a_recipe_may_have_them_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed, "int8_speedups", lambda every, *_: [0.5 if shapes[0].width == 24 else 2.0 for shapes in every])
    data = {
        "model": str(write_model(tmp_path / "model")),
        "task": {"use": "classification", "data": str(write_data(tmp_path / "data"))},
        "stages": [{"export": {"floats": "auto", "choose_within": 50.0}}, {"bench": {"seconds": 0.1, "rivals": []}}],
    }
    recipe = parse_recipe(data)
    assert parse_recipe(recipe.to_data()) == recipe
    assert recipe.export.exporter() == Export().exporter()
    log = Log(tmp_path / "out", quiet=True)
    run_recipe(recipe, tmp_path / "out", log=log, threads=1, wait_seconds=0.0)
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    verdicts = {line["point"]: line["reason"] for line in lines if line["kind"] == "verdict"}
    assert len(verdicts) == 3 * 4 + 1  # and what the pooler reads
    assert verdicts["encoder.1.ffn_out.input"] == "int8 is 0.50 times as fast on this machine"
    left_out = any("not faster than the best file without" in line.get("text", "") for line in lines)
    told = "int8 is 0.50 times as fast on this machine" in (tmp_path / "out" / "README.md").read_text()
    best = json.loads((tmp_path / "out" / "slimformer.json").read_text())["best"]
    assert told == (not left_out and best != "onnx/model.onnx")


def test_nothing_else_is_a_choice_of_points() -> None:
    with pytest.raises(RecipeError, match=r"export\.floats"):
        parse_recipe({"model": "x", "task": "intents", "stages": [{"export": {"floats": "all"}}]})


@dataclass(frozen=True)
class FloatOnly(Exporter):
    """Writes one file, and has no mixed precision."""

    files: ClassVar[Mapping[str, FileKind]] = {Variant.FLOAT: FILES[Variant.FLOAT]}

    def export(self, model: Any, batches: Any, path: Path, variant: str, outputs: Any = (), ranges: Any = None) -> Artifact:
        return Onnx().export(model, batches, path, variant, outputs, ranges)


@pytest.mark.parametrize("kept", [None, '["encoder.0.heads.input"]', "{"], ids=["nothing", "an older version's", "half"])
def test_a_rescue_that_cannot_be_read_is_made_again(made: Any, tmp_path: Path, kept: str | None) -> None:
    bundle, _ = made
    log = Log(tmp_path, quiet=True)
    trials = (Trial(Variant.FLOAT, 1.0, 0.0, 1.0, 1.0, 1),)
    candidate = Candidate(Made(bundle), (), FloatOnly.files, trials, tmp_path / "files")
    if kept is not None:
        (tmp_path / "floats-1.json").write_text(kept, encoding="utf-8")
    judge = Judge(bundle.material, {}, Reference(1.0, None), 1, 0.0, log)
    run = Run(tmp_path, tmp_path, log)
    for _ in range(2):
        assert rescue.rescue(candidate, judge, run, 1.0, exporter=FloatOnly()) is None
    said = [json.loads(line)["text"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert said == ["this exporter leaves no single matrices in float."] * 2


@pytest.mark.slow
def test_files_of_other_weights_are_not_taken_for_these(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed run may come back with other data, and then with another model, into the same folder."""
    bundle, run = made
    state = run("again")
    judge = judge_of(bundle, state)
    model = copy.deepcopy(bundle.subject.model)
    with torch.no_grad():
        model.classifier.bias += torch.tensor([100.0, -100.0])
    changed = replace(bundle, subject=subject_of(model))
    first, other = (
        candidate_of(Made(each), (), state.root / "export", judge, state, FloatOnly()) for each in (bundle, changed)
    )
    assert first.trials[0].score > 0.9 > other.trials[0].score
    assert first.files[Variant.FLOAT].read_bytes() != other.files[Variant.FLOAT].read_bytes()
    monkeypatch.setattr("slimformer.running.candidate.export_files", lambda *_, **__: pytest.fail("it was kept"))
    assert candidate_of(Made(bundle), (), state.root / "export", judge, state, FloatOnly()) == first
