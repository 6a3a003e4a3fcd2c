"""Judges a model that came trained, on validation examples: whether its answers can be right at all.

Classes in another order, scores that run the other way and answers no better than chance are seen here, before hours of work.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from slimformer.errors import DataError, shown

if TYPE_CHECKING:
    import numpy as np

_FEWEST = 20  # examples from which anything is concluded
_BETTER = 0.3  # accuracy that another order of the classes must bring
_RANKED = 0.75  # share of pairs in the right order from which another order of labels is believed
_GOOD = 0.6  # accuracy in another order from which that order is believed


def check_classes(predicted: np.ndarray, wanted: np.ndarray, names: Sequence[str], what: str = "validation examples") -> str:
    """A warning about a classifier, "" if there is none: ids of shape (examples,); DataError if its classes have another order.

    The order is found on every other example and tried on the rest, so that it is no accident of few examples.
    """
    import numpy as np

    count = len(wanted)
    if count < _FEWEST:
        return ""
    right, most = int((predicted == wanted).sum()), int(np.bincount(wanted).max())
    order = _best_order(predicted[::2], wanted[::2], len(names))
    rest, truth = predicted[1::2], wanted[1::2]
    as_it_is, reordered = float((rest == truth).mean()), float((order[rest] == truth).mean())
    if reordered >= max(_GOOD, as_it_is + _BETTER):
        other = int((order[predicted] == wanted).sum())
        moved = [index for index in range(len(names)) if order[index] != index]
        pairs = [f"class {index} ({shown(names[index], 30)}) answers {shown(names[order[index]], 30)}" for index in moved]
        mapping = json.dumps({str(index): names[place] for index, place in enumerate(order)})
        raise DataError(
            f"the model is right on {right} of {count} {what}, far below what it can: its classes stand in another order "
            f"than those of the data. In that order it would be right on {other}.",
            facts=["; ".join(pairs[:8])],
            help="mend the names of the classes in the model's config.json, id2label"
            + (f": {mapping}" if len(names) <= 8 else "")
            + ", and label2id beside it; or mend the labels of the data.",
        )
    chance = count / len(names)
    if right > most + 2 * (most * (1 - most / count)) ** 0.5:
        return ""
    usual = shown(names[int(np.bincount(wanted).argmax())], 40)
    how = "worse than chance" if right < 0.7 * chance else "no better than chance"
    return (
        f"warning: the model is right on {right} of {count} {what}, {how}: always answering {usual} would be right on "
        f"{most}. What is lost against such a model proves nothing. Was it trained on these classes?"
    )


def check_label_sets(logits: np.ndarray, wanted: np.ndarray, names: Sequence[str]) -> str:
    """A warning about a model of several labels, "" if there is none: (examples, labels) each; DataError if their order is another.

    A label is judged by how well its logit ranks the examples that have it, whatever the threshold.
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    told = [place for place in range(len(names)) if 0 < wanted[:, place].sum() < len(wanted)]
    if len(wanted) < _FEWEST or not told or not np.isfinite(logits).all():
        return ""

    def ranked(rows: slice) -> np.ndarray:
        """(labels of the model, labels of the data): the share of pairs that stand in the right order."""
        order = np.argsort(np.argsort(logits[rows], axis=0, kind="stable"), axis=0) + 1.0
        have = wanted[rows].sum(axis=0)
        pairs = np.maximum(have * (len(wanted[rows]) - have), 1)
        areas = (order.T @ wanted[rows] - have * (have + 1) / 2) / pairs
        return np.asarray(np.where(have * (len(wanted[rows]) - have) > 0, areas, 0.5))

    first, rest = ranked(slice(0, None, 2)), ranked(slice(1, None, 2))
    places = linear_sum_assignment(first + 1e-3 * np.eye(len(names)), maximize=True)[1]
    as_it_is, reordered = float(np.diag(rest)[told].mean()), float(rest[np.arange(len(names)), places][told].mean())
    if reordered >= max(_RANKED, as_it_is + _BETTER):
        moved = [index for index in range(len(names)) if places[index] != index]
        pairs_told = [
            f"output {index} ({shown(names[index], 30)}) answers {shown(names[places[index]], 30)}" for index in moved
        ]
        raise DataError(
            f"the model's labels stand in another order than those of the data: of pairs of examples of which one has a label, its "
            f"logit is higher for the right one in {as_it_is:.0%}, and in {reordered:.0%} in another order.",
            facts=["; ".join(pairs_told[:8])],
            help="mend the names of the labels in the model's config.json, id2label and label2id; or mend the labels of the data.",
        )
    if as_it_is > 0.5 + 1 / len(wanted) ** 0.5:
        return ""
    return (
        f"warning: the model ranks {len(wanted)} validation examples by their labels no better than chance. What is lost against such a "
        "model proves nothing. Was it trained on these labels?"
    )


def _best_order(predicted: np.ndarray, wanted: np.ndarray, classes: int) -> np.ndarray:
    """For each class of the model the class of the data that makes most of its answers right: a permutation."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    table = np.zeros((classes, classes))
    np.add.at(table, (predicted, wanted), 1.0)
    table += 1e-3 * np.eye(classes)  # classes that do not occur stay where they are
    return np.asarray(linear_sum_assignment(table, maximize=True)[1])


def check_scores(predicted: np.ndarray, wanted: np.ndarray) -> str:
    """A warning about a model of scores, "" if there is none: (examples,) each; DataError if its scores run the other way."""
    import numpy as np
    from scipy.stats import spearmanr

    predicted = np.asarray(predicted, dtype=np.float64)
    if len(wanted) < _FEWEST or not np.isfinite(predicted).all() or np.ptp(wanted) == 0:
        return ""
    rank = 0.0 if np.ptp(predicted) == 0 else float(spearmanr(predicted, wanted).statistic)
    if rank < -0.5:
        raise DataError(
            f"the model's scores run the other way: their rank correlation with the data's is {rank:.2f} on {len(wanted)} validation "
            "examples.",
            help="turn the scores of the data round, or start from another model.",
        )
    if rank < 0.2:
        return (
            f"warning: the model's scores have a rank correlation of {rank:.2f} with the data's on {len(wanted)} validation examples. "
            "What is lost against such a model proves nothing."
        )
    ours, theirs = float(np.std(predicted)), float(np.std(wanted))
    if rank > 0.5 and not 1 / 3 < ours / theirs < 3:
        return (
            f"warning: the model's scores run from {predicted.min():.2f} to {predicted.max():.2f}, the data's from {wanted.min():.2f} to "
            f"{wanted.max():.2f}: the task's own loss would pull the model to another scale."
        )
    return ""


def check_spans(score: float, swapped: float, count: int) -> str:
    """A warning about a model of answers, "" if there is none, by its F1; DataError if it is better with start and end swapped."""
    if count < _FEWEST:
        return ""
    if swapped >= max(0.5, score + _BETTER):
        raise DataError(
            f"the model reaches an F1 of {score:.2f} on {count} validation questions, and {swapped:.2f} if its outputs for start and end "
            "are swapped.",
            help="swap the two rows of qa_outputs in the model's weights, and save it again.",
        )
    if score < 0.15:
        return (
            f"warning: the model reaches an F1 of {score:.2f} on {count} validation questions with an answer, as one that was never "
            "tuned for this would. What is lost against it proves nothing."
        )
    return ""
