"""Metrics of the user's own by dotted name, and weights of classes: found, refused, and equal to what they are called after."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from torch.nn import functional

from slimformer.errors import DataError, RecipeError
from slimformer.tasks._own_metric import own_metric
from slimformer.tasks.base import Example, Features, Split
from slimformer.tasks.classification import Classification
from slimformer.tasks.intents import Intents

BALANCED = "sklearn.metrics.balanced_accuracy_score"
AREA = "sklearn.metrics.roc_auc_score"
ROWS = [{"text": f"text {number}", "label": "rare" if number % 5 == 0 else "usual"} for number in range(200)]


def scored(task: Classification, logits: np.ndarray, answers: list[Any]) -> tuple[dict[str, float], np.ndarray | None]:
    """The scores of some logits, and their metric on twenty resamples."""
    features = Features({"input_ids": [[1]] * len(logits)}, range(len(logits)), 0, 0)
    examples = [Example(str(row), ("text",), answer) for row, answer in enumerate(answers)]
    draws = [np.random.default_rng(seed).integers(0, len(logits), len(logits)) for seed in range(20)]
    outputs = {"logits": logits}
    return task.score(outputs, features, examples), task.resampled(outputs, features, examples, draws)


@pytest.mark.parametrize(("metric", "by_score"), [(BALANCED, False), (AREA, True)])
def test_a_function_of_scikit_learn_is_a_metric(metric: str, by_score: bool) -> None:
    task = Classification(data=ROWS, metric=metric).settled()
    assert task.metric == metric
    draw = np.random.default_rng(0)
    logits, wanted = draw.normal(size=(60, 2)), draw.integers(0, 2, 60)
    found, resamples = scored(task, logits, [task.labels[place] for place in wanted])
    function = roc_auc_score if by_score else balanced_accuracy_score
    given = torch.tensor(logits).softmax(-1)[:, 1].numpy() if by_score else logits.argmax(-1)
    assert found[metric] == pytest.approx(function(wanted, given))
    assert found["accuracy"] == (logits.argmax(-1) == wanted).mean()
    assert resamples is not None
    some = np.random.default_rng(7).integers(0, 60, 60)
    assert resamples[7] == pytest.approx(function(wanted[some], given[some]))


def test_where_it_has_no_value_a_resample_is_left_out_and_the_whole_is_an_error() -> None:
    task = Classification(data=ROWS, metric=AREA).settled()
    _, resamples = scored(task, np.eye(2)[[0, 0, 0, 1]], ["rare", "rare", "rare", "usual"])
    assert resamples is not None
    assert 0 < np.isnan(resamples).sum() < 20
    assert set(resamples[np.isfinite(resamples)]) == {1.0}
    with pytest.raises(DataError, match=r"roc_auc_score (fails|gives nan) on 2 examples"):
        scored(task, np.eye(2), ["rare", "rare"])


def test_a_file_of_the_working_directory_gets_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "money_of_mine.py").write_text(
        "def found(wanted, given, names):\n    rare = names.index('rare')\n    return float((given[wanted == rare] == rare).mean())\n"
        "def nothing(wanted, given):\n    return float('inf')\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    task = Classification(data=ROWS, metric="money_of_mine.found").settled()
    assert sys.path == before
    scores, _ = scored(task, np.eye(2)[[0, 1, 1, 1]], ["rare", "rare", "rare", "usual"])
    assert scores["money_of_mine.found"] == pytest.approx(1 / 3)
    assert Intents(metric="money_of_mine.nothing").metric == "money_of_mine.nothing"
    with pytest.raises(DataError, match="money_of_mine.nothing gives inf"):
        own_metric("money_of_mine.nothing").judge(np.ones(2), np.ones(2), np.ones(2), ("a", "b"))


def test_scores_and_several_labels_are_handed_over_as_they_are() -> None:
    several = Classification(
        data=[{"text": "a", "label": ["x"]}, {"text": "b", "label": ["x", "y"]}] * 50, metric=AREA
    ).settled()
    assert several.tunes
    logits = np.array([[2.0, -1.0], [0.5, 3.0], [-2.0, 1.0]])
    wanted = [("x",), ("x", "y"), ("y",)]
    scores, _ = scored(several, logits, wanted)
    assert scores[AREA] == 1.0
    score = Classification(
        data=[{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}] * 50, metric="sklearn.metrics.r2_score"
    )
    values = np.array([[0.5], [1.5], [1.0]])
    scores, _ = scored(score.settled(), values, [0.5, 1.5, 1.5])
    assert scores["sklearn.metrics.r2_score"] == pytest.approx(1 - 0.25 / (2 / 3))


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("sklearn.metrics.balanced_acuracy_score", "did you mean 'balanced_accuracy_score'"),
        ("no_module_of_this_name.score", "no_module_of_this_name of .* cannot be imported: ModuleNotFoundError"),
        ("sklearn.metrics.hamming_loss", "less is better"),
        ("sklearn.metrics.silhouette_samples.x", "cannot be imported"),
        ("os.getcwd", "needs 0 arguments"),
        ("sklearn.metrics.fbeta_score", r"needs 3 arguments \(y_true, y_pred, beta\)"),
        ("sklearn.", "no dotted name"),
        ("acuracy", "did you mean 'accuracy'"),
    ],
)
def test_what_can_be_no_metric_is_refused_before_anything_is_read(metric: str, message: str) -> None:
    with pytest.raises(RecipeError) as told:
        Classification(data="./nothing-here", metric=metric)
    assert re.search(message, "\n".join((str(told.value), *told.value.facts, told.value.help or ""))), told.value


def test_balanced_weights_are_counted_on_training_rows_and_weigh_the_loss() -> None:
    task = Classification(data=ROWS, class_weights="balanced").settled()
    train = [item.answer for item in task.split(Split.TRAIN)]
    each = tuple(len(train) / 2 / train.count(name) for name in task.labels)
    assert task.weights == pytest.approx(each)
    assert each[0] > 2 * each[1]
    logits, labels = torch.tensor([[1.0, 0.0], [0.3, 0.1], [0.0, 2.0]]), torch.tensor([0, 1, 1])
    loss = task.loss({"logits": logits}, {"labels": labels})
    parts = functional.cross_entropy(logits, labels, reduction="none")
    weights = torch.tensor(each)[labels]
    torch.testing.assert_close(loss, (parts * weights).sum() / weights.sum())
    assert Classification(data=ROWS).settled().weights is None


def test_weights_of_some_classes_and_of_several_labels() -> None:
    task = Classification(data=ROWS, class_weights="rare=4").settled()
    assert task.labels == ("rare", "usual")
    assert task.weights == (4.0, 1.0)
    again = Classification(data=ROWS, class_weights=task.class_weights)  # as a recipe writes and reads it
    assert again.class_weights == Classification(data=ROWS, class_weights={"rare": 4}).class_weights
    several = Classification(
        data=[{"text": "a", "label": ["x"]}, {"text": "b", "label": ["x", "y"]}] * 50, class_weights={"y": 3}
    ).settled()
    logits, labels = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.0, 1.0]])
    wanted = (functional.softplus(torch.tensor(1.0)) + 3 * functional.softplus(torch.tensor(1.0))) / 2
    torch.testing.assert_close(several.loss({"logits": logits}, {"labels": labels}), wanted)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("even", "balanced, or a number for each class"),
        ({"rare": 0}, "a number above 0 for 'rare', not 0"),
        ([1.0, 2.0], "a number for each class"),
        ("rare=1,rare=2", "'rare' has 2"),
    ],
)
def test_weights_that_cannot_be_are_refused(weights: Any, message: str) -> None:
    with pytest.raises(RecipeError) as told:
        Classification(data=ROWS, class_weights=weights)
    assert message in "\n".join(told.value.facts)
    with pytest.raises(DataError, match="there is no class 'rar'; did you mean 'rare'"):
        Classification(data=ROWS, class_weights="rar=2").settled().reading()
    with pytest.raises(RecipeError) as untold:
        Classification(data=ROWS, class_weights="balanced", labels="none")
    assert "these have none" in "\n".join(untold.value.facts)
