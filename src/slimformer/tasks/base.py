"""What a task is: where the examples come from, how they are encoded, what is trained and how it is scored.

A task is one file of this folder: a frozen dataclass whose fields are its options in a recipe, and those made by `option` are options
of the command line too. Reading, encoding and scoring need neither torch nor transformers, so that an exported model can be scored
without them; `loss` and `divergence` get torch tensors and import torch themselves.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import Field, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_args, get_type_hints

from slimformer.digests import digest_all
from slimformer.errors import RecipeError, nearest
from slimformer.registry import name_of
from slimformer.tasks._snippet import batch_snippet, runtime_snippet

if TYPE_CHECKING:
    import numpy as np
    import torch
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig, PreTrainedModel

    from slimformer.core.pooling import VectorHead

TOGETHER = "group"  # a column of features: rows with the same number are trained side by side
IGNORED = -100  # the label of a token that no loss counts, as in torch
# output name -> (features, ...); "logits" -> (features, classes), with tokens in between if each has an answer; "text" -> (features,),
# texts that a model wrote
Outputs = Mapping[str, "np.ndarray"]


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
    """One input with its right answer, which is None if the data has no label."""

    id: str
    texts: tuple[str, ...]
    answer: Any


@dataclass(frozen=True)
class Features:
    """Encoded examples, a row each; an example may give several rows, such as the windows of a long text."""

    # "input_ids", "token_type_ids" -> a list of token lists; "labels" -> a list of numbers, of tuples, or of token lists of any length
    columns: Mapping[str, Sequence[Any]]
    example: Sequence[int]  # row -> index of its example
    truncated: int  # examples that lost tokens at the length limit
    pad_id: int

    def __len__(self) -> int:
        return len(self.example)

    def lengths(self) -> np.ndarray:
        """Tokens of each row, before padding: (features,)."""
        import numpy as np

        return np.fromiter((len(ids) for ids in self.columns["input_ids"]), dtype=np.int64, count=len(self))

    def groups(self) -> Sequence[int] | None:
        """Which rows belong together, such as the passages of one query; None if each stands for itself."""
        return self.columns.get(TOGETHER)

    def target_lengths(self) -> np.ndarray | None:
        """Tokens of the text that each row is to give, its end included: (features,); None if none is to be written."""
        import numpy as np

        if "decoder_input_ids" not in self.columns:
            return None
        return np.fromiter((len(ids) for ids in self.columns["decoder_input_ids"]), dtype=np.int64, count=len(self))


class Task(ABC):
    """Subclasses are frozen dataclasses. The abstract members are what every task must say; the rest has defaults that do nothing.

    A task of `pretraining` makes a model that others start from: it is delivered for PyTorch alone, and not timed. Its outputs have
    a number for each word of the vocabulary, so they are computed only where they are read, and a teacher's are never kept. An
    encoder without the task's head may teach: by its hidden states and attention scores.
    """

    auto_class: ClassVar[str]  # transformers' class of the task's models: "AutoModelForSequenceClassification"
    labelled: ClassVar[bool] = (
        True  # whether rows have labels: without, all is learnt from a teacher, which answers what is judged
    )
    outputs: ClassVar[tuple[str, ...]] = ("logits",)  # what such a model returns and an exported file is asked for
    per_token: ClassVar[
        tuple[str, ...]
    ] = ()  # those of them that answer for each token: what they give for padding counts for nothing
    higher_is_better: ClassVar[bool] = True  # of `metric`
    pretraining: ClassVar[bool] = False  # whether it teaches language from plain text, before any task: see `Task`
    # of tasks whose `metric` judges texts that a model writes: the key of `score` that counts where it only read the right ones
    stand_in: ClassVar[str] = ""
    usual_for: ClassVar[tuple[str, ...]] = ()  # model types that are made for it, where several tasks have models of one class
    paths: ClassVar[tuple[str, ...]] = ()  # options that may be paths; in a recipe they are relative to its file
    # columns of rows that hold word pieces as they stand in the texts, nothing drawn at random among them
    piece_columns: ClassVar[tuple[str, ...]] = ("input_ids",)
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # short names of this task and the options each one settles

    metric: str  # the key of `score` that counts
    max_length: int  # tokens an input may have; a model may allow fewer

    @property
    def settings(self) -> str:
        """All options as text, the same from whichever folder its files are named."""
        told = {item.name: getattr(self, item.name) for item in fields(self) if item.repr}  # type: ignore[arg-type]
        for name in self.paths:
            value = told.get(name)
            told[name] = {key: _place(item) for key, item in value.items()} if isinstance(value, dict) else _place(value)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in told.items())})"

    # ---- what every task says

    @abstractmethod
    def split(self, name: Split) -> Sequence[Example]:
        """Examples of a split, always the same ones in the same order; DataError if the data cannot be used."""

    @abstractmethod
    def encode(self, examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> Features:
        """Examples as rows of token ids of at most `max_length`."""

    @abstractmethod
    def configure(self) -> Mapping[str, Any]:
        """What the config of a fresh model must hold for this task: num_labels, id2label, label2id, problem_type."""

    @abstractmethod
    def bind(self, config: PretrainedConfig | Mapping[str, Any]) -> Task:
        """This task with its labels in the order of a trained model's config; DataError if the two do not fit together."""

    @abstractmethod
    def loss(self, output: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Mean loss of a batch: a scalar."""

    def terms(self, batch: Mapping[str, torch.Tensor]) -> int:
        """How many numbers `loss` and `divergence` are the mean of: one for each row, unless a task says otherwise."""
        return len(batch["input_ids"])

    @abstractmethod
    def divergence(
        self,
        student: Mapping[str, torch.Tensor],
        teacher: Mapping[str, torch.Tensor],
        batch: Mapping[str, torch.Tensor],
        temperature: float,
    ) -> torch.Tensor:
        """How far a student's outputs are from the teacher's: KL * temperature^2 for classes, MSE for a score; a scalar.

        Padding takes no part: if an output has a value per token, `batch` says which tokens are real.
        """

    @abstractmethod
    def score(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> dict[str, float]:
        """All metrics of the task, each in [0, 1] (correlations in [-1, 1]); `self.metric` is one of the keys.

        A task with a `stand_in` gives `metric` for outputs["text"], and `stand_in` for outputs without texts.
        """

    @abstractmethod
    def credit(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> np.ndarray:
        """How right each answer is, for paired comparison: (examples,); 1 or 0, or minus the squared error of a score."""

    @abstractmethod
    def answers(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> list[str]:
        """The model's answer to each example, as a person would read it."""

    # ---- what a task may say

    def row_texts(self) -> int:
        """How many texts a row reads: as many as an example has, unless an example gives several rows."""
        return len(self.split(Split.TRAIN)[0].texts)

    def counted(self, scores: Mapping[str, float]) -> float:
        """The score that counts: `metric`, or `stand_in` where no text was written."""
        return scores[self.metric if self.metric in scores or not self.stand_in else self.stand_in]

    def resampled(
        self, outputs: Outputs, features: Features, examples: Sequence[Example], draws: Sequence[np.ndarray]
    ) -> np.ndarray | None:
        """The metric on each draw of examples (indices), if there is a quicker way than `score` on each: (draws,)."""
        return None

    def content_digest(self) -> str:
        """Names what the splits hold: ids, texts and answers of all examples. Data that is mended gets another name; a path has none.

        It reads all splits, and raises DataError as `split` does.
        """
        return digest_all(part for split in Split for item in self.split(split) for part in (split, _content_of(item)))

    def title(self) -> str:
        """What reports call this task: "glue/sst2", "classification reviews"; by default its name."""
        return name_of(self)

    def notes(self) -> tuple[str, ...]:
        """Sentences on the data that a person should read before a run, such as how much of it cannot be used."""
        return ()

    def trained_on(self) -> Mapping[str, Any]:
        """What a model's config says of its training data beside the labels, once the model is trained on this task."""
        return {}

    def check_model(
        self,
        config: PretrainedConfig | Mapping[str, Any],
        predict: Callable[[], tuple[Outputs, Features, Sequence[Example]]],
    ) -> str:
        """A warning about a model that came trained, "" if there is none; DataError if its answers cannot be right.

        That is so if it was trained on data of another kind, which its labels and config do not tell, or on classes in another
        order. `predict` gives the model's outputs on some validation examples, which takes seconds.
        """
        return ""

    def answered(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> Sequence[Example]:
        """The examples with what the teacher says of them as their answers; of tasks with labels as they are."""
        return examples

    def completed(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Fields that the config of a trained model lacks for this task, such as what becomes of its score: they are added to it."""
        return {}

    def told_vectors(self, head: VectorHead | None, width: int, *, narrows: bool) -> VectorHead | None:
        """How a model makes its vectors by the options, over what its folder says (`head`), of hidden states of this `width`.

        `narrows`: whether these will become narrower. ModelError if something that must be known of the model is told nowhere.
        """
        return head

    def decoding(self, model: PreTrainedModel, batch: Mapping[str, torch.Tensor | np.ndarray]) -> AbstractContextManager[None]:
        """While it lasts, a pass of the model over this batch may leave out outputs that the task does not read."""
        return nullcontext()

    def kept(
        self, output: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor | np.ndarray]
    ) -> dict[str, torch.Tensor]:
        """What `score` needs of a model's outputs on a batch, a row for each of its rows: by default all of them."""
        return {name: output[name] for name in self.outputs}

    @property
    def tunes(self) -> bool:
        """Whether `tune` has an option to fit; only then are outputs on validation examples made for it."""
        return False

    def tune(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> Task:
        """This task with options fitted on validation examples after training, such as a no-answer threshold.

        Those options are None until then; their values are kept for each exported file.
        """
        return self

    def snippet(self, folder: Path, file: str, texts: Sequence[tuple[str, ...]], max_length: int) -> str:
        """Python for the model card: it runs `file` of an exported folder on the texts and prints the answers.

        It runs in that folder and needs onnxruntime, tokenizers and numpy alone. By default it prints the outputs' shapes.
        """
        return batch_snippet(folder, file, texts, max_length, "print([array.shape for array in session.run(None, feeds)])")

    def plain_snippet(self, folder: Path, file: str, texts: Sequence[tuple[str, ...]], max_length: int, runtime: str) -> str:
        """The same for a file of any runtime, opened by slimformer."""
        return runtime_snippet(folder, file, texts, max_length, runtime)

    # ---- the command line

    @classmethod
    def claims(cls, data: str) -> bool:  # noqa: ARG003
        """Whether `data` is surely for this task, by the names of its files: it is then taken if no task is named."""
        return False

    @classmethod
    def reads(cls, data: str) -> bool:  # noqa: ARG003
        """Whether `data` may be for this task, if a model is for it and no task is named; "" names none."""
        return True

    @classmethod
    def made_for(cls, config: Mapping[str, Any]) -> bool:  # noqa: ARG003
        """Whether a model's config.json names this task: it is then taken if no task is named."""
        return False

    @classmethod
    def flags(cls) -> dict[str, Field[Any]]:
        """The task's options of the command line: "--max-length" -> the field max_length."""
        options: dict[str, Field[Any]] = getattr(cls, "__dataclass_fields__", {})
        return {
            item.metadata["flag"] or f"--{name.replace('_', '-')}": item
            for name, item in options.items()
            if "flag" in item.metadata
        }

    @classmethod
    def from_flags(cls, texts: Mapping[str, str], settled: Mapping[str, Any] | None = None) -> Self:
        """The task that flags with their texts stand for; `settled` are the options of an alias, which flags overrule.

        RecipeError for a flag that the task does not have, a text that is no number, and a required option that is missing.
        """
        flags, name, hints = cls.flags(), name_of(cls), get_type_hints(cls)
        unknown = [flag for flag in texts if flag not in flags]
        if unknown:
            raise RecipeError(f"the task {name} has no {' or '.join(unknown)}.", help=nearest(unknown[0], flags))
        options = dict(settled or {})
        options |= {flags[flag].name: _parse(text, hints[flags[flag].name], flag) for flag, text in texts.items()}
        for flag, item in flags.items():
            if item.metadata["required"] and item.name not in options:
                others = ", ".join(alias for alias, given in cls.aliases.items() if item.name in given)
                raise RecipeError(
                    f"no {item.name} is named for the task {name}.",
                    help=f"give {flag}: {item.metadata['help'][0].lower()}{item.metadata['help'][1:]}"
                    + (f" Or choose a --task that names its {item.name}: {others}." if others else ""),
                )
        return cls(**options)


def refuse_pretraining(task: Task, what: str) -> None:
    """RecipeError if a task makes no model that could be compared with others."""
    if task.pretraining:
        raise RecipeError(
            f"the task {name_of(task)} trains a model that others start from, and {what} needs a task with answers.",
            help="run a recipe with it, then start another from the folder that it leaves.",
        )


def option(default: Any, help: str, *, flag: str = "", required: bool = False) -> Any:
    """A field of a task that is also an option of the command line, `--field-name` unless `flag` names another.

    `required`: the command line insists on it, unless an alias of the task settles it.
    """
    return field(default=default, metadata={"help": help, "flag": flag, "required": required})


def _place(value: Any) -> Any:
    """The one name of a place on this machine; anything else stays."""
    return os.path.realpath(value) if isinstance(value, str) and os.path.exists(value) else value


def _content_of(item: Example) -> str:
    return json.dumps([item.id, item.texts, repr(item.answer)])  # JSON, because texts could hold any separator


def _parse(text: str, hint: Any, flag: str) -> Any:
    """The value that a text of the command line stands for, by the type of its field."""
    kinds = get_args(hint) or (hint,)
    if int in kinds and re.fullmatch(r"[+-]?\d{1,18}", text):
        return int(text)
    if float in kinds and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
        return float(text)
    if {int, float} & set(kinds) and str not in kinds:
        raise RecipeError(f"{flag} takes a {'whole ' if float not in kinds else ''}number, not '{text}'.")
    return text
