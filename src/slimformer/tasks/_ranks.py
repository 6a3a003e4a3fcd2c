"""What an order of passages is worth, query by query: nDCG and the reciprocal rank of the first right one, both at TEN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

TEN = 10  # places of an order that are looked at
RANK_METRICS = ("ndcg_at_10", "mrr_at_10")


def gain_of_order(scores: np.ndarray, grades: np.ndarray) -> float:
    """nDCG of one query's passages, (passages,) each, by scikit-learn: gains are the grades themselves, ties count by their mean.

    >>> import numpy as np
    >>> gain_of_order(np.array([0.1, 0.9, 0.5]), np.array([1, 0, 0]))
    0.5
    """
    from sklearn.metrics import ndcg_score

    return float(ndcg_score(grades[None], scores[None], k=TEN)) if len(grades) > 1 else 1.0


def chance_gain(grades: Sequence[float]) -> float:
    """The nDCG that a random order of passages with these grades has in the mean.

    >>> round(chance_gain([1.0, 0.0]), 4)
    0.8155
    """
    import numpy as np

    discounts = 1 / np.log2(np.arange(2, min(TEN, len(grades)) + 2))
    best = float((np.sort(np.asarray(grades))[::-1][: len(discounts)] * discounts).sum())
    return float(np.mean(grades) * discounts.sum()) / best if best > 0 else 1.0


def reciprocal_rank(scores: np.ndarray, grades: np.ndarray) -> float:
    """One over the place of the first passage with a grade above 0, 0 beyond TEN; of equal scores the wrong passages come first.

    >>> import numpy as np
    >>> reciprocal_rank(np.array([0.5, 0.9, 0.5]), np.array([1, 0, 0]))
    0.3333333333333333
    """
    right = grades > 0
    if not right.any():
        return 0.0
    best = scores[right].max()
    place = 1 + int((scores[~right] >= best).sum())
    return 1 / place if place <= TEN else 0.0


def grades_of_order(scores: Sequence[float]) -> tuple[float, ...]:
    """Grades that tell an order: TEN for the first, one less for each after it, 0 from the eleventh on; ties go by place.

    >>> grades_of_order([0.2, 0.9, 0.4])
    (8.0, 10.0, 9.0)
    """
    import numpy as np

    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    return tuple(map(float, np.maximum(0, TEN - places).tolist()))
