"""Three ways to read a row of logits: as one class, as a score, or as any number of labels.

Each says what the loss is, how far two models are apart, what the answer is and how right it is. A task has one of them and adds
where its examples come from.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from slimformer.errors import DataError
from slimformer.tasks._judging import check_classes, check_label_sets, check_scores
from slimformer.tasks._losses import kl_divergence, kl_divergence_of_each
from slimformer.tasks._metrics import class_metrics, label_set_counts, label_set_metrics, score_metrics
from slimformer.tasks._own_metric import is_own, own_metric
from slimformer.tasks._unlabelled import drawn_classes

if TYPE_CHECKING:
    import numpy as np
    import torch

EVEN = 0.5  # the probability from which a label is given, if none was fitted


class Reading(ABC):
    """How a model's row of logits (examples, outputs) is read."""

    problem_type: str  # what a config of transformers calls it

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The names of the outputs in their order."""

    @abstractmethod
    def targets(self, answers: Sequence[Any], ids: Mapping[str, int]) -> np.ndarray:
        """Right answers as numbers: class ids or scores (examples,), or 1 for each label that a row has (examples, labels)."""

    def column(self, answers: Sequence[Any], ids: Mapping[str, int]) -> list[Any]:
        """The same as a column of features."""
        return list(self.targets(answers, ids).tolist())

    @abstractmethod
    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss of a batch: a scalar."""

    @abstractmethod
    def divergence(self, ours: torch.Tensor, theirs: torch.Tensor, temperature: float) -> torch.Tensor:
        """How far two models' logits are apart, the mean over rows: a scalar."""

    @abstractmethod
    def metrics(self, logits: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
        """All metrics that are known for it."""

    @abstractmethod
    def given(self, logits: np.ndarray) -> np.ndarray:
        """The answers as numbers, of the shape of `targets`."""

    @abstractmethod
    def scores(self, logits: np.ndarray) -> np.ndarray:
        """What answers are chosen by: of the last of two classes, or the score (examples,), else of each output (examples, outputs)."""

    def judged(self, metric: str, logits: np.ndarray, wanted: np.ndarray) -> float:
        """One metric, known or the user's own."""
        if is_own(metric):
            return own_metric(metric).judge(wanted, self.given(logits), self.scores(logits), self.names)
        return self.metrics(logits, wanted)[metric]

    @abstractmethod
    def credit(self, logits: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """How right each answer is: (examples,)."""

    @abstractmethod
    def told(self, logits: np.ndarray) -> list[Any]:
        """The answers as examples have them."""

    @abstractmethod
    def drawn(self, logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Labels drawn by the model's own distribution, as `loss` reads them; `shares` (batch, outputs) are between 0 and 1."""

    @abstractmethod
    def check(self, logits: np.ndarray, wanted: np.ndarray) -> str:
        """What seems to be wrong with a model that came trained, "" if nothing; DataError if its answers cannot be right."""

    @abstractmethod
    def answers(self, logits: np.ndarray) -> list[str]:
        """The answers, as a person would read them."""

    @abstractmethod
    def lines(self) -> tuple[str, ...]:
        """Python that prints the answers, from `session` and `feeds`."""

    def resampled(self, logits: np.ndarray, wanted: np.ndarray, metric: str, draws: Sequence[np.ndarray]) -> np.ndarray | None:
        """The metric on each draw of examples, if there is a quicker way than `metrics` on each: (draws,).

        The user's own is NaN where it has no value, such as an area under a curve where a draw holds one class.
        """
        import numpy as np

        if not is_own(metric):
            return None
        found = np.full(len(draws), np.nan)
        for place, draw in enumerate(draws):
            with suppress(DataError):
                found[place] = self.judged(metric, logits[draw], wanted[draw])
        return found


@dataclass(frozen=True)
class OneClass(Reading):
    """Classes that exclude each other: the largest logit is the answer. `weights`: what a row of each class counts in the loss."""

    classes: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    problem_type = "single_label_classification"

    @property
    def names(self) -> tuple[str, ...]:
        return self.classes

    def targets(self, answers: Sequence[Any], ids: Mapping[str, int]) -> np.ndarray:
        import numpy as np

        return np.asarray([ids[answer] for answer in answers], dtype=np.int64)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        weights = None if self.weights is None else logits.new_tensor(self.weights)  # (classes,)
        return functional.cross_entropy(logits, labels, weights)

    def divergence(self, ours: torch.Tensor, theirs: torch.Tensor, temperature: float) -> torch.Tensor:
        return kl_divergence(ours, theirs, temperature)

    def metrics(self, logits: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
        return class_metrics(logits.argmax(-1), wanted, len(self.classes))

    def given(self, logits: np.ndarray) -> np.ndarray:
        return logits.argmax(-1)

    def scores(self, logits: np.ndarray) -> np.ndarray:
        import numpy as np
        from scipy.special import softmax

        shares = np.asarray(softmax(logits.astype(np.float64), axis=-1))
        return shares[:, 1] if len(self.classes) == 2 else shares

    def credit(self, logits: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        import numpy as np

        return np.asarray(logits.argmax(-1) == wanted, dtype=np.float64)

    def told(self, logits: np.ndarray) -> list[Any]:
        return self.answers(logits)

    def drawn(self, logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        return drawn_classes(logits, shares[:, :1])

    def check(self, logits: np.ndarray, wanted: np.ndarray) -> str:
        return check_classes(logits.argmax(-1), wanted, self.classes)

    def answers(self, logits: np.ndarray) -> list[str]:
        return [self.classes[index] for index in logits.argmax(-1)]

    def lines(self) -> tuple[str, ...]:
        return (
            'labels = json.loads(pathlib.Path("config.json").read_text("utf-8"))["id2label"]',
            'print([labels[str(best)] for best in session.run(["logits"], feeds)[0].argmax(axis=1)])',
        )


@dataclass(frozen=True)
class OneScore(Reading):
    """A single number."""

    problem_type = "regression"

    @property
    def names(self) -> tuple[str, ...]:
        return ("score",)

    def targets(self, answers: Sequence[Any], ids: Mapping[str, int]) -> np.ndarray:
        import numpy as np

        return np.asarray(answers, dtype=np.float64)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        return functional.mse_loss(logits.squeeze(-1), labels.float())

    def divergence(self, ours: torch.Tensor, theirs: torch.Tensor, temperature: float) -> torch.Tensor:
        from torch.nn import functional

        return functional.mse_loss(ours, theirs)

    def metrics(self, logits: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
        return score_metrics(logits[:, 0], wanted)

    def given(self, logits: np.ndarray) -> np.ndarray:
        return logits[:, 0]

    def scores(self, logits: np.ndarray) -> np.ndarray:
        return logits[:, 0]

    def credit(self, logits: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        import numpy as np

        return np.asarray(-((logits[:, 0].astype(np.float64) - wanted) ** 2))

    def told(self, logits: np.ndarray) -> list[Any]:
        return [float(value) for value in logits[:, 0]]

    def drawn(self, logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        import torch

        return logits[:, 0] + torch.special.ndtri(shares[:, 0].clamp(1e-6, 1 - 1e-6))

    def check(self, logits: np.ndarray, wanted: np.ndarray) -> str:
        return check_scores(logits[:, 0], wanted)

    def answers(self, logits: np.ndarray) -> list[str]:
        return [f"{value:.3f}" for value in logits[:, 0]]

    def lines(self) -> tuple[str, ...]:
        return ('print(session.run(["logits"], feeds)[0][:, 0])',)


@dataclass(frozen=True)
class AnyLabels(Reading):
    """Labels that do not exclude each other: each whose probability, sigmoid(logit), is at least `threshold` is given.

    An answer is a tuple of names, perhaps empty. The loss is the mean of the binary cross-entropies, as transformers computes it;
    `weights` say what a row that has the label counts there, beside one that has not.
    """

    labels: tuple[str, ...]
    threshold: float | None = None
    weights: tuple[float, ...] | None = None
    problem_type = "multi_label_classification"

    @property
    def names(self) -> tuple[str, ...]:
        return self.labels

    @property
    def margin(self) -> float:
        """The logit from which a label is given."""
        share = EVEN if self.threshold is None else self.threshold
        return math.log(share / (1 - share))

    def targets(self, answers: Sequence[Any], ids: Mapping[str, int]) -> np.ndarray:
        import numpy as np

        found = np.zeros((len(answers), len(self.labels)), dtype=np.int64)
        for row, answer in enumerate(answers):
            found[row, [ids[name] for name in answer]] = 1
        return found

    def column(self, answers: Sequence[Any], ids: Mapping[str, int]) -> list[Any]:
        return [tuple(row) for row in self.targets(answers, ids).tolist()]  # tuples are not padded to the length of a text

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        weights = None if self.weights is None else logits.new_tensor(self.weights)  # (labels,)
        return functional.binary_cross_entropy_with_logits(logits, labels.float(), pos_weight=weights)

    def divergence(self, ours: torch.Tensor, theirs: torch.Tensor, temperature: float) -> torch.Tensor:
        return kl_divergence_of_each(ours, theirs, temperature)

    def metrics(self, logits: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
        return label_set_metrics(logits >= self.margin, wanted)

    def given(self, logits: np.ndarray) -> np.ndarray:
        import numpy as np

        return np.asarray(logits >= self.margin, dtype=np.int64)

    def scores(self, logits: np.ndarray) -> np.ndarray:
        import numpy as np
        from scipy.special import expit

        return np.asarray(expit(logits.astype(np.float64)))

    def credit(self, logits: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        import numpy as np

        return np.asarray(((logits >= self.margin) == (wanted == 1)).all(axis=1), dtype=np.float64)

    def told(self, logits: np.ndarray) -> list[Any]:
        return [tuple(name for name, value in zip(self.labels, row, strict=True) if value >= self.margin) for row in logits]

    def drawn(self, logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        return (shares < logits.sigmoid()).float()

    def check(self, logits: np.ndarray, wanted: np.ndarray) -> str:
        return check_label_sets(logits, wanted, self.labels)

    def answers(self, logits: np.ndarray) -> list[str]:
        return [", ".join(names) for names in self.told(logits)]

    def lines(self) -> tuple[str, ...]:
        share = EVEN if self.threshold is None else self.threshold
        return (
            'labels = json.loads(pathlib.Path("config.json").read_text("utf-8"))["id2label"]',
            'shares = 1 / (1 + np.exp(-session.run(["logits"], feeds)[0]))  # the probability of each label by itself',
            f"print([[labels[str(i)] for i in np.flatnonzero(row >= {share:.4g})] for row in shares])",
        )

    def resampled(self, logits: np.ndarray, wanted: np.ndarray, metric: str, draws: Sequence[np.ndarray]) -> np.ndarray | None:
        import numpy as np

        given = logits >= self.margin
        times = np.stack([np.bincount(draw, minlength=len(wanted)) for draw in draws]).astype(np.float64)  # (draws, examples)
        counts = [times @ part for part in label_set_counts(given, wanted)]  # (draws, labels) each
        if metric == "f1_micro":
            return _f1(*(count.sum(axis=1) for count in counts))
        if metric == "f1_macro":
            return np.asarray(_f1(*counts).mean(axis=1))
        return super().resampled(logits, wanted, metric, draws)

    def fitted(self, logits: np.ndarray, wanted: np.ndarray, metric: str) -> AnyLabels:
        """The same with the threshold at which the metric is best, of equal ones the nearest to a half."""
        tried = [replace(self, threshold=percent / 100) for percent in range(5, 100, 5)]
        return max(tried, key=lambda one: (one.judged(metric, logits, wanted), -abs((one.threshold or EVEN) - EVEN)))


def _f1(right: np.ndarray, extra: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """2 tp / (2 tp + fp + fn); 0 where there is nothing to find and nothing found, as scikit-learn says it here."""
    import numpy as np

    whole = 2 * right + extra + missing
    return np.divide(2 * right, whole, out=np.zeros_like(whole), where=whole > 0)
