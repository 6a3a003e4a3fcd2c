"""Several classifications at once: one encoder gives each text a class of every task, with a head for each.

Each task has data of its own, or a column of its own in common data. A text that several tasks know is one row, and no text of a task's
dev data is in the training data of another. Reading and scoring need neither torch nor transformers.

The loss is the mean over all labels of a batch, so a task counts by its rows. A teacher is followed in every task on every row, which
needs no label. What a model is judged by is the mean of the tasks' own metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from slimformer.core.answers import ANSWERS, answer_slices, answers_field, is_task_name, label_of
from slimformer.data.labels import enumerate_labels, model_labels
from slimformer.data.memory import data_source
from slimformer.errors import DataError, RecipeError, nearest, shown
from slimformer.log import remark
from slimformer.tasks._labelled import Labelled
from slimformer.tasks._several import MEANS, ClassOfEach
from slimformer.tasks.base import Example, Split, option
from slimformer.tasks.classification import Classification

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_STRICTEST_FIRST = (Split.DEV, Split.VALIDATION, Split.TRAIN)


@dataclass(frozen=True)
class Multitask(Labelled):
    """Several classifications with one encoder.

    `data` names the data of each task: a mapping, or "mood=./reviews,topic=./news"; each is what `classification` takes. Or it is one
    place with a label column for each task, which `label` names: "mood,topic". `text`, `text_pair` and `label` name columns, the same
    for all tasks or "mood=stars,topic=section". `metric` is the mean of what each task reaches: accuracy, f1_macro or matthews.
    `train_rows` draws so many rows for each task, and `validation_share` of each task's training data is set aside. `labels` are the
    classes of each task in the order of the model's outputs; `bind` fills them.

    RecipeError names every option that is wrong. What is wrong with the data becomes a DataError when it is read.

    >>> from slimformer.tasks.base import Split
    >>> rows = [{"text": f"I liked film {n}.", "mood": "good", "topic": "film"} for n in range(50)]
    >>> rows += [{"text": f"I hated room {n}.", "mood": "bad", "topic": "room"} for n in range(50)]
    >>> task = Multitask(data=rows, label="mood,topic")
    >>> task.classes
    ('mood: bad', 'mood: good', 'topic: film', 'topic: room')
    >>> task.split(Split.TRAIN)[0].answer
    ('mood: good', 'topic: film')
    """

    paths: ClassVar[tuple[str, ...]] = ("data",)

    data: Any = option("", "The data of each task, mood=./reviews,topic=./news; or one place.", required=True)  # noqa: RUF009
    text: Any = option(None, "Column of the text; guessed if it has a usual name.")  # noqa: RUF009
    text_pair: Any = option(None, "Column of the second text, if pairs are classified.")  # noqa: RUF009
    label: Any = option(None, "Column of the label, mood=stars,topic=section; of one place a column for each task: mood,topic.")  # noqa: RUF009
    metric: str = option("accuracy", "The metric whose mean over the tasks counts: accuracy, f1_macro or matthews.")
    max_length: int = option(128, "Tokens an input may have; longer ones are cut off.")
    validation_share: float = 0.05
    train_rows: int | None = option(None, "How many rows of each task to train on.")
    labels: Any = None

    def __post_init__(self) -> None:
        mistakes: list[str] = []
        data, label = _by_task(self.data), _by_task(self.label)
        columns = [part.strip() for part in self.label.split(",")] if isinstance(self.label, str) and label is None else []
        if data is None and len(columns) > 1:  # one place with a column for each task
            data, label = dict.fromkeys(columns, self.data), {name: name for name in columns}
        if data is None or len(data) < 2:
            mistakes.append("data: name it for each of two tasks or more, such as mood=./reviews,topic=./news")
            data = data or {}
        object.__setattr__(self, "data", {name: data_source(place) for name, place in data.items()})
        for name in data:
            if not is_task_name(name):
                mistakes.append(f"data: {shown(name, 40)} is no name for a task: letters, digits and underscores")
        for field, told in (("text", _by_task(self.text)), ("text_pair", _by_task(self.text_pair)), ("label", label)):
            if told is not None:
                object.__setattr__(self, field, told)
                mistakes += [f"{field}: there is no task '{name}'; {nearest(name, data)}" for name in told if name not in data]
        if self.metric not in MEANS:
            mistakes.append(f"metric: there is no '{self.metric}'; {nearest(self.metric, MEANS)}")
        object.__setattr__(self, "labels", {name: tuple(names) for name, names in dict(self.labels or {}).items()})
        if not mistakes:
            mistakes += list(self._mistakes_of_parts())
        if mistakes:
            raise RecipeError("the task multitask cannot be set up like that.", facts=mistakes, help="mend these options.")

    def _mistakes_of_parts(self) -> Iterable[str]:
        for name in self.data:
            try:
                self._part(name)
            except RecipeError as error:
                yield from (f"{name}: {fact}" for fact in error.facts)

    def title(self) -> str:
        return f"multitask {'+'.join(self.data)}"

    @cached_property
    def parts(self) -> Mapping[str, Classification]:
        """Each task by itself, with its columns and classes; DataError if one of them gives something else than a class."""
        found: dict[str, Classification] = {}
        for name in self.data:
            part = self._part(name)
            part = part if part.labels else part.settled()
            if part.kind != "classes":
                what = "a score" if part.kind == "score" else "several labels"
                raise DataError(
                    f"the task {name} gives a row {what}, and tasks that share an encoder give it one class.",
                    help="compress a model for that task by itself.",
                )
            found[name] = part
        return found

    @property
    def classes(self) -> tuple[str, ...]:
        return self.reading().names

    def reading(self) -> ClassOfEach:
        return ClassOfEach({name: part.labels for name, part in self.parts.items()})

    def configure(self) -> Mapping[str, Any]:
        counts = {name: len(part.labels) for name, part in self.parts.items()}
        return dict(super().configure()) | {"problem_type": None, ANSWERS: answers_field(counts)}

    def row_texts(self) -> int:
        return max(part.row_texts() for part in self.parts.values())

    # ---- what the data says

    def split(self, name: Split) -> Sequence[Example]:
        return self._rows[Split(name)]

    @cached_property
    def _rows(self) -> Mapping[Split, tuple[Example, ...]]:
        """The examples of all tasks; a text is in one split alone.

        In common data, that is where the first task has its first row, and the labels of all tasks go with it: so dev and validation
        are as large as those of one task. A text that is dev or validation text in other data is left out.
        """
        found: dict[Split, dict[tuple[str, ...], Example]] = {split: {} for split in _STRICTEST_FIRST}
        homes: dict[str, dict[tuple[str, ...], Split]] = {}  # data -> a text -> its split
        for part in self.parts.values():
            first = homes.setdefault(part.data, {})
            for split, item in _in_order(part):
                first.setdefault(item.texts, split)
        places: dict[tuple[str, ...], Split] = {}
        for data in homes.values():
            for texts, split in data.items():
                places[texts] = min(split, places.get(texts, split), key=_STRICTEST_FIRST.index)
        for split in _STRICTEST_FIRST:
            left_out = 0
            for task, part in self.parts.items():
                items = part.split(split)
                ids = part._ids(items)
                for item in items:
                    home = homes[part.data][item.texts]
                    if home is not places[item.texts]:
                        left_out += 1
                        continue
                    answer = label_of(task, part.classes[ids[item.answer]])
                    known = found[home].get(item.texts)
                    if known is None:
                        found[home][item.texts] = Example(f"{task}/{item.id}", item.texts, (answer,))
                    elif not any(other.startswith(label_of(task, "")) for other in known.answer):
                        found[home][item.texts] = replace(known, answer=(*known.answer, answer))
            if left_out:
                remark(f"{left_out:,} rows of {split} are left out: other tasks have their texts to report or to choose on.")
        return {split: tuple(merged.values()) for split, merged in found.items()}

    def notes(self) -> tuple[str, ...]:
        """What was found in the data of each task."""
        return tuple(note for part in self.parts.values() for note in part.notes())

    # ---- what the model says

    @classmethod
    def made_for(cls, config: Mapping[str, Any]) -> bool:
        return ANSWERS in config

    def bind(self, config: PretrainedConfig | Mapping[str, Any]) -> Multitask:
        slices, (names, _) = answer_slices(config), model_labels(config)
        if not slices:
            raise DataError(
                f"the model gives one answer, and the data is for {len(self.data)} tasks: {', '.join(self.data)}.",
                facts=[f"the model's classes: {enumerate_labels(names)}"],
                help="join classifiers of one encoder (slimformer join), or start from an encoder, which is tuned for all tasks first.",
            )
        if {*slices} != {*self.data}:
            raise DataError(
                f"the model's tasks are {', '.join(slices)}, those of the data {', '.join(self.data)}.",
                help="name the data of each task of the model, by its name there.",
            )
        labels = {}
        for task, part in slices.items():
            own = {index: name.removeprefix(label_of(task, "")) for index, name in enumerate(names[part])}
            told = {"id2label": own, "num_labels": len(own), "problem_type": "single_label_classification"}
            labels[task] = self._part(task).bind(told).labels
        ordered = {task: self.data[task] for task in slices}
        return replace(self, data=ordered, labels=labels)

    def _part(self, name: str) -> Classification:
        def of(told: Any) -> Any:
            return told.get(name) if isinstance(told, Mapping) else told

        options = {"text": of(self.text), "text_pair": of(self.text_pair), "label": of(self.label)}
        return Classification(
            data=self.data[name],
            kind="classes" if name in self.labels else "auto",
            metric="auto",
            max_length=self.max_length,
            validation_share=self.validation_share,
            train_rows=self.train_rows,
            labels=self.labels.get(name, ()),
            **options,
        )


def _in_order(part: Classification) -> list[tuple[Split, Example]]:
    """The examples of a task as its data has them, those of a dev file first."""
    rows = [(split, item) for split in _STRICTEST_FIRST for item in part.split(split)]
    apart = part.has_dev_data
    return sorted(rows, key=lambda row: (not (apart and row[0] is Split.DEV), int(row[1].id.rpartition("/")[2])))


def _by_task(told: Any) -> dict[str, Any] | None:
    """A mapping of tasks, or the one that a text names, "a=x,b=y"; None if it names none."""
    if isinstance(told, Mapping):
        return {str(name): value for name, value in told.items()}
    if not isinstance(told, str) or "=" not in told:
        return None
    parts = [part.partition("=") for part in told.split(",")]
    return {name.strip(): value.strip() for name, _, value in parts}
