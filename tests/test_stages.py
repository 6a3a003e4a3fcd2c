"""Stages: text without labels, and no cutting of what is factored."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny
from tiny_folder import write_data, write_model, write_tokenizer

from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.data.material import encode_text, prepare
from slimformer.errors import DataError, PlanError, RecipeError, TargetError
from slimformer.families.base import anatomy_of, subject_of
from slimformer.forms.kronecker import Kronecker
from slimformer.log import Log
from slimformer.methods.distillation import Distillation, Heads
from slimformer.methods.fisher import Fisher
from slimformer.methods.gates import Gates
from slimformer.methods.layers import Layers
from slimformer.running.bundle import Bundle, Run
from slimformer.running.preflight import preflight
from slimformer.running.prepare import prepare_bundle
from slimformer.running.reader import parse_recipe
from slimformer.running.recipe import Recipe
from slimformer.running.runner import train_stages
from slimformer.running.stages import advance, context_of, refuse_cuts, run_stage, training_rows
from slimformer.saving import checkpoint
from slimformer.tasks.base import Split
from slimformer.tasks.classification import Classification
from slimformer.training.stage import Calibrate, Train, TrimVocabulary

# -- Text without labels -------------------------------------------------------------------------------------------------------


def test_each_line_of_a_file_is_a_row(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    file = tmp_path / "text.txt"
    file.write_text("the film was great\n\n  dull story \nthe film was very very very great\n   \n", encoding="utf-8")
    features = encode_text(file, tokenizer, 6)
    rows = [list(map(int, row)) for row in features.columns["input_ids"]]
    assert rows[:2] == [tokenizer.encode(text).ids for text in ("the film was great", "dull story")]
    assert [len(row) for row in rows] == [6, 4, 6]
    assert (features.truncated, len(features), list(features.columns)) == (1, 3, ["input_ids"])
    assert tokenizer.truncation is None


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read the text"), (b"\xff\xfe\xff", "cannot read the text"), (b"\n \n", "holds no text")],
)
def test_a_file_without_text_is_said_before_anything_starts(tmp_path: Path, content: bytes | None, message: str) -> None:
    source = write_model(tmp_path / "model", trained=False)
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    task = Classification(data=str(write_data(tmp_path / "data")))
    with pytest.raises(DataError, match=message):
        preflight(Recipe(str(source), task, (Train((Distillation(),), text=str(file)),)))


def bundle(folder: Path) -> Bundle:
    source = write_model(folder / "model")
    model = checkpoint.load(source)
    task = Classification(data=str(write_data(folder / "data", train=320))).bind(model.config)
    plan = Plan({"encoder.0.heads": (0, 1), "encoder.1.neurons": tuple(range(12))})
    teacher = subject_of(model)
    return Bundle(subject_of(shrink(model, teacher.anatomy, plan)), plan, prepare(task, source), teacher)


@pytest.mark.slow
def test_learns_from_the_teacher_and_reads_no_label(tmp_path: Path) -> None:
    start = bundle(tmp_path)
    stage = Train((Distillation(hidden=0),), epochs=1, lr=1e-3, dropout=False, precision="fp32", text="task")
    assert stage.loss_weight == 0
    rows = training_rows(stage, start, Run(tmp_path, tmp_path, Log(None, quiet=True)))
    assert set(rows.columns) == {"input_ids", "token_type_ids"}
    assert len(rows) == len(start.material.features[Split.TRAIN])
    train = start.material.features[Split.TRAIN]
    wrong = replace(train, columns=dict(train.columns) | {"labels": [1 - label for label in train.columns["labels"]]})
    turned = replace(start, material=replace(start.material, features=dict(start.material.features) | {Split.TRAIN: wrong}))
    log = Log(None, quiet=True)
    made = [
        run_stage(stage, each, Run(tmp_path / name, tmp_path / name, log, threads=1)).subject.model.state_dict()
        for name, each in (("right", start), ("wrong", turned))
    ]
    before = start.subject.model.state_dict()
    assert all(torch.equal(made[0][name], made[1][name]) for name in before)
    assert any(not torch.equal(made[0][name], before[name]) for name in before)


@pytest.mark.slow
def test_batches_come_where_the_model_is_by_now(tmp_path: Path) -> None:
    """Training moves a model after the context of its methods is made."""
    start = bundle(tmp_path)
    context = context_of(start, Run(tmp_path, tmp_path, Log(None, quiet=True), threads=1), start.subject, "macs")
    assert {value.device.type for value in next(iter(context.batches(4))).values()} == {"cpu"}
    start.subject.model.to("meta")
    assert {value.device.type for value in next(iter(context.batches(4))).values()} == {"meta"}


@pytest.mark.slow
def test_frozen_embeddings_are_frozen_in_any_form(tmp_path: Path) -> None:
    start = bundle(tmp_path)
    words = start.subject.model.get_input_embeddings().weight.shape[0]
    plan = Plan(forms={"embeddings.word": Kronecker((words, 8))})
    small = shrink(start.subject.model, start.subject.anatomy, plan)
    start = replace(start, subject=subject_of(small), plan=start.plan.then(plan))
    run = Run(tmp_path / "work", tmp_path / "work", Log(None, quiet=True), threads=1)
    before = start.subject.model.state_dict()
    for freeze, still in (("embeddings", True), ("nothing", False)):
        stage = Train((Distillation(hidden=0),), epochs=0.2, lr=1e-3, precision="fp32", text="task", freeze=freeze)  # type: ignore[arg-type]
        after = run_stage(stage, start, run.under(freeze)).subject.model.state_dict()
        for part in ("a", "b"):
            name = f"bert.embeddings.word_embeddings.{part}"
            assert torch.equal(after[name], before[name]) is still
        assert not torch.equal(after["classifier.weight"], before["classifier.weight"])


@pytest.mark.slow
def test_like_words_are_those_of_the_teacher(tmp_path: Path) -> None:
    """Whatever became of the student's table, and however the teacher's is stored, the rows are augmented as before."""
    start = bundle(tmp_path)
    words, width = start.subject.model.get_input_embeddings().weight.shape
    exact, coarse = (Plan(forms={"embeddings.word": Kronecker(shape)}) for shape in ((words, width), (words, width // 8)))
    dense = start.subject
    factored, rough = (subject_of(shrink(dense.model, dense.anatomy, plan)) for plan in (exact, coarse))
    student = replace(start, subject=rough, plan=start.plan.then(coarse))
    run = Run(tmp_path / "work", tmp_path / "work", Log(None, quiet=True), threads=1)
    stage = Train((Distillation(hidden=0),), epochs=0.2, precision="fp32", augment=1)
    each = [training_rows(stage, one, run).columns["input_ids"] for one in (start, student, replace(start, teacher=factored))]
    assert len(each[0]) == 2 * len(start.material.features[Split.TRAIN])
    for rows in each[1:]:
        assert all(np.array_equal(one, other) for one, other in zip(each[0], rows, strict=True))
    assert run_stage(stage, student, run).plan.forms == coarse.forms


def test_text_in_a_recipe_lies_beside_it_and_needs_a_teacher(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a text\n", encoding="utf-8")
    stage = {"train": {"text": "text.txt", "methods": ["distillation"]}}
    data: dict[str, Any] = {"model": "x", "task": "intents", "stages": [stage]}
    recipe = parse_recipe(data, base=tmp_path)
    assert recipe.stages == (Train((Distillation(),), text=str(tmp_path / "text.txt")),)
    assert parse_recipe(recipe.to_data()) == recipe
    assert parse_recipe(data | {"stages": [{"train": {"text": "task", "methods": ["distillation"]}}]}).stages == (
        Train((Distillation(),), text="task"),
    )
    with pytest.raises(
        RecipeError, match=r"stages\[0\].train.text: text has no labels, so there is nothing to learn; add distil"
    ):
        parse_recipe(data | {"stages": [{"train": {"text": "task"}}]})


# -- What comes cut ------------------------------------------------------------------------------------------------------------

FIRST = Plan({"encoder.0.heads": (1, 2, 3), "encoder.2.attention": ()})


def cut_folder(folder: Path, source: Path, plan: Plan = FIRST, seed: int | None = None) -> Path:
    """A model folder as a run delivers one: the model of `source` cut by a plan, with the plan beside it."""
    model = checkpoint.load(source)
    if seed is not None:  # as if it had been trained again
        with torch.no_grad():
            model.get_submodule("classifier").weight.add_(torch.randn(2, 32, generator=torch.Generator().manual_seed(seed)))
    checkpoint.save(shrink(model, anatomy_of(model), plan), plan, folder, tokenizer_from=source)
    return folder


@pytest.mark.parametrize("named", [False, True])
def test_what_comes_cut_teaches_the_heads_that_it_has(tmp_path: Path, named: bool) -> None:
    """A delivered folder compressed once more is its own teacher, and a teacher that is named may be cut as well."""
    source, data = write_model(tmp_path / "dense", trained=False), write_data(tmp_path / "data", train=24, dev=8)
    small = cut_folder(tmp_path / "small", source)
    model, teacher = (source, str(small)) if named else (small, None)
    run = Run(tmp_path / "work", tmp_path / "work", Log(None, quiet=True), threads=1)
    recipe = Recipe(str(model), Classification(data=str(data)), (), teacher=teacher)
    start, _ = prepare_bundle(preflight(recipe), run)
    assert start.teacher_plan == FIRST == start.uncut.plan
    assert start.plan == (Plan() if named else FIRST)
    again = Plan({"encoder.0.heads": (0, 1)})  # the first two of those that are left
    student = subject_of(shrink(start.subject.model, start.subject.anatomy, again))
    bundle = replace(start, subject=student, plan=start.plan.then(again))
    state = Distillation(scores=1.0).attach(context_of(bundle, run, student, "macs"))
    first, second = "encoder.0.heads", "encoder.1.heads"
    every = Heads(second, (0, 1, 2, 3), (0, 1, 2, 3))
    expected = {first: Heads(first, (1,), (0,)) if named else Heads(first, (0, 1), (0, 1)), second: every}
    assert state.heads == expected  # type: ignore[attr-defined]


# -- What was made before ------------------------------------------------------------------------------------------------------


def test_what_trackers_write_lies_where_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[Path | None] = []

    def noted(trackers: Sequence[str], folder: Path | None) -> Any:
        places.append(folder)
        raise ZeroDivisionError

    monkeypatch.setattr("slimformer.training.loop.accelerator_for", noted)
    source, data = write_model(tmp_path / "model", trained=False), write_data(tmp_path / "data", train=24, dev=8)
    recipe = Recipe(str(source), Classification(data=str(data)), (Train(steps=1, methods=(Distillation(),)),))
    with pytest.raises(ZeroDivisionError):
        train_stages(recipe, tmp_path / "out", wait_seconds=0)
    (place,) = places
    assert place.parent == tmp_path / "out" / "tracking"  # the folder of the work goes


def test_a_stage_is_the_same_wherever_its_files_lie() -> None:
    """They count by what they hold, which `advance` looks at."""
    for near, far in (
        (Train(text="./texts.txt"), Train(text="/far/texts.txt")),
        (Train(augment=1, augment_model="masked"), Train(augment=1, augment_model="/far/masked")),
        (TrimVocabulary(text="texts.txt"), TrimVocabulary(text="../texts.txt")),
    ):
        assert near.digest() == far.digest()
    assert len({stage.digest() for stage in (Train(), Train(text="task"), Train(text="a.txt"), Train(augment=1))}) == 4
    assert TrimVocabulary().digest() != TrimVocabulary(text="texts.txt").digest()


@pytest.mark.slow
@pytest.mark.parametrize("mended", ["nothing", "teacher", "label", "text", "masked model"])
def test_a_stage_is_made_again_if_what_it_was_made_from_is_another(
    tmp_path: Path, mended: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything lies at the same paths, and the recipe is the same."""
    source, data = write_model(tmp_path / "dense", trained=False), write_data(tmp_path / "data", train=24, dev=8)
    cut_folder(tmp_path / "teacher", source)
    (tmp_path / "texts.txt").write_text("the film was great\nthe meal was dull\n", encoding="utf-8")
    words = checkpoint.read_config(source)["vocab_size"]

    def write_masked(seed: int) -> None:
        model = tiny("bert", seed, "AutoModelForMaskedLM", vocab_size=words, pad_token_id=0)
        model.save_pretrained(tmp_path / "masked")
        write_tokenizer(tmp_path / "masked")

    write_masked(0)
    text = str(tmp_path / "texts.txt") if mended == "text" else None
    stage = Train((Distillation(),), steps=1, precision="fp32", text=text)
    calibrated = Calibrate(Layers(keep=0.7))
    if mended == "masked model":
        stage = replace(stage, augment=1, augment_model=str(tmp_path / "masked"))
    recipe = Recipe(str(source), Classification(data=str(data)), (calibrated, stage), teacher=str(tmp_path / "teacher"))

    def once() -> list[Path]:
        run = Run(tmp_path / "work", tmp_path / "work", Log(None), threads=1)
        start, stages = prepare_bundle(preflight(recipe), run)
        advance(stages, start, run)
        return sorted(file.parent.parent for file in (tmp_path / "work").glob("*/made/plan.json"))

    before = once()
    assert len(before) == 2
    if mended == "teacher":
        cut_folder(tmp_path / "teacher", source, seed=5)
    elif mended == "label":
        file = data / "train.tsv"
        lines = file.read_text(encoding="utf-8").splitlines()
        lines[3] = lines[3].replace("bad", "good") if lines[3].endswith("bad") else lines[3].replace("good", "bad")
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif mended == "text":
        (tmp_path / "texts.txt").write_text("the film was great\nthe meal was cold\n", encoding="utf-8")
    elif mended == "masked model":
        write_masked(1)
    caplog.clear()
    with caplog.at_level("INFO", logger="slimformer"):
        after = once()
    said = [record.message for record in caplog.records if record.message.startswith("stage ")]
    again = "was made from another model, teacher or data: it is made again."
    reused = [
        f"stage {number} ({kind}) is done already; going on from it." for number, kind in ((1, "calibrate"), (2, "train"))
    ]
    if mended == "nothing":
        assert (said, after) == (reused, before)
    elif mended in ("text", "masked model"):  # only the second stage reads it
        assert said == [reused[0], f"stage 2 (train) {again}"]
    else:
        assert said == [f"stage 1 (calibrate) {again}", f"stage 2 (train) {again}"]


# -- Cut first, factor after ---------------------------------------------------------------------------------------------------


def test_a_recipe_that_cuts_what_it_has_factored_is_a_mistake() -> None:
    stages = [{"calibrate": {"method": "fisher"}}, {"calibrate": {"method": "kronecker"}}]
    parse_recipe({"model": "x", "task": "intents", "stages": [*stages, {"train": {"methods": ["distillation"]}}]})
    for later in ({"calibrate": {"method": "layers"}}, {"train": {"methods": ["distillation", "gates"]}}):
        with pytest.raises(
            RecipeError, match=r"stages\[2\].*(layers|gates) cannot cut what kronecker has factored before: cut first"
        ):
            parse_recipe({"model": "x", "task": "intents", "stages": [*stages, later]})


def test_a_method_that_cuts_refuses_a_factored_model_before_it_looks(tmp_path: Path) -> None:
    model = tiny("bert")
    anatomy = anatomy_of(model)
    factored = shrink(model, anatomy, Plan(forms={"encoder.1.ffn_out": Kronecker((2, 2))}))
    run = Run(tmp_path, tmp_path, Log(None, quiet=True))
    start = Bundle(subject_of(factored), Plan(), None, subject_of(factored))  # type: ignore[arg-type]  # no data is asked for
    message = r"chooses what to cut, and 'encoder.1.neurons' can no longer be cut: 'encoder.1.ffn_out' is stored as Kron"
    with pytest.raises(PlanError, match=f"fisher {message}"):
        run_stage(Calibrate(Fisher()), start, run)
    with pytest.raises(PlanError, match=f"gates {message}"):
        run_stage(Train((Gates(), Distillation())), start, run)
    refuse_cuts((Distillation(),), anatomy_of(factored))
    refuse_cuts((Fisher(),), anatomy.after(Plan(forms={"embeddings.word": Kronecker((99, 8))})))
    assert np.array_equal(sorted(anatomy.sites), sorted(anatomy_of(factored).sites))


@pytest.mark.slow
def test_a_stage_that_fails_ends_its_clock_and_keeps_the_minutes(tmp_path: Path) -> None:
    """A clock that went on would write into a folder that belongs to nobody any more."""
    start = bundle(tmp_path)
    run = Run(tmp_path / "work", tmp_path / "work", Log(None, quiet=True), threads=1)
    before = threading.active_count()
    with pytest.raises(TargetError):
        advance((Calibrate(Fisher(keep=1e-6)),), start, run)
    assert threading.active_count() == before
    (seconds,) = run.root.glob("*/seconds")
    assert float(seconds.read_text(encoding="utf-8")) >= 0


def test_what_was_made_of_other_data_is_not_taken_for_this(tmp_path: Path) -> None:
    """The data may change between a kill and the next run: names in the folder tell the rows and the weights."""
    start = bundle(tmp_path)
    train = start.material.features[Split.TRAIN]
    fewer = {name: list(column)[:-1] for name, column in train.columns.items()}
    features = dict(start.material.features) | {Split.TRAIN: replace(train, columns=fewer, example=list(train.example)[:-1])}
    others = replace(start, material=replace(start.material, features=features))
    other = {"encoder.0.heads": (0, 2)}  # as many as there are: the plan beside the weights alone tells it
    turned = [replace(start, plan=Plan(dict(start.plan.keep) | other)), replace(start, teacher_plan=Plan(other))]
    bundles = [start, others, start.uncut, replace(start), *turned]
    assert len({each.digest() for each in bundles}) == 5
