"""Reranking: what is read, what is learned, how an order is judged, and a whole run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score
from tiny_folder import refusing, run_quickly
from tiny_ranking import pair_rows, queries, write_reranker, write_rows

from slimformer import cli
from slimformer.core.relevance import activation_facts, score_activation
from slimformer.data.batching import collate, epoch_order
from slimformer.data.nearest import nearest_passages
from slimformer.data.tokenizer import load_tokenizer
from slimformer.errors import DataError, ModelError, RecipeError
from slimformer.measuring.scoring import bootstrap, evaluate
from slimformer.reporting.ledger import read_facts, read_records
from slimformer.running.bench import bench
from slimformer.runtimes.onnxruntime import OnnxRuntime
from slimformer.saving import checkpoint
from slimformer.tasks._ranks import gain_of_order, reciprocal_rank
from slimformer.tasks.base import IGNORED, TOGETHER, Example, Features, Split
from slimformer.tasks.classification import Classification
from slimformer.tasks.reranking import Relevance, Reranking

GROUPS = queries(60, 3)


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(rows: list[dict[str, Any]], separator: str, names: tuple[str, str, str]) -> str:
    head = separator.join(names)
    return "\n".join([head, *(separator.join(str(row[key]) for key in ("query", "passage", "label")) for row in rows)]) + "\n"


PAIRS = pair_rows(GROUPS)
FORMS = {
    "pairs.csv": table(PAIRS, ",", ("query", "passage", "label")),
    "texts.tsv": table(PAIRS, "\t", ("sentence1", "sentence2", "score")),
    "strange.tsv": table(PAIRS, "\t", ("Search-Query", "Document", "is_relevant")),
    "lists.jsonl": lines(GROUPS),
    "short.jsonl": lines([{"query": row["query"], "pos": row["positive"], "neg": row["negative"]} for row in GROUPS]),
    "titled.jsonl": lines(
        [
            {
                "query": row["query"],
                "positive_passages": [{"docid": "1", "title": "", "text": text} for text in row["positive"]],
                "negative_passages": [{"docid": "2", "title": "", "text": text} for text in row["negative"]],
            }
            for row in GROUPS
        ]
    ),
    "docs.jsonl": lines(
        [
            {
                "query": row["query"],
                "docs": [*row["negative"], *row["positive"]],
                "labels": [0] * len(row["negative"]) + [1] * len(row["positive"]),
            }
            for row in GROUPS
        ]
    ),
    "marco.jsonl": lines(
        [
            {
                "query": row["query"],
                "passages": {
                    "passage_text": [*row["negative"], *row["positive"]],
                    "is_selected": [0] * len(row["negative"]) + [1] * len(row["positive"]),
                },
            }
            for row in GROUPS
        ]
    ),
    "triples.tsv": "query\tpositive\tnegative\n"
    + "".join(
        f"{row['query']}\t{right}\t{wrong}\n" for row in GROUPS for right in row["positive"] for wrong in row["negative"]
    ),
}


def content(task: Reranking) -> dict[str, dict[str, float | None]]:
    examples = [item for name in Split for item in task.split(name)]
    return {item.texts[0]: dict(zip(item.texts[1:], item.answer.grades, strict=True)) for item in examples}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_groups(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(FORMS[name], encoding="utf-8")
    wanted = {row["query"]: dict.fromkeys(row["negative"], 0.0) | dict.fromkeys(row["positive"], 1.0) for row in GROUPS}
    assert content(Reranking(data=str(tmp_path / name))) == wanted


def test_no_query_is_in_two_splits() -> None:
    splits = {name: {item.texts[0] for item in Reranking(data=GROUPS).split(name)} for name in Split}
    assert [len(splits[name]) for name in Split] == [43, 11, 6]
    assert len(set.union(*splits.values())) == 60


def write_beir(folder: Path, dev: str = "test") -> Path:
    texts = list(dict.fromkeys(text for row in GROUPS for text in (*row["positive"], *row["negative"])))
    ids = {text: f"d{place}" for place, text in enumerate(texts)}
    write_rows(folder / "corpus.jsonl", [{"_id": name, "title": "", "text": text} for text, name in ids.items()])
    write_rows(folder / "queries.jsonl", [{"_id": f"q{place}", "text": row["query"]} for place, row in enumerate(GROUPS)])
    (folder / "qrels").mkdir()
    for name, some in (("train", range(45)), (dev, range(45, 60))):
        told = [f"q{place}\t{ids[text]}\t2" for place in some for text in GROUPS[place]["positive"]]
        (folder / "qrels" / f"{name}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *told]) + "\n")
    return folder


def test_a_folder_of_beir_has_the_nearest_passages_for_wrong_ones(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "scifact")
    task = Reranking(data=str(folder), candidates=7, train_candidates=4)
    dev, train = task.split(Split.DEV), task.split(Split.TRAIN)
    assert {item.texts[0] for item in dev} == {row["query"] for row in GROUPS[45:]}
    relevant = {row["query"]: set(row["positive"]) for row in GROUPS}
    for item in (*dev, *train):
        grades = dict(zip(item.texts[1:], item.answer.grades, strict=True))
        assert {text for text, grade in grades.items() if grade == 2} == relevant[item.texts[0]]
        assert set(grades.values()) == {0, 2}
    assert {len(item.texts) for item in dev} == {8}
    assert {len(item.texts) for item in train} == {5}
    assert isinstance(cli._task({"--data": str(folder)}), Reranking)


def write_squad(file: Path, articles: int = 30) -> Path:
    data = [
        {
            "title": f"article {number}",
            "paragraphs": [
                {
                    "context": f"paragraph {part} of article {number} is about thing {part * 100 + number}",
                    "qas": [
                        {
                            "id": f"{number}-{part}",
                            "question": f"which thing is in {part} of {number}?",
                            "answers": [{"text": "thing", "answer_start": 0}],
                        },
                        {
                            "id": f"{number}-{part}-n",
                            "question": f"nothing {number} {part}",
                            "is_impossible": True,
                            "answers": [],
                        },
                    ],
                }
                for part in range(3)
            ],
        }
        for number in range(articles)
    ]
    file.write_text(json.dumps({"version": "v2.0", "data": data}), encoding="utf-8")
    return file


def test_a_paragraph_of_squad_stands_against_others_of_its_article(tmp_path: Path) -> None:
    task = Reranking(data=str(write_squad(tmp_path / "train-v2.0.json")))
    for name in Split:
        for item in task.split(name):
            asked, number = re.findall(r"\d+", item.texts[0])
            assert sorted(item.texts[1:]) == sorted(
                f"paragraph {part} of article {number} is about thing {part * 100 + int(number)}" for part in range(3)
            )
            right = item.texts[1:][item.answer.grades.index(1.0)]
            assert right.startswith(f"paragraph {asked} of")
            assert sum(item.answer.grades) == 1


def test_right_passages_alone_stand_against_those_of_other_queries() -> None:
    rows = [{"query": row["query"], "positive": row["positive"][0]} for row in GROUPS]
    examples = Reranking(data=rows, candidates=4).split(Split.DEV)
    assert {item.answer.grades for item in examples} == {(1.0, 0.0, 0.0, 0.0)}


def test_the_nearest_passages_are_those_of_brute_force() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    passages = [row["passage"] for row in PAIRS[:200]]
    asked = [row["query"] for row in GROUPS[:10]]
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+")
    scores = (
        vectorizer.fit_transform(passages).astype(np.float32) @ vectorizer.transform(asked).astype(np.float32).T
    ).T.toarray()
    found = nearest_passages(asked, passages, [[passages[0]] for _ in asked], 3)
    for row, texts in zip(scores, found, strict=True):
        own = [row[passages.index(text)] for text in texts]
        left = sorted((value for value, text in zip(row, passages, strict=True) if text != passages[0]), reverse=True)
        assert own == pytest.approx(left[: len(own)], abs=1e-6)
        assert passages[0] not in texts


BAD: dict[str, tuple[str, str]] = {
    "one passage a query": (
        lines([{"query": f"q {n}", "passage": f"p {n}", "label": n % 2} for n in range(60)]),
        "in too few queries can passages be put in a right or a wrong order",
    ),
    "nothing is relevant": (
        lines([{"query": f"q {n // 3}", "passage": f"p {n}", "label": 0} for n in range(60)]),
        "in too few queries can passages be put in a right or a wrong order",
    ),
    "no labels": (
        lines([{"query": f"q {n // 3}", "passage": f"p {n}"} for n in range(60)]),
        "in too few queries can passages be put in a right or a wrong order",
    ),
    "a negative label": (
        lines([{"query": f"q {n // 3}", "passage": f"p {n}", "label": 1 - n} for n in range(60)]),
        r"line 3: the label -1 in column 'label' is below 0",
    ),
    "a word for a label": (
        lines([{"query": "q", "passage": "p", "label": "fine"}]),
        r"line 1: the label 'fine' in column 'label' is no number",
    ),
    "no query column": (
        lines([{"a": "x", "passage": "p", "label": 1}]),
        "cannot tell which column holds the queries",
    ),
    "two nested columns of one name": (
        lines([{"query": "x", "a": {"passage": "p"}, "b": {"passage": "q"}, "label": 1}]),
        "cannot tell which column holds the passages",
    ),
    "no passage column": (lines([{"query": "x", "b": "p", "label": 1}]), "cannot tell which column holds the passages"),
    "an empty query": (lines([{"query": " ", "passage": "p", "label": 1}]), "line 1: no query"),
    "an empty passage": (lines([{"query": "q", "passage": None, "label": 1}]), "line 1: no text in column 'passage'"),
    "labels of another number": (
        lines([{"query": "q", "docs": ["a", "b"], "labels": [1]}]),
        "line 1: 2 passages with 1 labels",
    ),
    "one label for a list": (
        lines([{"query": "q", "docs": ["a", "b"], "label": 1}]),
        "a list of passages needs a list of labels",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    text, message = BAD[name]
    (tmp_path / "data.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        Reranking(data=str(tmp_path / "data.jsonl")).split(Split.TRAIN)
    assert caught.value.help


def test_what_cannot_be_judged_is_left_out_and_said() -> None:
    rows = [*PAIRS, {"query": "alone", "passage": "p", "label": 1}]
    rows += [{"query": "nothing", "passage": text, "label": 0} for text in ("p", "r")]
    task = Reranking(data=rows)
    held = [item.texts[0] for name in (Split.VALIDATION, Split.DEV) for item in task.split(name)]
    assert not {"alone", "nothing"} & {*held}
    assert {"alone", "nothing"} <= {item.texts[0] for item in task.split(Split.TRAIN)}
    said = next(line for line in task.notes() if "left out where the order is judged" in line)
    assert "with one passage only: 1" in said
    assert "more relevant than another: 1" in said


def test_of_a_pair_that_comes_twice_the_higher_label_is_taken_and_said() -> None:
    wrong = next(row for row in PAIRS if row["label"] == 0)
    task = Reranking(data=[{**wrong, "label": 1}, *PAIRS, {**wrong, "label": None}])
    assert content(task)[wrong["query"]][wrong["passage"]] == 1
    assert any("2 pairs occurred before and are left out, 2 of them with another label" in line for line in task.notes())


def test_pairs_without_a_label_are_trained_on_and_not_judged() -> None:
    rows = [{**row, "label": None if place % 5 == 0 else row["label"]} for place, row in enumerate(PAIRS)]
    task = Reranking(data=rows)
    assert not any(
        grade is None for name in (Split.VALIDATION, Split.DEV) for item in task.split(name) for grade in item.answer.grades
    )
    assert any(grade is None for item in task.split(Split.TRAIN) for grade in item.answer.grades)


def test_labels_of_dev_alone_are_chosen_on_and_reported_on(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{name: row[name] for name in ("query", "passage")} for row in PAIRS])
    write_rows(tmp_path / "dev.jsonl", pair_rows(queries(40, 7)))
    with pytest.raises(DataError, match="too few") as caught:
        Reranking(data=str(tmp_path)).split(Split.TRAIN)
    assert "labels: dev" in str(caught.value.help)
    task = Reranking(data=str(tmp_path), labels="dev")
    assert not task.labelled
    assert [len(task.split(name)) for name in Split] == [60, 20, 20]
    assert not {item.texts[0] for item in task.split(Split.DEV)} & {item.texts[0] for item in task.split(Split.VALIDATION)}


def test_a_task_of_scores_says_what_queries_with_several_passages_are_for() -> None:
    assert any("--task reranking" in line for line in Classification(data=PAIRS, kind="score").notes())
    alone = [{"query": f"q {n}", "passage": f"p {n}", "label": n % 5 / 2} for n in range(60)]
    assert not any("--task reranking" in line for line in Classification(data=alone, kind="score").notes())


def test_options_that_cannot_be_are_named_together() -> None:
    with pytest.raises(RecipeError) as caught:
        Reranking(data="x", metric="ndcg", activation="tanh", objective="hinge", candidates=1, margin_weight=-1.0, labels="no")
    assert len(caught.value.facts) == 6
    with pytest.raises(RecipeError, match="reranking"):
        Reranking(data="x", metric="agreement")


# -- Learning ------------------------------------------------------------------------------------------------------------------


def features_of(task: Reranking, examples: list[Example], folder: Path) -> Features:
    return task.encode(examples, load_tokenizer(folder), 64)


def test_a_row_is_a_pair_and_its_target_the_label_over_the_highest(tmp_path: Path) -> None:
    folder = write_reranker(tmp_path)
    rows = [{**row, "label": None if place % 7 == 0 else 3 * row["label"]} for place, row in enumerate(PAIRS)]
    task = Reranking(data=rows)
    features = features_of(
        task, [Example("0", ("the film", "a dull show", "a great show", "a song"), Relevance((1, 3, None)))], folder
    )
    assert features.columns["labels"] == pytest.approx([1 / 3, 1.0, IGNORED])
    assert features.columns[TOGETHER] == [0, 0, 0]
    assert [len(set(ids)) for ids in features.columns["token_type_ids"]] == [2, 2, 2]
    assert features.lengths().tolist() == [8, 8, 7]


def test_losses_by_hand() -> None:
    logits = torch.tensor([[0.0], [2.0], [-1.0]], requires_grad=True)
    batch = {"labels": torch.tensor([1.0, 0.5, float(IGNORED)]), "input_ids": torch.ones(3, 2, dtype=torch.int64)}
    share = 1 / (1 + np.exp(-2.0))
    wanted = (np.log(2) - 0.5 * np.log(share) - 0.5 * np.log(1 - share)) / 3
    lost = Reranking(data="x").loss({"logits": logits}, batch)
    assert lost.item() == pytest.approx(wanted)
    (gradient,) = torch.autograd.grad(lost, logits)
    assert gradient[2] == 0
    squared = Reranking(data="x", objective="mse").loss({"logits": logits}, batch)
    assert squared.item() == pytest.approx((0.25 + (share - 0.5) ** 2) / 3)
    plain = Reranking(data="x", objective="mse", activation="identity").loss({"logits": logits}, batch)
    assert plain.item() == pytest.approx((1 + 1.5**2) / 3)


def test_divergence_is_of_points_and_of_margins_within_a_query() -> None:
    ours, theirs = torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([[0.0], [3.0], [5.0]])
    batch = {TOGETHER: torch.tensor([4, 4, 7])}
    whole = Reranking(data="x").divergence({"logits": ours}, {"logits": theirs}, batch, 1.0)
    assert float(whole) == pytest.approx(2 / 3 + 4.0)  # margins: (1 - 2) - (0 - 3) = 2, twice
    half = Reranking(data="x", margin_weight=0.5).divergence({"logits": ours}, {"logits": theirs}, batch, 1.0)
    assert float(half) == pytest.approx(2 / 3 + 2.0)
    alone = Reranking(data="x").divergence({"logits": ours}, {"logits": theirs}, {TOGETHER: torch.tensor([1, 2, 3])}, 1.0)
    assert float(alone) == pytest.approx(2 / 3)


def test_without_labels_the_gradient_is_a_draw_of_the_fisher_information() -> None:
    task = Reranking(data="x", labels="none")
    ids = torch.arange(40_000).reshape(-1, 2)
    logits = torch.full((len(ids), 1), 0.7, requires_grad=True)
    (gradient,) = torch.autograd.grad(task.loss({"logits": logits}, {"input_ids": ids}) * len(ids), logits)
    share = 1 / (1 + np.exp(-0.7))
    assert float(gradient.mean()) == pytest.approx(0, abs=0.02)
    assert float(gradient.square().mean()) == pytest.approx(share * (1 - share), abs=0.01)


def test_passages_of_a_query_share_a_batch() -> None:
    groups = np.repeat(np.arange(30), 5)
    lengths = np.random.default_rng(0).integers(5, 60, len(groups))
    order = epoch_order(lengths, 10, seed=1, epoch=0, groups=groups)
    assert sorted(row for rows in order for row in rows) == list(range(150))
    assert all(len(set(groups[rows])) == 2 for rows in order)
    assert order != epoch_order(lengths, 10, seed=1, epoch=1, groups=groups)


# -- Judging -------------------------------------------------------------------------------------------------------------------


def judged(scores: list[list[float]], grades: list[tuple[float, ...]]) -> tuple[dict[str, np.ndarray], Features, list[Example]]:
    """Outputs whose groups come in the opposite order."""
    examples = [Example(str(n), ("q", *("p" * len(own))), Relevance(own)) for n, own in enumerate(grades)]
    places = [place for place in reversed(range(len(scores))) for _ in scores[place]]
    logits = np.asarray([value for own in reversed(scores) for value in own])[:, None]
    return {"logits": logits}, Features({"input_ids": [[1]] * len(places)}, places, 0, 0), examples


def test_orders_are_scored_query_by_query() -> None:
    task = Reranking(data="x")
    scores, grades = [[3.0, 1.0, 2.0], [1.0, 2.0]], [(0.0, 2.0, 1.0), (0.0, 1.0)]
    found = judged(scores, grades)
    first = (1 / np.log2(3) + 2 / np.log2(4)) / (2 + 1 / np.log2(3))
    assert task.score(*found) == pytest.approx({"ndcg_at_10": (first + 1) / 2, "mrr_at_10": 0.75})
    assert task.credit(*found) == pytest.approx([first, 1.0])
    assert Reranking(data="x", metric="mrr_at_10").credit(*found) == pytest.approx([0.5, 1.0])
    assert task.answers(*found) == ["passage 1, 3, 2 first", "passage 2, 1 first"]


def test_gains_are_those_of_scikit_learn_and_ranks_those_of_brute_force() -> None:
    draw = np.random.default_rng(4)
    for count in (2, 5, 30):
        for _ in range(20):
            scores, grades = draw.integers(0, 8, count) / 4, draw.integers(0, 3, count).astype(float)
            assert gain_of_order(scores, grades) == ndcg_score([grades], [scores], k=10)
            worst = sorted(range(count), key=lambda place: (-scores[place], grades[place] > 0))
            place = next((rank for rank, item in enumerate(worst, 1) if grades[item] > 0), 99)
            assert reciprocal_rank(scores, grades) == (1 / place if place <= 10 else 0.0)


def test_the_interval_is_over_queries() -> None:
    """A metric that is the mean of a query's credit is resampled query by query."""
    draw = np.random.default_rng(1)
    grades = [tuple(float(place == 0) for place in range(5)) for _ in range(30)]
    good, bad = ([draw.normal(size=5) + np.eye(5)[0] * shift for _ in grades] for shift in (2.0, 0.5))
    task = Reranking(data="x")
    credits = [task.credit(*judged([own.tolist() for own in side], grades)) for side in (good, bad)]
    assert all(task.score(*judged([own.tolist() for own in side], grades))["ndcg_at_10"] == pytest.approx(credit.mean())
               for side, credit in zip((good, bad), credits, strict=True))  # fmt: skip
    interval = bootstrap(*credits, seed=0)
    assert interval.low < interval.value < interval.high


def test_a_teacher_s_order_is_what_counts_without_labels() -> None:
    task = Reranking(data="x", labels="none")
    outputs, features, examples = judged([[3.0, 1.0, 2.0], [1.0, 2.0]], [(None,) * 3, (None,) * 2])  # type: ignore[list-item]
    taught = task.answered(outputs, features, examples)
    assert [item.answer.grades for item in taught] == [(10.0, 8.0, 9.0), (9.0, 10.0)]
    assert task.score(outputs, features, taught) == {"agreement": 1.0, "same_first": 1.0}
    other = judged([[2.0, 1.0, 3.0], [1.0, 2.0]], [(0.0,) * 3, (0.0,) * 2])[0]
    assert task.credit(other, features, taught)[1] == 1.0
    assert 0.9 < task.credit(other, features, taught)[0] < 1.0
    assert task.score(other, features, taught)["same_first"] == 0.5
    tied = judged([[3.0, 1.0, 3.0], [1.0, 2.0]], [(0.0,) * 3, (0.0,) * 2])[0]
    assert task.score(tied, features, taught)["same_first"] == 0.5
    assert Reranking(data="x").answered(outputs, features, examples) is examples


def test_a_model_that_ranks_by_chance_or_the_wrong_way_is_told() -> None:
    draw = np.random.default_rng(2)
    grades = [tuple(float(place == 0) for place in range(5)) for _ in range(40)]
    told = {}
    for name, shift in (("right", 4.0), ("chance", 0.0), ("wrong", -4.0)):
        found = judged([(draw.normal(size=5) + np.eye(5)[0] * shift).tolist() for _ in grades], grades)
        try:
            told[name] = Reranking(data="x").check_model({}, lambda found=found: found)
        except DataError as error:
            told[name] = error.what
    assert told["right"] == ""
    assert "proves nothing" in told["chance"]
    assert "run the other way" in told["wrong"]


# -- Folders -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [3, 4, 6])
@pytest.mark.parametrize("activation", ["Sigmoid", "Identity"])
def test_what_becomes_of_a_score_is_read_from_folders_of_all_versions(version: int, activation: str, tmp_path: Path) -> None:
    folder = write_reranker(tmp_path, activation, version)
    task = Reranking(data="x").bind(checkpoint.read_config(folder))
    assert task.activation == activation.lower()
    assert task.completed(checkpoint.read_config(folder)) == {}
    assert checkpoint.is_tuned(folder, Reranking.auto_class)
    assert not checkpoint.is_tuned(folder, "AutoModelForSentenceEmbedding")


def test_a_plain_folder_gets_the_sigmoid_that_cross_encoder_would_take(tmp_path: Path) -> None:
    config = checkpoint.read_config(write_reranker(tmp_path))
    task = Reranking(data="x").bind(config)
    assert task.activation == "sigmoid"
    assert score_activation(task.completed(config)) == "sigmoid"
    other = Reranking(data="x", activation="identity").bind(config | activation_facts("sigmoid"))
    assert score_activation(other.completed(config | activation_facts("sigmoid"))) == "identity"


def test_a_folder_whose_score_is_not_computed_here_is_refused(tmp_path: Path) -> None:
    folder = write_reranker(tmp_path, "Sigmoid", 6)
    with pytest.raises(DataError, match="the model has 2 outputs .LABEL_0, LABEL_1., and a reranker has one score") as caught:
        Reranking(data="x").bind({"num_labels": 2})
    assert "--task classification" in str(caught.value.help)
    with pytest.raises(ModelError, match="go through .*Tanh"):
        Reranking(data="x").bind({"num_labels": 1, "sentence_transformers": {"activation_fn": "torch.nn.Tanh"}})
    steps = [{"type": "sentence_transformers.models.Transformer"}, {"type": "sentence_transformers.cross_encoder.LogitScore"}]
    (folder / "modules.json").write_text(json.dumps(steps))
    with pytest.raises(ModelError, match="names the steps Transformer, LogitScore"):
        checkpoint.read_config(folder)
    (folder / "modules.json").unlink()
    facts = {"model_type": "CrossEncoder", "prompts": {"web": "Query: "}, "default_prompt_name": "web"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(facts))
    with pytest.raises(ModelError, match="puts 'Query: ' before each pair"):
        checkpoint.read_config(folder)


# -- A whole run ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reranker of version 6 that is tuned, cut, distilled, exported and measured."""
    home = tmp_path_factory.mktemp("reranking")
    write_reranker(home / "model", "Sigmoid", 6)
    write_rows(home / "data" / "train.jsonl", queries(160, 1))
    write_rows(home / "data" / "dev.jsonl", pair_rows(queries(40, 2)))
    stages = [
        {"train": {"epochs": 6, "lr": 3e-3}},
        {"calibrate": {"method": {"use": "fisher", "keep": 0.5, "examples": 64, "damage_examples": 16}}},
        {"train": {"epochs": 1, "lr": 1e-3, "task_weight": 0.1, "methods": [{"use": "distillation"}]}},
    ]
    run_quickly(home / "model", {"use": "reranking", "data": str(home / "data")}, stages, home / "out")
    return home


@pytest.mark.slow
def test_a_reranker_is_tuned_cut_exported_and_measured(done: Path) -> None:
    records = read_records([done / "out" / "ledger.jsonl"])
    first, best = records[0], next(item for item in records if item.chosen)
    assert (first.metric, first.examples) == ("ndcg_at_10", 40)
    assert best.score > 0.9
    assert best.loss is not None
    assert best.loss.low <= best.loss.value <= best.loss.high
    facts = read_facts(done / "out")
    assert facts is not None
    assert facts.task["use"] == "reranking"


@pytest.mark.slow
def test_what_is_delivered_gives_the_same_scores_everywhere(done: Path) -> None:
    """In ONNX Runtime by the lines of the card, in PyTorch, and in sentence-transformers without our code."""
    out = done / "out"
    group = queries(3, 9)[1]
    pairs = [(group["query"], text) for text in (*group["positive"], *group["negative"])]
    small = checkpoint.load(out)
    task = Reranking(data="x").bind(checkpoint.read_config(out))
    rows = features_of(task, [Example("0", (pairs[0][0], *(text for _, text in pairs)), Relevance((None,) * 5))], out)
    inputs = collate(rows, range(5), ("input_ids", "attention_mask", "token_type_ids"))
    batch = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.no_grad():
        logits = small(**batch).logits.numpy()
    run = OnnxRuntime().load(out / "onnx" / "model.onnx", threads=1)
    found = evaluate(run, rows)
    assert np.allclose(found["logits"], logits, atol=1e-5)
    assert np.allclose(found["score"], 1 / (1 + np.exp(-logits)), atol=1e-6)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-ranking" in card
    assert 'CrossEncoder(".").predict' in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    guarded = refusing("slimformer", "torch", "transformers", "sentence_transformers") + code[1]
    ran = subprocess.run(
        [sys.executable, "-I", "-c", guarded],
        cwd=out,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert len(np.fromstring(ran.stdout.strip("[]\n "), sep=" ")) == 3
    package = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    theirs = package.CrossEncoder(str(out), device="cpu").predict(pairs)
    assert np.allclose(theirs, found["score"][:, 0], atol=1e-5)


@pytest.mark.slow
def test_a_bench_ranks_by_both_files(done: Path) -> None:
    files = [done / "out" / "onnx" / name for name in ("model.onnx", "model_quantized.onnx")]
    found = bench(files, Reranking(data=str(done / "data")), seconds=0.1, wait_seconds=0, threads=1)
    assert [record.metric for record in found.records] == ["ndcg_at_10"] * 2
    assert found.records[1].score == pytest.approx(found.records[0].score, abs=0.05)
