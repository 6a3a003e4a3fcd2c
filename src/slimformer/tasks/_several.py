"""A row of logits that holds the classes of several tasks side by side, each with an answer of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimformer.core.answers import label_of
from slimformer.tasks._judging import check_classes
from slimformer.tasks._losses import kl_divergence
from slimformer.tasks._metrics import class_metrics
from slimformer.tasks._readings import Reading
from slimformer.tasks._unlabelled import drawn_classes
from slimformer.tasks.base import IGNORED

if TYPE_CHECKING:
    import numpy as np
    import torch

MEANS = ("accuracy", "f1_macro", "matthews")  # each is the mean of the tasks' own


@dataclass(frozen=True)
class ClassOfEach(Reading):
    """One class of every task. An answer is a tuple of names, "task: class", of the tasks for which it is known.

    >>> import numpy as np
    >>> reading = ClassOfEach({"mood": ("bad", "good"), "topic": ("film", "food", "room")})
    >>> reading.answers(np.array([[0.0, 1.0, 0.0, 0.0, 3.0]]))
    ['mood: good, topic: room']
    """

    tasks: Mapping[str, Sequence[str]]  # the classes of each task, in the order of its outputs
    problem_type = ""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(label_of(task, name) for task, classes in self.tasks.items() for name in classes)

    def targets(self, answers: Sequence[Any], ids: Mapping[str, int]) -> np.ndarray:
        """Class ids, counted within each task, and IGNORED where none is known: (examples, tasks)."""
        import numpy as np

        found = np.full((len(answers), len(self.tasks)), IGNORED, dtype=np.int64)
        for row, answer in enumerate(answers):
            for index in map(ids.__getitem__, answer):
                column, part = next(
                    (place, part) for place, part in enumerate(self._parts()) if part.start <= index < part.stop
                )
                found[row, column] = index - part.start
        return found

    def column(self, answers: Sequence[Any], ids: Mapping[str, int]) -> list[Any]:
        return [tuple(row) for row in self.targets(answers, ids).tolist()]

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean over all labels that are known."""
        from torch.nn import functional

        total, count = logits.sum() * 0.0, int((labels != IGNORED).sum())
        for column, part in enumerate(self._parts()):
            total = total + functional.cross_entropy(logits[:, part], labels[:, column], ignore_index=IGNORED, reduction="sum")
        return total / max(count, 1)

    def divergence(self, ours: torch.Tensor, theirs: torch.Tensor, temperature: float) -> torch.Tensor:
        """The mean over tasks; every row counts for every task."""
        import torch

        parts = [kl_divergence(ours[:, part], theirs[:, part], temperature) for part in self._parts()]
        return torch.stack(parts).mean()

    def metrics(self, logits: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
        """Means over the tasks, and the accuracy of each."""
        import numpy as np

        of_each = {
            task: class_metrics(logits[rows, part].argmax(-1), wanted[rows, column], part.stop - part.start)
            for task, column, part, rows in self._known(wanted)
        }
        means = {name: float(np.mean([found[name] for found in of_each.values()])) if of_each else 0.0 for name in MEANS}
        return means | {f"accuracy of {task}": found["accuracy"] for task, found in of_each.items()}

    def given(self, logits: np.ndarray) -> np.ndarray:
        import numpy as np

        return np.stack([logits[:, part].argmax(-1) for part in self._parts()], axis=1)

    def scores(self, logits: np.ndarray) -> np.ndarray:
        import numpy as np
        from scipy.special import softmax

        return np.concatenate([softmax(logits[:, part].astype(np.float64), axis=-1) for part in self._parts()], axis=1)

    def credit(self, logits: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """The share of an example's known labels that is right."""
        import numpy as np

        known = wanted != IGNORED
        right = (self.given(logits) == wanted) & known
        return np.asarray(right.sum(1) / np.maximum(known.sum(1), 1), dtype=np.float64)

    def told(self, logits: np.ndarray) -> list[Any]:
        named = [list(classes) for classes in self.tasks.values()]
        rows = self.given(logits)
        return [
            tuple(label_of(task, named[place][index]) for place, (task, index) in enumerate(zip(self.tasks, row, strict=True)))
            for row in rows
        ]

    def drawn(self, logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        import torch

        drawn = [drawn_classes(logits[:, part], shares[:, part][:, :1]) for part in self._parts()]
        return torch.stack(drawn, dim=1)

    def check(self, logits: np.ndarray, wanted: np.ndarray) -> str:
        said = [
            check_classes(logits[rows, part].argmax(-1), wanted[rows, column], list(self.tasks[task]), f"examples of {task}")
            for task, column, part, rows in self._known(wanted)
        ]
        return " ".join(filter(None, said))

    def answers(self, logits: np.ndarray) -> list[str]:
        return [", ".join(answer) for answer in self.told(logits)]

    def lines(self) -> tuple[str, ...]:
        return (
            'config = json.loads(pathlib.Path("config.json").read_text("utf-8"))',
            'logits, start = session.run(["logits"], feeds)[0], 0',
            'for task, count in config["slimformer_answers"]:',
            "    best = start + logits[:, start : start + count].argmax(axis=1)",
            '    print([config["id2label"][str(index)] for index in best])',
            "    start += count",
        )

    def resampled(self, logits: np.ndarray, wanted: np.ndarray, metric: str, draws: Sequence[np.ndarray]) -> np.ndarray | None:
        """Accuracy by counting; any other metric by computing it on each draw."""
        import numpy as np

        if metric != "accuracy":
            return None
        known = wanted != IGNORED
        right = (self.given(logits) == wanted) & known
        found = np.full(len(draws), np.nan)
        for place, draw in enumerate(draws):
            counts = known[draw].sum(0)
            found[place] = float((right[draw].sum(0)[counts > 0] / counts[counts > 0]).mean())
        return found

    def _parts(self) -> list[slice]:
        """The outputs of each task."""
        parts, start = [], 0
        for classes in self.tasks.values():
            parts.append(slice(start, start := start + len(classes)))
        return parts

    def _known(self, wanted: np.ndarray) -> Iterator[tuple[str, int, slice, np.ndarray]]:
        """The tasks of which labels are known: name, column, outputs, and the rows."""
        for column, (task, part) in enumerate(zip(self.tasks, self._parts(), strict=True)):
            rows = (wanted[:, column] != IGNORED).nonzero()[0]
            if len(rows):
                yield task, column, part, rows
