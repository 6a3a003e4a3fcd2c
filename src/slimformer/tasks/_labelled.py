"""What tasks have in common whose model gives one row of logits per example: a class, several labels, or a single score."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slimformer.tasks._own_metric import is_own
from slimformer.tasks._readings import OneClass, OneScore, Reading
from slimformer.tasks._snippet import batch_snippet
from slimformer.tasks._unlabelled import drawn_shares
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

    def reading(self) -> Reading:
        """How the logits are read: as one class, or as a score if there are no classes."""
        return OneClass(self.classes) if self.classes else OneScore()

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
            columns["labels"] = self.reading().column([item.answer for item in examples], self._ids(examples))
        return Features(columns, range(len(examples)), truncated, pad_id_of(tokenizer))

    def configure(self) -> Mapping[str, Any]:
        reading = self.reading()
        return {
            "num_labels": len(reading.names),
            "id2label": dict(enumerate(reading.names)),
            "label2id": {name: index for index, name in enumerate(reading.names)},
            "problem_type": reading.problem_type,
        }

    def loss(self, output: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        logits = output["logits"].float()  # (batch, classes); a half-precision loss would lose small differences
        reading = self.reading()
        if "labels" in batch:
            return reading.loss(logits, batch["labels"])
        own = logits.detach()
        return reading.loss(logits, reading.drawn(own, drawn_shares(batch, own.shape[-1])))

    def divergence(
        self,
        student: Mapping[str, torch.Tensor],
        teacher: Mapping[str, torch.Tensor],
        batch: Mapping[str, torch.Tensor],
        temperature: float,
    ) -> torch.Tensor:
        return self.reading().divergence(student["logits"].float(), teacher["logits"].float(), temperature)

    def score(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> dict[str, float]:
        logits, wanted, reading = per_example(outputs["logits"], features), self._labels(examples), self.reading()
        own = {self.metric: reading.judged(self.metric, logits, wanted)} if is_own(self.metric) else {}
        return reading.metrics(logits, wanted) | own

    def resampled(
        self, outputs: Outputs, features: Features, examples: Sequence[Example], draws: Sequence[np.ndarray]
    ) -> np.ndarray | None:
        logits = per_example(outputs["logits"], features)
        return self.reading().resampled(logits, self._labels(examples), self.metric, draws)

    def credit(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> np.ndarray:
        return self.reading().credit(per_example(outputs["logits"], features), self._labels(examples))

    def check_model(
        self,
        config: PretrainedConfig | Mapping[str, Any],
        predict: Callable[[], tuple[Outputs, Features, Sequence[Example]]],
    ) -> str:
        """A warning if the model is no better than chance; DataError if its classes have another order than those of the data."""
        outputs, features, examples = predict()
        return self.reading().check(per_example(outputs["logits"], features), self._labels(examples))

    def answers(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> list[str]:
        return self.reading().answers(per_example(outputs["logits"], features))

    def snippet(self, folder: Path, file: str, texts: Sequence[tuple[str, ...]], max_length: int) -> str:
        return batch_snippet(folder, file, texts, max_length, *self.reading().lines())

    def _labels(self, examples: Sequence[Example]) -> np.ndarray:
        """Class ids or scores (examples,), or 1 for each label that an example has (examples, labels)."""
        return self.reading().targets([item.answer for item in examples], self._ids(examples))

    def _ids(self, examples: Sequence[Example]) -> Mapping[str, int]:
        return self._ids_of_answers(name for item in examples for name in names_in(item.answer)) if self.classes else {}

    def _ids_of_answers(self, answers: Iterable[str]) -> Mapping[str, int]:
        """The class id of each of these answers."""
        return {name: index for index, name in enumerate(self.classes)}


def names_in(answer: Any) -> tuple[str, ...]:
    """The names of classes in an answer: several, one, or none."""
    return answer if isinstance(answer, tuple) else (answer,)


def per_example(logits: np.ndarray, features: Features) -> np.ndarray:
    """Logits in the order of the examples: (examples, classes); each example has exactly one row."""
    import numpy as np

    ordered = np.empty_like(logits)
    ordered[np.asarray(features.example)] = logits
    return ordered
