"""A task small enough to learn in seconds: which of three bands of token ids fills a row. Shared by the tests of the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tiny import tiny

from slimformer.core.anatomy import Anatomy
from slimformer.core.cost import parameters
from slimformer.core.plan import Plan
from slimformer.data.batching import collate, in_order
from slimformer.families.base import anatomy_of, subject_of
from slimformer.log import Log
from slimformer.methods.base import Context, Method
from slimformer.tasks.base import Example, Features, Outputs, Split, Task
from slimformer.training.loop import Trained, train
from slimformer.training.stage import Train, Training

BANDS = 3


@dataclass(frozen=True)
class Toy(Task):
    metric: str = "accuracy"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"

    def split(self, name: Split) -> Sequence[Example]:
        raise NotImplementedError("rows are made by `rows`")

    def encode(self, examples: Sequence[Example], tokenizer: Any, max_length: int) -> Features:
        raise NotImplementedError("rows are made by `rows`")

    def configure(self) -> Mapping[str, Any]:
        return {"num_labels": BANDS}

    def bind(self, config: Any) -> Task:
        return self

    def loss(self, output: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(output["logits"], batch["labels"])

    def divergence(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: Mapping[str, Any], temperature: float
    ) -> torch.Tensor:
        ours, theirs = (torch.log_softmax(side["logits"] / temperature, -1) for side in (student, teacher))
        return torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean") * temperature**2

    def score(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> dict[str, float]:
        right = outputs["logits"].argmax(-1) == np.asarray(features.columns["labels"])
        return {"accuracy": float(right.mean())}

    def answers(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> list[str]:
        return [str(label) for label in outputs["logits"].argmax(-1)]

    def credit(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> np.ndarray:
        return np.asarray(outputs["logits"].argmax(-1) == np.asarray(features.columns["labels"]), dtype=np.float64)


def rows(count: int = 96, seed: int = 0, longest: int = 10) -> Features:
    """Rows of 3 to `longest` tokens, all from the band of their label."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, BANDS, count)
    ids = [list(map(int, generator.integers(5 + 30 * b, 35 + 30 * b, generator.integers(3, longest + 1)))) for b in labels]
    columns = {"input_ids": ids, "token_type_ids": [[0] * len(row) for row in ids], "labels": [int(b) for b in labels]}
    return Features(columns=columns, example=list(range(count)), truncated=0, pad_id=1)


def context(model: Any = None, features: Features | None = None, teacher: Any = None, seed: int = 3) -> Context:
    """A context around a tiny model (BERT by default) with nothing cut."""
    model = tiny("bert") if model is None else model
    features = rows() if features is None else features
    subject = subject_of(model)

    def batches(count: int) -> Iterator[dict[str, torch.Tensor]]:
        for some in in_order(min(count, len(features)), 16):
            yield {name: torch.from_numpy(array) for name, array in collate(features, some).items()}

    return Context(
        subject=subject,
        plan=Plan(),
        task=Toy(),
        cost=parameters(model, subject.anatomy),
        teacher=None if teacher is None else subject_of(teacher),
        batches=batches,
        generator=torch.Generator().manual_seed(seed),
    )


def with_model(around: Context, model: Any, anatomy: Anatomy | None = None) -> Context:
    """The context around another model."""
    return replace(around, subject=replace(around.subject, model=model, anatomy=anatomy or anatomy_of(model)))


def fit(
    around: Context,
    features: Features,
    methods: Sequence[Method],
    stage: Train,
    folder: Path,
    log: Log | None = None,
    evaluate: Callable[[Any], float] | None = None,
    cache: Path | None = None,
) -> Trained:
    """`train` with these methods, quietly."""
    training = Training(around, features, replace(stage, methods=tuple(methods)))
    return train(training, folder, log or Log(None, quiet=True), evaluate=evaluate, cache=cache)


def accuracy(features: Features) -> Callable[[Any], float]:
    """How `train` is told to evaluate."""

    def of(model: Any) -> float:
        batch = {name: torch.from_numpy(array) for name, array in collate(features, range(len(features))).items()}
        labels = batch.pop("labels")
        batch.pop("token_type_ids")
        return float((model(**batch).logits.argmax(-1) == labels).float().mean())

    return of


def without_dropout(model: Any) -> Any:
    """The model with every dropout at 0, also those that a module applies by itself."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "activation_dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model
