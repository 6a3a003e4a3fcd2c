"""The stages of a recipe as data: `Train` changes weights by gradient steps, `Calibrate` reads some batches and decides.

A stage is a frozen value that a recipe holds and the training loop reads; `running/stages.py` carries it out. A stage itself
says whether it cuts or fills zeros, so that no other code asks for its type.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, final, get_args

from slimformer.data.trimming import Characters
from slimformer.errors import RecipeError
from slimformer.hooks.precision import PrecisionChoice
from slimformer.methods.base import Context, Method, Zeros
from slimformer.registry import name_of
from slimformer.rules import Count, CountOrZero, Fraction, NotNegative, Positive, mistakes_in, some_of
from slimformer.tasks.base import Features

TASK_TEXT = "task"  # this value of `Train.text` stands for the task's own training texts
_SOME_FILE = "file"
Freeze = Literal["nothing", "embeddings", "encoder", "everything"]
Tracker = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]


class Stage(ABC):
    """A frozen dataclass of options with the methods that take part; `kind` is its key in a recipe."""

    kind: ClassVar[str]

    @property
    @abstractmethod
    def methods(self) -> tuple[Method, ...]:
        """The methods that take part."""

    @property
    def cuts(self) -> bool:
        """Whether the model that leaves this stage may be smaller: some method decides what stays, or in which form."""
        return any(method.effects().chooses for method in self.methods)

    @property
    def trains_over_zeros(self) -> bool:
        """Whether gradient steps change exact zeros in the encoder's matrices for good."""
        return False

    @property
    def fills_zeros(self) -> bool:
        """Whether exact zeros in the encoder's matrices are other numbers after this stage."""
        return self.trains_over_zeros or any(method.effects().refills for method in self.methods)

    @property
    def leading(self) -> bool:
        """Whether this is plain fine-tuning, which may come first to make a teacher."""
        return False

    @property
    def files(self) -> tuple[Path, ...]:
        """Files and folders that the stage reads beside the bundle: what they hold is a part of what it makes."""
        return ()

    def digest(self) -> str:
        """Names the stage and all its options; of `files` only that there are some, because they count by what they hold."""
        return f"{type(self).__name__}:{self._without_paths()!r}"

    def _without_paths(self) -> Stage:
        return self


@final
@dataclass(frozen=True)
class Train(Stage):
    """Trains with any methods; without one it is plain fine-tuning. At the end the model is cut as the methods decide.

    `epochs`: passes over the rows, copies counted apart (above 0).
    `steps`: steps of the optimiser; if given, `epochs` does not count.
    `lr`: the peak learning rate of AdamW; it rises to it and then falls to 0 in a line.
    `warmup`: the share of the steps in which the rate rises.
    `batch_size`: rows a step, of all processes together. `clip`: largest gradient norm of the model's weights; 0 clips nothing.
    `task_weight`: weight of the task's own loss beside what methods add. `weight_decay`: of matrices, not of biases and norms.
    `freeze`: the model's own weights that do not train: the word embeddings (half of a small encoder), all but the head, or all.
    `dropout`: turn it off if a student should follow its teacher closely and there is little time.
    `precision`: "auto" takes bf16 (else fp16) on a GPU, and bf16 on a CPU if it is measured to be clearly faster there.
    `trackers`: accelerate's names: "tensorboard", "wandb", ...
    `text`: a file with a text on each line, or "task" for the task's own training texts. No label is read then, the task's loss
    is left out, and everything is learnt from the teacher.
    `augment`: copies of each row in which words are replaced by similar ones, taken from the embedding table or from the masked
    language model in the folder `augment_model`. An epoch is then 1 + augment times as long. It is meant for distillation,
    because the labels of the copies may no longer fit.
    `targets`: "teacher" trains on the texts that the teacher writes for the rows by beam search, instead of the task's own
    (sequence-level distillation); for tasks that write texts. They are written once, before the first step, and kept. It goes with
    `distillation`, which then learns each word of them from the teacher too.
    `rows`: at most so many of the rows train, evenly spaced over all of them; an epoch is a pass over these.

    `methods`: those that take part; at most one of them decides what is cut.

    Raises:
        RecipeError: It lists every option with a value out of range.

    Example:
        >>> Train(epochs=2, lr=1e-4, freeze="embeddings").batch_size
        32
    """

    methods: tuple[Method, ...] = ()
    epochs: Positive = 3.0
    lr: NotNegative = 3e-5
    batch_size: Count = 32
    task_weight: NotNegative = 1.0
    weight_decay: NotNegative = 0.01
    warmup: Fraction = 0.1
    freeze: Freeze = "nothing"
    dropout: bool = True
    precision: PrecisionChoice = "auto"
    trackers: Annotated[tuple[Tracker, ...], some_of(*get_args(Tracker), none=True)] = ()
    text: str | None = None
    augment: CountOrZero = 0
    augment_model: str | None = None
    steps: Count | None = None
    rows: Count | None = None
    targets: Literal["task", "teacher"] = "task"
    clip: NotNegative = 1.0

    kind: ClassVar[str] = "train"
    __pydantic_config__: ClassVar[dict[str, bool]] = {
        "arbitrary_types_allowed": True
    }  # a method's class is unknown to pydantic

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(self.methods))
        object.__setattr__(self, "trackers", tuple(self.trackers))
        wrong = mistakes_in(self)
        if self.augment_model is not None and self.augment == 0:
            wrong.append("augment_model says how words are replaced: set augment too")
        if self.targets == "teacher" and (self.text is not None or self.augment):
            wrong.append(
                f"targets: the teacher writes for the task's own rows; leave out {'augment' if self.augment else 'text'}"
            )
        if wrong:
            raise RecipeError("these training options cannot be used.", facts=wrong, help="correct these values.")

    @property
    def trains_over_zeros(self) -> bool:
        holds = any(method.effects().holds_zeros or method.effects().zeros is Zeros.RESULT for method in self.methods)
        return self.freeze not in ("encoder", "everything") and not holds

    @property
    def leading(self) -> bool:
        return not self.methods and self.targets == "task"

    @property
    def files(self) -> tuple[Path, ...]:
        text = None if self.text == TASK_TEXT else self.text
        return tuple(Path(name) for name in (text, self.augment_model) if name is not None)

    def _without_paths(self) -> Train:
        text = self.text if self.text in (None, TASK_TEXT) else _SOME_FILE
        return replace(self, text=text, augment_model=self.augment_model and _SOME_FILE)

    @property
    def loss_weight(self) -> float:
        """The weight of the task's loss; texts without labels have none."""
        return self.task_weight if self.text is None else 0.0

    def steps_of(self, rows: int) -> int:
        """Optimiser steps over this many rows.

        Args:
            rows: Rows of the training data.

        Returns:
            `steps` if it is given, else `epochs` times the batches of an epoch, at least 1.

        Example:
            >>> Train(epochs=2, batch_size=32).steps_of(100)
            8
        """
        return self.steps if self.steps is not None else max(1, round(self.epochs * math.ceil(rows / self.batch_size)))


@final
@dataclass(frozen=True)
class Calibrate(Stage):
    """Runs one one-shot method, which reads some batches and decides, without an optimiser.

    Args:
        method: A method that looks once, such as `Fisher`.

    Raises:
        RecipeError: The method needs training steps.

    Example:
        >>> from slimformer.methods.fisher import Fisher
        >>> Calibrate(Fisher(keep=0.5)).kind
        'calibrate'
    """

    method: Method

    kind: ClassVar[str] = "calibrate"

    @property
    def methods(self) -> tuple[Method, ...]:
        return (self.method,)


@final
@dataclass(frozen=True)
class TrimVocabulary(Stage):
    """Cuts the vocabulary, and the word table with it, to the pieces that the task's training texts need; nothing is trained.

    Texts whose pieces stay are read as before and get the same answers, bit for bit. Other words are split into smaller pieces.
    After Ushio et al. 2023 (An Efficient Multilingual Language Model Compression through Vocabulary Trimming), who keep the pieces
    of a corpus in one language. Differences: the texts are the task's own, and a safety net of special tokens, byte pieces, digits,
    signs and letters stays, so that words that were not seen are split rather than unknown.

    `text`: a file with a text on each line that is to be read as before, too: such as texts that the model will meet.
    `at_least`: a piece stays if it occurs so many times in all these texts. Above 1, words with rarer pieces are split otherwise in
    training texts too.
    `characters`: the single letters that stay: those of the scripts that the texts have ("seen"), or all ("all").
    `common`: so many of the most common pieces of the whole vocabulary stay, in these scripts, whether a text has them or not.

    Raises:
        RecipeError: It lists every option with a value out of range.

    Example:
        >>> TrimVocabulary().kind
        'trim_vocabulary'
    """

    text: str | None = None
    at_least: Count = 1
    characters: Characters = "seen"
    common: CountOrZero = 0

    kind: ClassVar[str] = "trim_vocabulary"

    def __post_init__(self) -> None:
        wrong = mistakes_in(self)
        if wrong:
            raise RecipeError("these options cannot be used.", facts=wrong, help="correct these values.")

    @property
    def methods(self) -> tuple[Method, ...]:
        return ()

    @property
    def files(self) -> tuple[Path, ...]:
        return () if self.text is None else (Path(self.text),)

    def _without_paths(self) -> TrimVocabulary:
        return replace(self, text=self.text and _SOME_FILE)


@dataclass(frozen=True)
class Training:
    """One training, before it begins: everything that its numbers depend on.

    `context` holds the model that trains and stands around its methods; `seed` fixes everything random. `read`: the same rows as the
    teacher reads them, if it has another tokenizer than the model.
    """

    context: Context
    features: Features
    stage: Train
    seed: int = 17
    read: Features | None = None

    @property
    def methods(self) -> tuple[Method, ...]:
        return self.stage.methods

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return self.stage.steps_of(len(self.features))

    @property
    def taught(self) -> bool:
        """Whether any method learns from the teacher."""
        return any(method.effects().needs_teacher for method in self.methods)

    def check(self) -> None:
        """RecipeError if these methods cannot train together."""
        together(self.methods, self.context.teacher is not None)
        if not len(self.features):
            raise ValueError("no rows to train on")
        if self.read is not None and list(self.read.example) != list(self.features.example):
            raise ValueError("the teacher's rows are not those of the model")


def together(methods: Sequence[Method], taught: bool) -> None:
    """RecipeError if methods cannot train together: two that decide, one-shot ones, or no teacher (`taught`) if one is needed."""
    deciding = [name_of(method) for method in methods if method.effects().decides]
    wrong = []
    if len(deciding) > 1:
        wrong.append(f"{' and '.join(deciding)} both decide what is cut: put them into stages of their own")
    wrong += [
        f"{name_of(m)} looks once and does not train: use it in a calibrate stage" for m in methods if m.effects().one_shot
    ]
    wrong += parting(methods)
    if not taught:
        wrong += [f"{name_of(m)} needs a teacher and there is none" for m in methods if m.effects().needs_teacher]
    if wrong:
        raise RecipeError("these methods cannot train together.", facts=wrong, help="change the stage's methods.")


def parting(methods: Sequence[Method]) -> list[str]:
    """The reasons why methods cannot stand beside one that gives layers one set of weights; none if there is no such."""
    first = next((place for place, method in enumerate(methods) if method.effects().shares), None)
    if first is None:
        return []
    name, found = name_of(methods[first]), []
    for place, method in enumerate(methods):
        does = method.effects()
        if does.decides and not (does.alike or does.branches):
            remedy = "leave out one of the two" if does.uneven else "put it into a stage before"
            found.append(f"{name_of(method)} would make layers differ that {name} makes one: {remedy}")
        elif place < first and (does.decides or does.holds_zeros):
            found.append(f"{name_of(method)} looks at layers before {name} has made them one: put {name} first")
    return found
