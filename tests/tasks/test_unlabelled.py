"""Texts without labels for tasks that have them: the teacher answers, and what is measured is the agreement with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_folder import LABELS, run_quickly, sentences, write_model, write_pieces

import slimformer
from slimformer.data.batching import collate
from slimformer.errors import DataError, RecipeError
from slimformer.reporting.ledger import read_facts, read_records
from slimformer.running.bench import bench
from slimformer.running.reader import parse_task
from slimformer.tasks._readings import AnyLabels, OneClass, OneScore
from slimformer.tasks._unlabelled import drawn_shares
from slimformer.tasks.base import Example, Features, Split
from slimformer.tasks.classification import Classification
from slimformer.tasks.tagging import Tagging

TEXTS = list(dict.fromkeys(text for text, _ in sentences(300, 4)))
CONFIG = {"id2label": dict(enumerate(LABELS)), "label2id": {name: place for place, name in enumerate(LABELS)}}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_labelled(path: Path, count: int, seed: int) -> Path:
    return write(path, "sentence,label\n" + "".join(f"{text},{label}\n" for text, label in sentences(count, seed)))


FORMS = {
    "texts.txt": "\n".join(TEXTS) + "\n",
    "texts.csv": "text\n" + "\n".join(TEXTS) + "\n",
    "more.csv": "id,review,label\n" + "".join(f"{n},{text},\n" for n, text in enumerate(TEXTS)),
    "texts.jsonl": "".join(json.dumps({"sentence": text}) + "\n" for text in TEXTS),
}


@pytest.mark.parametrize("name", FORMS)
def test_texts_without_labels_are_read_in_every_form(name: str, tmp_path: Path) -> None:
    task = Classification(data=str(write(tmp_path / name, FORMS[name])), labels="none")
    splits = {split: task.split(split) for split in Split}
    assert {item.texts[0] for items in splits.values() for item in items} == set(TEXTS)
    assert sum(map(len, splits.values())) == len(TEXTS)
    assert all(item.answer is None for items in splits.values() for item in items)
    assert any("no labels are read" in line for line in task.notes())


def test_pairs_without_labels_keep_both_texts() -> None:
    rows = [{"premise": text, "hypothesis": f"not {text}"} for text in TEXTS]
    assert Classification(data=rows, labels="none").split(Split.TRAIN)[0].texts[1].startswith("not ")


def test_who_answers_is_kept_when_a_model_names_the_classes(tmp_path: Path) -> None:
    data = str(write(tmp_path / "texts.txt", FORMS["texts.txt"]))
    task = parse_task({"use": "classification", "data": data, "labels": "none"})
    assert (task.answers_from, task.labelled, task.metric, task.labels) == ("teacher", False, "agreement", ())
    bound = task.bind(CONFIG)
    assert (bound.answers_from, bound.labelled, bound.kind, bound.classes) == ("teacher", False, "classes", LABELS)
    assert task.bind({"num_labels": 1}).kind == "score"
    assert task.bind(CONFIG | {"problem_type": "multi_label_classification"}).kind == "multi_label"
    with pytest.raises(DataError, match="the classes are those of a model that was tuned"):
        task.configure()
    with pytest.raises(RecipeError) as caught:
        Classification(data=data, labels="none", metric="accuracy")
    assert "needs labels" in caught.value.facts[0]
    assert Classification(data=data, labels="good, bad").labels == ("good", "bad")


def test_labels_of_dev_alone_are_chosen_on_and_reported_on(tmp_path: Path) -> None:
    write(tmp_path / "train.txt", "one, two, three\n" + FORMS["texts.txt"])  # no table
    write_labelled(tmp_path / "dev.csv", 60, 9)
    task = Classification(data=str(tmp_path), labels="dev").bind(CONFIG)
    assert (task.answers_from, task.metric, task.classes) == ("dev", "accuracy", LABELS)
    train, validation, dev = (task.split(split) for split in Split)
    assert (len(train), len(validation), len(dev)) == (len(TEXTS) + 1, 30, 30)
    assert {item.answer for item in (*validation, *dev)} == set(LABELS)
    assert not {item.id for item in validation} & {item.id for item in dev}
    assert all(item.answer is None for item in train)
    (tmp_path / "dev.csv").unlink()
    with pytest.raises(DataError, match="no dev data, and labels: dev"):
        Classification(data=str(tmp_path), labels="dev").settled()


def test_a_table_without_labels_says_what_can_be_done(tmp_path: Path) -> None:
    table = write(tmp_path / "rows.csv", "text,other\n" + "".join(f"{text},{n} words more\n" for n, text in enumerate(TEXTS)))
    with pytest.raises(DataError, match="cannot tell which is a label column") as caught:
        Classification(data=str(table)).settled()
    assert "--labels none" in str(caught.value.help)


# -- Judging -------------------------------------------------------------------------------------------------------------------


def features(count: int) -> Features:
    return Features({"input_ids": [[1]] * count}, range(count), 0, 0)


def test_agreement_is_with_the_teacher_s_answers() -> None:
    examples = [Example(str(n), ("a text",), None) for n in range(4)]
    teacher = {"logits": np.asarray([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [2.0, 0.0]])}
    student = {"logits": np.asarray([[2.0, 0.0], [0.0, 2.0], [3.0, 2.0], [2.0, 0.0]])}
    task = Classification(data="x", labels="none").bind(CONFIG)
    taught = task.answered(teacher, features(4), examples)
    assert [item.answer for item in taught] == ["bad", "good", "good", "bad"]
    assert task.score(teacher, features(4), taught) == {"agreement": 1.0}
    assert task.score(student, features(4), taught) == {"agreement": 0.75}
    assert task.credit(student, features(4), taught).tolist() == [1, 1, 0, 1]
    several = Classification(data="x", labels="none").bind(CONFIG | {"problem_type": "multi_label_classification"})
    taught = several.answered({"logits": teacher["logits"] - 1}, features(4), examples)
    assert [item.answer for item in taught] == [("bad",), ("good",), ("good",), ("bad",)]
    assert several.score({"logits": student["logits"] - 1}, features(4), taught) == {"agreement": 0.75}
    assert not several.tunes
    rated = Classification(data="x", labels="none").bind({"num_labels": 1})
    taught = rated.answered({"logits": teacher["logits"][:, :1]}, features(4), examples)
    assert [item.answer for item in taught] == [2.0, 0.0, 0.0, 2.0]
    assert rated.score({"logits": 3 * teacher["logits"][:, :1] + 1}, features(4), taught) == {"agreement": pytest.approx(1.0)}
    told = Classification(data="x", labels="dev")
    assert told.answered(teacher, features(4), examples) is examples


def test_labels_are_drawn_by_the_model_s_own_distribution() -> None:
    batch = {"input_ids": torch.arange(20_000).reshape(-1, 2)}
    shares = drawn_shares(batch, 3)
    assert torch.equal(shares[5:7], drawn_shares({"input_ids": batch["input_ids"][5:7]}, 3))
    padded = {"input_ids": torch.cat([batch["input_ids"][:4], torch.zeros(4, 3, dtype=torch.int64)], 1)}
    padded["attention_mask"] = torch.tensor([[1, 1, 0, 0, 0]] * 4)
    assert torch.equal(shares[:4], drawn_shares(padded, 3))
    logits = torch.tensor([[0.5, -1.0, 0.2]]).expand(len(shares), 3)
    classes = OneClass(("a", "b", "c")).drawn(logits, shares)
    wanted = torch.tensor([0.5, -1.0, 0.2]).softmax(0)
    assert torch.bincount(classes, minlength=3) / len(classes) == pytest.approx(wanted, abs=0.02)
    labels = AnyLabels(("a", "b", "c")).drawn(logits, shares)
    assert labels.mean(0) == pytest.approx(torch.tensor([0.5, -1.0, 0.2]).sigmoid(), abs=0.02)
    scores = OneScore().drawn(logits[:, :1], shares)
    assert (scores.mean().item(), scores.std().item()) == pytest.approx((0.5, 1.0), abs=0.03)


# -- Tags ----------------------------------------------------------------------------------------------------------------------

WORDS = [["in", "Rome", str(n), "."] for n in range(60)]
TAGGED = {
    "texts.txt": "\n".join(" ".join(words) + " again" * (n % 3) for n, words in enumerate(WORDS)) + "\n",
    "rows.jsonl": "".join(json.dumps({"tokens": words}) + "\n" for words in WORDS),
    "texts.csv": "id,text\n" + "".join(f"{n},{' '.join(words)}\n" for n, words in enumerate(WORDS)),
    "told.conll": "\n\n".join("\n".join(f"{word} O" for word in words) for words in WORDS) + "\n",
    "words.txt": "\n\n".join("\n".join(f"{word} O" for word in words) for words in WORDS) + "\n",
}
NAMES = {"id2label": {0: "O", 1: "B-LOC", 2: "I-LOC"}, "label2id": {"O": 0, "B-LOC": 1, "I-LOC": 2}}


@pytest.mark.parametrize("name", TAGGED)
def test_words_without_tags_are_read_in_every_form(name: str, tmp_path: Path) -> None:
    task = Tagging(data=str(write(tmp_path / name, TAGGED[name])), labels="none").bind(NAMES)
    assert (task.answers_from, task.labelled, task.metric, task.labels) == (
        "teacher",
        False,
        "agreement",
        ("O", "B-LOC", "I-LOC"),
    )
    splits = {split: task.split(split) for split in Split}
    assert sum(map(len, splits.values())) == 60
    texts = {item.texts[0].removesuffix(" again").removesuffix(" again") for items in splits.values() for item in items}
    assert texts == {" ".join(words) for words in WORDS}
    assert all(item.answer.tags == () and item.answer.words[:2] == ((0, 2), (3, 7)) for item in splits[Split.TRAIN])
    assert any("no tags are read" in line for line in task.notes())


def test_tags_of_dev_alone_are_chosen_on_and_reported_on(tmp_path: Path) -> None:
    write(tmp_path / "train.txt", TAGGED["texts.txt"])
    told = "\n\n".join("\n".join(f"{word} {'B-LOC' if word == 'Rome' else 'O'}" for word in words) for words in WORDS[:40])
    write(tmp_path / "dev.conll", told + "\n")
    task = Tagging(data=str(tmp_path), labels="dev").bind(NAMES)
    assert (task.answers_from, task.metric) == ("dev", "f1")
    assert [len(task.split(split)) for split in Split] == [60, 20, 20]
    assert task.split(Split.DEV)[0].answer.tags == ("O", "B-LOC", "O", "O")
    assert task.split(Split.TRAIN)[0].answer.tags == ()
    assert len(Tagging(data=str(tmp_path), labels="dev", train_rows=30).bind(NAMES).split(Split.TRAIN)) == 30
    (tmp_path / "dev.conll").unlink()
    with pytest.raises(DataError, match="no dev data, and labels: dev"):
        Tagging(data=str(tmp_path), labels="dev").settled()


def test_a_teacher_s_spans_are_what_counts_without_tags(tmp_path: Path) -> None:
    pytest.importorskip("seqeval", reason="seqeval is not installed")
    task = Tagging(data=str(write(tmp_path / "texts.txt", TAGGED["texts.txt"])), labels="none").bind(NAMES)
    examples = task.split(Split.DEV)
    rows = task.encode(examples, write_pieces(tmp_path / "model"), 64)
    marked = [row for labels in rows.columns["labels"] for row in labels if row >= 0]
    assert len(marked) == sum(len(item.answer.words) for item in examples)
    draw = np.random.default_rng(0)
    width = int(rows.lengths().max())
    teacher = {"logits": draw.normal(size=(len(rows), width, 3))}
    taught = task.answered(teacher, rows, examples)
    assert all(len(item.answer.tags) == len(item.answer.words) for item in taught)
    assert task.score(teacher, rows, taught) == {"agreement": 1.0}
    student = {"logits": teacher["logits"] + draw.normal(size=teacher["logits"].shape)}
    found = task.score(student, rows, taught)["agreement"]
    assert 0 < found < 1
    every = [np.arange(len(examples)), np.zeros(len(examples), dtype=np.int64)]
    resampled = task.resampled(student, rows, taught, every)
    assert resampled is not None
    assert resampled[0] == pytest.approx(found)
    batch = {name: torch.from_numpy(array) for name, array in collate(rows, range(len(rows))).items()}
    logits = torch.from_numpy(teacher["logits"]).float().requires_grad_()
    (gradient,) = torch.autograd.grad(task.loss({"logits": logits}, batch), logits)
    assert ((gradient != 0).any(-1) == (batch["labels"] >= 0)).all()


# -- A whole run ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuned classifier that is cut and distilled on plain texts."""
    home = tmp_path_factory.mktemp("unlabelled")
    write_model(home / "model")
    write(home / "texts.txt", FORMS["texts.txt"])
    stages: list[dict[str, Any]] = [
        {"calibrate": {"method": {"use": "fisher", "keep": 0.5, "examples": 64, "damage_examples": 16}}},
        {"train": {"epochs": 2, "lr": 3e-3, "methods": [{"use": "distillation"}]}},
    ]
    task = {"use": "classification", "data": str(home / "texts.txt"), "labels": "none"}
    run_quickly(home / "model", task, stages, home / "out")
    return home


@pytest.mark.slow
def test_a_classifier_is_made_small_on_plain_texts(done: Path) -> None:
    records = read_records([done / "out" / "ledger.jsonl"])
    teacher, best = records[0], next(item for item in records if item.chosen)
    assert (teacher.metric, teacher.score) == ("agreement", 1.0)
    assert 0.8 < best.score <= 1.0
    assert best.loss is not None
    for name in ("README.md", "report.html"):
        assert "No labels were read" in (done / "out" / name).read_text(encoding="utf-8")
    assert "pipeline_tag: text-classification" in (done / "out" / "README.md").read_text(encoding="utf-8")
    facts = read_facts(done / "out")
    assert facts is not None
    assert facts.task["answers_from"] == "teacher"
    files = [done / "out" / "onnx" / name for name in ("model.onnx", "model_quantized.onnx")]
    task = Classification(data=str(done / "texts.txt"), labels="none")
    found = bench(files, task, seconds=0.1, wait_seconds=0, threads=1)
    assert found.records[0].score == 1.0
    assert found.records[1].score > 0.8


@pytest.mark.slow
def test_training_without_a_teacher_is_refused_before_anything_runs(done: Path) -> None:
    task = {"use": "classification", "data": str(done / "texts.txt"), "labels": "none"}
    recipe = {"model": str(done / "model"), "task": task, "stages": [{"train": {"epochs": 1}}]}
    with pytest.raises(RecipeError, match="the task classification has no labels"):
        slimformer.run(recipe, done / "none", wait_seconds=0)
    assert not (done / "none").exists()
