"""Data as people's own habits leave it: what other tools put beside files, how labels are written, and how files are named."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimformer.data.squad import read_questions
from slimformer.errors import DataError, OutputError
from slimformer.tasks._tags import Tagset, complete
from slimformer.tasks.base import Split
from slimformer.tasks.classification import Classification
from slimformer.tasks.embedding import Embedding
from slimformer.tasks.multitask import Multitask
from slimformer.tasks.reranking import Reranking
from slimformer.tasks.tagging import Tagging
from slimformer.tasks.translation import Translation

Call = Callable[..., tuple[int, str, str]]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def table(path: Path, rows: list[tuple[Any, ...]], header: str = "text,label") -> Path:
    return write(path, header + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))


def reviews(count: int, labels: tuple[Any, ...] = ("bad", "good")) -> list[tuple[Any, ...]]:
    return [(f"review number {place}", labels[place % len(labels)]) for place in range(count)]


def sizes(task: Any) -> list[int]:
    return [len(task.split(split)) for split in (Split.TRAIN, Split.VALIDATION, Split.DEV)]


def texts_of(task: Any) -> set[str]:
    return {item.texts[0] for split in Split for item in task.split(split)}


def model(*names: str, **more: Any) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), **more}


def test_a_saved_data_set_that_was_opened_since_is_read_as_it_was_saved(tmp_path: Path) -> None:
    """`map` and `shuffle` leave cache-*.arrow beside the data."""
    datasets = pytest.importorskip("datasets")
    rows = {"text": [f"text {place}" for place in range(40)], "label": [0, 1] * 20}
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows)).save_to_disk(str(tmp_path / "saved"))
    opened = datasets.load_from_disk(str(tmp_path / "saved"))["train"]
    opened.map(lambda row: {"text": row["text"].upper()})
    opened.shuffle(seed=1)
    assert len([*tmp_path.glob("saved/train/cache-*.arrow")]) == 2
    assert texts_of(Classification(data=str(tmp_path / "saved"))) == {*rows["text"]}


def test_each_split_in_memory_has_its_own_names_of_ids() -> None:
    datasets = pytest.importorskip("datasets")

    def split(names: list[str], count: int) -> Any:
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        rows = {"text": [f"{names[place % 2]} {place}" for place in range(count)], "label": [0, 1] * (count // 2)}
        return datasets.Dataset.from_dict(rows, features=features)

    task = Classification(data={"train": split(["up", "down"], 40), "validation": split(["down", "up"], 10)}).settled()
    assert all(item.texts[0].startswith(item.answer) for name in Split for item in task.split(name))


def test_a_label_that_is_rare_is_a_label(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [(f"text {place}", place % 2, int(place > 2400), int(place % 3 == 0), 0) for place in range(2500)]
    file = table(tmp_path / "train.csv", rows, "text,toxic,threat,insult,spam")
    with caplog.at_level(logging.INFO, "slimformer"):
        assert Classification(data=str(file)).settled().labels == ("toxic", "threat", "insult")
    assert "columns that say the same in every row are no labels: 'spam' (0)" in caplog.text


def test_a_code_that_looks_like_none_is_a_label_where_it_stands_beside_others() -> None:
    """Namibia is NA; alone in all its rows, it would be taken for a missing value."""
    lists = [["NA", "ZA"], ["BW"], ["NA"], ["ZA"]]
    beside = Classification(data=[{"text": f"text {place}", "labels": lists[place % 4]} for place in range(40)])
    assert beside.settled().labels == ("BW", "NA", "ZA")
    alone = Classification(
        data=[{"text": f"text {place}", "labels": [["ZA"], ["n/a"], ["BW", "ZA"]][place % 3]} for place in range(40)]
    )
    assert alone.settled().labels == ("BW", "ZA")


def test_names_with_marks_in_them_are_the_classes_of_a_model_that_has_them(tmp_path: Path) -> None:
    names = ("light/on", "light/off", "fan/on", "fan/off")
    task = Classification(data=str(table(tmp_path / "data.csv", reviews(60, names))))
    assert task.bind(model(*names)).labels == names
    assert task.settled().kind == "multi_label"
    assert Classification(data=task.data, kind="classes").settled().labels == tuple(sorted(names))


def test_the_kind_of_labels_can_be_told_on_the_command_line(tmp_path: Path, call: Call) -> None:
    code, _, err = call("bench", tmp_path, "--data", tmp_path, "--kind", "clases", "--task", "classification")
    assert code == 2
    assert "kind: 'clases'; known: auto, classes, score, multi_label" in err


@pytest.mark.parametrize("quoted", ['"say ""hi"" {}"', '"say, {}"'])
def test_a_return_inside_a_field_ends_no_row(tmp_path: Path, quoted: str) -> None:
    rows = [("one\rtwo" if place == 7 else quoted.format(place), "ab"[place % 2]) for place in range(40)]
    found = texts_of(Classification(data=str(table(tmp_path / "train.csv", rows))))
    assert len(found) == 40
    assert "one\rtwo" in found or "one two" in found
    assert not any(text.startswith('"') for text in found)


def test_columns_that_pandas_counts_are_a_header(tmp_path: Path) -> None:
    for header, more in (("0,1", ()), (",0,1", (0,))):
        file = table(tmp_path / "data.csv", [(*more, *row) for row in reviews(40, (0, 1))], header)
        assert sum(sizes(Classification(data=str(file)))) == 40
    called = table(tmp_path / "called.csv", reviews(40, ("label", "other")))
    assert sum(sizes(Classification(data=str(called)))) == 40


def test_shards_with_a_digest_and_parts_without_a_name(tmp_path: Path) -> None:
    for place in range(2):
        table(tmp_path / "hub" / f"train-0000{place}-of-00002-{place}a9c2a1b7b2d3e4f.csv", reviews(40))
    assert sum(sizes(Classification(data=str(tmp_path / "hub")))) == 80
    for name in ("train_1.csv", "train_2.csv", "valid.csv"):
        table(tmp_path / "parts" / name, reviews(20))
    with pytest.raises(DataError, match="it holds: train_1.csv, train_2.csv, valid.csv"):
        Classification(data=str(tmp_path / "parts")).split(Split.TRAIN)


def test_a_column_of_splits_splits(tmp_path: Path) -> None:
    rows = [(f"text {place}", "ab"[place % 2], ["train", "Dev", "test"][place % 3]) for place in range(60)]
    file = table(tmp_path / "data.csv", rows, "text,label,Split")
    for data in (file, tmp_path):
        task = Classification(data=str(data))
        assert sum(sizes(task)) == 40
        assert {item.texts[0] for item in task.split(Split.DEV)} == {text for text, _, split in rows if split == "Dev"}
    other = table(tmp_path / "other" / "data.csv", [(text, label, "a fold") for text, label, _ in rows], "text,label,split")
    assert sum(sizes(Classification(data=str(other)))) == 60


def test_a_file_is_what_its_name_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever judges a model names the file to judge on: all of it counts."""
    for name, count in (("train.csv", 100), ("dev.csv", 30)):
        table(tmp_path / name, reviews(count))
    dev = Classification(data=str(tmp_path / "dev.csv")).bind(model("bad", "good"))
    assert len(dev.split(Split.DEV)) == 30
    with pytest.raises(DataError, match="by its name, dev.csv is data to report on"):
        dev.split(Split.TRAIN)
    with caplog.at_level(logging.INFO, "slimformer"):
        assert sum(sizes(Classification(data=str(tmp_path / "train.csv")))) == 100
    assert "dev.csv beside it is not used; name the folder" in caplog.text


def test_of_every_task_a_file_called_dev_is_judged_on_whole(tmp_path: Path) -> None:
    words = "".join(f"Rome B-LOC\nis O\nold{place} O\n\n" for place in range(30))
    queries = [{"query": f"query {place}", "positive": f"right {place}", "negative": f"wrong {place}"} for place in range(30)]
    pairs = [{"en": f"Hello {place}", "de": f"Hallo {place}"} for place in range(30)]
    tasks = (
        Tagging(data=str(write(tmp_path / "tags" / "dev.conll", words))),
        Reranking(data=str(write(tmp_path / "ranks" / "dev.jsonl", "".join(json.dumps(row) + "\n" for row in queries)))),
        Translation(data=str(write(tmp_path / "pairs" / "test.jsonl", "".join(json.dumps(row) + "\n" for row in pairs)))),
    )
    for task in tasks:
        assert len(task.split(Split.DEV)) == 30
        with pytest.raises(DataError, match="by its name, (dev|test).* is data to report on"):
            task.split(Split.TRAIN)


def test_a_torn_archive_of_texts_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt.gz"
    file.write_bytes(gzip.compress("".join(f"text {place}\n" for place in range(9000)).encode())[:300])
    with pytest.raises(DataError, match=r"texts\.txt\.gz cannot be read"):
        Embedding(data=str(file)).split(Split.TRAIN)


def test_names_beside_ids_are_their_names(tmp_path: Path) -> None:
    """SetFit's data sets have them."""
    rows = [
        {"text": f"text {place}", "label": place % 2, "label_text": ["positive", "negative"][place % 2]} for place in range(40)
    ]
    file = write(tmp_path / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    task = Classification(data=str(file)).bind(model("negative", "positive"))
    told = {row["text"]: row["label_text"] for row in rows}
    assert all(item.answer == told[item.texts[0]] for split in Split for item in task.split(split))


@pytest.mark.parametrize("copies", [1, 4])
def test_tasks_with_common_data_set_as_much_aside_as_one(copies: int) -> None:
    texts = 1000 // copies
    rows = [
        {"text": f"text {place % texts}", "mood": "ab"[place % texts % 2], "topic": "xy"[place % texts % 5 % 2]}
        for place in range(1000)
    ]
    train, validation, dev = sizes(Multitask(data=rows, label="mood,topic"))
    assert train + validation + dev == texts
    assert 0.08 < dev / texts < 0.16
    assert validation / texts < 0.25


def test_tags_in_small_letters_and_with_the_letter_behind() -> None:
    for names in (["b-per", "i-per", "o", "b-loc"], ["PER-B", "PER-I", "O", "LOC-B"]):
        assert [span[1:] for span in Tagset.of(names).spans(names)] == [(0, 1), (3, 3)]
    assert complete(["o", "b-per"]) == ("o", "b-per", "i-per")
    assert complete(["O", "PER-B", "PER-I"]) == ("O", "PER-B", "PER-I")
    assert Tagset.of(["NOUN", "VERB-B"]).plain


@pytest.mark.parametrize("start", ["9", 9.0, 9])
def test_starts_of_answers_as_tables_write_them(tmp_path: Path, start: Any) -> None:
    row = {"context": "Rome and Rome", "qas": [{"question": "where?", "answers": [{"text": "Rome", "answer_start": start}]}]}
    for content in ([row], [{"paragraphs": [{**row, "qas": [{**row["qas"][0], "id": "a"}]}]}]):  # type: ignore[dict-item]
        (example,) = read_questions([write(tmp_path / f"{len(str(content))}.json", json.dumps(content))]).examples
        assert (example.texts, example.answer.start) == (("where?", "Rome and Rome"), 9)


def test_columns_that_are_called_as_flores_calls_languages() -> None:
    task = Translation(data=[{"eng_Latn": f"Hello {place}", "deu_Latn": f"Hallo {place}"} for place in range(60)])
    assert {item.texts[0].split()[0] for item in task.split(Split.TRAIN)} == {"Hello"}


def test_a_tab_in_one_text_makes_no_table_of_a_text_file(tmp_path: Path) -> None:
    lines = [f"this is text {place}" for place in range(60)]
    lines[7] = "one\twith a tab"
    task = Classification(data=str(write(tmp_path / "train.txt", "\n".join(lines))), labels="none")
    assert sum(sizes(task)) == 60


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("https://example.org/train.csv", "download it, and name the file"),
        ("reviews/*.csv", "name the folder that holds the files"),
        ("$DATA/train.csv", "leave out the quotes around it"),
    ],
)
def test_names_that_are_no_paths_are_told_apart(data: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Classification(data=data).split(Split.TRAIN)


def test_an_option_that_is_given_twice_is_refused(call: Call) -> None:
    code, _, err = call("compress", "model", "--data", "a.csv", "--data", "b.csv", "--out", "small")
    assert code == 2
    assert "--data is given 2 times" in err


@pytest.mark.parametrize("command", [("run", "one.yaml", "--seeds", 5), ("join", "a=~/one", "b=two"), ("report", "one")])
def test_the_home_of_a_path_behind_an_equals_sign(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch, command: tuple[Any, ...]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    seen, models = [], []

    def stop(given: Any, out: Path, **__: Any) -> None:
        seen.append(Path(out))
        models.append(given)
        raise OutputError("far enough.", help="look at the path.")

    for name in ("running.sweep.run_several", "running.joining.join_classifiers", "reporting.page.report"):
        monkeypatch.setattr(f"slimformer.{name}", stop)
    call(*command, "--out=~/small")
    assert seen == [tmp_path / "home" / "small"]
    if command[0] == "join":
        assert models == [{"a": str(tmp_path / "home" / "one"), "b": "two"}]


def test_several_runs_are_not_written_into_one(tmp_path: Path, call: Call) -> None:
    write(tmp_path / "run" / "ledger.jsonl", "")
    recipe = write(
        tmp_path / "one.yaml",
        "version: 1\nmodel: model\ntask: {use: classification, data: data}\nstages: [{use: train, epochs: 1}]\n",
    )
    code, _, err = call("run", recipe, "--seeds", 5, "--out", tmp_path / "run")
    assert code == 2
    assert "holds a run, and several runs are written beside each other" in err


def test_scores_of_pairs_with_decimal_commas(tmp_path: Path) -> None:
    """As a spreadsheet in German or French writes them."""
    rows = "".join(f"text {place};text {place + 1};{place % 5},5\n" for place in range(40))
    pairs = write(tmp_path / "pairs.csv", "sentence1;sentence2;score\n" + rows)
    task = Embedding(data=[{"text": f"text {place}"} for place in range(60)], pairs=str(pairs))
    assert {item.answer.gold for item in task.split(Split.DEV)} - {None} == {0.5, 1.5, 2.5, 3.5, 4.5}
