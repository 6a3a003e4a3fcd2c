"""What vectors of texts are worth: cosines, rank correlation of pairs, retrieval, and the same with vectors of one byte or one bit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

TOP = 10  # passages that a query is answered with
Coarse = Literal["", "int8", "binary"]


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The cosine of each row with the same row of the other: (rows,); 0 for a vector without a length.

    >>> import numpy as np
    >>> cosines(np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([[2.0, 0.0], [1.0, -1.0]])).tolist()
    [1.0, 0.0]
    """
    import numpy as np

    lengths = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return np.asarray((first * second).sum(-1) / np.maximum(lengths, 1e-12))


def coarse(vectors: np.ndarray, kind: Coarse, like: np.ndarray | None = None) -> np.ndarray:
    """Vectors (rows, dimension) as they come back from one byte a number, or from one bit (its sign).

    Bytes spread evenly over the range of each place, as in sentence-transformers' quantize_embeddings; `like`: the vectors that tell it.
    """
    import numpy as np

    if kind == "binary":
        return np.where(vectors > 0, 1.0, -1.0)
    if kind == "int8":
        low, high = ((vectors if like is None else like).min(0), (vectors if like is None else like).max(0))
        step = np.maximum((high - low) / 255, 1e-12)
        return np.asarray(np.clip(np.rint((vectors - low) / step), 0, 255) * step + low)
    return vectors


def rank_correlation(found: np.ndarray, wanted: np.ndarray) -> float:
    """Spearman's; 0 if one side is constant."""
    import numpy as np
    from scipy.stats import spearmanr

    if len(found) < 2 or np.ptp(found) == 0 or np.ptp(wanted) == 0:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(spearmanr(found, wanted).statistic)


def retrieved(
    queries: np.ndarray, passages: np.ndarray, relevant: Sequence[Sequence[int]], unit: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """nDCG at TOP and recall at TOP of each query, (queries,) each, for vectors (queries, dimension) and (passages, dimension).

    Relevance is yes or no; ties count as in scikit-learn's ndcg_score without ties: by place. `unit`: by cosine, else by dot product.
    """
    import numpy as np

    if unit:
        queries, passages = (
            side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-12) for side in (queries, passages)
        )
    top = min(TOP, len(passages))
    gains = 1 / np.log2(np.arange(2, top + 2))  # (top,)
    ndcg, recall = np.zeros(len(queries)), np.zeros(len(queries))
    for start in range(0, len(queries), 256):
        scores = queries[start : start + 256] @ passages.T  # (some, passages)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
        for row, places in enumerate(best, start):
            right = np.isin(places, relevant[row])
            ndcg[row] = (gains * right).sum() / gains[: min(len(relevant[row]), top)].sum()
            recall[row] = right.sum() / len(relevant[row])
    return ndcg, recall
