"""Rows with several labels: how people write them, what is computed from them, and a run to the end."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_folder import LABELS, TUNED_AND_CUT, run_quickly, sentences, write_model

from slimformer.data.files import Table
from slimformer.data.label_sets import label_sets
from slimformer.data.tokenizer import load_tokenizer
from slimformer.errors import DataError, RecipeError
from slimformer.measuring import scoring
from slimformer.methods.early_exit import EarlyExit
from slimformer.reporting.ledger import read_facts, read_records
from slimformer.runtimes.onnxruntime import OnnxRuntime
from slimformer.saving.checkpoint import read_config
from slimformer.tasks._judging import check_label_sets
from slimformer.tasks._losses import kl_divergence_of_each
from slimformer.tasks._readings import AnyLabels
from slimformer.tasks.base import Example, Features, Split
from slimformer.tasks.classification import Classification

TEXTS = [f"the soup number {row} was hot and cold, really" for row in range(60)]
SETS = [("insult", "toxic"), ("toxic",), (), ("insult",)]  # in turn


def rows_of(spell: Any, column: str = "label") -> list[dict[str, Any]]:
    return [{"text": text, column: spell(SETS[row % 4])} for row, text in enumerate(TEXTS)]


def answers_of(task: Classification) -> dict[str, tuple[str, ...]]:
    return {item.texts[0]: item.answer for split in Split for item in task.split(split)}


@pytest.mark.parametrize(
    "spell",
    [
        list,
        set,
        "|".join,
        ", ".join,
        ";".join,
        json.dumps,
        lambda names: str(list(names)),
        lambda names: "[" + ", ".join(names) + "]",
        lambda names: {"insult": "insult" in names, "toxic": int("toxic" in names)},
    ],
)
def test_labels_are_read_however_a_row_holds_them(tmp_path: Path, spell: Any) -> None:
    rows = rows_of(spell)
    task = Classification(
        data=rows if not isinstance(rows[0]["label"], set) else [{**row, "label": sorted(row["label"])} for row in rows]
    )
    task = task.settled()
    assert (task.kind, task.metric, task.labels) == ("multi_label", "f1_micro", ("insult", "toxic"))
    assert answers_of(task) == {text: SETS[row % 4] for row, text in enumerate(TEXTS)}


def test_a_column_of_0_and_1_for_each_label(tmp_path: Path) -> None:
    lines = ["id,comment_text,toxic,insult"]
    lines += [
        f'{row},"{text}",{int("toxic" in SETS[row % 4])},{int("insult" in SETS[row % 4])}' for row, text in enumerate(TEXTS)
    ]
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "test.csv").write_text("\n".join([lines[0], *(line[:-3] + "-1,-1" for line in lines[1:])]) + "\n")
    for label in (None, "toxic,insult"):
        task = Classification(data=str(tmp_path), label=label).settled()
        assert (task.text, task.label, task.labels) == ("comment_text", "toxic,insult", ("toxic", "insult"))
        assert {text: set(names) for text, names in answers_of(task).items()} == {
            text: set(SETS[row % 4]) for row, text in enumerate(TEXTS)
        }
    (tmp_path / "train.csv").write_text("\n".join(lines).replace(",1,1\n", ",1,2\n", 1) + "\n")
    with pytest.raises(DataError, match=r"train\.csv, line 2: column 'insult' holds '2'"):
        Classification(data=str(tmp_path), label="toxic,insult").settled()


def test_as_many_0_and_1_a_row_tell_labels_by_their_places() -> None:
    rows = rows_of(lambda names: [float("insult" in names), float("toxic" in names), 0.0], "labels")
    task = Classification(data=rows).settled()
    assert task.labels == ("0", "1", "2")
    bound = Classification(data=rows).bind(config_of("insult", "toxic", "threat"))
    assert answers_of(bound) == {text: SETS[row % 4] for row, text in enumerate(TEXTS)}
    with pytest.raises(DataError, match="'2' in column 'labels' is not a known one"):
        Classification(data=[{"text": text, "labels": [0, 1, 1]} for text in TEXTS]).bind(config_of("insult", "toxic"))


def test_names_with_commas_that_are_one_name_stay_one() -> None:
    table = Table("a", {"label": ["rock, pop", "jazz", "rock, pop"]}, range(1, 4))
    assert label_sets(table, "label") == [("rock, pop",), ("jazz",), ("rock, pop",)]
    rows = rows_of(lambda names: "|".join(names) or "fine")
    assert Classification(data=rows, kind="classes").settled().labels == ("fine", "insult", "insult|toxic", "toxic")
    pairs = [{"text": text, "label": "rock;pop" if row % 2 else "jazz"} for row, text in enumerate(TEXTS)]
    assert Classification(data=pairs).settled().labels == ("jazz", "rock;pop")
    assert Classification(data=pairs, kind="multi_label").settled().labels == ("jazz", "pop", "rock")


def config_of(*names: str, problem: str | None = "multi_label_classification") -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "problem_type": problem}


def test_bind_takes_the_models_order_and_refuses_what_does_not_fit() -> None:
    task = Classification(data=rows_of(list))
    bound = task.bind(config_of("toxic", "insult"))
    assert (bound.kind, bound.labels) == ("multi_label", ("toxic", "insult"))
    assert answers_of(bound)[TEXTS[0]] == ("toxic", "insult")
    assert task.bind(config_of("LABEL_0", "LABEL_1")).labels == ("insult", "toxic")
    one_each = Classification(data=rows_of(lambda names: "toxic" if names else "insult"))
    assert one_each.bind(config_of("toxic", "insult")).kind == "multi_label"
    with pytest.raises(DataError, match="gives each one answer"):
        task.bind(config_of("insult", "toxic", problem="single_label_classification") | {"num_labels": 2})
    with pytest.raises(DataError, match="'insult' in column 'label' is not a known one"):
        task.bind(config_of("toxic", "threat"))
    with pytest.raises(DataError, match="1 labels without names, the data has 2"):
        task.bind(config_of("LABEL_0"))
    with pytest.raises(DataError, match="do not exclude each other"):
        Classification(data=rows_of(lambda names: len(names)), kind="classes").bind(config_of("a", "b", "c"))
    with pytest.raises(DataError, match="no label but a list"):
        Classification(data=rows_of(list), kind="classes").settled()
    with pytest.raises(DataError, match="no row has a label"):
        Classification(data=rows_of(lambda _: []), kind="multi_label").settled()
    with pytest.raises(DataError, match="the metric 'accuracy' does not fit"):
        Classification(data=rows_of(list), metric="accuracy").settled()
    with pytest.raises(RecipeError, match="threshold: a probability"):
        Classification(data=rows_of(list), threshold=1.0)
    assert EarlyExit().problem(bound) == "an exit asks how sure one answer is, and a text may have several labels here"


def test_loss_and_divergence_by_hand() -> None:
    reading = AnyLabels(("a", "b"))
    logits = torch.tensor([[0.0, 2.0], [-1.0, 0.5]])
    labels = torch.tensor([[1, 0], [0, 1]])
    shares = torch.sigmoid(logits).double()
    expected = -(labels * shares.log() + (1 - labels) * (1 - shares).log()).mean()
    assert float(reading.loss(logits, labels)) == pytest.approx(float(expected), rel=1e-6)
    theirs = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    p, q = torch.sigmoid(theirs / 2).double(), torch.sigmoid(logits / 2).double()
    by_hand = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean() * 4
    assert float(kl_divergence_of_each(logits, theirs, 2.0)) == pytest.approx(float(by_hand), rel=1e-5)
    assert float(kl_divergence_of_each(theirs, theirs, 2.0)) == pytest.approx(0.0, abs=1e-6)


def test_metrics_credit_and_answers_by_hand() -> None:
    reading = AnyLabels(("a", "b", "c"))
    logits = np.array([[1.0, -1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, -1.0]])
    wanted = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0]])  # tp 2, fp 1, fn 1
    found = reading.metrics(logits, wanted)
    assert found == {
        "f1_micro": pytest.approx(2 * 2 / 6),
        "f1_macro": pytest.approx((1.0 + 0.0 + 0.0) / 3),
        "exact": pytest.approx(1 / 3),
    }
    assert reading.credit(logits, wanted).tolist() == [1.0, 0.0, 0.0]
    assert reading.answers(logits) == ["a", "a, b", ""]
    assert AnyLabels(("a", "b", "c"), threshold=0.1).answers(logits)[2] == "a, b, c"


@pytest.mark.parametrize("metric", ["f1_micro", "f1_macro", "exact"])
def test_resamples_are_the_metric_on_the_draws_and_the_threshold_is_the_best(metric: str) -> None:
    draw = np.random.default_rng(0)
    names = ("a", "b", "c")
    wanted = (draw.random((40, 3)) < 0.3).astype(np.int64)
    logits = draw.normal(size=(40, 3)) + 1.5 * wanted - 2.0
    examples = [Example(str(row), ("x",), tuple(np.array(names)[flags == 1])) for row, flags in enumerate(wanted)]
    features = Features({"input_ids": [[1]] * 40}, range(40), 0, 0)
    task = Classification(data=rows_of(list), kind="multi_label", metric=metric, labels=names)
    tuned = task.tune({"logits": logits}, features, examples)
    assert (task.tunes, tuned.tunes) == (True, False)
    scores = {share / 100: AnyLabels(names, share / 100).metrics(logits, wanted)[metric] for share in range(5, 100, 5)}
    assert scores[tuned.threshold] == max(scores.values()) > scores[0.5]
    draws = [draw.integers(0, 40, 40) for _ in range(20)]
    quick = tuned.resampled({"logits": logits}, features, examples, draws)
    expected = [AnyLabels(names, tuned.threshold).metrics(logits[rows], wanted[rows])[metric] for rows in draws]
    assert (quick is None) == (metric == "exact")
    if quick is not None:
        assert quick.tolist() == pytest.approx(expected)


def test_a_model_with_its_labels_in_another_order_is_refused() -> None:
    draw = np.random.default_rng(1)
    wanted = (draw.random((200, 4)) < 0.3).astype(np.int64)
    logits = draw.normal(size=(200, 4)) + 4 * wanted - 6  # far below the threshold: only their order counts
    names = ("a", "b", "c", "d")
    assert check_label_sets(logits, wanted, names) == ""
    with pytest.raises(DataError, match="another order"):
        check_label_sets(logits[:, [1, 2, 0, 3]], wanted, names)
    assert "no better than chance" in check_label_sets(draw.normal(size=(200, 4)), wanted, names)


# -- A run ---------------------------------------------------------------------------------------------------------------------

MOODS = (*LABELS, "loud")


def write_rows(path: Path, count: int, seed: int) -> None:
    """Two sentences in one text: it has the label of each, and "loud" if "truly" occurs."""
    parts = sentences(2 * count, seed)
    draw = np.random.default_rng(seed)
    order = draw.permutation(2 * count)
    rows = []
    for first, second in zip(order[::2], order[1::2], strict=True):
        text = f"{parts[first][0]} {parts[second][0]}"
        labels = sorted({parts[first][1], parts[second][1]} | ({"loud"} if "truly" in text else set()))
        rows.append(json.dumps({"text": text, "labels": labels}))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that tunes an encoder on rows of several labels, cuts it, exports and measures it."""
    home = tmp_path_factory.mktemp("several")
    write_model(home / "encoder", trained=False, bare=True)
    (home / "data").mkdir()
    write_rows(home / "data" / "train.jsonl", 300, 0)
    write_rows(home / "data" / "dev.jsonl", 40, 1)
    task = {"use": "classification", "data": str(home / "data")}
    run_quickly(home / "encoder", task, TUNED_AND_CUT, home / "out")
    return home


@pytest.mark.slow
def test_a_model_of_several_labels_is_tuned_cut_exported_and_measured(done: Path) -> None:
    records = {item.file: item for item in read_records([done / "out" / "ledger.jsonl"]) if item.role == "ours"}
    assert {item.metric for item in records.values()} == {"f1_micro"}
    assert min(item.score for item in records.values()) > 0.8
    config, facts = read_config(done / "out"), read_facts(done / "out")
    assert (config["problem_type"], config["id2label"]) == (
        "multi_label_classification",
        {str(n): name for n, name in enumerate(MOODS)},
    )
    assert facts is not None
    assert {*facts.fitted} >= {file for file in records if file}
    assert all(0 < options["threshold"] < 1 for options in facts.fitted.values())
    found = re.search(r"```python\n(.*?)```", (done / "out" / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    ran = subprocess.run([sys.executable, "-I", "-c", found[1]], cwd=done / "out", capture_output=True, text=True, check=True)
    file = re.search(r'InferenceSession\("([^"]+)"', found[1])
    assert file is not None
    task = Classification(data=str(done / "data"), **facts.fitted[file[1]]).bind(config)
    some = task.split(Split.DEV)[:2]
    features = task.encode(some, load_tokenizer(done / "out"), 64)
    said = task.answers(scoring.evaluate(OnnxRuntime().load(done / "out" / file[1], threads=1), features), features, some)
    assert [", ".join(names) for names in ast.literal_eval(ran.stdout.splitlines()[-1])] == said


@pytest.mark.slow
def test_bench_reads_the_folder_with_the_threshold_that_was_fitted(done: Path, call: Any) -> None:
    status, out, err = call("bench", done / "out", "--data", done / "data", "--seconds", "0.2", "--threads", "1", "--wait", "0")
    assert status == 0, err
    assert "f1_micro" in out or "f1 micro" in out
