"""A task: where the examples come from, how they are encoded, what is trained and how it is scored.

One file per type of task. A task is a frozen dataclass whose fields are its options in a recipe. Reading, encoding and
scoring need neither torch nor transformers, so that an exported model can be benched where neither is installed; `loss` and
`divergence` get torch tensors and import torch themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig

Outputs = Mapping[str, np.ndarray]  # output name -> (features, ...); "logits" -> (features, classes)


class Split(StrEnum):
    """What the examples of a task are for. No example is in two splits.

    TRAIN is what a model is trained on. VALIDATION is a slice of the training data that is set aside: everything that is chosen
    (budgets, files, thresholds, stopping points) is chosen on it. DEV is reported on and never chosen on. A file that a user calls
    "validation" is their DEV: VALIDATION always comes out of the training data.
    """

    TRAIN = "train"
    VALIDATION = "validation"
    DEV = "dev"


@dataclass(frozen=True)
class Example:
    """One thing to be judged. `answer` is None where a data set carries no label."""

    id: str
    texts: tuple[str, ...]
    answer: Any


@dataclass(frozen=True)
class Features:
    """Model inputs, a row each; an example may give several rows (windows of a long text)."""

    columns: Mapping[str, Sequence[Any]]  # "input_ids", "token_type_ids" -> a list of token lists; "labels" -> a list
    example: Sequence[int]  # row -> index of its example
    truncated: int  # examples that lost tokens at the length limit
    pad_id: int

    def __len__(self) -> int:
        return len(self.example)

    def lengths(self) -> np.ndarray:
        """Tokens of each row, before padding: (features,)."""
        return np.fromiter((len(ids) for ids in self.columns["input_ids"]), dtype=np.int64, count=len(self))


class Task(ABC):
    """Subclasses are final frozen dataclasses; each names its metric and the transformers Auto class of its models."""

    metric: str  # key of `score` that counts
    max_length: int  # tokens an input may have; a model may allow fewer
    higher_is_better: ClassVar[bool] = True
    auto_class: ClassVar[str]  # "AutoModelForSequenceClassification"
    outputs: ClassVar[tuple[str, ...]] = ("logits",)  # what the model returns and an exported file is asked for

    @abstractmethod
    def split(self, name: Split) -> Sequence[Example]:
        """Examples of a split, always the same ones in the same order. DataError where the data is no good."""

    @abstractmethod
    def encode(self, examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> Features:
        """Examples as rows of token ids of at most `max_length`."""

    @abstractmethod
    def configure(self) -> Mapping[str, Any]:
        """What a fresh model's config must hold for this task: num_labels, id2label, label2id, problem_type."""

    def marks(self) -> Mapping[str, Any]:
        """What else of this data a model's config says once the model is trained on it, beside the labels; here, nothing."""
        return {}

    @abstractmethod
    def bind(self, config: PretrainedConfig | Mapping[str, Any]) -> Task:
        """This task with its labels in the order of a tuned model's config; DataError where they cannot be matched."""

    @abstractmethod
    def loss(self, output: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Mean loss of a batch: a scalar."""

    @abstractmethod
    def divergence(
        self,
        student: Mapping[str, torch.Tensor],
        teacher: Mapping[str, torch.Tensor],
        batch: Mapping[str, torch.Tensor],
        temperature: float,
    ) -> torch.Tensor:
        """How far a student's outputs are from the teacher's: KL * temperature^2 for classes, MSE for a score; a scalar.

        Padding takes no part: where an output has a value per token, `batch` says which tokens are real.
        """

    @abstractmethod
    def score(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> dict[str, float]:
        """All metrics of the task, each in [0, 1] (correlations in [-1, 1]); `self.metric` is one of the keys."""

    @abstractmethod
    def answers(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> list[str]:
        """The model's answer to each example, as a person would read it."""

    @abstractmethod
    def credit(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> np.ndarray:
        """Right (1) or wrong (0) per example, or minus the squared error of a score: (examples,); for paired comparison."""

    @property
    def fits(self) -> bool:
        """Whether `tune` has something to fit: only then are outputs on validation examples made for it."""
        return False

    def tune(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> Task:
        """This task with what is fitted after training, on validation examples (a no-answer threshold); here, nothing.

        It differs in fields whose default is None until then: they are kept for each exported file.
        """
        return self

    def suits(
        self,
        config: PretrainedConfig | Mapping[str, Any],
        look: Callable[[], tuple[Outputs, Features, Sequence[Example]]],
    ) -> None:
        """DataError where a model that came tuned shows, on some validation examples, that it was tuned for other data; here, nothing.

        `look` makes its outputs, which takes seconds: for what neither labels nor config tell.
        """

    def remarks(self) -> tuple[str, ...]:
        """What a person should know of the data before a run: a sentence each, such as how much of it cannot be used."""
        return ()
