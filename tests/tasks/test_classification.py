"""The task classification: readers that fail by DataError or not at all, labels matched, metrics worked by hand."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from slimformer import cli
from slimformer.data.files import read_table
from slimformer.data.glue import GLUE
from slimformer.data.labels import match_labels
from slimformer.errors import DataError, RecipeError
from slimformer.log import show_log
from slimformer.tasks._metrics import class_metrics, score_metrics
from slimformer.tasks.base import Example, Features, Split
from slimformer.tasks.classification import Classification
from slimformer.tasks.intents import Intents

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_glue = pytest.mark.skipif(not (SHARED / "glue").is_dir(), reason="the GLUE files are not beside the repository")
FILES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


def rows(count: int = 40) -> list[tuple[str, str]]:
    return [(f"sentence number {index}", "good" if index % 2 else "bad") for index in range(count)]


def write_tsv(path: Path, lines: Sequence[Sequence[str]], header: Sequence[str] = ("sentence", "label")) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join("\t".join(line) for line in [header, *lines]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tsv(tmp_path / "reviews" / "train.tsv", rows())
    write_tsv(tmp_path / "reviews" / "dev.tsv", rows(10))
    return tmp_path / "reviews"


@pytest.fixture
def tokenizer() -> Tokenizer:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "sentence", "number"]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


def features(count: int, order: Sequence[int] | None = None) -> Features:
    return Features({"input_ids": [[1]] * count}, order or range(count), 0, 0)


def examples(answers: Sequence[Any]) -> list[Example]:
    return [Example(str(index), ("x",), answer) for index, answer in enumerate(answers)]


# ---- splits


def test_train_validation_and_dev_are_disjoint_and_always_the_same(folder: Path) -> None:
    task = Classification(data=str(folder))
    train, validation, dev = (task.split(name) for name in (Split.TRAIN, Split.VALIDATION, Split.DEV))
    assert len(train) == 32
    assert len(validation) == 8  # a fifth: 200 would be more than the data has
    assert len(dev) == 10
    assert {item.id for item in train}.isdisjoint(item.id for item in validation)
    assert Counter(item.answer for item in validation) == {"good": 4, "bad": 4}
    assert Classification(data=str(folder)).split(Split.VALIDATION) == validation
    assert dev[0] == Example("dev/0", ("sentence number 0",), "bad")


def test_validation_is_five_percent_within_its_bounds(tmp_path: Path) -> None:
    write_tsv(tmp_path / "train.tsv", rows(10_000))
    write_tsv(tmp_path / "dev.tsv", rows(10))
    assert len(Classification(data=str(tmp_path)).split(Split.VALIDATION)) == 500
    assert len(Classification(data=str(tmp_path), validation_share=0.001).split(Split.VALIDATION)) == 200
    assert len(Classification(data=str(tmp_path), validation_share=0.4).split(Split.VALIDATION)) == 2000


def test_one_file_gives_a_tenth_to_dev(tmp_path: Path) -> None:
    task = Classification(data=str(write_tsv(tmp_path / "all.tsv", rows(100))))
    sizes = {name: len(task.split(name)) for name in Split}
    assert sizes == {Split.TRAIN: 72, Split.VALIDATION: 18, Split.DEV: 10}
    assert Counter(item.answer for item in task.split(Split.DEV)) == {"good": 5, "bad": 5}
    texts = [item.texts for name in Split for item in task.split(name)]
    assert len(set(texts)) == 100


def test_a_file_that_changes_is_read_again(folder: Path) -> None:
    task = Classification(data=str(folder))
    assert len(task.split(Split.DEV)) == 10
    write_tsv(folder / "dev.tsv", rows(12))
    assert len(task.split(Split.DEV)) == 12


def test_train_rows_choose_by_number_or_at_random(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"train_rows": list(range(20))}), encoding="utf-8")
    task = Classification(data=str(folder), train_rows=str(file))
    ids = {int(item.id.removeprefix("train/")) for name in (Split.TRAIN, Split.VALIDATION) for item in task.split(name)}
    assert ids == set(range(20))
    some = Classification(data=str(folder), train_rows=10)
    assert len(some.split(Split.TRAIN)) + len(some.split(Split.VALIDATION)) == 10
    assert some.split(Split.TRAIN) == Classification(data=str(folder), train_rows=10).split(Split.TRAIN)


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"rows": [1]}', "no list of row numbers"), ("[0, 40]", "names row 40"), ("[1.5]", "no list"), ("{", "cannot be read")],
)
def test_bad_train_rows(folder: Path, tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "rows.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        Classification(data=str(folder), train_rows=str(file)).split(Split.TRAIN)


# ---- columns and kinds


def test_columns_are_guessed_told_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    table = [("q1", "s1", "x", "0.5"), ("q2", "s2", "y", "2.5")] * 20
    file = write_tsv(tmp_path / "pairs.tsv", table, ("Question", "Sentence", "note", "Score"))
    task = Classification(data=str(file)).settled()
    assert (task.text, task.text_pair, task.label) == ("Question", "Sentence", "Score")
    assert (task.kind, task.metric, task.labels) == ("score", "spearman", ())
    assert f"{file}: taking text 'Question' and 'Sentence', label 'Score'" in caplog.text
    told = Classification(data=str(file), text="note", label="Question").settled()
    assert (told.text, told.text_pair, told.label, told.labels) == ("note", None, "Question", ("q1", "q2"))


def test_the_command_line_shows_the_columns_that_were_guessed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with show_log():
        Classification(data=str(folder)).settled()
    assert capsys.readouterr().out == f"{folder / 'train.tsv'}: taking text 'sentence', label 'label'\n"


def test_numbers_are_classes_when_whole_and_sorted_by_value(tmp_path: Path) -> None:
    file = write_tsv(tmp_path / "stars.tsv", [("a", label) for label in ["10", "2.0", "9", "2"] * 10])
    task = Classification(data=str(file)).settled()
    assert (task.kind, task.labels) == ("classes", ("2", "9", "10"))


def test_a_column_that_cannot_be_guessed_lists_what_there_is(tmp_path: Path) -> None:
    file = write_tsv(tmp_path / "a.tsv", [("1", "2", "3")] * 9, ("foo", "bar", "baz"))
    with pytest.raises(DataError, match="cannot tell which is a label column") as caught:
        Classification(data=str(file)).settled()
    assert "'foo', 'bar', 'baz'" in str(caught.value)
    with pytest.raises(DataError, match="cannot tell which is a text column"):
        Classification(data=str(file), label="baz").settled()


def test_parquet_knows_its_class_names(tmp_path: Path) -> None:
    metadata = {"info": {"features": {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}}}}
    table = pyarrow.table({"text": ["good", "bad"] * 20, "label": [1, 0] * 20})
    pyarrow.parquet.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(metadata)}), tmp_path / "train-00000-of-00001.parquet"
    )
    task = Classification(data=str(tmp_path)).settled()
    assert task.labels == ("neg", "pos")
    assert {item.texts[0]: item.answer for item in task.split(Split.TRAIN)} == {"good": "pos", "bad": "neg"}
    assert task.bind({"id2label": {0: "POSITIVE", 1: "NEGATIVE"}}).split(Split.DEV)[0].answer in {"POSITIVE", "NEGATIVE"}


# ---- labels and the model


@pytest.mark.parametrize(
    ("data", "names", "known", "expected"),
    [
        (["Good", "bad"], ("bad", "good"), (), {"Good": 1, "bad": 0}),
        (["0", "1"], ("negative", "positive"), (), {"0": 0, "1": 1}),
        (["0", "1"], ("positive", "negative"), ("negative", "positive"), {"0": 1, "1": 0}),
        (["not entailment", "entailment"], ("ENTAILMENT", "not_entailment"), (), {"not entailment": 1, "entailment": 0}),
        (["1", "2"], ("2", "1"), (), {"1": 1, "2": 0}),
        (["1", "2"], ("negative", "positive"), (), {}),
        (["good", "awful"], ("bad", "good"), (), {"good": 1}),
    ],
)
def test_labels_are_matched(data: list[str], names: tuple[str, ...], known: tuple[str, ...], expected: dict[str, int]) -> None:
    assert match_labels(data, names, known) == expected


def test_class_names_in_the_data_settle_ids_of_a_model_with_more_classes(tmp_path: Path) -> None:
    metadata = {"info": {"features": {"label": {"names": ["neg", "pos", "mixed"], "_type": "ClassLabel"}}}}
    table = pyarrow.table({"text": ["good", "bad"] * 20, "label": [1, 0] * 20})
    pyarrow.parquet.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(metadata)}), tmp_path / "train.parquet"
    )
    task = Classification(data=str(tmp_path)).bind({"id2label": {0: "mixed", 1: "pos", 2: "neg"}})
    assert {item.texts[0]: item.answer for item in task.split(Split.TRAIN)} == {"good": "pos", "bad": "neg"}


@pytest.mark.parametrize(
    ("id2label", "labels"),
    [
        ({0: "good", 1: "bad"}, ("good", "bad")),
        ({"1": "Good", "0": "Bad"}, ("Bad", "Good")),
        ({0: "LABEL_0", 1: "LABEL_1"}, ("bad", "good")),
        ({0: "0", 1: "1"}, ("bad", "good")),
        ({0: "good", 1: "bad", 2: "so-so"}, ("good", "bad", "so-so")),
    ],
)
def test_bind_takes_the_models_order(folder: Path, id2label: Mapping[Any, str], labels: tuple[str, ...]) -> None:
    task = Classification(data=str(folder)).bind({"id2label": id2label})
    assert task.labels == labels
    by_name = {name.lower(): name for name in labels}
    assert task.split(Split.DEV)[1].answer == by_name["good"]
    assert task.bind({"id2label": id2label}) == task
    assert task.configure()["id2label"] == dict(enumerate(labels))


def test_bind_lets_the_persons_labels_name_an_unnamed_models_order(folder: Path) -> None:
    task = Classification(data=str(folder), labels=("good", "bad")).bind({"id2label": {0: "LABEL_0", 1: "LABEL_1"}})
    assert task.labels == ("good", "bad")


def test_bind_refuses_what_does_not_fit(folder: Path, tmp_path: Path) -> None:
    task = Classification(data=str(folder))
    with pytest.raises(DataError, match="label 'bad' in column 'label' is not a known one") as caught:
        task.bind({"id2label": {0: "good", 1: "awful"}})
    assert "train.tsv, line 2" in str(caught.value)
    assert "known labels: good, awful" in str(caught.value)
    with pytest.raises(DataError, match="5 classes without names, the data has 2"):
        task.bind({"id2label": {index: f"LABEL_{index}" for index in range(5)}})
    with pytest.raises(DataError, match="gives one score, the data has 2 classes"):
        Classification(data=str(folder), kind="classes").bind({"id2label": {0: "LABEL_0"}})
    with pytest.raises(DataError, match="gives one score .* but column 'label' of .*train.tsv holds classes: bad, good"):
        task.bind({"id2label": {0: "bad"}})
    with pytest.raises(DataError, match="label 'bad' in column 'label' is not a known one"):
        task.bind({"id2label": {0: "9" * 5000, 1: "LABEL_" + "9" * 5000}})
    with pytest.raises(DataError, match="id2label is not a mapping"):
        task.bind({"num_labels": float("inf")})
    with pytest.raises(DataError, match="id2label has the ids 1, 2"):
        task.bind({"id2label": {1: "good", 2: "bad"}})
    ids = write_tsv(tmp_path / "ids.tsv", [("a", "0"), ("b", "1")] * 20)
    with pytest.raises(DataError, match="no ids above 1, the model has 3 classes: bad, middling, good"):
        Classification(data=str(ids)).bind({"id2label": {0: "bad", 1: "middling", 2: "good"}})
    scores = write_tsv(tmp_path / "scores.tsv", [("a", "0.5"), ("b", "1.5")] * 20)
    with pytest.raises(DataError, match="the data has scores, the model has 2 classes"):
        Classification(data=str(scores), kind="score").bind({"id2label": {0: "no", 1: "yes"}})


def test_bind_to_one_output_makes_numbers_scores(tmp_path: Path) -> None:
    file = write_tsv(tmp_path / "stars.tsv", [("a", "1"), ("b", "5")] * 20)
    task = Classification(data=str(file)).bind({"id2label": {0: "LABEL_0"}, "problem_type": "regression"})
    assert (task.kind, task.metric) == ("score", "spearman")
    assert {item.answer for item in task.split(Split.TRAIN)} == {1.0, 5.0}
    assert task.configure()["num_labels"] == 1


def test_bind_reads_a_real_config(folder: Path) -> None:
    from transformers import BertConfig

    config = BertConfig(id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1})
    assert Classification(data=str(folder)).bind(config).labels == ("good", "bad")


def test_a_model_can_be_judged_where_there_is_no_training_data(tmp_path: Path) -> None:
    write_tsv(tmp_path / "dev.tsv", rows(6))
    task = Classification(data=str(tmp_path)).bind({"id2label": {0: "good", 1: "bad"}})
    assert len(task.split(Split.DEV)) == 6
    with pytest.raises(DataError, match="has no training data"):
        task.split(Split.TRAIN)


# ---- encoding, loss


def test_encode_counts_what_is_cut_and_keeps_the_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    tokenizer.enable_padding(length=50)
    task = Classification(data=str(folder)).settled()
    short = task.encode(task.split(Split.DEV), tokenizer, 4)
    assert short.columns["input_ids"][0] == [2, 4, 5, 3]
    assert (short.truncated, short.pad_id) == (10, 0)
    assert tokenizer.padding is not None
    whole = task.encode(task.split(Split.DEV), tokenizer, 5)
    assert (whole.truncated, whole.lengths().tolist()) == (0, [5] * 10)
    assert whole.columns["labels"] == [0, 1] * 5


def test_encode_marks_the_second_text_and_leaves_out_unknown_labels(tokenizer: Tokenizer) -> None:
    task = Classification(kind="classes", labels=("a", "b"))
    encoded = task.encode([Example("0", ("sentence", "number number"), None)], tokenizer, 16)
    assert encoded.columns["input_ids"] == [[2, 4, 3, 5, 5, 3]]
    assert encoded.columns["token_type_ids"] == [[0, 0, 0, 1, 1, 1]]
    assert "labels" not in encoded.columns


def test_loss_and_divergence_by_hand() -> None:
    classes = Classification(kind="classes", labels=("a", "b"))
    even = {"logits": torch.zeros(3, 2, dtype=torch.float16)}
    assert classes.loss(even, {"labels": torch.tensor([0, 1, 1])}).item() == pytest.approx(math.log(2))
    sure = {"logits": torch.tensor([[math.log(3.0), 0.0]])}  # 3/4, 1/4
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    level = {"logits": torch.zeros(1, 2)}
    assert classes.divergence(level, sure, {}, 1.0).item() == pytest.approx(expected, rel=1e-5)
    hot = {"logits": 2 * sure["logits"]}  # at temperature 2 the same distribution, and times four
    assert classes.divergence(level, hot, {}, 2.0).item() == pytest.approx(4 * expected, rel=1e-5)
    assert classes.divergence(sure, sure, {}, 3.0).item() == pytest.approx(0.0, abs=1e-6)
    score = Classification(kind="score")
    ours, theirs = {"logits": torch.tensor([[1.0], [2.0]])}, {"logits": torch.tensor([[3.0], [2.0]])}
    assert score.loss(ours, {"labels": torch.tensor([2.0, 2.0])}).item() == pytest.approx(0.5)
    assert score.divergence(ours, theirs, {}, 4.0).item() == pytest.approx(2.0)


# ---- metrics


def test_class_metrics_by_hand() -> None:
    wanted, predicted = np.array([1, 1, 1, 0, 0, 0, 0, 1]), np.array([1, 1, 0, 0, 0, 1, 0, 0])
    # tp 2, fn 2, fp 1, tn 3
    scores = class_metrics(predicted, wanted, 2)
    assert scores["accuracy"] == pytest.approx(5 / 8)
    assert scores["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    assert scores["f1_macro"] == pytest.approx((4 / 7 + 6 / 9) / 2)
    assert scores["matthews"] == pytest.approx((2 * 3 - 1 * 2) / math.sqrt(3 * 4 * 5 * 4))


def test_metrics_where_a_class_never_occurs() -> None:
    scores = class_metrics(np.array([0, 0]), np.array([0, 0]), 2)
    assert (scores["accuracy"], scores["f1"], scores["matthews"]) == (1.0, 0.0, 0.0)
    three = class_metrics(np.array([0, 1, 2]), np.array([0, 1, 1]), 3)
    assert three["f1_macro"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert "f1" not in three


def test_score_metrics_by_hand() -> None:
    scores = score_metrics(np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 2.0]))
    assert scores["spearman"] == pytest.approx(1 - 6 * (0 + 1 + 1) / (3 * 8))
    assert scores["pearson"] == pytest.approx(1 / math.sqrt((14 / 3) * 2))
    for nothing in (np.zeros(3), np.array([1.0, np.nan, 2.0]), np.full(3, 7.1)):
        assert score_metrics(nothing, np.array([1.0, 2.0, 3.0])) == {"pearson": 0.0, "spearman": 0.0}


def test_score_answers_and_credit_follow_the_examples_not_the_rows() -> None:
    task = Classification(kind="classes", labels=("a", "b"))
    outputs = {"logits": np.array([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0]])}  # b, a, b
    shuffled = features(3, [2, 0, 1])  # row 0 is example 2
    judged = examples(["a", "b", "a"])
    assert task.answers(outputs, shuffled, judged) == ["a", "b", "b"]
    assert task.credit(outputs, shuffled, judged).tolist() == [1.0, 1.0, 0.0]
    assert task.score(outputs, shuffled, judged)["accuracy"] == pytest.approx(2 / 3)
    score = Classification(kind="score")
    numbers = {"logits": np.array([[1.0], [2.5]], dtype=np.float32)}
    assert score.answers(numbers, features(2), examples([1.0, 2.0])) == ["1.000", "2.500"]
    assert score.credit(numbers, features(2), examples([1.0, 2.0])).tolist() == [0.0, -0.25]


@pytest.mark.parametrize("kind", ["classes", "score"])
def test_the_metric_is_one_of_the_scores(kind: Any) -> None:
    task = Classification(kind=kind, labels=("a", "b") if kind == "classes" else ())
    outputs = {"logits": np.array([[0.0, 1.0], [2.0, 1.0]])[:, : 2 if kind == "classes" else 1]}
    assert task.metric in task.score(outputs, features(2), examples(["a", "b"] if kind == "classes" else [0.5, 1.0]))


def test_f1_of_many_classes_is_the_macro_mean(tmp_path: Path) -> None:
    file = write_tsv(tmp_path / "a.tsv", [("x", label) for label in "abc" * 10])
    assert Classification(data=str(file), metric="f1").settled().metric == "f1_macro"


# ---- bad input: what, where, what to do


def table(tmp_path: Path, name: str, content: bytes) -> str:
    (tmp_path / name).write_bytes(content)
    return str(tmp_path / name)


GOOD = b"sentence\tlabel\n" + b"".join(b"text %d\t%d\n" % (index, index % 2) for index in range(20))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"", "is empty"),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.tsv", b"sentence\tlabel\n", "no rows"),
        ("a.csv", GOOD[:40] + b"caf\xe9\t1\n", r"not UTF-8: byte 43 \(0xe9\), in line 4"),
        ("a.tsv", GOOD + b"one\ttwo\tthree\n", "line 22: 3 fields, the first line has 2"),
        ("a.tsv", GOOD + b"lonely\n", "line 22: 1 fields"),
        ("a.csv", b'text,label\n"a\nb",1\nc,"d" e,0\n', "line 4: "),
        ("a.csv", b'text,label\n"never closed,1\n', "line 2: unexpected end of data"),
        ("a.tsv", GOOD + b"no label\t\n", "line 22: no label in column 'label'"),
        ("a.jsonl", b'{"text": "a", "label": 0}\n{"text": "b"}\n', "line 2: no label in column 'label' .None."),
        ("a.jsonl", b'{"text": "a", "label": 0}\n\n{"text": "b", "label": [1]}\n', "line 3: no label"),
        ("a.jsonl", b'{"text": "a", "label": 0}\n[1, 2]\n', "line 2: .1, 2. is not an object"),
        ("a.jsonl", b'{"text": "a", "label": 0}\n{"text": \n', "line 2: not JSON"),
        ("a.json", b'[{"text": "a"}, 3]', "row 2: 3 is not an object"),
        ("a.jsonl", b"{}\n{}\n", "no rows with columns"),
        ("a.jsonl", b"[" * 100_000, "not JSON"),
        (
            "a.jsonl",
            b'{"text": null, "label": 0}\n' * 10 + b'{"text": "b", "label": 1}\n' * 10,
            "line [0-9]: no text in column 'text' .None.",
        ),
        ("a.tsv", b"sentence\tlabel\n" + b"same\t1\n" * 30, "every row has the label '1'"),
        ("a.tsv", b"sentence\tsentence\tlabel\na\tb\t1\n", "two columns 'sentence'"),
        ("a.parquet", b"PAR1 this is not parquet", "cannot be read as Parquet"),
        ("a.parquet", b"", "cannot be read as Parquet"),
        ("a.xlsx", GOOD, "not a kind of table"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        Classification(data=table(tmp_path, name, content)).split(Split.TRAIN)
    assert caught.value.help
    assert name in caught.value.what


def test_a_missing_file_names_the_nearest(folder: Path) -> None:
    with pytest.raises(DataError, match="does not exist") as caught:
        Classification(data=str(folder / "trian.tsv")).split(Split.TRAIN)
    assert "did you mean 'train.tsv'?" in caught.value.help
    with pytest.raises(DataError, match="has no data"):
        Classification().split(Split.TRAIN)
    with pytest.raises(DataError, match="does not exist"):
        Classification(data="x" * 5000).split(Split.TRAIN)


def test_a_missing_column_names_the_nearest(folder: Path) -> None:
    with pytest.raises(DataError, match="has no column 'sentense'") as caught:
        Classification(data=str(folder), text="sentense").split(Split.TRAIN)
    assert "did you mean 'sentence'?" in caught.value.help


def test_folders_without_a_train_file_or_with_two(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no train file"):
        Classification(data=str(tmp_path / "empty")).split(Split.TRAIN)
    (folder / "train.csv").write_text("sentence,label\na,good\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.csv and train\.tsv: which one is meant"):
        Classification(data=str(folder)).split(Split.TRAIN)


def test_labels_in_dev_that_train_does_not_have(folder: Path) -> None:
    write_tsv(folder / "dev.tsv", [*rows(4), ("odd", "ugly")])
    task = Classification(data=str(folder))
    assert len(task.split(Split.TRAIN)) == 32
    with pytest.raises(DataError, match=r"dev\.tsv, line 6: the label 'ugly'"):
        task.split(Split.DEV)


def test_too_few_rows(tmp_path: Path) -> None:
    file = write_tsv(tmp_path / "two.tsv", rows(2))
    with pytest.raises(DataError, match="too few"):
        Classification(data=str(file)).split(Split.DEV)


def test_options_are_checked_together() -> None:
    with pytest.raises(RecipeError) as caught:
        Classification(glue="sst3", metric="f2", validation_share=0.0, max_length=1, text_pair="b")
    assert len(caught.value.facts) == 5
    assert "did you mean 'sst2'?" in str(caught.value)
    with pytest.raises(RecipeError, match="'spearman' for classes"):
        Classification(kind="classes", metric="spearman")


def test_a_metric_that_does_not_fit_the_data(folder: Path) -> None:
    with pytest.raises(DataError, match="'pearson' does not fit"):
        Classification(data=str(folder), metric="pearson").settled()


def test_flags_and_aliases_mean_a_task(folder: Path) -> None:
    given = {"--data": str(folder)}
    assert cli._task(given | {"--label": "label"}) == Classification(data=str(folder), label="label")
    assert cli._task(given | {"--task": "glue/sst2"}) == Classification(data=str(folder), glue="sst2")
    assert cli._task({"--task": "glue/stsb"}) == Classification(data="glue/stsb")
    assert cli._task(given | {"--train-rows": "20"}).train_rows == 20
    assert cli._task(given | {"--train-rows": "rows.json"}).train_rows == "rows.json"
    assert cli._task({"--task": "intents", "--max-length": "32"}) == Intents(max_length=32)
    with pytest.raises(RecipeError, match="no task 'intent'") as caught:
        cli._task({"--task": "intent"})
    assert "did you mean 'intents'?" in caught.value.help
    with pytest.raises(RecipeError, match="the task intents has no --text"):
        cli._task({"--task": "intents", "--text": "a"})
    with pytest.raises(RecipeError, match="--max-length takes a whole number, not 'long'"):
        cli._task(given | {"--max-length": "long"})
    with pytest.raises(RecipeError, match="no data is named") as caught:
        cli._task({})
    assert "--data" in caught.value.help
    assert "glue/sst2" in caught.value.help


# ---- property tests of the readers


TABLE = st.lists(st.tuples(ANY_TEXT, st.sampled_from(["yes", "no"])), min_size=1, max_size=12)


@FILES
@given(TABLE, st.sampled_from([("a.csv", ","), ("a.tsv", "\t"), ("semi.csv", ";")]))
def test_any_text_survives_a_table_with_quotes(tmp_path: Path, lines: list[tuple[str, str]], form: tuple[str, str]) -> None:
    name, separator = form
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter=separator, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *lines])
    (tmp_path / name).write_bytes(stream.getvalue().encode())
    read = read_table(tmp_path / name)
    assert list(zip(read.column("text"), read.column("label"), strict=True)) == lines


@FILES
@given(TABLE)
def test_any_text_without_tabs_survives_a_tsv_with_literal_quotes(tmp_path: Path, lines: list[tuple[str, str]]) -> None:
    plain = [(text.replace("\t", " ").replace("\n", " "), label) for text, label in lines]
    write_tsv(tmp_path / "a.tsv", plain, ("text", "label"))
    (tmp_path / "a.tsv").write_bytes(("text\tlabel\n" + "".join(f"{a}\t{b}\n" for a, b in plain)).encode())
    read = read_table(tmp_path / "a.tsv", literal=True)
    assert list(zip(read.column("text"), read.column("label"), strict=True)) == plain


def test_a_tsv_tells_literal_quotes_from_quoting(tmp_path: Path) -> None:
    literal = write_tsv(tmp_path / "l.tsv", [('"Well, he said.', "1"), ('a "b" c', "0"), ('"x" y', "0")])
    assert read_table(literal).column("sentence") == ['"Well, he said.', 'a "b" c', '"x" y']
    quoted = write_tsv(tmp_path / "q.tsv", [('"tab\there, ""quoted"""', "1"), ("plain", "0")])
    assert read_table(quoted).column("sentence") == ['tab\there, "quoted"', "plain"]


@FILES
@given(TABLE, st.booleans())
def test_any_text_survives_json_lines(tmp_path: Path, lines: list[tuple[str, str]], ascii_only: bool) -> None:
    items = [json.dumps({"text": text, "label": label}, ensure_ascii=ascii_only) for text, label in lines]
    (tmp_path / "a.jsonl").write_bytes("\n".join(items).encode())
    read = read_table(tmp_path / "a.jsonl")
    assert list(zip(read.column("text"), read.column("label"), strict=True)) == lines
    (tmp_path / "a.json").write_bytes(f"[{','.join(items)}]".encode())
    assert read_table(tmp_path / "a.json").column("text") == [text for text, _ in lines]


SCRAPS = st.lists(
    st.sampled_from([b"text", b"label", b"\t", b",", b"\n", b'"', b"\r", b"{", b"}", b"[", b"]", b":", b"1", b"\xff", b"\x00",
                     b'{"text": "a", "label": 1}', b"NaN", b"1e999", b'"\\ud800"', b"\xef\xbb\xbf"]),
    max_size=40,
).map(b"".join)  # fmt: skip


@settings(FILES, max_examples=150)
@given(st.one_of(st.binary(max_size=80), SCRAPS), st.sampled_from([".tsv", ".csv", ".jsonl", ".json", ".parquet"]))
def test_any_bytes_give_a_result_or_a_data_error(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    for head in (b"", b'{"text": "a", "label": "x"}\n' if "json" in suffix else b"text\tlabel\n"):
        path.write_bytes(head + content)
        try:
            found = Classification(data=str(path)).split(Split.DEV)
        except DataError:
            continue
        assert all(item.texts[0].encode() is not None and item.answer for item in found)


def test_half_a_surrogate_pair_can_be_encoded(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [json.dumps({"text": f"a \ud800 {index}", "label": index % 2}) for index in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    task = Classification(data=str(tmp_path / "a.jsonl")).settled()
    assert task.split(Split.DEV)[0].texts[0].startswith("a � ")
    assert task.encode(task.split(Split.DEV), tokenizer, 16).truncated == 0


# ---- GLUE as it is handed around


GLUE_FILES = {
    "sst2": ("SST-2", 67_349, 872, ("it 's a charming and often affecting journey . ",), "positive"),
    "mrpc": ("MRPC", 3_668, 408, None, "equivalent"),
    "cola": ("CoLA", 8_551, 1_043, ("The sailors rode the breeze clear of the rocks.",), "acceptable"),
    "rte": ("RTE", 2_490, 277, None, "not_entailment"),
    "stsb": ("STS-B", 5_749, 1_500, ("A man with a hard hat is dancing.", "A man wearing a hard hat is dancing."), 5.0),
}


@needs_glue
@pytest.mark.parametrize("name", GLUE_FILES)
@pytest.mark.slow
def test_glue_is_read_whole_and_right(name: str) -> None:
    folder, train, dev, texts, answer = GLUE_FILES[name]
    task = Classification(data=str(SHARED / "glue" / folder), glue=name)
    first = task.split(Split.DEV)[0]
    assert len(task.split(Split.TRAIN)) + len(task.split(Split.VALIDATION)) == train
    assert len(task.split(Split.DEV)) == dev
    assert first.answer == answer
    assert texts is None or first.texts == texts
    assert task.metric == GLUE[name].metric


@needs_glue
def test_quotes_in_mrpc_are_literal() -> None:
    first = Classification(glue="mrpc", data=str(SHARED / "glue" / "MRPC")).split(Split.DEV)[0]
    assert first.texts[1] == '"The foodservice pie business does not fit our long-term growth strategy.'


@needs_glue
def test_qnli_has_dev_only() -> None:
    task = Classification(glue="qnli", data=str(SHARED / "glue" / "QNLI"))
    assert len(task.bind({"id2label": {0: "LABEL_0", 1: "LABEL_1"}}).split(Split.DEV)) == 5_463
    with pytest.raises(DataError, match="no training data"):
        task.split(Split.TRAIN)


@needs_glue
@pytest.mark.slow
def test_the_20000_of_sst2() -> None:
    task = Classification(glue="sst2", data=str(SHARED / "glue" / "SST-2"), train_rows=str(SHARED / "splits" / "sst2-20k.json"))
    assert (len(task.split(Split.TRAIN)), len(task.split(Split.VALIDATION))) == (19_000, 1_000)


def test_cola_has_no_header_and_stsb_has_surplus_fields(tmp_path: Path) -> None:
    cola = [("gj04", str(index % 2), "", f'A "sentence {index}.') for index in range(30)]
    write_tsv(tmp_path / "train.tsv", cola[1:], cola[0])
    task = Classification(data=str(tmp_path), glue="cola")
    assert sum(len(task.split(name)) for name in Split) == 30
    assert task.split(Split.TRAIN)[0].texts[0].startswith('A "sentence')
    with_header = write_tsv(tmp_path / "cola.tsv", cola, ("source", "label", "star", "sentence"))
    assert sum(len(Classification(data=str(with_header), glue="cola").split(name)) for name in Split) == 30
    stsb = [("a", "b", "2.5", "surplus") if index % 3 else ("a", "b", "4.000") for index in range(30)]
    file = write_tsv(tmp_path / "stsb.tsv", stsb, ("sentence1", "sentence2", "score"))
    assert {item.answer for item in Classification(data=str(file), glue="stsb").split(Split.TRAIN)} == {2.5, 4.0}


# ---- hub data sets: real `datasets` objects, and only the download replaced


@pytest.mark.slow
def test_hub_data_sets_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    kinds = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "tokens": datasets.Sequence(datasets.Value("string")),
        }
    )
    data = {"text": [f"text {index}" for index in range(30)], "label": [0, 1] * 15, "tokens": [["a"]] * 30}
    asked = []

    def download(name: str, config: str | None) -> datasets.DatasetDict:
        asked.append((name, config))
        if name == "no/such":
            raise ConnectionError("no route\nto host")
        made = datasets.Dataset.from_dict(data, features=kinds)
        return datasets.DatasetDict(train=made, validation=made.select(range(10)))

    monkeypatch.setattr(datasets, "load_dataset", download)
    task = Classification(data="someone/reviews:plain").bind({"id2label": {0: "NEG", 1: "POS"}})
    assert task.split(Split.DEV)[1] == Example("dev/1", ("text 1",), "POS")
    assert len(task.split(Split.TRAIN)) == 24
    assert not datasets.are_progress_bars_disabled()
    with pytest.raises(DataError, match="has no column 'words'"):
        Classification(data="someone/reviews", text="words").settled()
    with pytest.raises(DataError, match="could not be loaded from the hub") as caught:
        Classification(data="no/such").split(Split.TRAIN)
    assert "ConnectionError: no route" in str(caught.value)
    assert ("someone/reviews", "plain") in asked
    assert ("no/such", None) in asked


@pytest.mark.slow
def test_glue_from_the_hub_has_other_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def download(name: str, config: str | None) -> datasets.DatasetDict:
        assert (name, config) == ("nyu-mll/glue", "mnli")
        names = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
        made = datasets.Dataset.from_dict(
            {"premise": ["a"] * 30, "hypothesis": ["b"] * 30, "label": [0, 1, 2] * 10, "idx": list(range(30))}
        ).cast_column("label", names)
        return datasets.DatasetDict(train=made, validation_matched=made)

    monkeypatch.setattr(datasets, "load_dataset", download)
    task = Classification(data="glue/mnli").settled()
    assert (task.text, task.text_pair, task.metric) == ("premise", "hypothesis", "accuracy")
    assert task.split(Split.DEV)[2] == Example("dev/2", ("a", "b"), "contradiction")


# ---- contents as keys


def test_mended_data_has_another_name_and_moved_data_has_not(folder: Path, tmp_path: Path) -> None:
    before = Classification(data=str(folder)).content_digest()
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert Classification(data=str(moved)).content_digest() == before
    write_tsv(moved / "dev.tsv", [*rows(9), ("sentence number 9", "bad")])
    assert Classification(data=str(moved)).content_digest() != before
