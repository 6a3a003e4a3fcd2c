"""Vectors of texts: every form of data gives the same texts, scores are those of others, a student stays in the teacher's space."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_sentence_folders import by_sentence_transformers, by_us, embedder, write_embedder
from tiny_folder import kept_from_others, refusing, run_quickly, sentences, write_tokenizer

import slimformer
from slimformer import cli
from slimformer.core.pooling import SENTENCE_VECTOR, VectorHead
from slimformer.data.plain_texts import is_plain, read_plain
from slimformer.data.retrieval import read_retrieval
from slimformer.errors import DataError, ModelError, RecipeError
from slimformer.reporting.ledger import read_facts, read_records
from slimformer.running.bench import bench
from slimformer.runtimes.onnxruntime import OnnxRuntime
from slimformer.saving import checkpoint
from slimformer.tasks._vectors import coarse, cosines, rank_correlation, retrieved
from slimformer.tasks.base import Example, Features, Split
from slimformer.tasks.embedding import Embedding, Target
from slimformer.testing.tiny import batch

TEXTS = [f"{text} number {place}" for place, (text, _) in enumerate(sentences(60, 3))]


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# -- Data ----------------------------------------------------------------------------------------------------------------------

LINES = "\n".join([*TEXTS[:30], "", "   ", *TEXTS[30:], TEXTS[0]]) + "\n"
FORMS: dict[str, bytes] = {
    "lines.txt": LINES.encode(),
    "windows.txt": b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode(),
    "mac.txt": LINES.replace("\n", "\r").encode(),
    "utf16.txt": LINES.encode("utf-16"),
    "packed.txt.gz": gzip.compress(LINES.encode()),
    "rows.jsonl": "".join(json.dumps({"id": place, "text": text}) + "\n" for place, text in enumerate(TEXTS)).encode(),
    "table.csv": ("id,sentence\n" + "".join(f"{place},{text}\n" for place, text in enumerate(TEXTS))).encode(),
    "one.tsv": ("anything\n" + "\n".join(TEXTS) + "\n").encode(),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_texts(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / name, FORMS[name])
    assert read_plain(str(file), None, 1000, ())["train"].texts == tuple(TEXTS)


def test_a_folder_has_train_and_dev_or_many_files(tmp_path: Path) -> None:
    write(tmp_path / "split" / "train.txt", "\n".join(TEXTS[:50]))
    write(tmp_path / "split" / "dev.txt", "\n".join(TEXTS[50:]))
    task = Embedding(data=str(tmp_path / "split"))
    assert [item.texts[0] for item in task.split(Split.DEV)] == TEXTS[50:]
    for place in range(3):
        write(tmp_path / "many" / f"part{place}.txt", "\n".join(TEXTS[place::3]))
    assert set(read_plain(str(tmp_path / "many"), None, 1000, ())["train"].texts) == set(TEXTS)


def test_of_more_texts_than_are_wanted_some_are_read_evenly_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "slimformer")
    file = write(tmp_path / "many.txt", "".join(f"text {place}\n" for place in range(10_000)))
    texts = read_plain(str(file), None, 300, ())["train"].texts
    places = [int(text.split()[1]) for text in texts]
    assert len(texts) == 300
    assert places == sorted(places)
    assert places[0] < 50
    assert places[-1] > 9_900
    assert max(np.diff(places)) < 80
    assert "10,000 texts; one of every 32 is read, 300 in all, to bound memory" in caplog.text


def test_no_example_is_in_two_splits() -> None:
    task = Embedding(data=[{"text": text} for text in TEXTS])
    texts = [{item.texts[0] for item in task.split(split)} for split in Split]
    assert sum(map(len, texts)) == len(set().union(*texts)) == 60


BAD: dict[str, tuple[str, bytes, str]] = {
    "nothing": ("a.txt", b"", r"holds no text"),
    "blank lines": ("a.txt", b"\n \n\t\n", r"holds no text"),
    "one line": ("a.txt", b"a text\n", r"holds one text"),
    "few lines": ("a.txt", b"a\nb\nc\n", r"holds 3 texts, too few to set some aside"),
    "a binary file": ("a.txt", b"abc\0\1\2\3def\n" * 50, r"is a binary file: it holds NUL bytes"),
    "Latin-1": ("a.txt", b"good\nfran\xe7ais\n" * 30, r"is not UTF-8: byte 0xe7 in line 2"),
    "a page": ("a.txt", b"<!DOCTYPE html><html>" * 9, r"is a web page"),
    "a pickle": ("a.txt", b"\x80\x04" * 20, r"is a pickle"),
    "many columns": ("a.csv", b"a,b\n" + b"one text,two texts\n" * 30, r"cannot tell which column holds the texts"),
    "nowhere": ("", b"", r"does not exist"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    file, content, said = BAD[name]
    place = write(tmp_path / file, content) if file else tmp_path / "none.txt"
    with pytest.raises(DataError, match=said) as caught:
        Embedding(data=str(place)).split(Split.TRAIN)
    assert "\n" not in caught.value.what
    assert caught.value.help


def test_options_that_cannot_be_are_named_together() -> None:
    with pytest.raises(RecipeError) as caught:
        Embedding(data="x", metric="spearmn", pooling="men", normalize="maybe", dimension=0, train_rows=3, max_length=1)  # type: ignore[arg-type]
    assert [fact.partition(":")[0] for fact in caught.value.facts] == [
        "metric", "pooling", "normalize", "dimension", "max_length", "train_rows",
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="cannot be set up") as caught:
        Embedding(data="x", metric="spearman")
    assert "name pairs" in caught.value.facts[0]
    with pytest.raises(RecipeError) as caught:
        Embedding(data="x", metric="ndcg_at_10")
    assert "name retrieval" in caught.value.facts[0]


def write_pairs(path: Path, count: int, seed: int) -> Path:
    rows = [text for text, _ in sentences(2 * count, seed)]
    lines = [f"{rows[place]}\t{rows[place + count]}\t{place % 11 / 2}" for place in range(count)]
    return write(path, "\n".join(["sentence1\tsentence2\tscore", *lines]) + "\n")


def test_pairs_are_chosen_on_and_reported_on_apart(tmp_path: Path) -> None:
    file = write_pairs(tmp_path / "pairs.tsv", 40, 5)
    write_pairs(tmp_path / "folder" / "train.tsv", 40, 5)
    write_pairs(tmp_path / "folder" / "dev.tsv", 30, 6)
    own = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    told = [f"{'dev' if place % 4 else 'train'}\t" + "\t".join(row) for place, row in enumerate(own)]
    by_column = write(tmp_path / "told.tsv", "\n".join(["split\tsentence1\tsentence2\tscore", *told]) + "\n")
    for place, counts in ((file, (20, 20)), (tmp_path / "folder", (40, 30)), (by_column, (10, 30))):
        task = Embedding(data=[{"text": text} for text in TEXTS], pairs=str(place))
        assert task.metric == "spearman"
        found = [[item for item in task.split(split) if item.answer.kind == "pair"] for split in (Split.VALIDATION, Split.DEV)]
        assert tuple(map(len, found)) == counts
        assert not {item.texts for item in found[0]} & {item.texts for item in found[1]}
        assert all(0 <= item.answer.gold <= 5 for items in found for item in items)
    assert not [item for item in task.split(Split.TRAIN) if item.answer.kind != "text"]
    single = write(tmp_path / "one.tsv", "sentence\tscore\n" + "".join(f"a text\t{n / 3}\n" for n in range(30)))
    with pytest.raises(DataError, match="has one text in a row, not two"):
        Embedding(data=[{"text": text} for text in TEXTS], pairs=str(single)).split(Split.DEV)


def test_queries_and_passages_come_from_squad_or_rows(tmp_path: Path) -> None:
    passages = [f"The {thing} number {place} is here." for place, thing in enumerate(("film", "room", "meal", "song") * 3)]
    answer = {"text": "here", "answer_start": 4}
    paragraphs = [
        {
            "context": text,
            "qas": [{"id": f"{place}-{n}", "question": f"where {place} {n}?", "answers": [answer]} for n in range(2)],
        }
        for place, text in enumerate(passages)
    ]
    squad = write(tmp_path / "dev.json", json.dumps({"data": [{"paragraphs": paragraphs}]}))
    rows = write(
        tmp_path / "rows.jsonl",
        "".join(
            json.dumps({"query": item["question"], "passage": part["context"]}) + "\n"
            for part in paragraphs
            for item in part["qas"]
        ),  # type: ignore[attr-defined]
    )
    found = [next(iter(read_retrieval(str(file), ()).values())) for file in (squad, rows)]
    assert replace(found[0], where="") == replace(found[1], where="")
    assert found[0].passages == tuple(passages)
    assert [found[0].passages[place] for place in found[0].relevant[5]] == [passages[2]]
    part = found[0].part([0, 9], 5)
    assert part.queries == ("where 0 0?", "where 4 1?")
    assert len(part.passages) == 5
    assert [part.passages[place] for (place,) in part.relevant] == [passages[0], passages[4]]
    task = Embedding(data=[{"text": text} for text in TEXTS], retrieval=str(squad), retrieval_rows=6)
    assert task.metric == "ndcg_on_teacher_index"
    queries = [[item for item in task.split(split) if item.answer.kind == "query"] for split in (Split.VALIDATION, Split.DEV)]
    assert [len(some) for some in queries] == [6, 6]
    assert not {item.texts for item in queries[0]} & {item.texts for item in queries[1]}
    with pytest.raises(DataError, match="cannot tell which columns hold queries and passages"):
        read_retrieval(str(write(tmp_path / "bad.jsonl", '{"a": "x", "b": "y"}\n' * 3)), ())


# -- Prompts -------------------------------------------------------------------------------------------------------------------

E5 = {"query": "query: ", "passage": "passage: "}


def bound(head: VectorHead, **options: Any) -> Embedding:
    return Embedding(data="texts.txt", **options).bind({SENTENCE_VECTOR: head.to_config()})


def test_the_prompt_is_told_and_never_guessed() -> None:
    assert bound(VectorHead()).prefixes == ("",)
    assert bound(VectorHead(prompts=E5, default_prompt="passage")).prefixes == ("passage: ",)
    assert bound(VectorHead(prompts=E5), prompt="query").prefixes == ("query: ",)
    assert bound(VectorHead(prompts=E5), prompt="none").prefixes == ("",)
    assert bound(VectorHead(prompts=E5), prompt="both").prefixes == ("query: ", "passage: ")
    assert bound(VectorHead(), query_prompt="q: ", passage_prompt="q: ").prefixes == ("q: ",)
    for head in (VectorHead(prompts=E5), VectorHead(prompts={"query": "find: "})):
        with pytest.raises(DataError, match="before a passage, and nothing says which") as caught:
            bound(head)
        assert "--prompt query, passage, both" in caught.value.help
    with pytest.raises(DataError, match="has no prompt 'qery'") as caught:
        bound(VectorHead(prompts=E5), prompt="qery")
    assert "query" in caught.value.help
    with pytest.raises(DataError, match="does not say how its vectors are made"):
        Embedding(data="x").bind({"model_type": "bert"})
    assert bound(VectorHead(max_length=128)).max_length == 128
    assert bound(VectorHead(max_length=128), max_length=64).max_length == 64


def test_each_text_has_its_prompt(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "model")
    task = replace(bound(VectorHead(prompts={"query": "the ", "passage": "a "}), prompt="none"), lower=True)
    examples = [
        Example("0", ("film was good",), Target()),
        Example("1", ("the film", "the room was"), Target("pair", gold=1.0)),
        Example("2", ("Film was",), Target("query", relevant=("3",))),
        Example("3", ("film was",), Target("passage")),
    ]
    features = task.encode(examples, tokenizer, 6)
    assert list(features.example) == [0, 1, 1, 2, 3]
    words = [" ".join(map(tokenizer.id_to_token, ids[1:-1])) for ids in features.columns["input_ids"]]
    assert words == ["film was [UNK]", "the film", "the room was", "the film was", "a film was"]
    assert task.encode(examples, tokenizer, 4).truncated == 4


# -- Losses --------------------------------------------------------------------------------------------------------------------


def test_the_gradient_of_the_loss_is_a_draw_of_the_fisher_information() -> None:
    """Its squares average to the squared columns of the Jacobian, in units of the vector's length."""
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(16, 3, generator=generator)  # of vectors (16,) by three weights
    start = torch.randn(16, generator=generator)
    weights = torch.zeros(400, 3, requires_grad=True)
    ids = torch.arange(1200).reshape(400, 3)
    vectors = start + weights @ jacobian.T
    loss = Embedding(data="x").loss({SENTENCE_VECTOR: vectors}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    (gradient,) = torch.autograd.grad(loss * 400, weights)
    wanted = jacobian.square().sum(0) / 16 / start.square().sum()
    assert torch.allclose(gradient.square().mean(0), wanted, rtol=0.25)


def test_the_draw_of_a_row_depends_neither_on_its_batch_nor_on_padding() -> None:
    def gradients(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        vectors = torch.ones(len(ids), 8, requires_grad=True)
        loss = Embedding(data="x").loss({SENTENCE_VECTOR: vectors}, {"input_ids": ids, "attention_mask": mask})
        return torch.autograd.grad(loss * len(ids), vectors)[0]

    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])
    whole = gradients(ids, (ids > 0).long())
    assert torch.allclose(gradients(ids[:1, :3], torch.ones(1, 3, dtype=torch.long)), whole[:1])
    assert not torch.allclose(whole[0], whole[1])


def test_divergence_is_the_distance_of_vectors_and_of_their_cosines() -> None:
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (torch.nn.functional.normalize(torch.randn(6, 8, generator=generator), dim=1) for _ in range(2))

    def apart(first: torch.Tensor, second: torch.Tensor, weight: float) -> float:
        task = Embedding(data="x", similarity_weight=weight)
        return float(task.divergence({SENTENCE_VECTOR: first}, {SENTENCE_VECTOR: second}, {}, 3.0))

    assert apart(theirs, theirs, 1.0) == pytest.approx(0, abs=1e-6)
    assert apart(ours, theirs, 0.0) == pytest.approx(float((2 - 2 * (ours * theirs).sum(1)).mean()), rel=1e-5)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    assert apart(theirs @ turn, theirs, 1.0) == pytest.approx(apart(theirs @ turn, theirs, 0.0), abs=1e-5)  # the same cosines
    others = ~np.eye(6, dtype=bool)
    mine, his = ((side @ side.T).numpy()[others] for side in (ours, theirs))
    assert apart(ours, theirs, 2.0) - apart(ours, theirs, 0.0) == pytest.approx(
        2 * ((mine - his) ** 2).mean() / his.var(), rel=1e-4
    )
    with pytest.raises(ModelError, match="have 4 numbers, the teacher's 8"):
        apart(ours[:, :4], theirs, 1.0)


# -- Judging -------------------------------------------------------------------------------------------------------------------


def test_retrieval_is_scored_as_scikit_learn_does() -> None:
    from sklearn.metrics import ndcg_score

    generator = np.random.default_rng(2)
    queries, passages = generator.normal(size=(40, 6)), generator.normal(size=(30, 6))
    relevant = [sorted(generator.choice(30, generator.integers(1, 4), replace=False).tolist()) for _ in range(40)]
    ndcg, recall = retrieved(queries, passages, relevant)
    truth = np.zeros((40, 30))
    for row, places in enumerate(relevant):
        truth[row, places] = 1
    unit = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in (queries, passages)]
    scores = unit[0] @ unit[1].T
    assert ndcg.mean() == pytest.approx(ndcg_score(truth, scores, k=10))
    best = np.argsort(-scores, axis=1)[:, :10]
    assert recall.tolist() == pytest.approx([np.isin(places, best[row]).mean() for row, places in enumerate(relevant)])
    by_dot, _ = retrieved(queries, passages, relevant, unit=False)
    assert by_dot.mean() == pytest.approx(ndcg_score(truth, queries @ passages.T, k=10))


def test_coarse_vectors() -> None:
    vectors = np.random.default_rng(3).normal(size=(50, 4))
    byte = coarse(vectors, "int8")
    assert len(np.unique(byte[:, 0].round(9))) <= 50
    assert 0 < np.abs(byte - vectors).max() <= (np.ptp(vectors, axis=0) / 255 / 2).max() + 1e-9
    assert set(np.unique(coarse(vectors, "binary"))) == {-1.0, 1.0}
    assert np.array_equal(coarse(vectors, "binary") > 0, vectors > 0)
    assert coarse(vectors, "") is vectors
    assert coarse(100 * vectors, "int8", vectors).max() <= vectors.max() + 1e-9  # clamped to the range that was told


def judged(seed: int = 0) -> tuple[list[Example], Features, np.ndarray]:
    """Texts, pairs, queries and passages with vectors of a teacher, and a student's near them."""
    generator = np.random.default_rng(seed)
    examples = [Example(f"train/{n}", ("a",), Target()) for n in range(10)]
    examples += [Example(f"pair/{n}", ("a", "b"), Target("pair", gold=float(generator.random()))) for n in range(25)]
    examples += [Example(f"query/{n}", ("a",), Target("query", relevant=(f"passage/{n}",))) for n in range(12)]
    examples += [Example(f"passage/{n}", ("a",), Target("passage")) for n in range(20)]
    owners = [place for place, item in enumerate(examples) for _ in item.texts]
    order = generator.permutation(len(owners))
    owners = [owners[place] for place in sorted(order, key=lambda row: (owners[row], row))]
    features = Features({"input_ids": [[1]] * len(owners)}, owners, 0, 0)
    theirs = generator.normal(size=(len(owners), 8))
    task = Embedding(data="x")
    answered = list(task.answered({SENTENCE_VECTOR: theirs}, features, examples))
    return answered, features, theirs + 0.5 * generator.normal(size=theirs.shape)


def test_scores_are_those_of_each_part() -> None:
    examples, features, ours = judged()
    task = Embedding(data="x", pairs="p", retrieval="r")
    outputs = {SENTENCE_VECTOR: ours}
    scores = task.score(outputs, features, examples)
    theirs = np.concatenate([item.answer.vectors for item in examples])
    rows = {place: [row for row, owner in enumerate(features.example) if owner == place] for place in range(len(examples))}
    per_example = [cosines(ours, theirs)[rows[place]].mean() for place in range(len(examples))]
    assert scores["cosine"] == pytest.approx(np.mean(per_example))
    assert task.credit(outputs, features, examples).tolist() == pytest.approx(per_example)
    pairs = [place for place, item in enumerate(examples) if item.answer.kind == "pair"]
    alike = [float(cosines(*(ours[[rows[place][side]]] for side in (0, 1)))[0]) for place in pairs]
    assert scores["spearman"] == pytest.approx(
        rank_correlation(np.array(alike), np.array([examples[p].answer.gold for p in pairs]))
    )
    queries, passages = (
        [rows[p][0] for p, item in enumerate(examples) if item.answer.kind == kind] for kind in ("query", "passage")
    )
    relevant = [[place] for place in range(12)]
    assert scores["ndcg_at_10"] == pytest.approx(retrieved(ours[queries], ours[passages], relevant)[0].mean())
    assert scores["ndcg_on_teacher_index"] == pytest.approx(retrieved(ours[queries], theirs[passages], relevant)[0].mean())
    assert {
        f"{name}_{kind}" for name in ("spearman", "ndcg_at_10", "recall_on_teacher_index") for kind in ("int8", "binary")
    } <= set(scores)
    own = task.score({SENTENCE_VECTOR: theirs}, features, examples)
    assert own["cosine"] == pytest.approx(1.0)
    assert own["ndcg_on_teacher_index"] == own["ndcg_at_10"]
    assert task.answers(outputs, features, examples)[0].startswith("cosine 0.")
    assert task.answers(outputs, features, examples)[pairs[0]] == f"similarity {alike[0]:.2f}"


@pytest.mark.parametrize("metric", ["spearman", "ndcg_at_10", "ndcg_on_teacher_index"])
def test_the_score_of_a_resample_is_that_of_its_examples(metric: str) -> None:
    from slimformer.measuring.scoring import Entry, Scored, _score_again

    examples, features, ours = judged(4)
    task = Embedding(data="x", pairs="p", retrieval="r", metric=metric)
    outputs = {SENTENCE_VECTOR: ours}
    passages = [place for place, item in enumerate(examples) if item.answer.kind == "passage"]
    draws = [np.concatenate([np.random.default_rng(seed).integers(0, 47, 47), passages]) for seed in range(4)]
    quick = task.resampled(outputs, features, examples, draws)
    assert quick is not None
    entry = Entry("x", "ours", "fp32", None, task, features)  # type: ignore[arg-type]
    scored = Scored.of(entry, outputs, examples)
    rows = [[row for row, owner in enumerate(features.example) if owner == place] for place in range(len(examples))]
    slow = [_score_again(scored, rows, examples, draw) for draw in draws]
    assert quick.tolist() == pytest.approx(slow)


def test_what_counts_without_pairs_is_the_cosine() -> None:
    task = Embedding(data="x", pairs="p")
    assert task.counted({"cosine": 0.9, "spearman": 0.8}) == 0.8
    assert task.counted({"cosine": 0.9}) == 0.9


# -- The command line ----------------------------------------------------------------------------------------------------------


def test_a_folder_of_vectors_and_plain_text_need_no_task(tmp_path: Path) -> None:
    model = str(write_embedder(tmp_path / "model"))
    file = str(write(tmp_path / "texts.txt", LINES))
    table = str(write(tmp_path / "rows.csv", "text,label\n" + "".join(f"{text},{n % 2}\n" for n, text in enumerate(TEXTS))))
    assert is_plain(file)
    assert not is_plain(table)
    assert isinstance(cli._task({"--data": file}, model), Embedding)
    assert not isinstance(cli._task({"--data": table}, model), Embedding)
    assert isinstance(cli._task({"--data": file, "--pooling": "mean"}, str(tmp_path)), Embedding)


# -- A whole run ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder whose pooling is told, cut, distilled, exported and measured."""
    home = tmp_path_factory.mktemp("embedding")
    write_embedder(home / "encoder", VectorHead(max_length=24))
    (home / "encoder" / "modules.json").unlink()
    write(home / "texts.txt", "\n".join(dict.fromkeys(text for text, _ in sentences(500, 8))))
    write_pairs(home / "pairs.tsv", 60, 5)
    task = {"use": "embedding", "data": str(home / "texts.txt"), "pairs": str(home / "pairs.tsv"), "pooling": "mean"}
    stages = [
        {"calibrate": {"method": {"use": "fisher", "keep": 0.5, "examples": 64, "damage_examples": 16}}},
        {"train": {"epochs": 2, "lr": 3e-3, "methods": [{"use": "distillation"}]}},
    ]
    run_quickly(home / "encoder", task, stages, home / "out")
    return home


@pytest.mark.slow
def test_an_embedder_is_cut_distilled_exported_and_measured(done: Path) -> None:
    records = read_records([done / "out" / "ledger.jsonl"])
    teacher, best = records[0], next(item for item in records if item.chosen)
    assert teacher.metric == "spearman"
    assert teacher.scores["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert 0.5 < best.scores["cosine"] < 1.0
    assert best.loss is not None
    assert best.loss.low <= best.loss.value <= best.loss.high
    facts = read_facts(done / "out")
    assert facts is not None
    assert facts.task["use"] == "embedding"
    assert not kept_from_others(done / "out")


@pytest.mark.slow
def test_what_is_delivered_gives_the_same_vectors_everywhere(done: Path) -> None:
    """In ONNX Runtime by the lines of the card, in PyTorch, and in sentence-transformers without our code."""
    out, texts = done / "out", [text for text, _ in sentences(7, 9)]
    small = checkpoint.load(out)
    ours = by_us(out, small, texts)
    assert ours.shape == (7, 32)  # the dimension is the teacher's
    run = OnnxRuntime().load(out / "onnx" / "model.onnx", threads=1)
    task = Embedding(data="x", pooling="mean").bind(checkpoint.read_config(out / "onnx"))
    from slimformer.data.tokenizer import load_tokenizer
    from slimformer.measuring.scoring import evaluate

    rows = task.encode([Example(str(n), (text,), Target()) for n, text in enumerate(texts)], load_tokenizer(out), 24)
    assert np.allclose(evaluate(run, rows)[SENTENCE_VECTOR], ours, atol=1e-5)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: sentence-similarity" in card
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found is not None
    guarded = refusing("slimformer", "torch", "transformers", "sentence_transformers") + found[1]
    ran = subprocess.run(
        [sys.executable, "-I", "-c", guarded],
        cwd=out,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("(2, 32) [[")
    assert np.allclose(by_sentence_transformers(out, texts), ours, atol=1e-5)


@pytest.mark.slow
def test_a_vector_depends_on_nothing_but_its_text(done: Path) -> None:
    """Alone, at each place of a batch, and at any padding: in float to the last bits, in int8 too, since its ranges are fixed."""
    for file in ("model.onnx", "model_quantized.onnx"):
        run = OnnxRuntime().load(done / "out" / "onnx" / file, threads=1)
        ids = np.array([[2, 5, 9, 14, 20, 3]])
        alone = run({"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)})[
            SENTENCE_VECTOR
        ][0]
        for rows, width in ((2, 6), (5, 9), (8, 23)):
            many = np.random.default_rng(rows).integers(5, 30, (rows, width))
            mask = np.ones_like(many)
            place = rows // 2
            many[place], mask[place] = 0, 0
            many[place, :6], mask[place, :6] = ids[0], 1
            together = run({"input_ids": many, "attention_mask": mask, "token_type_ids": np.zeros_like(many)})[SENTENCE_VECTOR]
            assert np.abs(together[place] - alone).max() < 1e-6


@pytest.mark.slow
def test_a_bench_compares_with_the_first_model(done: Path) -> None:
    task = Embedding(data=str(done / "texts.txt"), pooling="mean")
    found = bench(
        [done / "out" / "onnx" / "model.onnx", done / "out" / "onnx" / "model_quantized.onnx"],
        task,
        seconds=0.1,
        wait_seconds=0,
        threads=1,
    )
    first, second = found.records
    assert (first.metric, first.score) == ("cosine", pytest.approx(1.0, abs=1e-6))
    assert 0.9 < second.score < 1.0


def test_training_without_a_teacher_is_refused_before_anything_runs(done: Path) -> None:
    recipe: dict[str, Any] = {
        "model": str(done / "encoder"),
        "task": {"use": "embedding", "data": str(done / "texts.txt"), "pooling": "mean"},
        "stages": [{"train": {"epochs": 1}}],
    }
    with pytest.raises(RecipeError, match="the task embedding has no labels") as caught:
        slimformer.run(recipe, done / "none", wait_seconds=0)
    assert "stages[0]: it trains on no labels" in caught.value.facts[0]
    assert not (done / "none").exists()
    del recipe["task"]["pooling"]
    with pytest.raises(ModelError, match="nothing says how the hidden states become one vector"):
        slimformer.run(recipe, done / "none", wait_seconds=0)


def sampled(task: Embedding, model: Any) -> Callable[[int], Any]:
    return lambda count: iter([batch(model, 4, 6, seed) for seed in range(max(1, count // 4))][:4])


def test_single_units_are_left_out_by_what_the_vectors_lose() -> None:
    """Without labels a unit is worth how far the vectors move without it."""
    from slimformer.core.cost import parameters
    from slimformer.core.plan import Plan
    from slimformer.families.base import subject_of
    from slimformer.methods.base import Context
    from slimformer.methods.importance import left_out

    model = embedder()
    subject = subject_of(model)
    task = Embedding(data="x", similarity_weight=0.0)
    context = Context(
        subject=subject,
        plan=Plan(),
        task=task,
        cost=parameters(model, subject.anatomy),
        teacher=None,
        teacher_plan=Plan(),
        batches=sampled(task, model),
        generator=torch.Generator().manual_seed(0),
    )
    rises = left_out(context, [subject.anatomy.sites["encoder.1.heads"]], 16)["encoder.1.heads"]
    assert (rises > 1e-5).all()
