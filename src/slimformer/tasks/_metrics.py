"""Metrics of classes, of scores and of sets of labels, for tasks of this folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

CLASS_METRICS = ("accuracy", "f1", "f1_macro", "matthews")
SCORE_METRICS = ("pearson", "spearman")
LABEL_METRICS = ("f1_micro", "f1_macro", "exact")


def class_metrics(predicted: np.ndarray, wanted: np.ndarray, classes: int) -> dict[str, float]:
    """Accuracy, Matthews, macro F1, and for two classes F1 of the last one: ids of shape (examples,)."""
    import numpy as np
    from sklearn.metrics import f1_score, matthews_corrcoef

    every = list(range(classes))
    scores = {
        "accuracy": float((predicted == wanted).mean()) if len(wanted) else 0.0,
        # 0 by definition if everything is one class; scikit-learn warns there
        "matthews": float(matthews_corrcoef(wanted, predicted)) if len(np.union1d(wanted, predicted)) > 1 else 0.0,
        "f1_macro": float(f1_score(wanted, predicted, labels=every, average="macro", zero_division=0.0)),
    }
    if classes == 2:
        scores["f1"] = float(f1_score(wanted, predicted, labels=[1], average="micro", zero_division=0.0))
    return scores


def score_metrics(predicted: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Pearson and Spearman correlation of scores: (examples,) each; 0 if one side is constant or not finite."""
    import numpy as np
    from scipy.stats import pearsonr, spearmanr

    predicted = np.asarray(predicted, dtype=np.float64)
    varied = len(wanted) > 1 and np.isfinite(predicted).all() and np.ptp(predicted) > 1e-9 * max(1.0, abs(predicted).max())
    if not varied or np.ptp(wanted) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(pearsonr(predicted, wanted).statistic),
        "spearman": float(spearmanr(predicted, wanted).statistic),
    }


def label_set_metrics(given: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Micro and macro F1, and the share of examples with all labels right: (examples, labels) each, 1 or true where there is one."""
    from sklearn.metrics import f1_score

    kinds = ("micro", "macro")
    scores = {f"f1_{kind}": float(f1_score(wanted, given, average=kind, zero_division=0.0)) for kind in kinds}
    return scores | {"exact": float((given == (wanted == 1)).all(axis=1).mean()) if len(wanted) else 0.0}


def label_set_counts(given: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each example and label whether it is rightly given, wrongly given, or missing: (examples, labels) each, 0 or 1."""
    there = wanted == 1
    return (given & there).astype(float), (given & ~there).astype(float), (~given & there).astype(float)
