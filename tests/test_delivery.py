"""What is chosen among files and from which scores: hand-worked cases, and real small files on validation examples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_export import data, export
from tiny_folder import write_data, write_model

from slimformer.core.anatomy import Role
from slimformer.core.plan import Plan
from slimformer.data.material import prepare
from slimformer.errors import ExtraError
from slimformer.exporters._onnx import int8
from slimformer.exporters.base import Exporter, Variant
from slimformer.families.base import anatomy_of, subject_of
from slimformer.files import remembered
from slimformer.kernels import session
from slimformer.kernels.library import installed
from slimformer.log import Log
from slimformer.measuring.machine import Quiet, environment
from slimformer.measuring.records import Record
from slimformer.measuring.scoring import Measurement
from slimformer.measuring.sessions import open_session
from slimformer.measuring.timing import SINGLE, SORTED, Ratio
from slimformer.methods.distillation import Distillation
from slimformer.methods.gates import Gates
from slimformer.reporting.ledger import read_facts
from slimformer.reporting.words import mb_text
from slimformer.running import delivery, exports, rivals, trials
from slimformer.running.bench import bench
from slimformer.running.bundle import Bundle, Effort, Made, Run
from slimformer.running.exports import export_files, read_notes, teacher_files
from slimformer.running.reader import parse_recipe
from slimformer.running.recipe import Export, Recipe
from slimformer.running.rivals import rivals_of, without_cuts
from slimformer.running.runner import run as run_recipe
from slimformer.running.trials import Judge, Reference, Trial, choose_trial, judge_of
from slimformer.runtimes.openvino import OpenVINO
from slimformer.saving import checkpoint
from slimformer.saving.sparse import size_bytes
from slimformer.tasks.base import Split
from slimformer.tasks.classification import Classification
from slimformer.training.stage import Train


def trial(variant: Variant, loss: float, speed: float) -> Trial:
    return Trial(variant, 0.9 - loss / 100, loss, speed, speed / 2, 1000)


FLOAT = trial(Variant.FLOAT, 0.0, 1.5)
DYNAMIC = trial(Variant.INT8_DYNAMIC, 0.8, 3.0)
STATIC = trial(Variant.INT8_STATIC, 2.0, 4.0)


@pytest.mark.parametrize(
    ("max_loss", "expected"), [(5.0, STATIC), (2.0, STATIC), (1.0, DYNAMIC), (0.8, DYNAMIC), (0.1, FLOAT), (0.0, FLOAT)]
)
def test_the_fastest_within_the_loss_is_chosen(max_loss: float, expected: Trial) -> None:
    assert choose_trial([FLOAT, DYNAMIC, STATIC], max_loss) == expected


def test_where_none_is_within_the_loss_the_one_that_loses_least_is() -> None:
    assert choose_trial([STATIC, DYNAMIC], 0.1) == DYNAMIC
    fast = replace(DYNAMIC, speed_32=5.0)
    assert choose_trial([STATIC, DYNAMIC, fast], 0.1) == fast


@pytest.mark.slow
def test_runs_share_the_files_and_scores_of_their_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Classification(data=str(write_data(tmp_path / "data", train=80, dev=20)))
    sources = [write_model(tmp_path / f"dense-{seed}", seed=seed) for seed in (0, 1)]

    def begun(name: str, source: Path, task: Classification) -> tuple[Bundle, Run]:
        model = checkpoint.load(source)
        bundle = Bundle(subject_of(model), Plan(), prepare(task.bind(model.config.to_dict()), source), subject_of(model))
        return bundle, Run(tmp_path / name, tmp_path / name, Log(None, quiet=True), cache=tmp_path / "shared")

    first = begun("first", sources[0], task)
    files, scores = teacher_files(*first), judge_of(*first).reference
    assert not (tmp_path / "first").exists()
    other = begun("other", sources[1], task)
    assert teacher_files(*other)[Variant.FUSED].parent != files[Variant.FUSED].parent, "another teacher"
    fewer = begun("fewer", sources[0], replace(task, train_rows=40))
    assert teacher_files(*fewer)[Variant.FUSED].parent != files[Variant.FUSED].parent, "other rows"
    monkeypatch.setattr(exports, "export_files", lambda *_, **__: pytest.fail("exported again"))
    monkeypatch.setattr(trials, "_score", lambda *_: pytest.fail("scored again"))
    second = begun("second", sources[0], task)
    assert teacher_files(*second) == files
    assert judge_of(*second).reference == scores
    with pytest.raises(pytest.fail.Exception, match="scored again"):
        judge_of(*begun("third", sources[0], replace(task, metric="f1")))


def test_an_int8_file_slower_than_its_float_version_is_told() -> None:
    slow = trial(Variant.INT8_STATIC, 0.0, 1.4)
    assert trials.slower([FLOAT, DYNAMIC, slow]) == [(slow, 1.5)]
    assert trials.slower([DYNAMIC, slow]) == []  # no float file beside them: the teacher's, at 1
    alone = trial(Variant.INT8_DYNAMIC, 0.0, 0.9)
    assert trials.slower([alone]) == [(alone, 1.0)]
    assert trials.slower([FLOAT, trial(Variant.FUSED, 0.0, 1.0)]) == []


losses = st.floats(-5, 50)
speeds = st.floats(0.1, 20)


@given(st.lists(st.builds(trial, st.sampled_from(list(Variant)), losses, speeds), min_size=1), st.floats(0, 20))
def test_nothing_better_is_left_behind(trials: list[Trial], max_loss: float) -> None:
    best = choose_trial(trials, max_loss)
    assert best in trials
    if best.loss <= max_loss:
        assert not any(other.loss <= max_loss and other.speed_32 > best.speed_32 for other in trials)
    else:
        assert not any(other.loss < best.loss for other in trials)


def test_trials_survive_a_kill(tmp_path: Path) -> None:
    tried = [FLOAT, DYNAMIC, STATIC]
    assert remembered(tmp_path / "trials.json", lambda: tried, list[Trial]) == tried
    assert remembered(tmp_path / "trials.json", lambda: pytest.fail("tried again"), list[Trial]) == tried


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Data of 80 training rows (16 for validation) that the bag of words of tiny_export gets all right; no PyTorch model is needed."""
    source = export(tmp_path / "model")
    task = Classification(data=str(data(tmp_path / "data"))).bind({"id2label": {0: "bad", 1: "good"}})
    return Bundle(None, Plan(), prepare(task, source), None)  # type: ignore[arg-type]  # no PyTorch model


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "work", tmp_path / "work", Log(None, quiet=True), threads=1, quiet=Quiet(0))


@pytest.mark.slow
@pytest.mark.parametrize("exporter", [None, Export().exporter()], ids=["plain", "of a recipe"])
def test_an_int8_file_that_answers_otherwise_is_judged_and_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exporter: Exporter | None
) -> None:
    """A model just cut, or a CPU that saturates: the loss on validation examples decides, and the run goes on."""
    quantize_weight = int8.quantize_weight

    def broken(weight: np.ndarray, axis: int, coding: int8.WeightCoding) -> tuple[np.ndarray, np.ndarray]:
        values, scales = quantize_weight(weight, axis, coding)
        return np.roll(values, 1, axis=0), scales

    monkeypatch.setattr(int8, "quantize_weight", broken)
    source = write_model(tmp_path / "model")
    model = checkpoint.load(source)
    task = Classification(data=str(write_data(tmp_path / "data"))).bind(model.config.to_dict())
    log = Log(None, quiet=True)
    wanted = [Variant.INT8_DYNAMIC]
    files = export_files(subject_of(model), prepare(task, source), tmp_path, wanted, log, exporter=exporter)
    file = files[Variant.INT8_DYNAMIC]
    assert file.is_file()
    notes = read_notes(tmp_path)[file.name]
    (share,) = (float(note.split("%")[0]) for note in notes if note.endswith("rows answer as before"))
    assert share < 90


@pytest.mark.slow
def test_losses_are_points_below_the_teacher_on_validation_examples(bundle: Bundle, run: Run, tmp_path: Path) -> None:
    """A file that takes 'fine' for bad loses a quarter of the rows: those with nothing but 'fine'."""
    dense = tmp_path / "model" / "model.onnx"
    worse = export(tmp_path / "worse", weights={"fine": (1.0, 0.0)}) / "model.onnx"
    files = {Variant.FLOAT: dense, Variant.INT8_DYNAMIC: worse}
    chosen_on, seen = (trials._score(open_session(worse, 1), bundle.material, split) for split in ("validation", "train"))
    assert 0 < chosen_on < 1

    def judge(reference: Reference) -> Judge:
        return Judge(bundle.material, {Variant.FUSED: dense}, reference, run.threads, run.quiet, run.log)

    tried = judge(Reference(1.0, None)).try_out(files, seconds=0)
    assert [item.variant for item in tried] == [Variant.FLOAT, Variant.INT8_DYNAMIC]
    assert tried[0].loss == 0
    assert tried[1].loss == pytest.approx(100 * (1 - chosen_on))
    assert tried[0].size_bytes == dense.stat().st_size
    assert all(item.speed_32 > 0 and item.speed_1 > 0 for item in tried)
    # a teacher that came tuned may know the validation examples: the mean with what both have seen
    unsure = judge(Reference(1.0, 0.9)).try_out(files, seconds=0)
    assert unsure[0].loss == pytest.approx((0 - 10) / 2)
    assert unsure[1].loss == pytest.approx((100 * (1 - chosen_on) + 100 * (0.9 - seen)) / 2)
    # the rows of another tokenizer are those of its own file alone
    features = bundle.material.features[Split.VALIDATION]
    blank = [[0] * len(ids) for ids in features.columns["input_ids"]]
    other = replace(features, columns={**features.columns, "input_ids": blank})
    read = replace(bundle.material, features={**bundle.material.features, Split.VALIDATION: other})
    apart = judge(Reference(1.0, None)).try_out(files, seconds=0, reads={Variant.FLOAT: read})
    assert apart[0].loss > 0
    assert apart[1].loss == tried[1].loss


def test_a_rival_must_be_wanted(bundle: Bundle, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model" / "model.onnx"
    teacher = dict.fromkeys((Variant.FUSED, Variant.FLOAT, Variant.INT8_DYNAMIC), file)
    monkeypatch.setattr(rivals, "facts_of", lambda *_: {"minutes": 1.0})
    made = Made(bundle, Effort(minutes=3.0))
    judge = Judge(bundle.material, teacher, Reference(1.0, None), run.threads, run.quiet, run.log)
    alone = rivals_of(made, (), (), judge, run)
    assert [item.standing for item in alone] == ["teacher-fp32"]
    both = rivals_of(made, (), ("teacher-int8", "small-dense"), judge, run)
    assert [item.standing for item in both] == ["teacher-fp32", "teacher-int8"]  # nothing was cut: no smaller dense model
    assert both[0].facts == {"minutes": None, "threads": None, "peak_rss_bytes": None}
    assert [item.name for item in both] == ["dense fp32", "dense int8"]
    cut = Made(replace(bundle, teacher_plan=Plan({"encoder.0.heads": (0,)})), Effort(minutes=3.0))
    assert [item.name for item in rivals_of(cut, (), ("teacher-int8",), judge, run)] == ["given fp32", "given int8"]


def test_the_smaller_dense_rival_trains_in_every_stage() -> None:
    """Without the gates, a stage that trains nothing else would have nothing to train."""
    gates, lesson = Gates(), Distillation()
    frozen = Train(methods=(gates,), freeze="everything", epochs=2.0, lr=1e-4)
    assert without_cuts(frozen) == Train(epochs=2.0, lr=1e-4)
    both = Train(methods=(gates, lesson), freeze="everything")
    assert without_cuts(both) == Train(methods=(lesson,))
    for stage in (Train(methods=(lesson,), freeze="everything"), Train(freeze="embeddings")):
        assert without_cuts(stage) == stage
    assert without_cuts(Train(methods=(gates,), freeze="embeddings")) == Train(freeze="embeddings")


@pytest.mark.slow
@pytest.mark.parametrize("values", ["int8", "float16"])
def test_non_zeros_are_delivered_in_fewer_bytes_and_the_card_says_so(tmp_path: Path, values: str) -> None:
    source = write_model(tmp_path / "model")
    model = checkpoint.load(source)
    with torch.no_grad():
        for matrix in anatomy_of(model).matrices.values():
            if matrix.role is not Role.EMBEDDING:
                weight = model.get_submodule(matrix.module).weight
                weight[:, ::2] = 0.0
    sparse = tmp_path / "sparse"
    checkpoint.save(model, Plan(), sparse, tokenizer_from=source)
    data = {
        "model": str(sparse),
        "task": {"use": "classification", "data": str(write_data(tmp_path / "data"))},
        "stages": [{"export": {"values": values}}, {"bench": {"seconds": 0.1, "rivals": [], "fused": True}}],
    }
    out = tmp_path / "out"
    made = run_recipe(parse_recipe(data), out, log=Log(out, quiet=True), threads=1, wait_seconds=0.0)
    ours = next(record for record in made.records if record.chosen)
    dense = next(record for record in made.records if record.role == "teacher-fp32")
    assert ours.weights_bytes is not None
    assert dense.weights_bytes is not None
    assert ours.weights_bytes == size_bytes(checkpoint.unshared(model), values, checkpoint.heads(model))  # type: ignore[arg-type]
    assert ours.weights_bytes < dense.weights_bytes
    assert f"matrices and word tables as {values}, rounded by at most" in (out / "README.md").read_text()
    loaded = checkpoint.load(out).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=float(tensor.abs().max()) / 250)
    (fused,) = (record for record in made.records if record.name == "slimformer fp32 fused")
    assert (fused.role, fused.precision, fused.chosen) == ("ours", "fused", False)
    assert not (out / fused.file).exists()


def recipe_for_openvino(folder: Path) -> Recipe:
    data = {
        "model": str(write_model(folder / "model")),
        "task": {"use": "classification", "data": str(write_data(folder / "data"))},
        "stages": [{"export": {"openvino": True}}, {"bench": {"seconds": 0.1, "rivals": []}}],
    }
    return parse_recipe(data)


@pytest.mark.slow
@pytest.mark.skipif(not OpenVINO().available(), reason="needs the extra: pip install 'slimformer[openvino]'")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_our_model_is_delivered_and_measured_as_openvino_int8(tmp_path: Path) -> None:
    recipe, out = recipe_for_openvino(tmp_path), tmp_path / "out"
    made = run_recipe(recipe, out, log=Log(out, quiet=True), threads=1, wait_seconds=0.0)
    (ours,) = (record for record in made.records if record.name == "slimformer OpenVINO int8")
    assert (ours.role, ours.precision, ours.chosen) == ("ours", "int8_static", False)
    assert ours.size_bytes == sum((out / f"openvino/openvino_model.{end}").stat().st_size for end in ("xml", "bin"))
    assert ours.timings
    text = (out / "README.md").read_text()
    assert f"| `openvino/openvino_model.xml` | {mb_text(ours.size_bytes)} | int8 by NNCF" in text
    assert "slimformer OpenVINO int8 | " in text
    OpenVINO().load(out / "openvino/openvino_model.xml", 1)


def test_without_the_extra_its_install_line_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimformer.runtimes.openvino.find_spec", lambda *_: None)
    with pytest.raises(ExtraError, match=r"pip install 'slimformer\[openvino\]'"):
        run_recipe(recipe_for_openvino(tmp_path), tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()


def recipe_for_kernels(folder: Path) -> Recipe:
    data = {
        "model": str(write_model(folder / "model")),
        "task": {"use": "classification", "data": str(write_data(folder / "data"))},
        "stages": [{"export": {}}, {"bench": {"seconds": 0.1, "rivals": []}}],
    }
    return parse_recipe(data)


@pytest.mark.slow
@pytest.mark.skipif(not installed(), reason="slimformer-kernels is not installed: `make kernels` builds it")
def test_a_file_for_the_kernels_is_measured_and_ships_if_it_is_the_fastest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fastest in (True, False):
        monkeypatch.setattr("slimformer.running.delivery._slim_ships", lambda _, ships=fastest: ships)
        out = tmp_path / str(fastest)
        made = run_recipe(
            recipe_for_kernels(tmp_path / f"from-{fastest}"), out, log=Log(out, quiet=True), threads=1, wait_seconds=0.0
        )
        (ours,) = (record for record in made.records if record.precision == "int8_kernels")
        assert (ours.name, ours.role, ours.chosen) == ("slimformer int8 kernels", "ours", False)
        assert ours.timings
        file = out / "onnx/model_slim.onnx"
        assert file.exists() is fastest
        assert ("model_slim.onnx" in (out / "README.md").read_text(encoding="utf-8")) is fastest
        names = [item.name for item in read_facts(out).files]
        assert ("onnx/model_slim.onnx" in names) is fastest
    out = tmp_path / "True"
    assert session(out / "onnx/model_slim.onnx", 1).get_outputs()[0].name == "logits"
    there = [row.file for row in bench([out], seconds=0.05, wait_seconds=0).records]
    assert "onnx/model_slim.onnx" in there
    monkeypatch.setattr("slimformer.reporting.delivered.installed", lambda: False)
    assert [row.file for row in bench([out], seconds=0.05, wait_seconds=0).records] == [
        name for name in there if name != "onnx/model_slim.onnx"
    ]


def test_the_kernels_file_ships_only_if_it_is_faster_than_every_other_of_ours() -> None:
    about = ("my-bert", "reviews", "dev", "accuracy", {"accuracy": 0.9}, "2026-01-02", environment())

    def measured(*speeds: tuple[str, float, float]) -> Measurement:
        rows = tuple(
            Record(
                name,
                "ours",
                *about,
                precision=name,
                speed={SORTED: Ratio(at_32, at_32, at_32), SINGLE: Ratio(at_1, at_1, at_1)},
            )
            for name, at_32, at_1 in speeds
        )
        return Measurement(rows, {})

    assert delivery._slim_ships(measured(("int8_fused", 2.0, 3.0), ("int8_kernels", 3.0, 2.0)))
    assert delivery._slim_ships(measured(("int8_fused", 2.0, 2.0), ("float", 1.0, 1.5), ("int8_kernels", 1.5, 2.5)))
    assert not delivery._slim_ships(measured(("int8_fused", 2.0, 3.0), ("float", 1.0, 1.5), ("int8_kernels", 1.5, 2.5)))
    assert not delivery._slim_ships(measured(("int8_fused", 2.0, 3.0)))
