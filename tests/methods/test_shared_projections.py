"""Shared projections and dual training: by hand, one pair for all layers, and a student that reads other pieces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny
from tiny_folder import write_data, write_model, write_pieces

from slimformer.data.tokenizer import load_tokenizer
from slimformer.errors import RecipeError, SlimformerError
from slimformer.families.base import subject_of
from slimformer.log import Log
from slimformer.methods.base import Context
from slimformer.methods.shared_projections import (
    SharedProjections,
    directions,
    inherited,
    mixed_row,
    projected,
    projected_distance,
)
from slimformer.reporting.ledger import read_records
from slimformer.running.bundle import Bundle, Run
from slimformer.running.given import given_models
from slimformer.running.preflight import preflight
from slimformer.running.prepare import prepare_bundle
from slimformer.running.reader import parse_recipe
from slimformer.running.recipe import Recipe
from slimformer.running.runner import run
from slimformer.running.stages import advance, context_of, training_of
from slimformer.running.trials import Judge, Reference
from slimformer.saving import checkpoint
from slimformer.tasks.base import Split
from slimformer.testing.checks import tiny_context
from slimformer.training.devices import accelerator_for
from slimformer.training.step import attached

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 12, "num_attention_heads": 2}
PIECES = 160
TEACH = {"train": {"epochs": 1, "methods": [{"use": "shared_projections"}, {"use": "distillation", "hidden": 0}]}}


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def test_a_distance_by_hand() -> None:
    """A teacher of 2 x 3 and a student of 1 x 2."""
    goal, own = torch.tensor([[2.0, 0.0, 0.0], [0.0, 4.0, 0.0]]), torch.tensor([[1.0, 2.0]])
    up = [torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])]  # (to, from)
    assert torch.equal(projected(own, up), torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]))
    gap = (2 - 1) ** 2 + (0 - 2) ** 2 + (0 - 3) ** 2 + 4**2
    assert float(projected_distance(own, goal, up, "up")) == pytest.approx(gap / (2**2 + 4**2))
    down = [torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 7.0]])]
    assert torch.equal(projected(goal, down), torch.tensor([[2.0, 2.0]]))
    assert float(projected_distance(own, goal, down, "down")) == pytest.approx(1 / (4 + 4))


def test_a_vector_and_an_axis_of_equal_length() -> None:
    table, vector = torch.arange(6.0).reshape(3, 2), torch.tensor([1.0, 2.0])
    matrix = torch.tensor([[1.0, 1.0], [0.0, 1.0], [2.0, 0.0]])
    assert torch.equal(projected(vector, [matrix]), torch.tensor([3.0, 2.0, 2.0]))
    assert torch.equal(projected(table, [None, matrix]), table @ matrix.T)


def test_a_row_is_mixed_by_words() -> None:
    """Of four words the second is one piece to the student and two to the teacher, the third the reverse."""
    own, theirs = np.array([7, 20, 21, 22, 8]), np.array([1, 30, 31, 32, 2])
    starts_own, starts = np.array([1, 1, 1, 0, 1], bool), np.array([1, 1, 0, 1, 1], bool)
    segments = np.array([0, 0, 0, 1, 1])
    row = mixed_row(own, theirs, segments, starts_own, starts, np.array([False, True, True, False]))
    assert row is not None
    assert row.tolist() == [[1, 0, 0], [20, 1, 0], [21, 1, 1], [22, 1, 1], [2, 0, 1]]
    assert mixed_row(own, theirs, segments, starts_own, starts, np.zeros(4, bool))[:, 0].tolist() == theirs.tolist()  # type: ignore[index]
    assert mixed_row(own[:4], theirs, segments, starts_own[:4], starts, np.ones(4, bool)) is None  # one was cut off


def test_a_row_for_pieces_is_the_mean_of_what_they_are_made_of() -> None:
    table = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 7.0]])
    assert torch.equal(inherited(table, [(2,), (0, 1), (1,)]), torch.tensor([[5.0, 7.0], [2.0, 1.0], [3.0, 2.0]]))


# -- One pair for all layers ---------------------------------------------------------------------------------------------------


def pair(model_type: str = "bert", **changes: Any) -> Context:
    """A teacher of three layers and a student of two that is half as wide, with the same vocabulary."""
    around = tiny_context(model_type)
    names = {"bert": SHAPE, "distilbert": {"dim": 16, "n_layers": 2, "hidden_dim": 12, "n_heads": 2}}
    return replace(around, subject=subject_of(tiny(model_type, **(names[model_type] | changes))))


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_all_layers_share_the_projections(model_type: str, direction: Any) -> None:
    """Weights that one set of projections makes are no distance away; with another set for one layer they are."""
    around = pair(model_type)
    assert around.teacher is not None
    state: Any = SharedProjections(direction=direction).attach(around)
    try:
        sizes = {"HIDDEN": (32, 16), "HEADS": (32, 16), "NEURONS": (24, 12)}
        expected = {
            f"{kind}_{end}": size if direction == "up" else size[::-1] for kind, size in sizes.items() for end in ("in", "out")
        }
        assert {name: tuple(value.shape) for name, value in state.maps.items()} == expected
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for value in state.maps.values():
                value.copy_(torch.randn(value.shape, generator=generator))
        assert float(state.distance().detach()) > 0.5
        made = by_hand(around, state.maps, direction)
        assert float(state.distance().detach()) == pytest.approx(0.0, abs=1e-10)
        assert made == len(state._compared)
        alone = {name: torch.randn(value.shape, generator=generator) for name, value in state.maps.items()}
        by_hand(around, alone, direction, layer=1)
        assert float(state.distance().detach()) > 0.1
    finally:
        state.close()


def by_hand(around: Context, maps: Any, direction: str, layer: int | None = None) -> int:
    """Sets the goals so that the projections meet them, written out for each kind of tensor; returns how many there are."""
    assert around.teacher is not None
    student, teacher = (dict(subject.model.named_parameters()) for subject in (around.subject, around.teacher))
    hidden, heads, neurons = (
        tuple(maps[f"{kind}_{end}"].detach() for end in ("out", "in")) for kind in ("HIDDEN", "HEADS", "NEURONS")
    )
    count = 0
    with torch.no_grad():
        for name, own in student.items():
            place = next((int(part) for part in name.split(".") if part.isdigit()), None)
            source = name if place is None else name.replace(f"layer.{place}.", f"layer.{(1, 2)[place]}.")  # of three, evenly
            if any(part in name for part in ("pooler", "classifier")) or (layer is not None and layer != place):
                continue
            count += 1
            rows: Any
            columns: Any
            if "embeddings.weight" in name:
                rows, columns = None, hidden[0]
            elif any(part in name for part in ("query", "key", "value", "q_lin", "k_lin", "v_lin")):
                rows, columns = heads[0], hidden[1]
            elif "intermediate" in name or "lin1" in name:
                rows, columns = neurons[0], hidden[1]
            elif "attention.output.dense" in name or "out_lin" in name:
                rows, columns = hidden[0], heads[1]
            elif "output.dense" in name or "lin2" in name:
                rows, columns = hidden[0], neurons[1]
            else:
                rows, columns = hidden[0], None
            given, changed = (own, teacher[source]) if direction == "up" else (teacher[source], own)
            value = given if rows is None else rows @ given
            changed.copy_(value if columns is None or own.ndim == 1 else value @ columns.T)
    return count


def test_gradients_reach_projections_and_student_alone() -> None:
    around = pair()
    assert around.teacher is not None
    state: Any = SharedProjections().attach(around)
    state.distance().backward()
    state.close()
    assert all(bool(value.grad.any()) for value in state.maps.values())
    assert all(value.grad is None for value in around.teacher.model.parameters())
    without = {name for name, value in around.model.named_parameters() if value.grad is None}
    assert without == {name for name, _ in around.model.named_parameters() if "pooler" in name or "classifier" in name}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 40}, r"the model is wider than its teacher \(hidden units: 40 of 32\)"),
        ({"intermediate_size": 28}, r"wider than its teacher \(neurons: 28 of 24\)"),
        (
            {"num_hidden_layers": 4},
            "the model has 4 layers and its teacher 3, and each learns from one of them: give it 3 or fewer",
        ),
    ],
)
def test_a_student_that_is_larger_than_its_teacher_is_refused(changes: dict[str, int], said: str) -> None:
    with pytest.raises(SlimformerError, match=said):
        SharedProjections().attach(pair(**changes))


def test_layers_that_were_cut_differently_and_other_types_are_refused() -> None:
    mine, theirs = (subject_of(tiny(kind)).anatomy for kind in ("bert", "distilbert"))
    assert "other names" in str(SharedProjections().mismatch(mine, theirs))
    cut = replace(
        mine, sites={name: replace(site, size=3) if name == "encoder.1.heads" else site for name, site in mine.sites.items()}
    )
    assert "the layers differ in their heads" in str(SharedProjections().mismatch(cut, mine))
    assert "the model has no layers" in str(SharedProjections().mismatch(subject_of(tiny("cnn")).anatomy, theirs))


# -- Two tokenizers ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("two")
    write_model(place / "teacher", words=write_pieces)
    write_data(place / "data", train=400, dev=60)
    return place


def recipe_of(home: Path, stages: list[Any] | None = None, vocabulary: int | None = PIECES, **changes: Any) -> Recipe:
    model = {"use": "bert", "config": SHAPE} | ({} if vocabulary is None else {"vocabulary": vocabulary})
    data = {"use": "classification", "data": str(home / "data"), "text": "sentence", "label": "label"}
    return parse_recipe(
        {"model": model, "teacher": str(home / "teacher"), "task": data, "stages": [TEACH] if stages is None else stages}
        | changes
    )


@pytest.fixture(scope="module")
def bundle(home: Path) -> Bundle:
    with given_models(recipe_of(home), None, home / "built") as given:
        made, _ = prepare_bundle(preflight(given), Run(home / "work", home / "work", Log(None, quiet=True)))
    return made


@pytest.fixture
def around(home: Path, bundle: Bundle, tmp_path: Path) -> Context:
    return context_of(bundle, Run(tmp_path, tmp_path, Log(None, quiet=True)), bundle.subject, "macs")


@pytest.mark.slow
def test_the_student_has_its_own_pieces_and_begins_with_the_teachers_rows(home: Path, bundle: Bundle) -> None:
    folder = bundle.material.source
    own, theirs = load_tokenizer(folder), load_tokenizer(home / "teacher")
    assert own.get_vocab_size() == bundle.subject.model.config.vocab_size == PIECES
    assert bundle.subject.model.config.pad_token_id == own.token_to_id("[PAD]")
    assert own.encode("The FILM").ids != theirs.encode("The FILM").ids
    words = bundle.teacher.model.get_input_embeddings().weight.detach()
    table = bundle.subject.model.get_input_embeddings().weight.detach()
    ids = [theirs.token_to_id(piece) for piece in ("[CLS]", "q", "##e")]
    places = [own.token_to_id(piece) for piece in ("[CLS]", "q", "##e")]
    assert torch.allclose(table[places], words[ids] @ directions(words, 16), atol=1e-6)


def test_each_reads_the_same_texts_in_its_own_pieces_and_rivals_are_the_teachers(home: Path, bundle: Bundle) -> None:
    assert bundle.read is not None
    text = bundle.material.examples[Split.TRAIN][3].texts[0]
    for material, folder in ((bundle.material, bundle.material.source), (bundle.read, home / "teacher")):
        assert material.features[Split.TRAIN].columns["input_ids"][3] == load_tokenizer(folder).encode(text).ids
    assert bundle.uncut.material is bundle.read
    assert bundle.uncut.subject is bundle.teacher
    assert bundle.uncut.read is None
    assert bundle.digest() != replace(bundle, read=None).digest()


def test_the_teacher_answers_its_own_rows_in_training(bundle: Bundle, tmp_path: Path) -> None:
    """Cached or not, what a step sees of the teacher is its answer to the text, whatever the student's ids are."""
    stage = recipe_of(Path()).stages[0]
    training = training_of(stage, bundle, Run(tmp_path, tmp_path, Log(None, quiet=True)))  # type: ignore[arg-type]
    rows = [5, 0, 17]
    tokenizer = load_tokenizer(bundle.read.source)  # type: ignore[union-attr]
    tokenizer.enable_padding(pad_id=0)
    encoded = tokenizer.encode_batch([bundle.material.examples[Split.TRAIN][row].texts[0] for row in rows])
    with torch.no_grad():
        ids, mask = (torch.tensor([getattr(item, name) for item in encoded]) for name in ("ids", "attention_mask"))
        expected = bundle.teacher.model(input_ids=ids, attention_mask=mask).logits
    for cache in (tmp_path / "cache", None):
        seen: list[tuple[Any, ...]] = []
        with attached(training, "fp32", accelerator_for((), None), Log(None, quiet=True), cache) as stepper:
            hook = stepper._whole.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given))  # type: ignore[misc]
            stepper.step(rows, 0)
            hook.remove()
        ((batch, teacher, _, read),) = seen
        assert torch.allclose(teacher.output["logits"], expected, atol=1e-4)
        assert torch.equal(read["input_ids"], ids)
        assert batch["input_ids"].shape != ids.shape


def step_of(around: Context, bundle: Bundle, rows: int = 4) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The first rows as the student reads them, and as the teacher does."""
    found = []
    for material in (bundle.material, bundle.read):
        assert material is not None
        ids = material.features[Split.TRAIN].columns["input_ids"][:rows]
        longest = max(map(len, ids))
        table = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        found.append({"input_ids": table, "attention_mask": mask, "token_type_ids": torch.zeros_like(table)})
    return found[0], found[1]


def test_the_teacher_learns_rows_and_nothing_else_of_it_moves(around: Context, bundle: Bundle) -> None:
    guide = bundle.teacher
    before = {name: value.detach().clone() for name, value in guide.model.named_parameters()}
    trains = [value.requires_grad for value in guide.model.parameters()]
    method = SharedProjections()
    state: Any = method.attach(around)
    batch, read = step_of(around, bundle)
    with torch.no_grad():
        plain = guide.model(**guide.feed(read)).logits
        none = state.dual.answers(state.dual.mixed(batch, read, 0.0), ("logits",))["logits"]
    assert torch.allclose(none, plain, atol=1e-5)  # no word in the student's pieces: the text as it is
    every = state.dual.mixed(batch, read, 1.0)
    assert [ids[mask.bool()].tolist() for ids, mask in zip(every["ids"], every["attention_mask"], strict=True)] == [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert torch.equal(every["own"].long(), every["attention_mask"])
    output = state.dual.answers(every, ("logits",))
    assert not torch.allclose(output["logits"], plain, atol=1e-3)
    around.task.divergence(output, {"logits": plain}, read, 1.0).backward()
    assert bool(state.dual.rows.grad.any())
    assert all(value.grad is None for value in guide.model.parameters())
    assert any(value is state.dual.rows for group in state.groups() for value in group["params"])
    state.close()
    assert [value.requires_grad for value in guide.model.parameters()] == trains
    assert all(torch.equal(value, before[name]) for name, value in guide.model.named_parameters())


def test_training_rows_brings_the_mixed_text_to_the_answer_of_the_plain_one(around: Context, bundle: Bundle) -> None:
    state: Any = SharedProjections().attach(around)
    batch, read = step_of(around, bundle, 16)
    with torch.no_grad():
        plain = {"logits": bundle.teacher.model(**bundle.teacher.feed(read)).logits}
    optimizer, gaps = torch.optim.Adam([state.dual.rows], lr=3e-2), []
    for _ in range(15):
        output = state.dual.answers(state.dual.mixed(batch, read, 1.0), ("logits",))
        gap = around.task.divergence(output, plain, read, 1.0)
        optimizer.zero_grad()
        gap.backward()
        optimizer.step()
        gaps.append(float(gap.detach()))
    state.close()
    assert gaps[-1] < 0.3 * gaps[0]


@pytest.mark.parametrize("dual", [0.5, 0.0])
def test_the_word_table_is_compared_with_what_the_teacher_has_for_each_piece(
    around: Context, bundle: Bundle, dual: float
) -> None:
    """With dual training with the rows that are learned, without it with those of pieces that both know."""
    state: Any = SharedProjections(dual=dual).attach(around)
    own, theirs = (load_tokenizer(material.source).get_vocab() for material in (bundle.material, bundle.read) if material)
    words = bundle.teacher.model.get_input_embeddings().weight.detach()
    pieces = sorted(own, key=own.__getitem__)
    if dual:
        with torch.no_grad():
            state.dual.rows.add_(1.0)
        goal, rows = state.dual.rows.detach(), list(range(len(pieces)))
    else:
        rows = [own[piece] for piece in pieces if piece in theirs]
        goal = words[[theirs[piece] for piece in pieces if piece in theirs]]
    assert len(rows) < len(pieces) or dual
    table = around.model.get_input_embeddings().weight.detach()[rows]
    expected = projected_distance(table, goal, [None, state.maps["HIDDEN_out"].detach()], "up")
    name = state._table
    state._compared = {name: state._compared[name]}
    assert float(state.distance().detach()) == pytest.approx(float(expected), rel=1e-5)
    state.close()


def test_a_trial_times_the_teacher_on_the_same_texts_in_its_own_pieces(bundle: Bundle) -> None:
    judge = Judge(bundle.material, {}, Reference(1.0, None), 1, None, Log(None, quiet=True), bundle.read)  # type: ignore[arg-type]
    for place in judge._places({"int8": bundle.material, "teacher": bundle.read}):
        ours, theirs = place["int8"], place["teacher"]
        assert ours.sizes == theirs.sizes
        assert ours.tokens > theirs.tokens


def test_two_folders_with_their_own_tokenizers_train_on_the_lines_of_a_text_too(home: Path, tmp_path: Path) -> None:
    """A model that knows whole words alone, and a teacher that reads pieces: no vocabulary is trained, and nothing else is new."""
    source = write_model(tmp_path / "words", trained=False)
    (tmp_path / "lines.txt").write_text("a zebra was here\n\nthe film was great\n" * 20, encoding="utf-8")
    stage = {"train": {"steps": 2, "text": str(tmp_path / "lines.txt"), "methods": [{"use": "distillation", "hidden": 0}]}}
    recipe = recipe_of(home, [stage], model=str(source))
    state = Run(tmp_path / "work", tmp_path / "work", Log(None, quiet=True))
    made, stages = prepare_bundle(preflight(recipe), state)
    training = training_of(stages[0], made, state)  # type: ignore[arg-type]
    assert training.read is not None
    training.check()
    for features, folder in ((training.features, source), (training.read, home / "teacher")):
        tokenizer = load_tokenizer(folder)
        lines = ("a zebra was here", "the film was great")
        assert [list(row) for row in features.columns["input_ids"][:2]] == [tokenizer.encode(line).ids for line in lines]
    with pytest.raises(ValueError, match="the teacher's rows are not those of the model"):
        replace(training, read=replace(training.read, example=range(39))).check()
    assert advance(stages, made, state).bundle.read is made.read


# -- What cannot be done -------------------------------------------------------------------------------------------------------


def method(**options: Any) -> dict[str, Any]:
    return {"train": {"epochs": 1, "methods": [options]}}


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([method(use="distillation")], "distillation compares hidden of single word pieces: set hidden: 0"),
        ([method(use="distillation", hidden=0, scores=1.0)], "compares scores of single word pieces"),
        ([method(use="decomposed_attention")], "compares hidden of single word pieces: leave it out"),
        ([TEACH, {"trim_vocabulary": {}}], "trim_vocabulary cuts the pieces that both read"),
        (
            [{"train": TEACH["train"] | {"augment": 2}}],
            "train.augment: words are replaced",
        ),
    ],
)
def test_what_needs_the_same_pieces_is_refused_before_anything_is_built(
    home: Path, tmp_path: Path, stages: Any, said: str
) -> None:
    with (
        pytest.raises(RecipeError, match="only their answers to whole texts can be compared") as error,
        given_models(recipe_of(home, stages), None, tmp_path / "out"),
    ):
        pass
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocabulary": 60}, "a vocabulary of 60 pieces has no room for 4 special tokens"),
        ({"vocabulary": 3000}, "pieces, not of 3,000"),
        ({"model": {"use": "bert", "vocabulary": PIECES, "config": SHAPE | {"hidden_size": 64}}}, "hidden units: 64 of 32"),
        (
            {"model": {"use": "bert", "vocabulary": PIECES, "config": SHAPE | {"num_hidden_layers": 5}}},
            "the model has 5 layers and its",
        ),
        ({"model": {"use": "cnn", "vocabulary": PIECES}}, "stages\\[0\\]: shared_projections: the model has no layers"),
    ],
)
@pytest.mark.slow
def test_a_student_that_cannot_be_is_refused_before_anything_is_trained(
    home: Path, tmp_path: Path, changes: Any, said: str
) -> None:
    recipe = recipe_of(home, None, **changes)
    with pytest.raises(SlimformerError, match=said), given_models(recipe, None, tmp_path / "out") as given:
        preflight(given)


def test_a_teacher_with_another_kind_of_tokenizer_is_refused(home: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "teacher", trained=False)
    recipe = recipe_of(home, teacher=str(tmp_path / "teacher"))
    with (
        pytest.raises(
            SlimformerError, match="the tokenizer is a WordLevel, and a new vocabulary can be trained for a WordPiece alone"
        ),
        given_models(recipe, None, tmp_path / "out"),
    ):
        pass


def test_a_task_with_answers_for_single_pieces_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "train.conll").write_text("film O\nParis B-place\n\n" * 40, encoding="utf-8")
    recipe = recipe_of(home, [{"train": {"epochs": 1}}], task={"use": "tagging", "data": str(tmp_path)})
    with (
        pytest.raises(SlimformerError, match="the task tagging has answers for single pieces"),
        given_models(recipe, None, tmp_path / "out"),
    ):
        pass


# -- End to end ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_delivers_a_student_with_its_own_vocabulary(home: Path, tmp_path: Path) -> None:
    methods = [{"use": "shared_projections", "weight": 0.3}, {"use": "distillation", "hidden": 0}]
    stage = {"train": {"epochs": 20, "lr": 5e-3, "dropout": False, "methods": methods}}
    run(recipe_of(home, [stage, {"bench": {"seconds": 0.2, "rivals": []}}]), tmp_path / "out", wait_seconds=0)
    records = read_records([tmp_path / "out" / "ledger.jsonl"])
    dense, ours = records[0], next(record for record in records if record.chosen)
    assert ours.scores["accuracy"] > 0.85
    assert [timing.examples for timing in dense.timings] == [timing.examples for timing in ours.timings]
    assert all(mine.tokens > theirs.tokens for mine, theirs in zip(ours.timings, dense.timings, strict=True))
    assert load_tokenizer(tmp_path / "out").get_vocab_size() == PIECES
    assert checkpoint.load(tmp_path / "out").config.vocab_size == PIECES
