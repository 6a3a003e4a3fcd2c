"""What people bring: files of every make and data in memory are read right, or refused by their real cause; guesses are said."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import random
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimformer import log
from slimformer.data.files import read_table
from slimformer.data.labels import match_labels, several_labels, spell_labels
from slimformer.errors import DataError, SlimformerError
from slimformer.tasks._judging import check_classes, check_scores, check_spans
from slimformer.tasks.base import Example, Features, Split
from slimformer.tasks.classification import Classification
from slimformer.tasks.question_answering import QuestionAnswering

draw = random.Random(0)
LABELS = [draw.choice(["good", "bad"]) for _ in range(60)]
TEXTS = [f"the soup number {row} was {draw.choice(['hot', 'cold'])}, really" for row in range(60)]
ROWS = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]


@pytest.fixture(autouse=True)
def cache_of_one_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def table(separator: str = ",", header: Sequence[str] = ("text", "label"), rows: Sequence[Sequence[Any]] | None = None) -> str:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=separator, lineterminator="\n")
    writer.writerows([header] if header else [])
    writer.writerows(rows if rows is not None else zip(TEXTS, LABELS, strict=True))
    return stream.getvalue()


def labelled(values: Sequence[Any], name: str = "label") -> str:
    return table(header=("text", name), rows=[(text, values[row % len(values)]) for row, text in enumerate(TEXTS)])


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def zipped(**files: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("_", "."), content)
    return stream.getvalue()


def said(caplog: pytest.LogCaptureFixture, task: Any) -> str:
    caplog.set_level("INFO")
    log._remarked.clear()
    notes = task.notes()
    return "\n".join([caplog.text, *notes])


# ---- files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", table()),
        ("a.csv.gz", gzip.compress(table().encode(), mtime=0)),
        ("a.csv.bz2", bz2.compress(table().encode())),
        ("a.csv", gzip.compress(table().encode(), mtime=0)),  # packed, though its name does not say so
        ("a.zip", zipped(reviews_csv=table())),
        ("a.csv", b"\xef\xbb\xbf" + table().encode()),
        ("a.csv", table().encode("utf-16")),
        ("a.csv", table().encode("utf-16-le")),
        ("a.csv", table(";")),
        ("a.csv", table("|")),
        ("a.csv", "sep=;\n" + table(";")),
        ("a.tsv", table()),
        ("a.txt", table("\t")),
        ("a.tsv", table("\t").replace("\n", "\r\n")),
        ("a.tsv", table("\t").replace("\n", "\r")),
        ("a.csv", table() + ",\n,\n"),
        ("a.tsv", table("\t", ())),
        ("a.csv", table(header=("", "text", "label"), rows=[(row, *pair) for row, pair in enumerate(zip(TEXTS, LABELS, strict=True))])),
        ("a.csv", table(header=("id", "id", "text", "label"), rows=[(1, 2, *pair) for pair in zip(TEXTS, LABELS, strict=True)])),
        ("a.csv", table(header=("Unnamed: 0", "Phrase X", "Verdict"), rows=[(1, *pair) for pair in zip(TEXTS, LABELS, strict=True)])),
        ("a.csv", table(header=("v1", "v2", "", ""), rows=[(b, a, "", "") for a, b in zip(TEXTS, LABELS, strict=True)])),
        ("a.csv", table(header=("tweetText", "airline_sentiment"))),
        ("a.json", json.dumps({name: {str(row): item[name] for row, item in enumerate(ROWS)} for name in ("text", "label")})),
        ("a.json", json.dumps({"text": TEXTS, "label": LABELS}, indent=1)),
        ("a.json", json.dumps({"version": 1, "data": ROWS})),
        ("a.jsonl.gz", gzip.compress("\n".join(map(json.dumps, ROWS)).encode(), mtime=0)),
        ("a.json", json.dumps({"columns": ["text", "label"], "index": [*range(60)], "data": [*zip(TEXTS, LABELS, strict=True)]})),
        ("a.json", json.dumps({str(row): item for row, item in enumerate(ROWS)})),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.json", "".join(json.dumps(row, indent=1) for row in ROWS)),
        ("a.jsonl", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
        ("a.jsonl", "\n".join(json.dumps({"data": row}) for row in ROWS)),
        ("a.jsonl", "\n".join(json.dumps({"text": {"body": row["text"]}, "label": row["label"]}) for row in ROWS)),
        ("a.jsonl", "\n".join(json.dumps({"text": row["text"], "label": [row["label"]]}) for row in ROWS)),
        ("a.jsonl", "\n".join(json.dumps({"text": row["text"], "cats": {name: row["label"] == name for name in ("good", "bad")}})
                              for row in ROWS)),
        ("a.json", json.dumps({"rows": [{"row_idx": place, "row": row} for place, row in enumerate(ROWS)]})),
        ("a.csv", table(header=("reviews.text", "reviews.rating"))),
        ("a.csv", "text,label\n" + "".join(f'"{text}",{label},\n' for text, label in zip(TEXTS, LABELS, strict=True))),
        ("a.csv", table().encode("utf-32")),
    ],
)  # fmt: skip
def test_a_table_is_read_whole_whatever_wrote_it(tmp_path: Path, name: str, content: str | bytes) -> None:
    task = Classification(data=write(tmp_path / name, content))
    found = {item.id: item for split in Split for item in task.split(split)}
    assert [found[key].answer for key in sorted(found, key=lambda key: int(key.split("/")[1]))] != []
    assert {(item.texts[0], item.answer) for item in found.values()} == set(zip(TEXTS, LABELS, strict=True))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:a\n", "pointer of Git LFS"),
        ("a.csv", "<!DOCTYPE html><html></html>", "web page"),
        ("a.csv", b"\x80\x04pickled", "pickles are never read"),
        ("a.csv", zipped(xl_workbook_xml="").replace(b"xl.workbook.xml", b"xl/workbook.xml"), "spreadsheet of Excel"),
        ("a.zip", zipped(a_csv=table(), b_csv=table()), "holds 2 files, not one"),
        ("a.csv.gz", gzip.compress(table().encode(), mtime=0)[:90], "cannot be unpacked"),
        ("a.csv", table().replace("soup", "caf\xe9").encode("latin-1"), "not UTF-8: byte 19 .*in line 2"),
        ("a.csv", table(header=(), rows=[(1, *pair) for pair in zip(TEXTS, LABELS, strict=True)]), "its first line is data"),
        ("a.csv", table(header=("text", "label", "label"), rows=[(*pair, 1) for pair in zip(TEXTS, LABELS, strict=True)]),
         "two columns 'label'"),
        ("a.txt", "".join(f"__label__{label} {text}\n" for text, label in zip(TEXTS, LABELS, strict=True)), "fastText's form"),
        ("a.csv", table(rows=[(text, f"user {row}") for row, text in enumerate(TEXTS)]), "60 different values in 60 rows"),
        ("a.json", json.dumps({"mine": ROWS, "yours": ROWS}), "several lists of rows: 'mine', 'yours'"),
        ("a.json", json.dumps({"text": TEXTS, "label": LABELS[:5]}), "neither a list of rows nor columns"),
        ("a.jsonl", "\n".join(map(str, ROWS)), "as Python prints it, with single quotes"),
        ("a.jsonl", "\n".join(json.dumps([row["text"], row["label"]]) for row in ROWS), "line 1: .* is not an object"),
        ("a.jsonl", "\n".join(json.dumps({"text": row["text"], "label": {"name": row["label"], "id": 1}}) for row in ROWS),
         "cannot tell which is a label column"),
        ("a.csv.gz", gzip.compress(b"a.csv".ljust(257, b"\0") + b"ustar" + b"\0" * 250, mtime=0), "is an archive"),
        ("a.csv.tar.gz", b"\x1f\x8b", "is an archive"),
        ("a.csv", b"\x28\xb5\x2f\xfd1234", "packed by zstd"),
        ("a.csv", b"SQLite format 3\0", "a database of SQLite"),
        ("a.arrow", b"ARROW1", "cannot be read as Arrow"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_table_is_refused_by_its_cause(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        Classification(data=write(tmp_path / name, content)).split(Split.TRAIN)
    assert caught.value.help


def test_quotes_behind_a_backslash_and_lines_of_dashes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = "".join(f'"he said \\"{text}\\", no",{label}\n' for text, label in zip(TEXTS, LABELS, strict=True))
    read = read_table(write(tmp_path / "a.csv", "text,label\n" + rows))
    assert list(read.column("text")) == [f'he said "{text}", no' for text in TEXTS]
    rows = "".join(f"| {text} | {label} |\n" for text, label in zip(TEXTS, LABELS, strict=True))
    task = Classification(data=write(tmp_path / "b.csv", "| text | label |\n|---|:---:|\n" + rows))
    assert task.classes == ("bad", "good")
    assert "the line of dashes under the column names is left out" in said(caplog, task)


@pytest.mark.slow
def test_what_datasets_saves_to_disk_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["good", "bad"])})
    whole = datasets.Dataset.from_list(ROWS, features=names)
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict(train=whole, test=whole.shuffle(seed=1)).save_to_disk(tmp_path / "splits")
    for folder, sizes in (("one", [43, 11, 6]), ("splits", [48, 12, 60])):
        task = Classification(data=tmp_path / folder)
        assert [len(task.split(split)) for split in Split] == sizes
        assert task.classes == ("good", "bad")  # as the data numbers them
        assert {(item.texts[0], item.answer) for item in task.split(Split.TRAIN)} <= set(zip(TEXTS, LABELS, strict=True))


def sentences(separator: str, quotes: Mapping[int, str]) -> str:
    """Rows that begin or end with a quote, as a splitter of sentences leaves them."""
    lines = [f"text{separator}label"]
    for row in range(60):
        mark = quotes.get(row, "")
        text = f'"soup {row}' if mark == "open" else f'soup {row} ."' if mark == "close" else f"soup {row} ."
        lines.append(f"{text}{separator}{LABELS[row]}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("separator", ["\t", ",", ";"])
@pytest.mark.parametrize(
    "quotes",
    [
        {10: "open", 12: "close"},
        {3: "open", 4: "close", 30: "open", 50: "close"},
        {5: "open"},
        {1: "open", 2: "open", 4: "close"},
    ],
)
def test_quotes_never_swallow_rows(tmp_path: Path, separator: str, quotes: Mapping[int, str]) -> None:
    read = read_table(write(tmp_path / ("a.tsv" if separator == "\t" else "a.csv"), sentences(separator, quotes)))
    assert read.column("label") == LABELS
    assert not any("\n" in text for text in read.column("text"))


def test_texts_of_several_lines_stay_whole(tmp_path: Path) -> None:
    rows = [(f"Hello,\nfriend {row}, bye", label) for row, label in enumerate(LABELS)]
    assert list(read_table(write(tmp_path / "a.csv", table(rows=rows))).column("text")) == [text for text, _ in rows]


def test_a_parquet_file_that_would_fill_the_memory_is_refused_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["x" * 10_000] * 2000, "label": [0, 1] * 1000}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    monkeypatch.setattr("slimformer.data.columnar.most_bytes", lambda: 15_000_000)
    with pytest.raises(DataError, match=r"more than the memory does: 0\.0 GB"):
        read_table(tmp_path / "a.parquet")
    monkeypatch.setattr("slimformer.data.texts.most_bytes", lambda: 1_000_000)
    with pytest.raises(DataError, match="more than the memory does"):
        read_table(write(tmp_path / "a.csv.gz", gzip.compress(b"text,label\n" * 100_000)))


def test_a_parquet_file_with_two_columns_of_one_name(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = [TEXTS, LABELS, list(range(len(LABELS)))]
    parquet.write_table(pytest.importorskip("pyarrow").table(columns, names=["text", "label", "label"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="two columns 'label'"):
        Classification(data=tmp_path / "a.parquet").settled()


# ---- folders


@pytest.mark.parametrize(
    "test",
    [
        table(header=("text",), rows=[(text,) for text in TEXTS]),
        table(rows=[(text, -1) for text in TEXTS]),
        table(rows=[(text, "") for text in TEXTS]),
    ],
)
def test_a_test_file_without_labels_is_left_out_with_a_word(
    tmp_path: Path, test: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "train.csv", table())
    write(tmp_path / "test.csv", test)
    task = Classification(data=tmp_path)
    assert [len(task.split(split)) for split in Split] == [43, 11, 6]
    assert "test.csv has no labels" in said(caplog, task)


def test_a_test_file_with_labels_stands_in_and_rows_in_both_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "reviews_train.csv", table())
    write(tmp_path / "reviews_test.csv", table(rows=[(TEXTS[0].upper(), "good"), ("new", "bad")]))
    task = Classification(data=tmp_path)
    assert [len(task.split(split)) for split in Split] == [48, 12, 2]
    text = said(caplog, task)
    assert "reviews_test.csv stands in" in text
    assert "1 of 2 inputs of dev are in the training data too" in text


@pytest.mark.parametrize(
    ("name", "mended", "same"),
    [
        ("train/a.csv", table().replace(",good\n", ",bad\n", 1), False),  # a label
        ("train/a.csv", table().replace("number 7 ", "number seven "), False),  # a text
        ("train/a.csv", table() + "one more,good\n", False),  # a row
        ("dev/b.csv", table().replace(",bad\n", ",good\n", 1), False),
        ("train/a.csv", table(rows=[*zip(TEXTS[1:], LABELS[1:], strict=True), (TEXTS[0], LABELS[0])]), False),  # another order
        ("train/a.csv", table().replace(",good\n", ", good \n"), True),  # spaces around a label
        ("train/a.csv", table(";"), True),
        ("train/a.csv", gzip.compress(table().encode()), True),
    ],
)
def test_what_is_made_of_data_is_named_by_what_they_say(tmp_path: Path, name: str, mended: str | bytes, same: bool) -> None:
    write(tmp_path / "train" / "a.csv", table())
    write(tmp_path / "dev" / "b.csv", table())
    before = Classification(data=tmp_path).content_digest()
    write(tmp_path / name, mended)
    assert (Classification(data=tmp_path).content_digest() == before) is same


def test_columns_that_are_not_used_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [(text, f"{text} again", label) for text, label in zip(TEXTS, LABELS, strict=True)]
    task = Classification(
        data=write(tmp_path / "folder" / "only.csv", table(header=("title", "body", "label"), rows=rows)).parent
    )
    text = said(caplog, task)
    assert "taking its only file, only.csv" in text
    assert "text stands in 'title' too, which is not used" in text
    pair = Classification(data=write(tmp_path / "pair.csv", table(header=("question", "answer", "label"), rows=rows))).settled()
    assert (pair.text, pair.text_pair) == ("question", "answer")


def test_a_data_set_of_the_hub_as_it_is_downloaded(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-00000-of-00001.jsonl", "\n".join(map(json.dumps, ROWS)))
    assert len(Classification(data=tmp_path).split(Split.DEV)) == 6


@pytest.mark.parametrize(
    ("files", "sizes", "told"),
    [
        (["train/data.csv", "test/data.csv"], [48, 12, 60], "taking the file data.csv in train/ for the train data"),
        (
            ["train/part-0.csv", "train/part-1.csv", "Validation/a.csv"],
            [96, 24, 60],
            r"taking the 2 files \(part-0.csv, ...\) in train/",
        ),
        (["default/train/0000.csv"], [43, 11, 6], "default: taking the file 0000.csv in train/"),
        (["data/train/a.csv", "data/dev/b.csv"], [48, 12, 60], "taking the file b.csv in dev/ for the dev data"),
        (["reviews_train.csv", "._reviews_train.csv", ".ipynb_checkpoints/train.csv"], [43, 11, 6], "taking reviews_train.csv"),
        (["set-00000-of-00002.csv", "set-00001-of-00002.csv"], [86, 22, 12], "taking its 2 files"),
    ],
)
def test_files_in_folders_of_splits(
    tmp_path: Path, files: list[str], sizes: list[int], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name in files:
        write(tmp_path / name, b"\0\5\x16\7" if name.startswith("._") else table())
    task = Classification(data=tmp_path)
    assert [len(task.split(split)) for split in Split] == sizes
    assert re.search(told, said(caplog, task))
    changed = next(name for name in files if "train" in name or "set" in name)
    write(tmp_path / changed, table() + "one more,good\n")
    assert sum(len(Classification(data=tmp_path).split(split)) for split in Split) == sum(sizes) + 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train/neg/0.txt", "train/pos/0.txt"], r"a file for each text, in folders such as train/neg/"),
        (["neg/0.txt", "pos/0.txt"], r"a file for each text, in folders such as neg/"),
        (["x_train.csv", "y_train.csv"], r"it holds: x_train\.csv, y_train\.csv[\s\S]*name one of them"),
        (["train.xlsx"], "'CSV UTF-8'"),
        (["train.pkl"], "pickles are never read"),
        (["train.tar.gz"], "unpack it"),
        (["train.feather"], "call it .arrow"),
        (["README.md", "images/a.png"], r"it holds: README\.md, images/"),
        ([], "it is empty"),
    ],
)
def test_a_folder_without_tables_is_refused_by_what_it_holds(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        write(tmp_path / name, "x")
    with pytest.raises(DataError, match=message):
        Classification(data=tmp_path).split(Split.DEV)


# ---- labels


@pytest.mark.parametrize(
    ("values", "clause"),
    [
        (["a", "b", "a|b"], "joins names by '|'"),
        (["joy", "anger", "joy, anger"], "joins names by ','"),
        (["a;b", "b;c", "a;c"], "joins names by ';'"),
        ([[1], [0, 1]], "lists"),
        (["['a']", "['a', 'b']"], "lists"),
        (["[1 0]", "[0 1]"], "lists"),
        ([{"a", "b"}, {"a"}], "lists"),
        (["Sci/Tech", "World", "Sports"], ""),
        (["rock, pop", "jazz"], ""),
        (["3,5", "4", "2,5"], ""),
        (["sports/football", "sports/tennis", "news/local"], ""),
        ([0, 1, None], ""),
    ],
)
def test_several_labels_a_row_are_told_from_names_with_commas(values: list[Any], clause: str) -> None:
    found = several_labels(values * 5)
    assert clause in found
    assert bool(found) == bool(clause)


@pytest.mark.parametrize(
    ("values", "spelled"),
    [
        (["3,5", "4", "2,0"], ["3.5", "4", "2"]),
        (["1.0", 1, 1.0, True], ["1", "1", "1", "true"]),
        (["٣", "１", "2"], ["3", "1", "2"]),
        (["a", "N/A", "-", "", None, float("nan"), "?"], ["a", *[None] * 6]),
        ([0, 1, 2, -1], ["0", "1", "2", None]),
        ([-1, -1], [None, None]),
        ([-1, 0, 1], ["-1", "0", "1"]),
        ([-1, 1], ["-1", "1"]),
        (["none", "good"], ["none", "good"]),
        ([" good\0 ", "\u00a0bad"], ["good", "bad"]),
        (["1.234,5", "2"], ["1234.5", "2"]),
        (["1,234.5", "3.5"], ["1234.5", "3.5"]),
        (["1\u202f000,5", "3,5"], ["1000.5", "3.5"]),
        (["3,5", "3.5", "2"], ["3.5", "3.5", "2"]),
        (["\u22121,5", "0,5"], ["-1.5", "0.5"]),
        (["1,5", "rock"], ["1,5", "rock"]),
    ],
)
def test_labels_are_spelt_one_way(values: list[Any], spelled: list[str | None]) -> None:
    assert spell_labels(values) == spelled


@pytest.mark.parametrize(
    ("data", "names", "expected"),
    [
        (["1", "4"], ("1 star", "2 stars", "3 stars", "4 stars", "5 stars"), [0, 3]),
        (["5", "1"], ("Rating: 1", "Rating: 3", "Rating: 5"), [2, 0]),
        (["-1", "1"], ("-1", "0", "1"), [0, 2]),
        (["false", "True"], ("NEGATIVE", "POSITIVE"), [0, 1]),
        (["0", "1"], ("False", "True"), [0, 1]),
        (["LABEL_1", "LABEL_0"], ("negative", "positive"), [1, 0]),
        (["neg", "POS"], ("positive", "negative"), [1, 0]),
        (["ＧＯＯＤ", "bad"], ("bad", "good"), [1, 0]),
    ],
)
def test_labels_spelt_otherwise_find_their_class(data: list[str], names: tuple[str, ...], expected: list[int]) -> None:
    assert list(match_labels(data, names).values()) == expected


@pytest.mark.parametrize(
    ("values", "count", "message"),
    [([1, 2, 3], 3, "numbers from 1 to 3"), ([1, 2], 3, "numbers from 1 to 2"), ([0, 1], 3, "no ids above 1")],
)
def test_numbers_that_could_be_wrong_by_one_are_refused(tmp_path: Path, values: list[int], count: int, message: str) -> None:
    task = Classification(data=write(tmp_path / "a.csv", labelled(values)))
    with pytest.raises(DataError, match=message):
        task.bind({"id2label": {index: "abc"[index] for index in range(count)}})


def test_spellings_of_one_class_are_one_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = Classification(data=write(tmp_path / "a.csv", labelled(["good", "Good", "good ", "bad", "good"])))
    assert task.settled().labels == ("bad", "good")
    assert {item.answer for item in task.split(Split.TRAIN)} == {"bad", "good"}
    assert "'Good' is 'good'" in said(caplog, task)


@pytest.mark.parametrize("values", [[0, 1], ["Negative", "Positive"], ["LABEL_0", "LABEL_1"], [False, True], ["neg", "pos"]])
def test_examples_drawn_before_binding_are_scored_after_it(tmp_path: Path, values: list[Any]) -> None:
    task = Classification(data=write(tmp_path / "a.csv", labelled(values)))
    examples = task.split(Split.DEV)
    bound = task.bind({"id2label": {0: "NEGATIVE", 1: "POSITIVE"}})
    right = np.asarray([bound._ids_of_answers([item.answer])[item.answer] for item in examples])
    features = Features({"input_ids": [[1]] * len(examples)}, range(len(examples)), 0, 0)
    assert bound.score({"logits": np.eye(2)[right]}, features, examples)["accuracy"] == 1.0
    assert right.tolist() == [("NEGATIVE", "POSITIVE").index(item.answer) for item in bound.split(Split.DEV)]


def test_labels_of_dev_in_another_writing_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "train.csv", table())
    write(tmp_path / "dev.csv", labelled([0, 1]))
    assert "dev.csv: column 'label' is read by the names of the classes: '0' is 'bad', '1' is 'good'" in said(
        caplog, Classification(data=tmp_path)
    )


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (["None", "a", "b"], "None counts as a class"),
        (["unknown", "a", "b"], "unknown counts as a class"),
        ([0, 1, 99], "99 counts as a class"),
        ([1, 2, 3, 999], "999 counts as a class"),
        (["3,5", "2", "1,25"], "read as written locally: 3,5 is 3.5"),
        ([["good"], ["bad"]], "each list in column 'label' holds one label"),
        (["a"] * 29 + ["b"] * 30 + ["class"], "fewer than 3 rows to train on have the label class"),
    ],
)
def test_what_is_odd_about_labels_is_said(
    tmp_path: Path, values: list[Any], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": text, "label": values[row % len(values)]} for row, text in enumerate(TEXTS)]
    assert told in said(caplog, Classification(data=write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))))


@pytest.mark.parametrize(
    "values", [["unlabeled", "a", "b"], [-100, 0, 1], ["(null)", "a", "b"], [-100, -1, 0, 1, 2], ["#REF!", "a", "b"]]
)
def test_marks_of_rows_without_a_label_are_no_classes(tmp_path: Path, values: list[Any]) -> None:
    with pytest.raises(DataError, match=r"no label in column 'label'[\s\S]*rows without a label: [12]\d of 60"):
        Classification(data=write(tmp_path / "a.csv", labelled(values))).split(Split.TRAIN)


def test_a_text_that_was_decoded_wrongly_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = table().replace("soup", "caf\u00e9", 7).encode().decode("latin-1")
    assert "7 texts look like UTF-8 that was read as Latin-1" in said(
        caplog, Classification(data=write(tmp_path / "a.csv", text))
    )


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        (["a", "b"], ["a", "a"], "gives the name 'a' to 2 classes"),
        ([1, 4.5, 3], ["1 star", "2 stars", "3 stars", "4 stars", "5 stars"], "the label '4.5' .* is not a known one"),
        (["1.0 out of 5 stars", "5.0 out of 5 stars"], ["1 star", "2 stars", "3 stars", "4 stars", "5 stars"], "is not a known one"),
        ([0, 4], ["negative", "positive"], "the label '4' .* is not a known one"),
        ([-1, 1], ["negative", "positive"], "the label '-1' .* is not a known one"),
    ],
)  # fmt: skip
def test_labels_that_no_class_is_meant_by(tmp_path: Path, values: list[Any], names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Classification(data=write(tmp_path / "a.csv", labelled(values))).bind({"id2label": dict(enumerate(names))})


def test_names_that_a_config_has_in_label2id_alone_count(tmp_path: Path) -> None:
    unnamed = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"good": 0, "bad": 1}}
    assert Classification(data=write(tmp_path / "a.csv", table())).bind(unnamed).labels == ("good", "bad")


def test_names_that_differ_in_case_alone_are_two_classes_of_a_model(tmp_path: Path) -> None:
    task = Classification(data=write(tmp_path / "a.csv", labelled(["us", "US"]))).bind({"id2label": {0: "us", 1: "US"}})
    assert {item.answer for item in task.split(Split.TRAIN)} == {"us", "US"}


def test_what_the_model_calls_a_label_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = Classification(data=write(tmp_path / "a.csv", labelled([0, 1]))).bind({"id2label": {0: "NEGATIVE", 1: "POSITIVE"}})
    text = said(caplog, task)
    assert "'0' is 'NEGATIVE', '1' is 'POSITIVE'" in text
    assert "2 classes, in the order of their ids: NEGATIVE, POSITIVE" in text


def test_a_message_about_a_huge_label_stays_short(tmp_path: Path) -> None:
    task = Classification(data=write(tmp_path / "a.csv", labelled(["a" * 200_000, "b\x1b[31m"])))
    with pytest.raises(DataError) as caught:
        task.bind({"id2label": {0: "x", 1: "y"}})
    assert len(str(caught.value)) < 1000
    assert "\x1b" not in str(caught.value)


# ---- models that came trained


def logits(right: np.ndarray, order: Sequence[int], share: float) -> np.ndarray:
    """Answers of a model that is right on a share of the examples, and whose class i is class order[i] of the data."""
    generator = np.random.default_rng(0)
    answers = np.where(generator.random(len(right)) < share, right, generator.integers(0, len(order), len(right)))
    return np.argsort(order)[answers]


NAMES = ("contradiction", "entailment", "neutral", "other", "odd")


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 0), (0, 2, 1), (1, 0, 2, 3), (4, 3, 2, 1, 0)])
def test_classes_in_another_order_are_refused_with_the_right_one(order: tuple[int, ...]) -> None:
    wanted = np.random.default_rng(1).integers(0, len(order), 120)
    with pytest.raises(DataError, match="stand in another order") as caught:
        check_classes(logits(wanted, order, 0.8), wanted, NAMES[: len(order)])
    assert json.dumps({str(index): NAMES[place] for index, place in enumerate(order)}) in caught.value.help


def test_a_good_model_is_not_spoken_of_and_chance_is() -> None:
    wanted = np.random.default_rng(1).integers(0, 3, 120)
    assert check_classes(logits(wanted, (0, 1, 2), 0.6), wanted, NAMES[:3]) == ""
    assert "proves nothing" in check_classes(logits(wanted, (0, 1, 2), 0.0), wanted, NAMES[:3])
    assert check_classes(wanted[:9], wanted[:9], NAMES[:3]) == ""
    assert "proves nothing" in check_classes(np.zeros_like(wanted), wanted, NAMES[:3])


def test_scores_and_spans_are_judged_too() -> None:
    wanted = np.linspace(0, 5, 50)
    assert check_scores(wanted + 0.1, wanted) == ""
    assert "another scale" in check_scores(wanted / 5, wanted)
    assert "proves nothing" in check_scores(np.sin(40 * wanted), wanted)
    with pytest.raises(DataError, match="run the other way"):
        check_scores(-wanted, wanted)
    assert check_spans(0.8, 0.1, 100) == ""
    assert "proves nothing" in check_spans(0.05, 0.05, 100)
    with pytest.raises(DataError, match="swapped"):
        check_spans(0.1, 0.8, 100)


def test_the_task_judges_with_its_own_labels(tmp_path: Path) -> None:
    task = Classification(data=write(tmp_path / "a.csv", table())).settled()
    examples = [Example(str(row), (text,), label) for row, (text, label) in enumerate(zip(TEXTS, LABELS, strict=True))]
    features = Features({"input_ids": [[1]] * 60}, range(60), 0, 0)
    right = np.asarray([("bad", "good").index(label) for label in LABELS])
    assert task.check_model({}, lambda: ({"logits": np.eye(2)[right]}, features, examples)) == ""
    with pytest.raises(DataError, match="another order"):
        task.check_model({}, lambda: ({"logits": np.eye(2)[1 - right]}, features, examples))


# ---- data in memory


def frames(kind: str) -> Any:
    if kind == "rows":
        return ROWS
    if kind == "columns":
        return {"text": TEXTS, "label": LABELS}
    if kind == "splits":
        return {"training": ROWS, "validation": ROWS[:10], "unsupervised": ROWS}
    pandas = pytest.importorskip("pandas")
    if kind == "frame":
        return pandas.DataFrame(ROWS)
    return {"train": pandas.DataFrame(ROWS), "test": ROWS[:7]}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("rows", [43, 11, 6]), ("columns", [43, 11, 6]), ("frame", [43, 11, 6]), ("splits", [48, 12, 10]), ("mixed", [48, 12, 7])],
)
def test_data_in_memory_is_kept_by_its_content(kind: str, sizes: list[int], tmp_path: Path) -> None:
    task = Classification(data=frames(kind))
    assert [len(task.split(split)) for split in Split] == sizes
    assert Path(task.data).parent == tmp_path / "cache" / "slimformer" / "data"
    assert Classification(data=frames(kind)) == task
    assert Classification(data=task.data) == task  # as a recipe names it
    mended = [dict(row) for row in ROWS]
    mended[3]["label"] = "bad" if mended[3]["label"] == "good" else "good"
    assert Classification(data=mended).data != Classification(data=ROWS).data


def test_paths_stand_for_splits_too(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.csv", table())
    task = Classification(data={"train": file, "dev": str(file)})
    assert [len(task.split(split)) for split in Split] == [48, 12, 60]


def test_categories_keep_their_order() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS)
    frame["label"] = pandas.Categorical(frame["label"], categories=["good", "so-so", "bad"], ordered=True)
    task = Classification(data=frame).settled()
    assert task.labels == ("good", "so-so", "bad")
    assert {item.texts[0]: item.answer for item in task.split(Split.TRAIN)}.items() <= dict(
        zip(TEXTS, LABELS, strict=True)
    ).items()


@pytest.mark.slow
def test_data_sets_keep_their_class_names() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    data = datasets.Dataset.from_dict({"text": TEXTS, "label": [row % 2 for row in range(60)]}, features=features)
    assert Classification(data=data.with_format("numpy")).settled().labels == ("pos", "neg")
    several = datasets.DatasetDict(train=data, validation=data.select(range(10)), test=data)
    bound = Classification(data=several).bind({"id2label": {0: "NEG", 1: "POS"}})
    assert [item.answer for item in bound.split(Split.DEV)] == ["POS", "NEG"] * 5
    with pytest.raises(DataError, match="IterableDataset, which is streamed"):
        Classification(data=data.to_iterable_dataset())
    questions = datasets.Dataset.from_list(QUESTIONS)
    assert len(QuestionAnswering(data=questions).split(Split.DEV)) == 4


class Loader:
    """A type of PyTorch by its name."""


Loader.__module__ = "torch.utils.data.dataset"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((3, 2)), "numpy array"),
        ((row for row in ROWS), "generator, which can be read only once"),
        (list(zip(TEXTS, LABELS, strict=True)), r"data\[0\] is a tuple, and a row must be a dict"),
        ([], "no rows"),
        ({"text": TEXTS, "label": LABELS[:3]}, "columns of different lengths"),
        ({"train": ROWS, "dev": (row for row in ROWS)}, r"data\['dev'\] is a generator"),
        ({"some": ROWS, "other": 5}, "neither the name of a split nor a column"),
        (Loader(), "Dataset of PyTorch"),
        (7, "no kind of data"),
    ],
)
@pytest.mark.parametrize("task", [Classification, QuestionAnswering])
def test_what_cannot_be_read_is_refused_by_name(task: Any, data: Any, message: str) -> None:
    with pytest.raises(SlimformerError, match=message) as caught:
        task(data=data).split(Split.TRAIN)
    assert caught.value.help


def test_a_series_is_refused_and_missing_values_are_placed() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS)
    with pytest.raises(DataError, match="a Series, which is one column"):
        Classification(data=frame["text"])
    with pytest.raises(DataError, match=r"line 1: no label in column 'label'[\s\S]*rows without a label: 1 of 60"):
        Classification(data=frame.assign(label=[None, *LABELS[1:]])).settled()


# ---- questions


QUESTIONS = [
    {
        "question": "Which?",
        "context": f"Room {row} is red. Room {row} is not red.",
        "answers": {"text": ["red"], "answer_start": [8 + len(str(row))]},
    }
    for row in range(40)
]


def test_questions_in_memory_and_starts_off_by_one(caplog: pytest.LogCaptureFixture) -> None:
    task = QuestionAnswering(data={"train": QUESTIONS, "test": [row | {"answers": None} for row in QUESTIONS[:5]]})
    assert [len(task.split(split)) for split in Split] == [29, 7, 4]
    for split in Split:
        for item in task.split(split):
            assert item.texts[1][item.answer.start :].startswith("red. Room")  # the nearer of two
    text = said(caplog, task)
    assert "has no ids" in text
    assert "40 of 40 answers do not begin where answer_start says" in text
    assert "has no labels (no question has an answer)" in text


def test_questions_that_are_marked_impossible_have_no_answer(tmp_path: Path) -> None:
    articles = [
        {
            "context": row["context"],
            "qas": [
                {"id": str(n), "question": "?", "is_impossible": n % 2 == 0, "answers": [{"text": "red", "answer_start": 10}]}
            ],
        }
        for n, row in enumerate(QUESTIONS)
    ]
    file = write(tmp_path / "a.json", json.dumps({"data": [{"paragraphs": articles}]}))
    task = QuestionAnswering(data=file)
    assert task.settled().version == "v2"
    assert "20 questions are marked is_impossible and have answers" in "\n".join(task.notes())


def test_answers_that_no_model_can_find_are_counted_in_dev_too() -> None:
    wrong = [row | {"answers": {"text": ["blue"], "answer_start": [3]}} for row in QUESTIONS[:3]]
    notes = "\n".join(QuestionAnswering(data={"train": QUESTIONS, "dev": [*wrong, *QUESTIONS[3:9]]}).notes())
    assert "3 of 9 questions have an answer that does not occur in their context: no model can find it" in notes
    assert "9 of 9 questions of dev have a context of the training data" in notes


def test_one_json_file_may_hold_all_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """CLINC150 comes so: {"train": [[text, intent], ...], "val": [...], "oos_val": [...], "test": [...]}, beside another JSON file."""
    caplog.set_level("INFO", logger="slimformer")
    rows = [[f"text {number}", ("greeting", "parting")[number % 2]] for number in range(60)]
    content = {"oos_val": [["what", "oos"]], "val": rows[:20], "train": rows[20:], "test": rows[:4]}
    (tmp_path / "data_full.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "domains.json").write_text(json.dumps({"banking": ["pin", "routing"], "travel": ["visa"]}), encoding="utf-8")
    for data in (tmp_path, tmp_path / "data_full.json"):
        task = Classification(data=str(data))
        assert task.classes == ("greeting", "parting")
        assert [item.texts[0] for item in task.split(Split.DEV)] == [f"text {number}" for number in range(20)]
        assert len(task.split(Split.TRAIN)) + len(task.split(Split.VALIDATION)) == 40
    assert "oos_val, test are left out" in caplog.text
    objects = {"Train": [{"text": f"text {n}", "label": n % 2} for n in range(40)], "Dev": [{"text": "x", "label": 1}] * 4}
    (tmp_path / "objects.json").write_text(json.dumps(objects), encoding="utf-8")
    assert len(Classification(data=str(tmp_path / "objects.json")).split(Split.DEV)) == 4
    with pytest.raises(DataError, match="holds no train file"):
        Classification(data=str(tmp_path)).split(Split.TRAIN)  # two files with splits: which one is meant?
