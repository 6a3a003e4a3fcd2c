"""Students made from a teacher: what they compute, what they take over, their files, and a recipe that teaches one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from tiny import STUDENTS, batch, tiny
from tiny_folder import WORDS, write_data, write_model
from tiny_folder import write_tokenizer as write_words

from slimformer.core import cost
from slimformer.core.anatomy import VOCABULARY_SITE
from slimformer.data.tokenizer import load_tokenizer, max_length_of
from slimformer.errors import ModelError, RecipeError, SlimformerError
from slimformer.exporters.base import FILES, Variant
from slimformer.exporters.onnx import Onnx
from slimformer.families.base import anatomy_of, subject_of
from slimformer.measuring.profile import Texts, check_profiled
from slimformer.methods.shared_projections import directions
from slimformer.reporting.ledger import read_facts, read_records
from slimformer.running.fresh import Fresh
from slimformer.running.given import given_models
from slimformer.running.preflight import preflight
from slimformer.running.reader import parse_recipe
from slimformer.running.recipe import Recipe
from slimformer.running.runner import run, train_stages
from slimformer.running.search import compress
from slimformer.running.students import RARE, alone, rarity, reduced
from slimformer.saving import checkpoint
from slimformer.tasks import Classification

# -- What they compute ---------------------------------------------------------------------------------------------------------


def words_of(model: Any, ids: list[int]) -> np.ndarray:
    return model.encoder.embeddings.weight.detach().double().numpy()[ids]  # (words, size)


def head_of(model: Any, vector: np.ndarray) -> np.ndarray:
    dense, last = (
        [part.detach().double().numpy() for part in module.parameters()] for module in (model.dense, model.classifier)
    )
    inner = np.maximum(dense[0] @ vector + dense[1], 0)
    return last[0] @ inner + last[1]


def static_vector(model: Any, words: np.ndarray) -> np.ndarray:
    return words.mean(0)


def cnn_vector(model: Any, words: np.ndarray) -> np.ndarray:
    """Kim's filters one by one: the words that a filter covers, each with its part of the filter and of the bias."""
    weight, bias = (part.detach().double().numpy() for part in model.encoder.filters.parameters())
    count, place, found = model.config.hidden_size, 0, []
    for width in model.config.widths:
        parts = [slice(place + step * count, place + (step + 1) * count) for step in range(width)]
        place += width * count
        answers = [
            sum(weight[part] @ words[start + step] + bias[part] for step, part in enumerate(parts) if start + step < len(words))
            for start in range(len(words))
        ]
        found.append(np.maximum(np.max(answers, axis=0), 0))
    return np.concatenate(found)


def bilstm_vector(model: Any, words: np.ndarray) -> np.ndarray:
    """The equations of an LSTM, word after word; the second layer reads the states of the first."""

    def sigmoid(values: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-values))

    states = words
    for layer in model.encoder.recurrent:
        weights = {name: value.detach().double().numpy() for name, value in layer.lstm.named_parameters()}
        both, units = [], layer.units
        for end, order in (("", 1), ("_reverse", -1)):
            hidden, cell, seen = np.zeros(units), np.zeros(units), []
            for word in states[::order]:
                sums = (
                    weights[f"weight_ih_l0{end}"] @ word
                    + weights[f"bias_ih_l0{end}"]
                    + weights[f"weight_hh_l0{end}"] @ hidden
                    + weights[f"bias_hh_l0{end}"]
                )
                into, forget, new, out = np.split(sums, 4)
                cell = sigmoid(forget) * cell + sigmoid(into) * np.tanh(new)
                hidden = sigmoid(out) * np.tanh(cell)
                seen.append(hidden)
            both.append(np.array(seen[::order]))
        last = np.concatenate([both[0][-1], both[1][0]])
        states = np.concatenate(both, 1)
    return last


VECTORS = {"static": static_vector, "cnn": cnn_vector, "bilstm": bilstm_vector}


@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_student_computes_what_its_paper_says(kind: str, length: int) -> None:
    """A text shorter than all filters too, and with padding behind it."""
    model, ids = tiny(kind), list(range(20, 20 + length))
    expected = head_of(model, VECTORS[kind](model, words_of(model, ids)))
    for padding in (0, 5):
        mask = torch.tensor([[1] * length + [0] * padding])
        with torch.no_grad():
            got = model(input_ids=torch.tensor([ids + [1] * padding]), attention_mask=mask).logits[0]
        assert np.allclose(got.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", STUDENTS)
def test_every_part_of_a_student_matters_and_learns(kind: str) -> None:
    model = tiny(kind)
    inputs = batch(model, rows=8, seq=12)
    model(**inputs, labels=torch.arange(8) % 3).loss.backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.parameters())


@pytest.mark.parametrize("kind", STUDENTS)
def test_its_macs_are_those_of_its_matrices(kind: str) -> None:
    """Of seven tokens: filters of 3, 4 and 5 words; two LSTM layers, two directions, four gates of 12 units each."""
    model = tiny(kind)
    expected = {"static": 0, "cnn": 7 * 24 * 8 * 12, "bilstm": 7 * 2 * 4 * 12 * ((24 + 12) + (24 + 12))}
    assert cost.macs(anatomy_of(model), np.array([7])).dense == expected[kind]
    recurrent = sum(value.numel() for name, value in model.named_parameters() if ".lstm.weight" in name)
    assert anatomy_of(model).recurrent == recurrent


def test_a_student_without_layers_is_not_profiled() -> None:
    with pytest.raises(ModelError, match="no layers to tell apart"):
        check_profiled(subject_of(tiny("cnn")), [Texts(1, 8)])


# -- Files ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.slow
def test_an_answer_of_a_file_depends_on_no_neighbour_and_no_padding(kind: str, tmp_path: Path) -> None:
    """Stock ONNX Runtime, file by file; only the file with dynamic ranges looks at the whole batch."""
    model = tiny(kind)
    seen = [{name: value.numpy() for name, value in batch(model, 4, 9, seed).items()} for seed in range(3)]
    variants = {variant: tmp_path / kind.name for variant, kind in FILES.items() if variant != Variant.INT8_DYNAMIC}
    for artifact in Onnx().export_all(model, seen, variants).values():
        session = onnxruntime.InferenceSession(artifact.path, providers=["CPUExecutionProvider"])
        inputs = seen[0]
        (together,) = session.run(["logits"], dict(inputs))
        for row in range(4):
            length = int(inputs["attention_mask"][row].sum())
            (alone_,) = session.run(["logits"], {name: value[row : row + 1, :length] for name, value in inputs.items()})
            assert np.allclose(alone_[0], together[row], atol=1e-6), artifact.path.name


def test_lstms_are_one_operator_each_and_their_matrices_a_quarter_as_large(tmp_path: Path) -> None:
    model = tiny("bilstm", embedding_size=64, hidden_size=64)
    seen = [{name: value.numpy() for name, value in batch(model, 3, 9, seed).items()} for seed in range(2)]
    paths = {Variant.FLOAT: tmp_path / "float.onnx", Variant.INT8_FUSED: tmp_path / "int8.onnx"}
    made = Onnx().export_all(model, seen, paths)
    small = onnx_ir.load(paths[Variant.INT8_FUSED]).graph
    for graph in (onnx_ir.load(paths[Variant.FLOAT]).graph, small):
        assert sum(node.op_type == "LSTM" for node in graph) == 2
        assert not any(node.op_type in ("Loop", "Scan") for node in graph)
    stored = [value for value in small.initializers.values() if str(value.name).endswith(("into.int8", "back.int8"))]
    assert sum(value.const_value.size for value in stored) == anatomy_of(model).recurrent
    assert any("4 matrices of LSTMs" in note for note in made[Variant.INT8_FUSED].notes)


@pytest.mark.parametrize("kind", STUDENTS)
def test_auto_classes_read_a_student(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification

    model = tiny(kind)
    model.save_pretrained(tmp_path / "plain")
    for cls in (AutoModelForSequenceClassification, AutoModel):
        read = cls.from_pretrained(tmp_path / "plain")
        state = read.state_dict()
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items() if name in state)
    assert torch.equal(checkpoint.load(tmp_path / "plain").classifier.weight, model.classifier.weight)


# -- What a student takes over -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained teacher and its data."""
    place = tmp_path_factory.mktemp("home")
    write_model(place / "teacher")
    write_data(place / "data")
    return place


def built(home: Path, out: Path, use: str, stages: list[Any] | None = None, **config: Any) -> Recipe:
    return parse_recipe(
        {
            "model": {"use": use, "config": config},
            "teacher": str(home / "teacher"),
            "task": {"use": "classification", "data": str(home / "data"), "text": "sentence", "label": "label"},
            "stages": stages or [{"train": {"epochs": 1}}],
        }
    )


def folder_of(recipe: Recipe, out: Path) -> Path:
    with given_models(recipe, None, out) as given:
        preflight(given)
        return Path(str(given.model))


def test_directions_are_those_in_which_rows_are_largest() -> None:
    rows = torch.tensor([[3.0, 0.0, 0.0], [0.0, -2.0, 0.0], [0.0, 0.0, 1.0]])
    assert torch.allclose(directions(rows, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))


def test_reduced_vectors_keep_the_distances_that_fit() -> None:
    """Points in a plane of a space of five axes, away from its origin: two numbers tell them apart as well, four hold two zeros."""
    generator = torch.Generator().manual_seed(0)
    plane, points = torch.randn(2, 5, generator=generator), torch.randn(20, 2, generator=generator)
    vectors = points @ plane + 3
    for count in (2, 8):
        small = reduced(vectors, count)
        assert small.shape == (20, count)
        assert torch.allclose(torch.cdist(small, small), torch.cdist(vectors, vectors), atol=1e-3)
        assert torch.allclose(small.mean(0), torch.zeros(count), atol=1e-5)


def test_rare_pieces_count_more(tmp_path: Path) -> None:
    """Of four words "film" is half: a / (a + 1/2). Special tokens count nothing, what is not there counts whole."""
    tokenizer = write_words(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "pad_token_id": 0, "vocab_size": 100}', encoding="utf-8")
    weights = rarity(tmp_path, ["the film", "film was"], 100)
    assert weights[tokenizer.token_to_id("film")] == pytest.approx(RARE / (RARE + 0.5))
    assert weights[tokenizer.token_to_id("was")] == pytest.approx(RARE / (RARE + 0.25))
    assert weights[tokenizer.token_to_id("dull")] == 1.0
    assert [float(weights[tokenizer.token_to_id(token)]) for token in ("[CLS]", "[SEP]", "[PAD]")] == [0.0, 0.0, 0.0]


def test_a_static_student_knows_what_the_teacher_makes_of_each_piece(home: Path, tmp_path: Path) -> None:
    teacher = subject_of(checkpoint.load(home / "teacher"))
    found = alone(teacher, home / "teacher")
    for piece in (5, 17):
        ids = torch.tensor([[2, piece, 3]])
        with torch.no_grad():
            states = teacher.model.bert(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        assert torch.allclose(found[piece], states[0].mean(0), atol=1e-5)
    padding = tmp_path / "padding"
    shutil.copytree(home / "teacher", padding)
    tokenizer = load_tokenizer(padding)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(padding / "tokenizer.json"))
    assert torch.equal(alone(teacher, padding), found)
    folder = folder_of(built(home, tmp_path, "static", hidden_size=32, head_size=0), tmp_path / "out")
    table = checkpoint.load(folder).embeddings.weight.detach()
    texts = [line.split("\t")[0] for line in (home / "data" / "train.tsv").read_text().splitlines()[1:]]
    assert len(table) == len(found)
    assert bool((table[[0, 2, 3]] == 0).all())
    assert float(table.square().mean().sqrt()) == pytest.approx(0.3, rel=1e-3)
    centred = found - found.mean(0)
    kept = torch.linalg.norm(table, dim=1) / torch.linalg.norm(centred, dim=1)  # all 32 numbers: only the weight is left
    one, other = load_tokenizer(folder).token_to_id("film"), load_tokenizer(folder).token_to_id("great")
    weights = rarity(home / "teacher", texts, len(table))
    assert float(kept[one] / kept[other]) == pytest.approx(float(weights[one] / weights[other]), rel=0.1)


@pytest.mark.parametrize("kind", ["bilstm", "cnn"])
def test_other_students_begin_with_the_teachers_words(home: Path, tmp_path: Path, kind: str) -> None:
    folder = folder_of(built(home, tmp_path, kind, embedding_size=40, hidden_size=8), tmp_path / "out")
    words = checkpoint.load(home / "teacher").get_input_embeddings().weight.detach()
    table = checkpoint.load(folder).embeddings.weight.detach()
    assert table.shape == (len(words), 40)
    assert bool((table[:, 32:] == 0).all())  # the teacher has 32 numbers a word
    apart = [torch.cdist(item, item) for item in (table, words)]
    assert torch.allclose(apart[0] / apart[0].max(), apart[1] / apart[1].max(), atol=1e-3)
    assert max_length_of(folder) == max_length_of(home / "teacher") == 64
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(home / "teacher").get_vocab()


def test_a_shallower_student_has_the_teachers_layers(home: Path, tmp_path: Path) -> None:
    """Two of three layers: the first one learns from round(3 / 2), the second from the last."""
    folder = folder_of(built(home, tmp_path, "bert", num_hidden_layers=2), tmp_path / "out")
    student, teacher = checkpoint.load(folder), checkpoint.load(home / "teacher").bert
    for own, other in ((0, 1), (1, 2)):
        theirs = teacher.encoder.layer[other].state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in student.encoder.layer[own].state_dict().items())
    assert torch.equal(student.embeddings.word_embeddings.weight, teacher.embeddings.word_embeddings.weight)
    assert torch.equal(student.pooler.dense.weight, teacher.pooler.dense.weight)


def test_a_narrower_student_has_the_teachers_tables_in_fewer_columns(home: Path, tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2, "num_hidden_layers": 4}
    student = checkpoint.load(folder_of(built(home, tmp_path, "bert", **shape), tmp_path / "out"))
    teacher = checkpoint.load(home / "teacher").bert
    words = teacher.embeddings.word_embeddings.weight.detach()
    for name in ("word_embeddings", "position_embeddings"):
        own, other = (getattr(item.embeddings, name).weight.detach() for item in (student, teacher))
        assert torch.allclose(own, other @ directions(words, 16), atol=1e-6)
    assert len(student.encoder.layer) == 4
    assert student.encoder.layer[0].attention.self.query.weight.shape == (16, 16)


# -- Recipes -------------------------------------------------------------------------------------------------------------------

TEACH = {"train": {"epochs": 6, "lr": 5e-3, "batch_size": 32, "methods": [{"use": "distillation", "hidden": 0}]}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", "bilstm", "bert"])
def test_a_run_teaches_a_student_and_delivers_it(home: Path, tmp_path: Path, kind: str) -> None:
    sizes = {"bert": {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 2}}
    recipe = built(home, tmp_path, kind, [TEACH, {"bench": {"seconds": 0.2, "rivals": []}}], **sizes.get(kind, {}))
    result = run(recipe, tmp_path / "out", wait_seconds=0)
    records = read_records([tmp_path / "out" / "ledger.jsonl"])
    dense, ours = records[0], next(record for record in records if record.chosen)
    assert dense.scores["accuracy"] > 0.9
    assert ours.scores["accuracy"] > 0.85  # one word decides, and each kind can read it
    assert ours.layers == ()  # of the teacher's layers none is a part of it
    assert "heads" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert read_facts(tmp_path / "out").model == kind
    model = checkpoint.load(tmp_path / "out")
    assert type(model).__name__.lower() == f"{kind}forsequenceclassification"
    assert result.best.is_file()
    assert run(recipe, tmp_path / "out", wait_seconds=0).out == result.out  # finished: read, not made again


def test_a_student_is_built_once_and_from_one_teacher(home: Path, tmp_path: Path) -> None:
    recipe = built(home, tmp_path, "cnn", [{"train": {"epochs": 1, "batch_size": 64}}], hidden_size=4, embedding_size=8)
    train_stages(recipe, tmp_path / "out")
    file = tmp_path / "out" / "given" / "cnn" / "model.safetensors"
    written = file.stat().st_mtime_ns
    train_stages(recipe, tmp_path / "out")
    assert file.stat().st_mtime_ns == written
    write_model(tmp_path / "other", trained=False)
    other = Recipe(recipe.model, recipe.task, recipe.stages, teacher=str(tmp_path / "other"))
    with pytest.raises(SlimformerError, match="holds another model"), given_models(other, None, tmp_path / "out"):
        pass


def test_a_students_vocabulary_is_trimmed_and_its_activations_quantized(home: Path, tmp_path: Path) -> None:
    quantized = {"train": {"epochs": 1, "methods": [{"use": "quantization"}, {"use": "distillation", "hidden": 0}]}}
    lines = [f"the film was very {word}\t{label}" for label in ("good", "bad") for word in WORDS[label][:2]] * 16
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n", encoding="utf-8")
    recipe = built(home, tmp_path, "cnn", [{"trim_vocabulary": {}}, TEACH, quantized], hidden_size=8, embedding_size=16)
    recipe = replace(recipe, task=replace(recipe.task, data=str(tmp_path)))
    train_stages(recipe, tmp_path / "out", wait_seconds=0)
    (made,) = (tmp_path / "out" / "work").glob("3-train-*/made")
    model, whole = checkpoint.load(made), checkpoint.load(tmp_path / "out" / "given" / "cnn")
    kept = len(checkpoint.load_plan(made).keep[VOCABULARY_SITE])
    assert model.encoder.embeddings.num_embeddings == kept < whole.embeddings.num_embeddings
    ranges = checkpoint.load_ranges(made)
    assert ranges is not None
    assert {"filters.input"} <= set(ranges.activations)


def test_yaml_names_a_student(home: Path, tmp_path: Path) -> None:
    recipe = built(home, tmp_path, "cnn", widths=[2, 3])
    assert recipe.model == Fresh("cnn", config={"widths": [2, 3]})
    assert parse_recipe(recipe.to_data()) == recipe


def test_a_student_cannot_be_compressed_further(home: Path, tmp_path: Path) -> None:
    write_words(tmp_path / "static")
    tiny("static", vocab_size=60, num_labels=2).save_pretrained(tmp_path / "static")
    task = Classification(data=str(home / "data"), text="sentence", label="label")
    with pytest.raises(ModelError, match="is a static student, which has no layers to cut"):
        compress(str(tmp_path / "static"), task, tmp_path / "out")


METHODS = [
    ({"use": "distillation"}, "distillation compares hidden: set hidden: 0"),
    ({"use": "distillation", "hidden": 0, "scores": 1.0}, "distillation compares scores: set hidden: 0"),
    ({"use": "gates"}, "gates works on layers: leave it out"),
    ({"use": "theseus", "keep": 0.5}, "theseus works on layers"),
    ({"use": "layer_drop"}, "layer_drop works on layers"),
    ({"use": "elastic"}, "elastic works on layers"),
    ({"use": "shared_layers"}, "shared_layers works on layers"),
    ({"use": "early_exit"}, "early_exit works on layers"),
    ({"use": "weight_squeezing"}, "weight_squeezing works on layers"),
]


@pytest.mark.parametrize(("method", "said"), METHODS, ids=[said.split()[0] + str(i) for i, (_, said) in enumerate(METHODS)])
def test_a_stage_that_asks_for_layers_is_refused_before_anything_is_built(
    home: Path, tmp_path: Path, method: Any, said: str
) -> None:
    recipe = built(home, tmp_path, "static", [{"train": {"epochs": 1, "methods": [method]}}])
    with (
        pytest.raises(RecipeError, match="a static student has no layers") as error,
        given_models(recipe, None, tmp_path / "out"),
    ):
        pass
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("use", "config", "said"),
    [
        ("roberta", {}, "cannot read what its teacher reads, which is a bert"),
        ("bert", {"hidden_size": 17}, "cannot be built from this config"),
        ("bilstm", {"hidden_size": 0}, "hidden_size is too small"),
        ("bilstm", {"num_hidden_layers": 0}, "num_hidden_layers is too small"),
        ("cnn", {"widths": [0]}, "widths must be whole numbers from 1 to 100"),
        ("static", {"dropout": 1.0}, "dropout must be 0 or above, and below 1"),
    ],
)
def test_sizes_that_make_no_student_leave_nothing(home: Path, tmp_path: Path, use: str, config: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said), given_models(built(home, tmp_path, use, **config), None, tmp_path / "out"):
        pass
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"use": "sttaic"}, "did you mean 'static'"),
        ({"use": "static", "vocabulary": 0}, "vocabulary must be from 1 to a billion"),
        ({"use": "static", "config": {"layers": 2}}, "config.layers: unknown field of a static config"),
        ({"use": "cnn", "config": {"widths": ["?", None]}}, "config.widths: must be a number"),
        ({"use": "static"}, "a static is made from a teacher, and the recipe names no `teacher:`"),
    ],
)
def test_a_mistake_in_a_student_is_named(model: Any, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_recipe({"model": model, "task": {"use": "intents"}, "stages": []})
    assert said in str(error.value)


def test_a_task_with_other_answers_is_refused(home: Path, tmp_path: Path) -> None:
    text = tmp_path / "texts.txt"
    text.write_text("one line\n" * 200, encoding="utf-8")
    data = {"model": {"use": "cnn"}, "teacher": str(home / "teacher"), "task": {"use": "text", "data": str(text)}, "stages": []}
    with (
        pytest.raises(RecipeError, match="a cnn student gives one answer for a text, and the task text needs another"),
        given_models(parse_recipe(data), None, tmp_path / "out"),
    ):
        pass
