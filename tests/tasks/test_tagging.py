"""Tagging: every form of data gives the same sentences, schemes and F1 are those of seqeval, each word is answered once."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_folder import TUNED_AND_CUT, refusing, run_quickly
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from slimformer import cli
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.data.tagged import read_tagged
from slimformer.errors import DataError, ExportError, RecipeError
from slimformer.families.base import anatomy_of
from slimformer.measuring import scoring
from slimformer.reporting.ledger import read_facts, read_records
from slimformer.runtimes.onnxruntime import OnnxRuntime
from slimformer.saving.checkpoint import read_config
from slimformer.tasks._tags import Tagset, break_in, complete, count_spans, scheme_of, scores_of
from slimformer.tasks.base import IGNORED, Example, Features, Split
from slimformer.tasks.tagging import Tagging, Tags
from slimformer.testing.tiny import batch, tiny

SENTENCE = ("Ada", "Lovelace", "saw", "New", "York", ".")
BIO = ("B-PER", "I-PER", "O", "B-LOC", "I-LOC", "O")
SPANS = [("PER", 0, 1), ("LOC", 3, 4)]


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def lines(rows: Any, joint: str = "\t") -> str:
    return "".join(f"{joint.join(row)}\n" for row in rows)


# -- Files ---------------------------------------------------------------------------------------------------------------------

FOUR = list(
    zip(SENTENCE, ("NNP", "NNP", "VBD", "NNP", "NNP", "."), ("B-NP", "I-NP", "B-VP", "B-NP", "I-NP", "O"), BIO, strict=True)
)
PAIRS = list(zip(SENTENCE, BIO, strict=True))
FORMS = {
    "two.conll": lines(PAIRS) + "\t\n" + lines(PAIRS) + "\n\n",
    "spaces.txt": lines(PAIRS, " ") + "   \n" + lines(PAIRS, "   ").rstrip(),
    "conll2003.txt": "\ufeff-DOCSTART- -X- -X- O\n\n" + lines(FOUR, " ") + "\n-DOCSTART- -X- O O\n\n" + lines(FOUR, " "),
    "windows.tsv": (lines(PAIRS) + "\n" + lines(PAIRS)).replace("\n", "\r\n"),
    "rows.tsv": "tokens\tner_tags\n" + 2 * (" ".join(SENTENCE) + "\t" + " ".join(BIO) + "\n"),
    "header.tsv": "word\ttag\n" + lines(PAIRS) + "\n" + lines(PAIRS),
    "comments.conll": "".join(
        f"# id {number} domain=en\n" + lines([(word, "_", "_", tag) for word, tag in PAIRS], " ") + "\n"
        for number in "ab"
    ),
    "turned.conll": 2 * (lines(zip(BIO, SENTENCE, strict=True), " ") + "\n"),
    "numbered.conll": 2 * (lines([(str(n), w, t) for n, (w, t) in enumerate(PAIRS, 1)]) + "\n"),
    "lists.jsonl": 2 * (json.dumps({"tokens": SENTENCE, "ner_tags": BIO}) + "\n"),
    "strings.jsonl": 2 * (json.dumps({"words": " ".join(SENTENCE), "labels": " ".join(BIO)}) + "\n"),
    "others.json": json.dumps([{"id": 7, "tokens": SENTENCE, "pos_tags": ["X"] * 6, "tags": BIO}] * 2),
    "quoted.csv": "tokens,ner\n" + 2 * f'"{list(SENTENCE)}","{list(BIO)}"\n',
    "a-word-a-row.csv": "Sentence #,Word,Tag\n"
    + "".join(f"{f'Sentence: {s}' if not n else ''},{w},{t}\n" for s in (1, 2) for n, (w, t) in enumerate(PAIRS)),
    "entities.jsonl": 2 * (json.dumps({"text": " ".join(SENTENCE), "entities": [
        {"start": 17, "end": 25, "label": "LOC", "text": "New York"}, {"start": 0, "end": 12, "label": "PER"}]}) + "\n"),
    "doccano.jsonl": 2 * (json.dumps({"text": " ".join(SENTENCE), "label": [[0, 12, "PER"], [17, 25, "LOC"]]}) + "\n"),
    "columns.jsonl": 2 * (json.dumps({"text": " ".join(SENTENCE),
                                      "spans": {"start": [0, 17], "end": [12, 25], "type": ["PER", "LOC"]}}) + "\n"),
    "gliner.jsonl": 2 * (json.dumps({"tokenized_text": SENTENCE, "ner": [[0, 1, "PER"], [3, 4, "LOC"]]}) + "\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_sentences(name: str, tmp_path: Path) -> None:
    found = read_tagged([write(tmp_path / name, FORMS[name])])
    assert [(item.text, item.tags) for item in found.sentences] == [(" ".join(SENTENCE), BIO)] * 2
    assert [item.text[begin:end] for item in found.sentences for begin, end in item.words] == [*SENTENCE] * 2


def test_columns_may_be_named_by_their_numbers_and_conllu_has_its_own(tmp_path: Path) -> None:
    file = write(tmp_path / "train.txt", FORMS["conll2003.txt"])
    assert read_tagged([file], label="2").sentences[0].tags == ("NNP", "NNP", "VBD", "NNP", "NNP", ".")
    rows = ["# text = vámonos", "1-2\tvámonos\t" + "\t".join("_" * 8), "1\tvamos\tir\tVERB\t" + "\t".join("_" * 6)]
    rows += ["2\tnos\tnosotros\tPRON\t" + "\t".join("_" * 6), ""]
    found = read_tagged([write(tmp_path / "es.conllu", "\n".join(rows))]).sentences
    assert [(item.text, item.tags) for item in found] == [("vamos nos", ("VERB", "PRON"))]


def test_words_keep_signs_that_python_takes_for_space(tmp_path: Path) -> None:
    text = "a\xa0b\tO\n\u2028\tB-X\n\n#\tO\nx\tO\n"  # a hash may be a word
    found = read_tagged([write(tmp_path / "train.conll", text)]).sentences
    assert [(item.text, item.tags) for item in found] == [("a\xa0b \u2028", ("O", "B-X")), ("# x", ("O", "O"))]


def test_class_names_of_lists_are_kept_in_parquet_in_memory_and_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    names = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    kind = datasets.List(datasets.ClassLabel(names=names))
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": kind})
    data = datasets.Dataset.from_dict({"tokens": [SENTENCE] * 30, "ner_tags": [[3, 4, 0, 1, 2, 0]] * 30}, features=features)
    data.to_parquet(tmp_path / "train.parquet")

    def download(name: str, config: str | None, revision: str = "") -> Any:
        if not revision:
            raise RuntimeError("Dataset scripts are no longer supported, but found wnut_17.py")
        assert (name, config, revision) == ("someone/wnut_17", None, "refs/convert/parquet")
        return datasets.DatasetDict(train=data)

    monkeypatch.setattr(datasets, "load_dataset", download)
    with pytest.raises(DataError, match="is made by a script, and such are never run") as error:
        Tagging(data="someone/wnut_17").settled()
    assert "someone/wnut_17@refs/convert/parquet" in error.value.help
    for source in (str(tmp_path), data, "someone/wnut_17@refs/convert/parquet"):
        task = Tagging(data=source).settled()
        assert task.labels == tuple(names)
        assert task.split(Split.DEV)[0].answer.tags == BIO


def test_files_of_a_folder_are_found_by_how_people_call_them(tmp_path: Path) -> None:
    rows = "".join(f"word{n} B-X\nis O\n\n" for n in range(30))
    for train, dev in (("wnut17train.conll", "emerging.dev.conll"), ("eng.train", "eng.testa"), ("train.txt", "valid.txt")):
        folder = tmp_path / train
        folder.mkdir()
        write(folder / train, rows)
        write(folder / dev, rows[:80])
        task = Tagging(data=str(folder))
        assert len(task.split(Split.TRAIN)) == 24
        assert len(task.split(Split.DEV)) < 8
        assert any("of dev are in the training data too" in note for note in task.notes())


# -- Bad data ------------------------------------------------------------------------------------------------------------------

MANY = [{"tokens": ["in", "Berlin"], "tags": ["O", "B-LOC"]}] * 30
BAD = {
    "empty": ("train.conll", "", "is empty"),
    "blank": ("train.conll", "\n \n\t\n", "is empty"),
    "one line": ("train.conll", "Berlin B-LOC\n", "every word has the tag 'B-LOC'"),
    "one sentence": ("train.conll", "in O\nBerlin B-LOC\n", "holds 1 sentence, too few"),
    "no tag": ("train.conll", "Berlin\nParis\n", "line 1: 'Berlin' stands alone, without a tag"),
    "uneven": ("train.conll", "in O\nBerlin B-LOC\nand\nRome B-LOC\n", "line 3: 1 field, 'and', where other lines have 2"),
    "prose": ("train.txt", "It was a day.\n\nHe saw her there once again today.\n", "different numbers of fields"),
    "no word": ("train.conll", "in\tO\n\tB-LOC\n\nx\tO\n", "line 2: no word owns the tag 'B-LOC'"),
    "no tag in tabs": ("train.conll", "in\tO\nRome\t\n\nx\tO\n", "line 2: the word 'Rome' has no tag"),
    "breaks": ("train.conll", 20 * "in O\nRome B-LOC\n\n" + "x O\nNew O\nYork I-LOC\n", "line 63: 'York' has the tag I-LOC between O"),
    "other type": ("train.conll", 20 * "Ann B-PER\nRome I-LOC\n\nx B-LOC\n\n", "'Rome' has the tag I-LOC between B-PER and the end"),
    "open": ("train.conll", 20 * "Ann B-PER\nLee E-PER\n\nx B-PER\n\n", "line 4: 'x' has the tag B-PER between the beginning and"),
    "mixed": ("train.conll", 20 * "Ann B-PER\nLee I-PER\nRome LOC\nx O\n\n", "the tag 'LOC' has no letter before it"),
    "more tags": ("train.jsonl", json.dumps({"tokens": ["a"], "tags": ["O", "B-X"]}), "1 words and 2 tags: no word owns 'B-X'"),
    "more words": ("train.jsonl", json.dumps({"tokens": ["a", "b"], "tags": ["O"]}), "no tag belongs to 'b'"),
    "number": ("train.jsonl", json.dumps({"tokens": ["a", "b"], "tags": 5}), "are 5, neither a list nor a string"),
    "nothing": ("train.jsonl", json.dumps({"tokens": ["a", "b"], "tags": None}), "are None, neither a list nor a string"),
    "none inside": ("train.jsonl", json.dumps({"tokens": ["a", "b"], "tags": ["O", None]}), "None is no tag"),
    "no list": ("train.jsonl", json.dumps({"tokens": "['a' 'b']", "tags": "['O' 'O']"}), "look like a list and are none"),
    "numbers": ("train.jsonl", 30 * '{"tokens": ["a", "b"], "tags": [0, 1]}\n', "its tags are numbers"),
    "no columns": ("train.jsonl", 30 * '{"title": "a", "stars": 3}\n', "cannot tell which column holds the words"),
    "one word a row": ("train.csv", "word,tag\na,O\nb,B-X\n", "no column that tells the sentences apart"),
    "outside": ("train.jsonl", json.dumps({"text": "in Rome", "entities": [[3, 9, "LOC"]]}), "outside of the text"),
    "overlap": ("train.jsonl", json.dumps({"text": "in New York", "entities": [[3, 11, "LOC"], [3, 6, "X"]]}), "overlaps the one before"),
    "moved": ("train.jsonl", json.dumps({"text": "in Rome", "entities": [{"start": 2, "end": 6, "label": "X", "text": "Rome"}]}),
              "the data says 'Rome'"),
    "no span": ("train.jsonl", json.dumps({"text": "in Rome", "entities": [{"start": "3", "end": 6, "label": "X"}]}), "is no span"),
    "spaces": ("train.jsonl", json.dumps({"text": "in   Rome", "entities": [[2, 5, "LOC"]]}), "holds no word"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    file, text, said = BAD[name]
    write(tmp_path / file, text)
    with pytest.raises(DataError) as error:
        [Tagging(data=str(tmp_path)).split(split) for split in Split]
    assert said in error.value.what
    assert "\n" not in error.value.what
    assert error.value.help


def test_tags_that_break_bio_may_be_mended_as_seqeval_reads_them(tmp_path: Path) -> None:
    text = 20 * "in O\nRome B-LOC\nx O\n\n" + "x O\nNew I-LOC\nYork I-LOC\n"
    task = Tagging(data=str(write(tmp_path / "train.conll", text)), breaks="mend")
    (found,) = (item for split in Split for item in task.split(split) if "York" in item.texts[0])
    assert found.answer.tags == ("O", "B-LOC", "I-LOC")
    assert any("such tags, in 1 sentences, are mended" in note for note in task.notes())


def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub() -> None:
    with pytest.raises(DataError, match=r"data/train.conll does not exist"):
        Tagging(data="data/train.conll").settled()


def test_options_that_cannot_be_are_named_together() -> None:
    with pytest.raises(RecipeError) as error:
        Tagging(metric="f2", breaks="fix", stride=200, max_length=8, train_rows=2, labels=("O", "O"))  # type: ignore[arg-type]
    assert len(error.value.facts) == 5
    with pytest.raises(DataError, match="no tag of .* stands for 'outside'"):
        Tagging(data=[{"tokens": ["go", "now"], "tags": ["VERB", "ADV"]}] * 30, metric="f1").settled()


def test_numbers_need_names_from_the_task_or_the_model() -> None:
    rows = [{"tokens": ["in", "Rome"], "tags": [0, 1]}] * 30
    config = {"id2label": {0: "O", 1: "B-LOC", 2: "I-LOC"}}
    for task in (Tagging(data=rows, labels=("O", "B-LOC", "I-LOC")).settled(), Tagging(data=rows).bind(config)):
        assert task.split(Split.DEV)[0].answer.tags == ("O", "B-LOC")
    assert Tagging(data=rows, labels="O,B-LOC, I-LOC").labels == ("O", "B-LOC", "I-LOC")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="row 1, word 2: the tag 1 is none of the 1 that have a name|line 1, word 2: the tag 1"):
        Tagging(data=rows, labels=("O",)).settled()


# -- Schemes and counts --------------------------------------------------------------------------------------------------------

KINDS = ("PER", "creative-work")
NAMES = {
    "BIO": ("O", "B-PER", "I-PER", "B-creative-work", "I-creative-work"),
    "IO": ("O", "I-PER", "I-creative-work"),
    "IOB1": ("O", "B-PER", "I-PER", "I-creative-work"),
    "BIOES": ("O", *(f"{letter}-{kind}" for kind in ("PER", "creative-work") for letter in "BIES")),
    "BILOU": ("O", *(f"{letter}_{kind}" for kind in ("PER", "creative-work") for letter in "BILU")),
    "BMES": ("O", *(f"{letter}-{kind}" for kind in ("PER", "creative-work") for letter in "BMES")),
    "plain": ("O", "PER", "creative-work"),
}


def drawn(generator: np.random.Generator, apart: tuple[str, ...] = ()) -> tuple[list[tuple[str, int, int]], int]:
    """Random spans in a sentence; with a word between two of a type in `apart`."""
    spans: list[tuple[str, int, int]] = []
    at = 0
    while at < 12:
        at += int(generator.integers(0, 3))
        kind, size = KINDS[generator.integers(2)], int(generator.integers(1, 4))
        if kind in apart and spans and spans[-1][0] == kind and spans[-1][2] == at - 1:
            at += 1
        spans.append((kind, at, at + size - 1))
        at += size
    return spans, at + int(generator.integers(0, 2))


@pytest.mark.parametrize("scheme", NAMES)
def test_spans_survive_every_scheme(scheme: str) -> None:
    pytest.importorskip("seqeval", reason="seqeval is not installed")
    generator, tagset = np.random.default_rng(0), Tagset.of(NAMES[scheme])
    assert tagset.scheme == {"BILOU": "BIOES", "BMES": "BIOES"}.get(scheme, scheme)
    for _ in range(60):
        spans, count = drawn(generator, {"IO": KINDS, "plain": KINDS, "IOB1": KINDS[1:]}.get(scheme, ()))
        tags = [tagset.names[tagset.ids[part]] for part in tagset.tags(spans, count)]
        assert tagset.spans(tags) == spans
        assert break_in(tags, tagset, tagset.scheme) is None
    assert set(complete([*NAMES[scheme][1:], "O"])) >= set(NAMES[scheme])
    assert complete(complete(NAMES[scheme])) == complete(NAMES[scheme])


def test_iob1_is_told_by_what_begins_spans() -> None:
    pytest.importorskip("seqeval", reason="seqeval is not installed")
    names = Tagset.of(["O", "B-X", "I-X"])
    first = [("I-X", "I-X", "B-X", "O"), ("O", "I-X")]
    assert scheme_of(first, names) == "IOB1"
    assert [break_in(tags, names, "IOB1") for tags in first] == [None, None]
    assert names.spans(first[0]) == [("X", 0, 1), ("X", 2, 2)]
    assert scheme_of([("B-X", "B-X", "I-X"), ("O", "I-X")], names) == "BIO"
    rows = [{"tokens": ["New", "York", "Rome", "is"], "tags": ["I-X", "I-X", "B-X", "O"]}] * 30
    assert Tagging(data=rows).split(Split.DEV)[0].answer.tags == ("B-X", "I-X", "B-X", "O")


@pytest.mark.parametrize("scheme", ["BIO", "BIOES"])
def test_scores_are_those_of_seqeval_broken_tags_too(scheme: str) -> None:
    metrics = pytest.importorskip("seqeval.metrics", reason="seqeval is not installed")
    generator, tagset = np.random.default_rng(1), Tagset.of(NAMES[scheme])
    gold, told = (
        [
            [NAMES[scheme][int(tag)] for tag in generator.integers(0, len(NAMES[scheme]), size)]
            for size in generator.integers(1, 9, 40)
        ]
        for _ in range(2)
    )
    told = [[one if generator.random() < 0.6 else other for one, other in zip(tags, (said * 9)[: len(tags)], strict=True)]
            for tags, said in zip(gold, told, strict=True)]  # fmt: skip
    found = scores_of(count_spans(gold, told, tagset).sum(0))
    assert 0.2 < found["f1"] < 0.9
    for name in ("f1", "precision", "recall", "accuracy"):
        assert float(found[name]) == pytest.approx(getattr(metrics, f"{name}_score")(gold, told))


def test_plain_tags_are_not_read_letter_by_letter() -> None:
    pytest.importorskip("seqeval", reason="seqeval is not installed")
    tagset = Tagset.of(["O", "ORG", "SYM", "PER"])
    assert tagset.spans(["ORG", "ORG", "O", "SYM", "SYM", "PER"]) == [("ORG", 0, 1), ("SYM", 3, 4), ("PER", 5, 5)]


# -- Models --------------------------------------------------------------------------------------------------------------------


def test_a_model_with_another_scheme_and_order_is_bound_by_spans() -> None:
    pytest.importorskip("seqeval", reason="seqeval is not installed")
    rows = [{"tokens": SENTENCE, "tags": BIO}, {"tokens": ["Bo", "."], "tags": ["B-PER", "O"]}] * 20
    names = ("U-loc", "L-LOC", "I-LOC", "B-LOC", "O", "B-PER", "I-PER", "L-PER", "U-PER")
    config = {"id2label": dict(enumerate(name.upper() for name in names))}
    task = Tagging(data=rows).bind(config)
    said = {item.answer.tags for item in task.split(Split.TRAIN)}
    assert said == {("B-PER", "L-PER", "O", "B-LOC", "L-LOC", "O"), ("U-PER", "O")}
    assert any("BIO tags, which are rewritten as BIOES" in note for note in task.notes())
    lower = Tagging(data=rows).bind({"id2label": {0: "O", 1: "I-per", 2: "B-loc", 3: "I-loc", 4: "B-per"}})
    assert lower.split(Split.TRAIN)[0].answer.tags[:2] in {("B-per", "I-per"), ("B-per", "O")}
    parts = {"train": [row for row in rows if row["tokens"][0] == "Bo"], "dev": rows[:4]}  # dev has a type that train has not
    task = Tagging(data=parts).bind({"id2label": {0: "O", 1: "I-per", 2: "B-loc", 3: "I-loc", 4: "B-per"}})
    assert task.split(Split.DEV)[0].answer.tags == ("B-per", "I-per", "O", "B-loc", "I-loc", "O")
    plain = Tagging(data=rows).bind({"id2label": {0: "LOC", 1: "O", 2: "PER"}})
    assert plain.split(Split.TRAIN)[0].answer.tags[:2] in {("PER", "PER"), ("PER", "O")}


def test_a_model_of_other_tags_is_refused_and_one_without_names_is_counted() -> None:
    task = Tagging(data=MANY)
    with pytest.raises(DataError, match=r"the tag B-LOC of .* not among the known tags"):
        task.bind({"id2label": {0: "O", 1: "B-PER", 2: "I-PER"}})
    assert task.bind({"id2label": {n: f"LABEL_{n}" for n in range(3)}}).labels == ("O", "B-LOC", "I-LOC")
    with pytest.raises(DataError, match="has 5 tags without names, the data has 3"):
        task.bind({"id2label": {n: f"LABEL_{n}" for n in range(5)}})


def pieces() -> Tokenizer:
    """A tokenizer whose words fall into pieces of two letters, with BERT's special tokens; signs of no width give none."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    parts = [
        *letters,
        *(f"##{one}" for one in letters),
        *(f"{a}{b}" for a in "abn" for b in "abe"),
        *(f"##{a}{b}" for a in "ab" for b in "ab"),
        ".",
    ]
    words = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *parts])}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    from tokenizers import normalizers

    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def example(words: Any, tags: Any = None, name: str = "x") -> Example:
    places, at = [], 0
    for word in words:
        places.append((at, at + len(word)))
        at += len(word) + 1
    text = " ".join(words)
    return Example(name, (text,), Tags(tuple(places), tuple(tags or ["O"] * len(words)), text))


NAMED = Tagging(labels=NAMES["BIO"], metric="f1")


@pytest.mark.parametrize(("max_length", "stride"), [(9, 3), (12, 0), (16, 7), (200, 8)])
def test_each_word_is_answered_once_in_the_window_with_the_most_text_around_it(max_length: int, stride: int) -> None:
    generator = np.random.default_rng(2)
    sizes = [generator.integers(1, 8, generator.integers(1, 30)) for _ in range(40)]
    some = [example(["".join(generator.choice(list("abcdexyz"), size)) for size in row]) for row in sizes]
    tokenizer = pieces()
    features = replace(NAMED, max_length=max_length, stride=min(stride, max_length // 2)).encode(some, tokenizer, max_length)
    assert tokenizer.truncation is None
    starts: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for row, (owner, words, labels) in enumerate(
        zip(features.example, features.columns["words"], features.columns["labels"], strict=True)
    ):
        assert len(words) == len(features.columns["input_ids"][row]) <= max_length
        assert [place for place in range(len(words)) if words[place] >= 0] == np.flatnonzero(labels != IGNORED).tolist()
        for place in np.flatnonzero(words >= 0):
            starts.setdefault((owner, int(words[place])), []).append((row, int(place)))
    assert set(starts) == {(n, word) for n, item in enumerate(some) for word in range(len(item.answer.words))}
    tokenizer.enable_truncation(max_length, stride=min(stride, max_length // 2))
    for owner, item in enumerate(some):
        encoding = tokenizer.encode(item.texts[0])
        windows = [encoding, *encoding.overflowing]
        first_row = features.example.index(owner)
        for word, (begin, _) in enumerate(item.answer.words):
            ((row, place),) = starts[owner, word]
            there = {}
            for number, window in enumerate(windows):
                found = [at for at, (start, end) in enumerate(window.offsets) if start == begin and end > start]
                if found:
                    size = len(window.ids)
                    left, right = (found[0] if number else size), (size - 1 - found[0] if number < len(windows) - 1 else size)
                    there[number] = (min(left, right), -number, found[0])
            best = max(there, key=lambda number: there[number][:2])
            assert (row - first_row, place) == (best, there[best][2])


def test_words_without_a_token_count_as_outside_and_a_strange_tokenizer_is_refused() -> None:
    pytest.importorskip("seqeval", reason="seqeval is not installed")
    item = example(["ab", "\u200d", "cd"], ["B-PER", "I-PER", "I-PER"])
    features = NAMED.encode([item], pieces(), 32)
    assert [int(word) for word in features.columns["words"][0] if word >= 0] == [0, 2]
    logits = np.full((1, len(features.columns["input_ids"][0]), 5), -5.0)
    logits[..., 1] = 0
    assert NAMED.predict({"logits": logits}, features, [item]) == [("B-PER", "O", "B-PER")]
    with pytest.raises(DataError, match="gives no token for 2 of 3 words"):
        NAMED.encode([example(["\u200d", "a", "\u200b"])], pieces(), 32)


def encoded(count: int = 30, seed: int = 3) -> tuple[list[Example], Features]:
    """Random sentences, some longer than a window, as rows."""
    generator = np.random.default_rng(seed)
    some = []
    for number in range(count):
        spans, size = drawn(generator, KINDS)
        tagset = Tagset.of(NAMES["BIO"])
        tags = [tagset.names[tagset.ids[part]] for part in tagset.tags(spans, size)]
        some.append(example(["".join(generator.choice(list("abcd"), 3)) for _ in tags], tags, str(number)))
    return some, replace(NAMED, max_length=24, stride=6).encode(some, pieces(), 24)


def logits_of(some: list[Example], features: Features, wrong: float, seed: int = 0) -> np.ndarray:
    """Logits that give each word its tag, but for a share of the words."""
    generator = np.random.default_rng(seed)
    width = max(map(len, features.columns["input_ids"]))
    logits = generator.normal(size=(len(features), width, len(NAMED.labels))).astype(np.float32)
    for row, labels in enumerate(features.columns["labels"]):
        for place in np.flatnonzero(labels != IGNORED):
            if generator.random() >= wrong:
                logits[row, place, labels[place]] = 9.0
    return logits


def test_right_logits_score_1_and_resamples_are_scores_of_the_resample() -> None:
    pytest.importorskip("seqeval", reason="seqeval is not installed")
    some, features = encoded()
    assert max(np.bincount(features.example)) > 1
    perfect = NAMED.score({"logits": logits_of(some, features, 0.0)}, features, some)
    assert perfect == {"f1": 1.0, "precision": 1.0, "recall": 1.0, "accuracy": 1.0}
    outputs = {"logits": logits_of(some, features, 0.3)}
    entry = scoring.Entry("x", "other", "torch", None, NAMED, features)  # type: ignore[arg-type]
    scored = scoring.Scored.of(entry, outputs, some)
    assert not scored.is_mean
    assert 0.2 < scored.score < 0.95
    draws = [np.random.default_rng(seed).integers(0, len(some), len(some)) for seed in range(4)]
    quick = NAMED.resampled(outputs, features, some, draws)
    rows_of = [[row for row, owner in enumerate(features.example) if owner == number] for number in range(len(some))]
    assert quick == pytest.approx([scoring._score_again(scored, rows_of, some, draw) for draw in draws])
    credit = NAMED.credit(outputs, features, some)
    alone = [NAMED._counts(outputs, features, some)[n] for n in range(len(some))]
    assert credit == pytest.approx([2 * c[2] / (c[0] + c[1]) if c[0] + c[1] else 1.0 for c in alone])


def test_loss_and_divergence_look_at_first_tokens_alone() -> None:
    labels = torch.tensor([[IGNORED, 1, IGNORED, 0, IGNORED], [IGNORED, 2, IGNORED, IGNORED, IGNORED]])
    batch = {"labels": labels, "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])}
    ours, theirs = (torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    places = [(0, 1), (0, 3), (1, 1)]
    wanted = sum(-torch.log_softmax(ours[place], -1)[labels[place]] for place in places) / 3
    assert NAMED.loss({"logits": ours}, batch).item() == pytest.approx(float(wanted), rel=1e-5)
    pairs = [[torch.log_softmax(side[place] / 2, -1) for side in (theirs, ours)] for place in places]
    apart = sum(float((p.exp() * (p - q)).sum()) for p, q in pairs) * 4 / 3
    assert NAMED.divergence({"logits": ours}, {"logits": theirs}, batch, 2.0).item() == pytest.approx(apart, rel=1e-5)
    assert NAMED.terms(batch) == 3
    changed = ours.clone()
    changed[0, 2] = changed[1, 3:] = 50.0
    assert NAMED.loss({"logits": changed}, batch).item() == pytest.approx(float(wanted), rel=1e-5)
    bare = {"attention_mask": batch["attention_mask"]}  # a text without labels: all tokens teach
    assert NAMED.terms(bare) == 8
    assert NAMED.divergence({"logits": ours}, {"logits": ours}, bare, 1.0).item() == pytest.approx(0.0, abs=1e-6)
    nothing = {"labels": torch.full((1, 5), IGNORED)}
    assert NAMED.loss({"logits": ours[:1]}, nothing).item() == 0.0
    assert NAMED.divergence({"logits": ours[:1]}, {"logits": theirs[:1]}, nothing, 1.0).item() == 0.0


def test_a_model_whose_tags_stand_in_another_order_is_refused_and_a_guessing_one_is_told() -> None:
    pytest.importorskip("seqeval", reason="seqeval is not installed")
    some, features = encoded(60)
    right = logits_of(some, features, 0.1)
    assert NAMED.check_model({}, lambda: ({"logits": right}, features, some)) == ""
    with pytest.raises(
        DataError, match="words of validation examples, far below what it can: its classes stand in another order"
    ):
        NAMED.check_model({}, lambda: ({"logits": right[..., [0, 3, 4, 1, 2]]}, features, some))
    dull = np.zeros_like(right)
    assert "no better than chance" in NAMED.check_model({}, lambda: ({"logits": dull}, features, some))


def test_answers_are_spans_or_tags() -> None:
    pytest.importorskip("seqeval", reason="seqeval is not installed")
    some, features = encoded(3)
    outputs = {"logits": logits_of(some, features, 0.0)}
    begin, end = some[0].answer.words[0][0], some[0].answer.words[-1][1]
    assert all(
        part.rpartition(" (")[0] in some[0].texts[0][begin:end]
        for part in NAMED.answers(outputs, features, some)[0].split(", ")
    )
    assert str(example(SENTENCE, BIO).answer) == "Ada Lovelace (PER), New York (LOC)"
    assert str(example(SENTENCE).answer) == "nothing"
    verbs = Tagging(labels=("NOUN", "VERB"), metric="accuracy")
    item = example(["ab", "cd"], ["VERB", "NOUN"])
    rows = verbs.encode([item], pieces(), 16)
    logits = np.eye(2)[[0, 1, 0, 0, 0][: len(rows.columns["words"][0])]][None]
    said = verbs.predict({"logits": logits}, rows, [item])[0]
    assert verbs.answers({"logits": logits}, rows, [item]) == [" ".join(said)]
    assert set(verbs.score({"logits": logits}, rows, [item])) == {"accuracy"}


def test_data_of_words_with_tags_is_known_by_its_suffix(tmp_path: Path) -> None:
    write(tmp_path / "train.conll", 30 * "in O\nRome B-LOC\n\n")
    task = cli._task({"--data": str(tmp_path)}, str(tmp_path / "no-model"))
    assert task == Tagging(data=str(tmp_path))
    assert isinstance(cli._task({"--data": str(tmp_path), "--task": "classification"}).data, str)
    named = cli._task(
        {"--task": "tagging", "--data": str(tmp_path), "--labels": "O,B-LOC", "--breaks": "mend", "--stride": "8"}
    )
    assert named == Tagging(data=str(tmp_path), labels=("O", "B-LOC"), breaks="mend", stride=8)


def test_a_trainer_of_tags_needs_no_task() -> None:
    from slimformer.training.callback import _task_of

    model = tiny("bert", auto_class="AutoModelForTokenClassification", num_labels=3)
    task = _task_of(model)
    assert task.configure()["num_labels"] == 3
    labels = torch.full((1, 4), IGNORED).index_fill(1, torch.tensor([1]), 2)
    output = model(input_ids=torch.tensor([[5, 6, 7, 8]]), labels=labels)
    assert task.loss(output, {"labels": labels}).item() == pytest.approx(output.loss.item(), rel=1e-5)


# -- The whole way -------------------------------------------------------------------------------------------------------------

LABELS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")


@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert"])
def test_a_cut_tagger_answers_for_every_token(model_type: str) -> None:
    dense = tiny(model_type, auto_class=Tagging.auto_class, num_labels=5)
    anatomy = anatomy_of(dense)
    assert not any("classifier" in piece.param for site in anatomy.units for piece in site.slices if site.kind != "hidden")
    assert [point.modules for point in anatomy.points.values() if point.role == "head"] == [("classifier",)]
    model = shrink(dense, anatomy, Plan({"encoder.0.heads": (1, 2), "encoder.1.attention": ()}))
    assert model(**batch(model)).logits.shape == (3, 7, 5)


def write_tagged(path: Path, count: int, seed: int) -> Path:
    """Sentences whose words tell their tags by their first letter: a begins a person, b goes on with it, n is a place."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        for _ in range(int(generator.integers(2, 6))):
            tail = "".join(generator.choice(list("cdxyz"), generator.integers(0, 3)))
            kind = generator.integers(4)
            if kind == 0:
                rows += [f"a{tail} B-PER", *([f"b{tail} I-PER"] if generator.random() < 0.5 else [])]
            else:
                rows.append(f"n{tail} B-LOC" if kind == 1 else f"{'cdxyz'[generator.integers(5)]}{tail} O")
        rows.append("")
    return write(path, "\n".join(rows))


def write_tagger(folder: Path) -> Path:
    """An encoder without a head, and the tokenizer of `pieces`."""
    model = tiny("bert", vocab_size=pieces().get_vocab_size(), pad_token_id=0, hidden_dropout_prob=0.0)
    model.base_model.save_pretrained(folder)
    pieces().save(str(folder / "tokenizer.json"))
    config = {"model_max_length": 64, "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    write(folder / "tokenizer_config.json", json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that tunes an encoder, cuts and distils it, exports and measures it."""
    pytest.importorskip("seqeval", reason="seqeval is not installed")
    home = tmp_path_factory.mktemp("tagging")
    write_tagger(home / "encoder")
    (home / "data").mkdir()
    write_tagged(home / "data" / "train.conll", 240, 0)
    write_tagged(home / "data" / "dev.conll", 40, 1)
    task = {"use": "tagging", "data": str(home / "data"), "max_length": 16, "stride": 4}
    run_quickly(home / "encoder", task, TUNED_AND_CUT, home / "out")
    return home


@pytest.mark.slow
def test_a_tagger_is_tuned_cut_distilled_exported_and_measured(done: Path) -> None:
    records = {item.file: item for item in read_records([done / "out" / "ledger.jsonl"]) if item.role == "ours"}
    assert {item.metric for item in records.values()} == {"f1"}
    assert records["onnx/model.onnx"].score > 0.9
    assert records["onnx/model_quantized.onnx"].score > 0.8
    assert records["onnx/model.onnx"].loss is not None
    facts = read_facts(done / "out")
    assert facts is not None
    assert facts.task["use"] == "tagging"
    config = read_config(done / "out")
    assert (config["architectures"], config["id2label"]) == (
        ["BertForTokenClassification"],
        {str(n): name for n, name in enumerate(LABELS)},
    )


@pytest.mark.slow
def test_the_card_and_a_pipeline_give_the_spans_that_the_task_reads(done: Path) -> None:
    """Also of a text of several windows, in the lines of the card."""
    from transformers import pipeline

    card = (done / "out" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: token-classification" in card or "Worse than doing nothing" in card
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found is not None
    file = re.search(r'InferenceSession\("([^"]+)"', found[1])
    assert file is not None
    task = Tagging(data=str(done / "data"), max_length=16, stride=4).bind(read_config(done / "out"))
    some = task.split(Split.DEV)[:8]
    long = example([word for item in some for word in item.texts[0].split()])
    tagger = pipeline("token-classification", str(done / "out" / "model"), aggregation_strategy="first")
    assert read_config(done / "out" / "model")["model_type"] == "slimformer_bert"
    features = task.encode([*some, long], pieces(), 16)
    assert features.example.count(8) > 3
    spans = Tagset.of(task.labels).spans
    run = OnnxRuntime().load(done / "out" / "onnx" / "model.onnx", threads=1)
    said = task.predict(scoring.evaluate(run, features), features, [*some, long])
    for item, tags in zip(some, said, strict=False):
        if features.example.count(some.index(item)) == 1:
            got = [(part["start"], part["end"], part["entity_group"]) for part in tagger(item.texts[0])]
            assert got == [(item.answer.words[first][0], item.answer.words[last][1], kind) for kind, first, last in spans(tags)]
    best = OnnxRuntime().load(done / "out" / file[1], threads=1)
    tags = task.predict(scoring.evaluate(best, task.encode([long], pieces(), 16)), task.encode([long], pieces(), 16), [long])[0]
    code = re.sub(r"^text = .*$", lambda _: f"text = {long.texts[0]!r}", found[1], flags=re.MULTILINE)
    guarded = refusing("slimformer", "torch", "transformers", "seqeval") + code
    ran = subprocess.run(
        [sys.executable, "-I", "-c", guarded],
        cwd=done / "out",
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    places = long.answer.words
    wanted = [(places[first][0], places[last][1], kind) for kind, first, last in spans(tags)]
    assert [part[:3] for part in ast.literal_eval(ran.stdout)] == wanted
    assert len(wanted) > 4


def test_an_export_is_judged_by_the_answer_of_each_real_token() -> None:
    from slimformer.exporters._onnx.parity import check_parity

    class Session:
        def run(self, names: list[str], inputs: Any) -> list[np.ndarray]:
            return [told]

    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    item = {"input_ids": np.zeros((2, 4)), "attention_mask": mask}
    expected = np.zeros((2, 4, 3), dtype=np.float32)
    expected[..., 0] = 9.0
    told = expected.copy()
    told[1, 2:, 1] = 20.0  # padding
    reference = [{"logits": expected}]
    options: dict[str, Any] = {"tolerance": None, "agreement": 0.9}
    assert check_parity(Session(), "int8", [item], ("input_ids", "attention_mask"), reference, **options)[1] == 1.0
    told[0, 0, 1] = 20.0
    with pytest.raises(ExportError, match="on 83.3% of 6 tokens only"):
        check_parity(Session(), "int8", [item], ("input_ids", "attention_mask"), reference, **options)
