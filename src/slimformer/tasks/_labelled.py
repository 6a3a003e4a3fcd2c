"""What tasks have in common whose model gives one row of logits per example: a class each, or a single score."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slimformer.tasks._judging import check_classes, check_scores
from slimformer.tasks._losses import kl_divergence
from slimformer.tasks._metrics import class_metrics, score_metrics
from slimformer.tasks._snippet import batch_snippet
from slimformer.tasks.base import Example, Features, Outputs, Task

if TYPE_CHECKING:
    import numpy as np
    import torch
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig

_TEXTS_AT_ONCE = 4096  # encoded together: bounds the memory of the tokenizer's own objects


class Labelled(Task):
    """Subclasses say where the examples come from and what the classes are; everything between the two stands here."""

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the model's ids; empty if the answer is a score."""

    def encode(self, examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> Features:
        from slimformer.data.tokenizer import cutting, pad_id_of

        columns: dict[str, list[Any]] = {"input_ids": [], "token_type_ids": []}
        truncated = 0
        with cutting(tokenizer, max_length):
            for start in range(0, len(examples), _TEXTS_AT_ONCE):
                some = examples[start : start + _TEXTS_AT_ONCE]
                for row in tokenizer.encode_batch_fast([item.texts if len(item.texts) > 1 else item.texts[0] for item in some]):
                    columns["input_ids"].append(row.ids)
                    columns["token_type_ids"].append(row.type_ids)
                    truncated += bool(row.overflowing)
        if all(item.answer is not None for item in examples):
            columns["labels"] = self._labels(examples).tolist()
        return Features(columns, range(len(examples)), truncated, pad_id_of(tokenizer))

    def configure(self) -> Mapping[str, Any]:
        names = self.classes
        if not names:
            return {"num_labels": 1, "id2label": {0: "score"}, "label2id": {"score": 0}, "problem_type": "regression"}
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
            "problem_type": "single_label_classification",
        }

    def loss(self, output: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from torch.nn import functional

        logits = output["logits"].float()  # (batch, classes); a half-precision loss would lose small differences
        if not self.classes:
            return functional.mse_loss(logits.squeeze(-1), batch["labels"].float())
        return functional.cross_entropy(logits, batch["labels"])

    def divergence(
        self,
        student: Mapping[str, torch.Tensor],
        teacher: Mapping[str, torch.Tensor],
        batch: Mapping[str, torch.Tensor],
        temperature: float,
    ) -> torch.Tensor:
        from torch.nn import functional

        ours, theirs = student["logits"].float(), teacher["logits"].float()  # (batch, classes)
        return kl_divergence(ours, theirs, temperature) if self.classes else functional.mse_loss(ours, theirs)

    def score(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> dict[str, float]:
        logits, labels, names = _per_example(outputs["logits"], features), self._labels(examples), self.classes
        return class_metrics(logits.argmax(-1), labels, len(names)) if names else score_metrics(logits[:, 0], labels)

    def credit(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> np.ndarray:
        import numpy as np

        logits, labels = _per_example(outputs["logits"], features).astype(np.float64), self._labels(examples)
        if not self.classes:
            return np.asarray(-((logits[:, 0] - labels) ** 2))  # (examples,)
        return np.asarray(logits.argmax(-1) == labels, dtype=np.float64)

    def check_model(
        self,
        config: PretrainedConfig | Mapping[str, Any],
        predict: Callable[[], tuple[Outputs, Features, Sequence[Example]]],
    ) -> str:
        """A warning if the model is no better than chance; DataError if its classes have another order than those of the data."""
        outputs, features, examples = predict()
        logits, labels, names = _per_example(outputs["logits"], features), self._labels(examples), self.classes
        return check_classes(logits.argmax(-1), labels, names) if names else check_scores(logits[:, 0], labels)

    def answers(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> list[str]:
        logits, names = _per_example(outputs["logits"], features), self.classes
        return [names[index] for index in logits.argmax(-1)] if names else [f"{value:.3f}" for value in logits[:, 0]]

    def snippet(self, folder: Path, file: str, texts: Sequence[tuple[str, ...]], max_length: int) -> str:
        if not self.classes:
            return batch_snippet(folder, file, texts, max_length, 'print(session.run(["logits"], feeds)[0][:, 0])')
        return batch_snippet(
            folder,
            file,
            texts,
            max_length,
            'labels = json.loads(pathlib.Path("config.json").read_text("utf-8"))["id2label"]',
            'print([labels[str(best)] for best in session.run(["logits"], feeds)[0].argmax(axis=1)])',
        )

    def _labels(self, examples: Sequence[Example]) -> np.ndarray:
        """Class ids or scores: (examples,)."""
        import numpy as np

        names = self.classes
        if not names:
            return np.asarray([item.answer for item in examples], dtype=np.float64)
        ids = self._ids_of_answers(item.answer for item in examples)
        return np.asarray([ids[item.answer] for item in examples], dtype=np.int64)

    def _ids_of_answers(self, answers: Iterable[str]) -> Mapping[str, int]:
        """The class id of each of these answers."""
        return {name: index for index, name in enumerate(self.classes)}


def _per_example(logits: np.ndarray, features: Features) -> np.ndarray:
    """Logits in the order of the examples: (examples, classes); each example has exactly one row."""
    import numpy as np

    ordered = np.empty_like(logits)
    ordered[np.asarray(features.example)] = logits
    return ordered
