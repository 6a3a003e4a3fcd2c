"""Plain text as a task: splits, masks, pairs and losses by hand, and a stage on text whose student a second recipe takes up."""

from __future__ import annotations

import json
import logging
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import ENCODERS, batch, tiny
from tiny_folder import LABELS, sentences, write_data
from tiny_folder import write_model as write_tuned

from slimformer import load, load_plan
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.data.batching import collate
from slimformer.data.material import prepare
from slimformer.data.tokenizer import load_tokenizer
from slimformer.errors import DataError, ModelError, RecipeError
from slimformer.families.base import anatomy_of, subject_of
from slimformer.hooks.decoding import decoding_at
from slimformer.log import Log
from slimformer.running.bench import bench
from slimformer.running.bundle import Run
from slimformer.running.preflight import preflight
from slimformer.running.prepare import prepare_bundle
from slimformer.running.reader import parse_recipe
from slimformer.running.result import Result
from slimformer.running.runner import run
from slimformer.running.search import compress
from slimformer.running.stages import dev_scores
from slimformer.saving import checkpoint
from slimformer.tasks.base import IGNORED, Example, Split
from slimformer.tasks.text import Text, mask_tokens

QUIET = Log(None, quiet=True)
SPLITS = (Split.TRAIN, Split.VALIDATION, Split.DEV)


def write_text(file: Path, count: int = 240, *, blank: int = 0) -> Path:
    """Sentences of the tiny vocabulary, with a blank line after every `blank` of them."""
    lines = [
        text + ("\n" if blank and place % blank == blank - 1 else "") for place, (text, _) in enumerate(sentences(count, 5))
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def write_model(folder: Path, auto_class: str = "AutoModelForMaskedLM", *, tuned: bool = False, **changes: Any) -> Path:
    """A tiny BERT, or its classifier if `tuned`, whose tokenizer has a token for masked words."""
    write_tuned(folder, trained=tuned)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens(["[MASK]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    model = (
        load(folder) if tuned else tiny("bert", auto_class=auto_class, **({"pad_token_id": 0, "vocab_size": size} | changes))
    )
    model.resize_token_embeddings(size)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    return folder


def texts_of(task: Text, name: Split) -> list[str]:
    return [" ".join(example.texts) for example in task.split(name)]


# -- Data ----------------------------------------------------------------------------------------------------------------------


def test_each_line_is_a_text_in_one_split_and_copies_train(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {number}\n" for number in range(100)))
    task = Text(data=str(tmp_path / "text.txt"), masks=3)
    parts = [texts_of(task, name) for name in SPLITS]
    assert [len(part) for part in parts] == [3 * 72, 18, 10]
    assert sorted({text for part in parts for text in part}) == sorted(f"line {number}" for number in range(100))
    ids = [example.id for example in task.split(Split.TRAIN)]
    assert len(set(ids)) == len(ids)
    assert task.split(Split.TRAIN) == Text(data=str(tmp_path / "text.txt"), masks=3).split(Split.TRAIN)


def test_a_document_is_never_torn(tmp_path):
    documents = [[f"{number} {line}" for line in range(1 + number % 4)] for number in range(40)]
    (tmp_path / "text.txt").write_text("\n" + "\n\n\n".join("\n".join(lines) for lines in documents) + "\n")
    for pairs in (False, True):
        task = Text(data=str(tmp_path / "text.txt"), next_sentence=pairs)
        found = [{example.texts[0].split()[0] for example in task.split(name)} for name in SPLITS]
        assert not found[0] & found[1] | found[0] & found[2] | found[1] & found[2]
    assert len({text for name in SPLITS for text in texts_of(Text(data=task.data), name)}) == sum(map(len, documents))


def test_a_large_document_is_not_all_of_a_split(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"long {number}\n" for number in range(900)) + "\na short one\n")
    parts = [texts_of(Text(data=str(tmp_path / "text.txt")), name) for name in SPLITS]
    assert all(abs(len(part) - wanted) <= 64 for part, wanted in zip(parts, (649, 162, 90), strict=True))


def test_dev_may_be_a_file_of_its_own(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {number}\n" for number in range(50)))
    (tmp_path / "dev.txt").write_text("one\n\ntwo\n")
    task = Text(data=str(tmp_path / "text.txt"), dev=str(tmp_path / "dev.txt"))
    assert texts_of(task, Split.DEV) == ["one", "two"]
    assert len(task.split(Split.TRAIN)) + len(task.split(Split.VALIDATION)) == 50
    (tmp_path / "dev.txt").write_text("other\n")
    assert texts_of(task, Split.DEV) == ["other"]  # a file that was changed is read again


def test_half_of_the_pairs_are_neighbours_and_the_rest_are_not(tmp_path):
    lines = [f"d{document}l{line}" for document in range(60) for line in range(10)]
    (tmp_path / "text.txt").write_text("\n".join(line + ("\n" if line.endswith("l9") else "") for line in lines))
    task = Text(data=str(tmp_path / "text.txt"), next_sentence=True, masks=2)
    after = dict(pairwise(lines))
    examples = task.split(Split.TRAIN)
    assert len(examples) == 2 * 9 * len({example.texts[0].split("l")[0] for example in examples})
    for example in examples:
        first, second = example.texts
        assert (after[first] == second) == (example.answer == 0)
        assert second != first
        assert not first.endswith("l9")  # no pair reaches over the end of a document
    assert 0.4 < np.mean([example.answer for example in examples]) < 0.6
    train = {text for example in examples for text in example.texts}
    assert not train & {text for example in task.split(Split.DEV) for text in example.texts}


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is empty"), ("one line\n", "has too few texts to set some aside"), (b"\xff\xfe\x00\xd8", "no character")],
)
def test_data_that_cannot_be_used_is_said(tmp_path, content, message):
    (tmp_path / "text.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        for name in SPLITS:
            Text(data=str(tmp_path / "text.txt")).split(name)


def test_no_data_is_said(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        Text(data=str(tmp_path / "none.txt")).split(Split.DEV)
    with pytest.raises(DataError, match="the task text has no data"):
        Text().split(Split.DEV)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "share: above 0"),
        ({"masks": 0}, "masks: at least 1"),
        ({"metric": "perplexity"}, "there is no 'perplexity'"),
        ({"metric": "next_sentence"}, "measured if next_sentence is true"),
        ({"max_length": 4}, "max_length: at least 8"),
        ({"validation_share": 0.6}, "validation_share"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(RecipeError) as caught:
        Text(data="text.txt", **options)
    assert message in caught.value.facts[0]


# -- Masks ---------------------------------------------------------------------------------------------------------------------


def test_tokens_are_asked_for_in_the_shares_of_bert():
    words = np.arange(10, 30, dtype=np.int32)
    asked = masked = same = other = total = 0
    for number in range(400):
        ids = np.arange(100, 142, dtype=np.int32)
        special = np.isin(ids, (100, 141))
        got, labels = mask_tokens(ids, special, 0.15, 4, words, f"text {number}")
        chosen = labels != IGNORED
        assert (got[~chosen] == ids[~chosen]).all()
        assert (labels[chosen] == ids[chosen]).all()
        assert not (chosen & special).any()
        asked += chosen.sum()
        total += 40
        masked += (got[chosen] == 4).sum()
        same += (got[chosen] == ids[chosen]).sum()
        other += np.isin(got[chosen], words).sum()
    assert asked == 400 * 6  # 15 % of 40
    assert masked + same + other == asked
    for found, share in ((masked, 0.8), (same, 0.1), (other, 0.1)):
        assert abs(found / asked - share) < 4 * math.sqrt(share * (1 - share) / asked)


def test_one_token_is_asked_for_at_least_and_the_name_decides_which():
    ids, special = np.array([2, 50, 51, 52, 3], dtype=np.int32), np.array([True, False, False, False, True])
    draws = [mask_tokens(ids, special, 0.15, 4, ids, name)[1].tolist() for name in ("0", *map(str, range(30)))]
    assert all(sum(label != IGNORED for label in labels) == 1 for labels in draws)
    assert draws[0] == draws[1]
    assert len({tuple(labels) for labels in draws}) == 3
    assert mask_tokens(ids[:0], special[:0], 0.15, 4, ids, "none")[1].tolist() == []


def test_rows_carry_the_masked_text_and_the_right_words(tmp_path):
    tokenizer = load_tokenizer(write_model(tmp_path / "model"))
    mask = tokenizer.token_to_id("[MASK]")
    examples = [Example(str(number), (text,), None) for number, (text, _) in enumerate(sentences(50, 1))]
    features = Text(data="x").encode(examples, tokenizer, 64)
    assert set(features.columns) == {"input_ids", "labels"}
    for example, ids, labels in zip(examples, features.columns["input_ids"], features.columns["labels"], strict=True):
        whole = np.where(labels == IGNORED, ids, labels)
        assert whole.tolist() == tokenizer.encode(example.texts[0]).ids
    assert any(mask in ids for ids in features.columns["input_ids"])
    some = collate(features, range(8))
    assert (some["labels"][some["attention_mask"] == 0] == IGNORED).all()
    pairs = Text(data="x", next_sentence=True).encode([Example("0", ("the film", "a meal"), 1)], tokenizer, 64)
    assert pairs.columns["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert pairs.columns["next"] == [1]


def test_a_tokenizer_without_a_mask_is_refused(tmp_path):
    tokenizer = load_tokenizer(write_tuned(tmp_path / "model", trained=False))
    with pytest.raises(ModelError, match="no token that masks a word"):
        Text(data="x").encode([Example("0", ("the film",), None)], tokenizer, 64)


# -- Losses and scores ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_cross_entropy_of_the_words_asked_for():
    """Two of six tokens, four words: computed here one by one."""
    task, scores = Text(data="x"), torch.randn(2, 3, 4)
    labels = torch.tensor([[IGNORED, 2, IGNORED], [0, IGNORED, IGNORED]])
    by_hand = -(torch.log_softmax(scores[0, 1], -1)[2] + torch.log_softmax(scores[1, 0], -1)[0]) / 2
    asked = torch.stack([scores[0, 1], scores[1, 0]])
    for given in (scores, asked):  # of all tokens, or only of those asked for
        torch.testing.assert_close(task.loss({"logits": given}, {"labels": labels}), by_hand)
    other = torch.randn(2, 3, 4)
    kept = torch.stack([other[0, 1], other[1, 0]])
    terms = [torch.nn.functional.kl_div(asked[i].log_softmax(-1), kept[i].softmax(-1), reduction="sum") for i in range(2)]
    apart = task.divergence({"logits": asked}, {"logits": kept}, {"labels": labels}, 1.0)
    torch.testing.assert_close(apart, (terms[0] + terms[1]) / 2)


def test_pairs_add_their_loss():
    task = Text(data="x", next_sentence=True)
    labels, told = torch.tensor([[1, IGNORED]]), torch.tensor([1])
    output = {"prediction_logits": torch.randn(1, 4), "seq_relationship_logits": torch.randn(1, 2)}
    words = -torch.log_softmax(output["prediction_logits"][0], -1)[1]
    pair = -torch.log_softmax(output["seq_relationship_logits"][0], -1)[1]
    torch.testing.assert_close(task.loss(output, {"labels": labels, "next": told}), words + pair)
    torch.testing.assert_close(task.loss(output, {"labels": labels}), words)  # methods that look at batches see labels alone
    assert task.auto_class == "AutoModelForPreTraining"
    assert Text(data="x").auto_class == "AutoModelForMaskedLM"


def test_scores_count_words_of_all_rows():
    task = Text(data="x", next_sentence=True)
    labels = torch.tensor([[1, 2, IGNORED], [3, IGNORED, IGNORED]])
    likely = torch.tensor([[0.1, 0.7, 0.1, 0.1], [0.5, 0.2, 0.2, 0.1], [0.2, 0.2, 0.2, 0.4]])  # right, wrong, right
    output = {"prediction_logits": likely.log(), "seq_relationship_logits": torch.tensor([[2.0, 1.0], [1.0, 2.0]])}
    kept = {name: value.numpy() for name, value in task.kept(output, {"labels": labels, "next": torch.tensor([0, 0])}).items()}
    assert kept["asked"].tolist() == [2, 1]
    assert kept["found"].tolist() == [1, 1]
    features: Any = None
    scores = task.score(kept, features, [])
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["likelihood"] == pytest.approx((0.7 * 0.2 * 0.4) ** (1 / 3), rel=1e-5)
    assert scores["next_sentence"] == 0.5
    assert task.credit(kept, features, []).tolist() == [0.5, 1.0]
    assert task.answers(kept, features, []) == ["1 of 2 words", "1 of 1 words"]


@pytest.mark.parametrize("model_type", ENCODERS)
def test_words_are_scored_where_they_are_asked_for_alone(model_type):
    model = tiny(model_type, auto_class="AutoModelForMaskedLM")
    inputs = batch(model)
    chosen = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    chosen[0, 2] = chosen[2, 0] = True
    with torch.no_grad():
        whole = model(**inputs).logits
        with decoding_at(model, chosen):
            some = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, whole)
    torch.testing.assert_close(some, whole[chosen])


# -- Models --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_of_both_heads_is_known_for_each(tmp_path):
    """As bert-base-uncased: its config names the class of masked words, its weights hold the head of pairs too."""
    folder = write_model(tmp_path / "model", "AutoModelForPreTraining")
    config = json.loads((folder / "config.json").read_text())
    both = load(folder)
    for stated in (["BertForPreTraining"], ["BertForMaskedLM"], None):
        (folder / "config.json").write_text(json.dumps({**config, "architectures": stated}))
        for auto_class in ("AutoModelForMaskedLM", "AutoModelForPreTraining"):
            assert checkpoint.is_tuned(folder, auto_class)
            model = checkpoint.load_as(folder, auto_class, {}, 3)
            assert torch.equal(model.cls.predictions.transform.dense.weight, both.cls.predictions.transform.dense.weight)
        assert torch.equal(model.cls.seq_relationship.weight, both.cls.seq_relationship.weight)
    assert not checkpoint.is_tuned(write_model(tmp_path / "words"), "AutoModelForPreTraining")


def test_only_bert_tells_whether_a_text_follows():
    Text(data="x", next_sentence=True).bind({"model_type": "slimformer_bert"})
    with pytest.raises(DataError, match="a roberta model has no head that tells"):
        Text(data="x", next_sentence=True).bind({"model_type": "roberta"})


# -- Recipes -------------------------------------------------------------------------------------------------------------------


def stage_one(model: Path, text: Path, *, logits: float = 0.0, **task: Any) -> dict[str, Any]:
    lesson = {"use": "distillation", "logits": logits, "hidden": 3.0, "scores": 3.0, "embedding": 1.0, "relative": False}
    return {
        "model": str(model),
        "task": {"use": "text", "data": str(text), **task},
        "stages": [
            {"calibrate": {"method": {"use": "kronecker", "shapes": "7.7x"}}},
            {"train": {"epochs": 2, "lr": 5e-3, "batch_size": 16, "dropout": False, "precision": "fp32", "methods": [lesson]}},
        ],
    }


@pytest.mark.slow
def test_a_stage_on_text_leaves_a_student_for_a_tuned_teacher(tmp_path, caplog):
    """KroneckerBERT's two stages: the pre-trained teacher and text, then the tuned teacher, whose head the student takes."""
    plain = write_model(tmp_path / "plain", "AutoModelForPreTraining")
    text = write_text(tmp_path / "text.txt", blank=6)
    recipe = parse_recipe(stage_one(plain, text, next_sentence=True))
    result = run(recipe, tmp_path / "one")
    assert result.records == ()
    assert "a model for others to start from" in str(result) == result.summary()
    names = {item.name for item in (tmp_path / "one").iterdir() if not item.name.startswith(".")}
    assert names == {
        *(
            "README.md",
            "config.json",
            "log.jsonl",
            "model",
            "recipe.yaml",
            "slimformer.json",
            "tokenizer.json",
            "tokenizer_config.json",
        )
    }
    assert "| the model |" in (tmp_path / "one" / "README.md").read_text()
    student = result.model
    assert type(student).__name__ == "BertForPreTraining"
    plan = load_plan(tmp_path / "one")
    assert len(plan.forms) == 3 * 6 + 1  # the word table too, with which it decodes
    task = recipe.task.bind(student.config)
    scores = dev_scores(subject_of(student), prepare(task, tmp_path / "one" / "model"))
    assert 0 < scores["likelihood"] < 1
    assert f"{scores['accuracy']:.4g}" in (tmp_path / "one" / "README.md").read_text()
    assert run(recipe, tmp_path / "one").records == ()  # finished already
    assert Result.read(tmp_path / "one").out == tmp_path / "one"

    tuned = write_model(tmp_path / "tuned", tuned=True)
    second = {
        "model": str(tmp_path / "one"),
        "teacher": str(tuned),
        "task": {"use": "classification", "data": str(write_data(tmp_path / "data"))},
        "stages": [{"train": {"epochs": 1, "methods": ["distillation"]}}],
    }
    with caplog.at_level(logging.WARNING, logger="slimformer"):
        bundle, stages = prepare_bundle(preflight(parse_recipe(second)), Run(tmp_path / "two", tmp_path / "two", QUIET))
    assert "BertForPreTraining; its head (classifier.bias, ...) is copied from the teacher" in caplog.text
    after, teacher = bundle.subject.model, load(tuned)
    assert len(stages) == 1
    assert type(after).__name__ == "BertForSequenceClassification"
    assert after.config.id2label == dict(enumerate(LABELS))
    assert bundle.plan == plan
    assert bundle.subject.anatomy == bundle.teacher.anatomy.after(plan)
    assert torch.equal(after.classifier.weight, teacher.classifier.weight)
    assert torch.equal(after.bert.pooler.dense.weight, student.bert.pooler.dense.weight)  # which learned from the pairs
    assert torch.equal(after.bert.embeddings.word_embeddings.a, student.bert.embeddings.word_embeddings.a)
    after.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved").classifier.weight, teacher.classifier.weight)


@pytest.mark.slow
def test_a_student_without_a_pooler_takes_the_teachers_and_one_of_another_width_a_fresh_head(tmp_path, caplog):
    model = load(write_model(tmp_path / "plain"))  # for masked words alone
    anatomy, plan = anatomy_of(model), Plan({"encoder.0.heads": (1, 3)})
    checkpoint.save(shrink(model, anatomy, plan), plan, tmp_path / "cut", tokenizer_from=tmp_path / "plain")
    tuned = write_model(tmp_path / "tuned", tuned=True)
    labels = {"num_labels": 2}
    with caplog.at_level(logging.WARNING, logger="slimformer"):
        student, again, other = (
            checkpoint.load_as(tmp_path / "cut", "AutoModelForSequenceClassification", changes, 3, lender)
            for changes, lender in ((labels, tuned), (labels, None), ({"num_labels": 5}, tuned))
        )
    assert torch.equal(student.bert.pooler.dense.weight, load(tuned).bert.pooler.dense.weight)
    assert student.bert.encoder.layer[0].attention.self.query.out_features == 16
    assert caplog.text.count("is copied from the teacher") == 1
    assert caplog.text.count("the head of the BertForSequenceClassification is new") == 2
    assert other.classifier.out_features == 5
    assert not torch.equal(again.classifier.weight, student.classifier.weight)
    once_more = checkpoint.load_as(tmp_path / "cut", "AutoModelForSequenceClassification", labels, 3)
    assert torch.equal(once_more.classifier.weight, again.classifier.weight)


@pytest.mark.slow
def test_an_encoder_without_a_head_teaches_by_its_hidden_states(tmp_path):
    encoder, text = write_model(tmp_path / "encoder", "AutoModel"), write_text(tmp_path / "text.txt")
    data = stage_one(encoder, text)
    data["stages"][1]["train"] |= {"epochs": 1, "rows": 32, "task_weight": 0.0}
    model = run(parse_recipe(data), tmp_path / "out").model
    assert type(model).__name__ == "BertForMaskedLM"
    assert "has no head for the task text" in (tmp_path / "out" / "log.jsonl").read_text()
    assert "| the teacher |" not in (tmp_path / "out" / "README.md").read_text()  # a fresh head says nothing of it
    data["stages"][1]["train"]["methods"][0]["logits"] = 1.0
    with pytest.raises(RecipeError) as caught:
        run(parse_recipe(data), tmp_path / "other")
    assert "has no head for them: set logits: 0" in caught.value.facts[0]
    data["stages"].insert(0, {"train": {"steps": 2, "freeze": "encoder"}})
    run(parse_recipe(data), tmp_path / "third")


@pytest.mark.slow
def test_outputs_of_a_teacher_of_words_are_computed_beside_the_student(tmp_path):
    plain, text = write_model(tmp_path / "plain"), write_text(tmp_path / "text.txt")
    data = stage_one(plain, text, logits=1.0)
    data["stages"][1]["train"] |= {"steps": 2}
    data["stages"][1]["train"]["methods"][0] |= {"hidden": 0.0, "scores": 0.0, "embedding": 0.0}
    cache = tmp_path / "cache"
    run(parse_recipe(data), tmp_path / "out", cache=cache)
    assert not list(cache.rglob("output-*.npy"))
    data["stages"][1]["train"]["methods"][0] |= {"logits": 0.0, "hidden": 1.0}
    run(parse_recipe(data), tmp_path / "other", cache=cache)
    assert list(cache.rglob("hidden.npy"))
    assert not list(cache.rglob("output-*.npy"))


def test_stages_bring_no_other_texts_and_nothing_is_compared(tmp_path):
    plain, text = write_model(tmp_path / "plain"), write_text(tmp_path / "text.txt")
    data = stage_one(plain, text)
    data["stages"][1]["train"] |= {"text": "task", "augment": 2}
    with pytest.raises(RecipeError) as caught:
        run(parse_recipe(data), tmp_path / "out")
    assert [fact.split(":")[0] for fact in caught.value.facts] == ["stages[1].train.text", "stages[1].train.augment"]
    with pytest.raises(RecipeError, match="compress needs a task with answers"):
        compress(plain, Text(data=str(text)), tmp_path / "out")
    with pytest.raises(RecipeError, match="bench needs a task with answers"):
        bench([plain], Text(data=str(text)))
