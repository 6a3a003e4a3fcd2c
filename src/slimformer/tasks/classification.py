"""Classes or a score for one text or a pair of texts: reviews, intents, entailment, similarity, all of GLUE.

Columns, classes, kind and metric are found from the data and the model, and every one of them can be overruled by an option. The data
is a folder with a train and a dev file, one file (a tenth of it becomes dev), or a data set of the hub. Reading and scoring need
neither torch nor transformers.
"""

from __future__ import annotations

import os.path
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from slimformer.data.columns import find_columns, find_texts, flag_columns, names_beside
from slimformer.data.files import SHARD, SUFFIXES, Table, join_tables, read_hub, read_splits, read_table, spread
from slimformer.data.glue import GLUE, Glue, read_glue
from slimformer.data.label_sets import LabelSet, flag_width, label_sets, mark_between, told_apart, with_flags
from slimformer.data.labels import (
    ambiguous_ids,
    are_placeholders,
    enumerate_labels,
    guess_kind,
    id_of,
    is_collection,
    is_number,
    match_by_name,
    match_labels,
    maybe_none,
    model_labels,
    one_spelling,
    several_labels,
    single_labels,
    sort_labels,
    spell_label,
    spell_labels,
)
from slimformer.data.memory import data_source, with_kept_names
from slimformer.data.plain_texts import MOST_TEXTS, is_plain, read_plain
from slimformer.data.sources import Format, Stamp, is_training, no_training_data, read_sources, settle_dev, stamp
from slimformer.data.splits import (
    FOR_DEV,
    FOR_VALIDATION,
    TRAIN_NAMES,
    dev_count,
    draw_rows,
    draw_some,
    read_json_option,
    validation_count,
)
from slimformer.data.texts import repair_text, stem_of
from slimformer.errors import DataError, RecipeError, nearest, shown
from slimformer.log import remark, remarks_on
from slimformer.tasks._labelled import Labelled, per_example
from slimformer.tasks._metrics import CLASS_METRICS, LABEL_METRICS, SCORE_METRICS
from slimformer.tasks._own_metric import is_own, known_or_own
from slimformer.tasks._readings import AnyLabels, OneClass, OneScore, Reading
from slimformer.tasks._unlabelled import AGREEMENT, FEWEST_TOLD, TELLINGS, half_of_dev, telling_of, told_names, untold_rows
from slimformer.tasks._weights import class_weights, told_weights, weight_mistakes
from slimformer.tasks.base import Example, Features, Outputs, Split, option

if TYPE_CHECKING:
    from transformers import PretrainedConfig


MULTI: Literal["multi_label"] = "multi_label"
METRICS: Mapping[str, tuple[str, ...]] = {"classes": CLASS_METRICS, "score": SCORE_METRICS, MULTI: LABEL_METRICS}
USUAL = {"classes": "accuracy", "score": "spearman", MULTI: "f1_micro"}
_AGREES = {
    "classes": "accuracy",
    "score": "spearman",
    MULTI: "exact",
}  # the metric that is the agreement with a teacher's answers
_RARE = 3  # rows; a class with fewer is perhaps none
_MOJIBAKE = re.compile("\u00c3[\u0080-\u00bf]|\u00e2\u20ac[\u0080-\u2122]")  # two letters that one became
_FEWEST = 20  # rows from which a column of classes repeats them


@dataclass(frozen=True)
class Classification(Labelled):
    """Text classification, or scoring.

    `data` is a folder with train.* and dev.* (or validation.*), one file, `owner/name[:config][@revision]` on the hub, or `glue/sst2`;
    or data in memory: a list of dicts, a DataFrame, a Dataset, a DatasetDict, or a dict of such data by split. That is kept in the
    user's cache (`data/memory.py`). `glue` names a GLUE task, which settles columns, class order and metric. `text`, `text_pair` and
    `label` name columns; without them the usual names are looked for, and the log says what was taken. `kind` is "classes", "score", or
    "multi_label" if a row may have several labels, or none; "auto" takes labels with fractions for scores, and lists, names with marks
    between them, or a column of 0 and 1 for each label (named in `label` with commas, or found) for several. `metric` "auto" is
    accuracy for classes, spearman for scores, f1_micro for several labels, or GLUE's own; `f1` takes the last of two classes as
    positive and is the macro mean for more. `threshold` is the probability from which one of several labels is given; without it,
    it is fitted on validation examples for each file. A metric with a dot in its name is a function of yours (`_own_metric.py`).
    `class_weights` say what a row of each class counts in the loss: "balanced", the same for each class as a whole, or a number
    for some, 1 for the others; of several labels, what a row counts that has the label. Teachers' answers are not weighed.

    `train_rows` is a JSON file with the row numbers (from 0) to train on, or how many rows to draw. `validation_share` of the training
    data, but between 200 and 2,000 examples and at most a fifth, is set aside as validation examples. `labels` are the class names in
    the order of the model's ids; `bind` fills them. `labels: none` says that nobody told any: the teacher answers the texts, and what
    counts is the "agreement" with it: the share of equal answers, of scores Spearman's correlation. `labels: dev` says that only the
    dev data has labels, half of which is then chosen on. `answers_from` keeps which it is: "teacher", "dev", or "data".

    RecipeError names every option that is wrong. What is wrong with the data becomes a DataError when it is read.

    >>> from slimformer.tasks.base import Split
    >>> reviews = [{"review": "I liked it.", "stars": "good"}, {"review": "I did not.", "stars": "bad"}] * 50
    >>> task = Classification(data=reviews).settled()
    >>> task.text, task.label, task.labels, task.metric
    ('review', 'stars', ('bad', 'good'), 'accuracy')
    >>> [len(task.split(split)) for split in (Split.TRAIN, Split.VALIDATION, Split.DEV)]
    [72, 18, 10]
    """

    paths: ClassVar[tuple[str, ...]] = ("data", "train_rows")
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"glue/{name}": {"data": f"glue/{name}", "glue": name} for name in GLUE
    }

    data: Any = option("", "A folder with train and dev files, one file, or a hub name.", required=True)  # noqa: RUF009
    glue: str | None = None
    text: str | None = option(None, "Column of the text; guessed if it has a usual name.")
    text_pair: str | None = option(None, "Column of the second text, if pairs are classified.")
    label: str | None = option(None, "Column of the label; guessed if it has a usual name.")
    kind: Literal["auto", "classes", "score", "multi_label"] = option(
        "auto", "What a row gets: classes (one of them), score, or multi_label; found from the data."
    )
    metric: str = option(
        "auto",
        "The metric that counts: accuracy, f1, f1_macro, matthews, pearson, spearman, f1_micro, exact, or package.function.",
    )
    class_weights: Any = option(None, "What a row of each class counts in the loss: balanced, or class=2,other=1.")  # noqa: RUF009
    max_length: int = option(128, "Tokens an input may have; longer ones are cut off.")
    validation_share: float = 0.05
    train_rows: str | int | None = option(None, "How many rows to train on, or a JSON file of row numbers.")
    labels: Any = option((), "Class names in the order of their ids; none (the teacher answers) or dev (only dev has labels).")  # noqa: RUF009
    threshold: float | None = None
    answers_from: str = "data"

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", data_source(self.data))
        object.__setattr__(self, "class_weights", told_weights(self.class_weights))
        object.__setattr__(self, "answers_from", telling_of(self.labels) or self.answers_from)
        object.__setattr__(self, "labelled", self.answers_from == "data")
        object.__setattr__(self, "labels", () if telling_of(self.labels) else told_names(self.labels))
        if self.glue is None and re.fullmatch(r"glue/\w+", self.data) and not os.path.exists(self.data):
            object.__setattr__(self, "glue", self.data.removeprefix("glue/"))
        mistakes = list(self._mistakes())
        if mistakes:
            raise RecipeError(
                "the task classification cannot be set up like that.",
                facts=mistakes,
                help="mend the option, or leave it out: what is not said is found from the data.",
            )
        if self.answers_from == "teacher":
            object.__setattr__(self, "metric", AGREEMENT)
        elif self.glue is not None:
            object.__setattr__(self, "kind", "classes" if GLUE[self.glue].labels else "score")
            if self.metric == "auto":
                object.__setattr__(self, "metric", GLUE[self.glue].metric)
        elif self.metric == "auto" and self.kind != "auto":
            object.__setattr__(self, "metric", USUAL[self.kind])

    def _mistakes(self) -> Iterable[str]:
        known = {"auto": tuple(dict.fromkeys(name for names in METRICS.values() for name in names)), **METRICS}
        if self.glue is not None and self.glue not in GLUE:
            yield f"glue: there is no '{self.glue}'; {nearest(self.glue, GLUE)}"
        if self.kind not in known:
            yield f"kind: '{self.kind}'; known: {', '.join(known)}"
        elif self.answers_from not in TELLINGS:
            yield f"answers_from: '{self.answers_from}'; known: {', '.join(TELLINGS)}"
        elif self.answers_from == "teacher" and self.metric not in ("auto", AGREEMENT):
            yield f"metric: '{self.metric}' needs labels; without any it is the {AGREEMENT} with the teacher"
        elif self.answers_from != "teacher" and self.metric != "auto" and not known_or_own(self.metric, known[self.kind]):
            of_kind = "" if self.kind == "auto" else f" for {self.kind}"
            yield f"metric: there is no '{self.metric}'{of_kind}; {nearest(self.metric, known[self.kind])}, or package.function"
        if self.class_weights is not None and self.answers_from != "data":
            yield "class_weights: they weigh the labels of training rows, and these have none"
        elif self.class_weights is not None and self.kind == "score":
            yield "class_weights: a score has no classes"
        else:
            yield from weight_mistakes(self.class_weights)
        if self.text_pair is not None and self.text is None:
            yield "text_pair: name the first text column too (text)"
        if not 0 < self.validation_share < 0.5:
            yield f"validation_share: a share above 0 and below 0.5, not {self.validation_share}"
        if not 4 <= self.max_length <= 100_000:
            yield f"max_length: at least 4 tokens, not {self.max_length}"
        if isinstance(self.train_rows, int) and self.train_rows < 10:
            yield f"train_rows: at least 10, not {self.train_rows}"
        if self.threshold is not None and not 0 < self.threshold < 1:
            yield f"threshold: a probability above 0 and below 1, not {self.threshold}"

    def title(self) -> str:
        if self.glue is not None:
            return f"glue/{self.glue}"
        return f"classification {Path(self.data).resolve().name}" if self.data else "classification"

    @property
    def classes(self) -> tuple[str, ...]:
        settled = self.kind == "score" or (self.kind != "auto" and self.labels) or self.answers_from == "teacher"
        task = self if settled else self.settled()
        return () if task.kind == "score" else task.labels

    def reading(self) -> Reading:
        task = self if self.kind != "auto" else self.settled()
        if task.kind == MULTI:
            return AnyLabels(task.classes, task.threshold, task.weights)
        return OneClass(task.classes, task.weights) if task.classes else OneScore()

    @cached_property
    def weights(self) -> tuple[float, ...] | None:
        """What a row of each class counts in the loss, in the order of the ids; None if all count the same."""
        if self.class_weights is None or self.kind == "score":
            return None
        return class_weights(self.class_weights, self.classes, [item.answer for item in self.split(Split.TRAIN)])

    @property
    def tunes(self) -> bool:
        return self.kind == MULTI and self.threshold is None and self.answers_from != "teacher"

    def tune(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> Classification:
        """This task with the threshold that makes its metric best on these examples; unchanged if a row has one class, or a score."""
        if not self.tunes:
            return self
        fitted = AnyLabels(self.classes).fitted(per_example(outputs["logits"], features), self._labels(examples), self.metric)
        return replace(self, threshold=fitted.threshold)

    # ---- what the data says

    def split(self, name: Split) -> Sequence[Example]:
        return _examples(self, Split(name), stamp(self.data), stamp(self.train_rows))

    def settled(self) -> Classification:
        """This task with columns, kind, metric and class names filled from its data; what was filled before stays."""
        if self.answers_from == "teacher":
            return self
        table = self._table(Split.TRAIN, any_split=True)
        texts, label = self._columns(table)
        kind = self.kind if self.kind != "auto" else _guess(table, label)
        names: tuple[str, ...] = ()
        if kind == MULTI:
            names = self.labels or self._known_names(table, label) or self._names_in_sets(table, label)
        elif kind == "classes":
            names = self._names_of_classes(table, label)
        metric = self.metric if self.metric != "auto" else USUAL[kind]
        if metric not in METRICS[kind] and not is_own(metric):
            holds = {"classes": "classes", "score": "scores (numbers with a fraction)", MULTI: "several labels a row"}[kind]
            raise DataError(
                f"the metric '{metric}' does not fit: column '{label}' of {table.where} holds {holds}.",
                help=f"for {kind}: {', '.join(METRICS[kind])}.",
            )
        if metric == "f1" and len(names) > 2:
            metric = "f1_macro"
        pair = texts[1] if len(texts) > 1 else None
        return replace(self, text=texts[0], text_pair=pair, label=label, kind=kind, metric=metric, labels=names)

    def _names_of_classes(self, table: Table, label: str) -> tuple[str, ...]:
        """The classes of a column, in the order of their ids; DataError if it cannot hold classes."""
        raw = _raw_labels(table, label)
        names = self.labels or self._known_names(table, label) or sort_labels(one_spelling(raw).values())
        if len(set(raw)) < 2 and "train" in self._sources():
            raise DataError(
                f"{table.where}: every row has the label {shown(raw[0], 60)} in column '{label}'.",
                help="a classifier needs two classes; is it the right column, and the whole file?",
            )
        if len(raw) >= _FEWEST and 2 * len(set(raw)) > len(raw) and "train" in self._sources():
            raise DataError(
                f"{table.where}: column '{label}' has {len(set(raw)):,} different values in {len(raw):,} rows, so it does "
                "not hold classes.",
                facts=[f"for instance: {enumerate_labels(raw[:3])}"],
                help="name the column of the labels: --label <column>.",
            )
        return names

    def _names_in_sets(self, table: Table, label: str) -> tuple[str, ...]:
        """The labels of a column whose rows have several, in the order of their ids; DataError if no row has any."""
        flags = told_apart(table, label)
        if flags:
            return flags
        width = flag_width(table, label)
        found = [name for names in self._sets(table, label) for name in names]
        if not found:
            raise DataError(
                f"{table.where}: no row has a label in column '{label}'.", help="is it the right column, and the whole file?"
            )
        return tuple(map(str, range(width))) if width else sort_labels(one_spelling(found).values())

    def _sets(self, table: Table, label: str) -> list[LabelSet]:
        """The labels of each row, read as those of the training data are."""
        first = self._table(Split.TRAIN, any_split=True)
        return label_sets(table, label, mark_between(first, label, sure=self.kind == MULTI))

    def _has_several(self, names: Sequence[str]) -> bool:
        """Whether rows may have several labels; not if each is the name of one of a model's classes, such as "light/on"."""
        table = self._table(Split.TRAIN, any_split=True)
        values = table.column(self._columns(table)[1])
        whole = all(isinstance(value, str) for value in values) and match_by_name({*values}, names, ())
        return not whole and bool(_several_in(values))

    @property
    def has_dev_data(self) -> bool:
        """Whether dev data was given; if not, it is drawn."""
        return "dev" in self._sources()

    def _sources(self) -> Mapping[str, Table]:
        return _settled_tables(self, stamp(self.data))

    def _lacking(self, train: Table, test: Table) -> str:
        """What labels the test data lacks that stands in for dev, "" if none."""
        label = self._columns(train)[1]
        if label not in test.columns:
            return f"no column '{label}'"
        if not any(text is not None for text in spell_labels(test.columns[label])):
            return f"column '{label}' says {shown(test.columns[label][0], 20)} in every row"
        return ""

    def _table(self, name: Split, *, any_split: bool = False) -> Table:
        """The rows a split is drawn from; with `any_split`, the dev data if there is no training data."""
        sources = self._sources()
        if name is Split.DEV and "dev" in sources:
            return sources["dev"]
        if "train" in sources:
            return sources["train"]
        if any_split:
            return sources["dev"]
        raise no_training_data(
            self.data,
            "name the training file train.tsv, .csv, .jsonl or .parquet; files that belong together may lie in a folder train.",
            f"{', '.join(TRAIN_NAMES)} with {', '.join(SUFFIXES)}",
        )

    def _form(self) -> Glue | None:
        return GLUE[self.glue] if self.glue is not None else None

    def _columns(self, table: Table) -> tuple[tuple[str, ...], str]:
        return find_columns(table, self.text, self.text_pair, self.label, self._form())

    def _known_names(self, table: Table, label: str) -> tuple[str, ...]:
        """The names that GLUE or the data itself gives to class ids; none if it gives none."""
        form = self._form()
        return form.labels if form is not None else table.class_names.get(label) or names_beside(table, label)

    def _id_sets(self, table: Table, sets: Sequence[LabelSet]) -> list[list[int]]:
        """The ids of each row's labels, rising; DataError with the first row that has an unknown one."""
        rows = [row for row, names in enumerate(sets) for _ in names]
        ids = iter(self._class_ids(table, [name for names in sets for name in names], rows))
        return [sorted({next(ids) for _ in names}) for names in sets]

    def _class_ids(self, table: Table, raw: Sequence[str], rows: Sequence[int] | None = None) -> list[int]:
        """The class id of each label; DataError with the row (`rows`: that of each) of the first unknown one."""
        label = self._columns(table)[1]
        ids = match_labels(set(raw), self.labels, self._known_names(table, label))
        unknown = [text for text in dict.fromkeys(raw) if text not in ids]
        if unknown:  # 1 and 3 may be ids, and are none beside 4.5: that is named
            known = self._known_names(table, label)
            text = next((text for text in unknown if not match_labels([text], self.labels, known)), unknown[0])
            quoted = f"'{text}'" if len(text) <= 60 else shown(text, 60)
            row = raw.index(text) if rows is None else rows[raw.index(text)]
            raise DataError(
                f"{table.place(row)}: the label {quoted} in column '{label}' is not a known one.",
                facts=[f"known labels: {enumerate_labels(self.labels)}", f"rows with {quoted}: {raw.count(text)}"],
                help=f"did you mean another column or another model? {nearest(text[:60], [name[:60] for name in self.labels])[:200]}",
            )
        read = {text: self.labels[ids[text]] for text in sort_labels(set(raw)) if text != self.labels[ids[text]]}
        if read and not are_placeholders(self.labels):
            pairs = [f"{shown(text, 40)} is '{name}'" for text, name in read.items()]
            remark(f"{table.where}: column '{label}' is read by the names of the classes: {_some(pairs)}")
        return [ids[text] for text in raw]

    def _ids_of_answers(self, answers: Iterable[str]) -> Mapping[str, int]:
        """The ids of answers by the model's names, or as the data spells them before the task is bound to a model."""
        answers = set(answers)
        ids = {name: index for index, name in enumerate(self.classes)}
        if answers <= ids.keys():
            return ids
        table = self._table(Split.TRAIN, any_split=True)
        return ids | match_labels(answers, self.classes, self._known_names(table, self._columns(table)[1]))

    # ---- what the model says

    def configure(self) -> Mapping[str, Any]:
        if self.answers_from == "teacher" and self.kind == "auto":
            raise DataError(
                "with labels: none the classes are those of a model that was tuned, and this one has no head for them.",
                help="name a tuned model, or a teacher; or give labels.",
            )
        return super().configure()

    def bind(self, config: PretrainedConfig | Mapping[str, Any]) -> Classification:
        names, problem = model_labels(config)
        if self.answers_from == "teacher":
            found = MULTI if problem == AnyLabels.problem_type else "score" if len(names) == 1 else "classes"
            return replace(self, kind=found, labels=() if found == "score" else names)  # type: ignore[arg-type]
        kind = self.kind
        if kind == "auto":
            kind = MULTI if problem == AnyLabels.problem_type or self._has_several(names) else "classes"
            if kind != MULTI and (len(names) == 1 or problem == "regression"):
                kind = "score"
        if kind != MULTI and problem == AnyLabels.problem_type:
            raise DataError(
                "the model gives a row several labels (problem_type: multi_label_classification): its classes do not exclude each other, "
                "and those of this task do.",
                facts=[f"the model's labels: {enumerate_labels(names)}"],
                help="start from a model that was trained to give one label, or leave out kind.",
            )
        task = replace(self, kind=kind, labels=()).settled()
        if task.kind == MULTI and problem not in (None, AnyLabels.problem_type):
            raise DataError(
                f"the rows of the data have several labels, and the model gives each one answer (problem_type: {problem}).",
                facts=[f"the model's labels: {enumerate_labels(names)}"],
                help="start from a model that was trained for several labels, or from an encoder, which is tuned first.",
            )
        table = task._table(Split.TRAIN, any_split=True)
        label = task._columns(table)[1]
        if task.kind == MULTI:
            return task._bound_to(names, table, label)
        raw = _raw_labels(table, label)
        if task.kind == "score":
            if len(names) != 1:
                raise DataError(
                    f"the data has scores, the model has {len(names)} classes: {enumerate_labels(names)}.",
                    help="train a model with one output for scores, or say kind: classes.",
                )
            if not all(map(is_number, raw)):
                raise DataError(
                    f"the model gives one score (its config.json names one label), but column '{label}' of {table.where} holds "
                    f"classes: {enumerate_labels(sort_labels(set(raw)))}.",
                    help="take a model that was trained for these classes, or name them in its config.json (id2label).",
                )
            return task
        known = task.labels
        if len(names) == 1:
            raise DataError(
                f"the model gives one score, the data has {len(known)} classes: {enumerate_labels(known)}.",
                help="train a model for these classes, or say kind: score.",
            )
        counted = are_placeholders(names) and len(known) == len(names)  # any order of ids is as good as another
        if ambiguous_ids(set(raw), names, task._known_names(table, label)) and not counted:
            raise _ambiguous(raw, names)
        if not are_placeholders(names):
            bound = replace(task, labels=names)
        else:  # LABEL_0, LABEL_1, ...: the model only knows an order, so the data's own order is the best there is
            if len(known) > len(names) or (
                len(known) < len(names) and not all(id_of(text) in range(len(names)) for text in known)
            ):
                raise DataError(
                    f"the model has {len(names)} classes without names, the data has {len(known)}: {enumerate_labels(known)}.",
                    help="the model was trained on other labels; name them in its config.json (id2label).",
                )
            order = self.labels if len(self.labels) == len(names) else known  # a person who names them knows their order
            bound = replace(task, labels=order if len(order) == len(names) else names)
        bound._class_ids(table, raw)
        return bound

    def _bound_to(self, names: tuple[str, ...], table: Table, label: str) -> Classification:
        """This task of several labels with the order of a model's; DataError if that has other labels, or fewer."""
        known = self.labels
        if are_placeholders(names):
            if len(known) > len(names):
                raise DataError(
                    f"the model has {len(names)} labels without names, the data has {len(known)}: {enumerate_labels(known)}.",
                    help="the model was trained on other labels; name them in its config.json (id2label).",
                )
            names = known if len(known) == len(names) else names
        bound = replace(self, labels=names)
        bound._id_sets(table, bound._sets(table, label))
        return bound

    # ---- answers of a teacher

    def answered(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> Sequence[Example]:
        """Without labels the teacher's answers."""
        if self.answers_from != "teacher":
            return examples
        told = self.reading().told(per_example(outputs["logits"], features))
        return tuple(replace(item, answer=answer) for item, answer in zip(examples, told, strict=True))

    def score(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> dict[str, float]:
        found = super().score(outputs, features, examples)
        return {AGREEMENT: found[_AGREES[self.kind]]} if self.answers_from == "teacher" else found

    def check_model(
        self,
        config: PretrainedConfig | Mapping[str, Any],
        predict: Callable[[], tuple[Outputs, Features, Sequence[Example]]],
    ) -> str:
        return "" if self.answers_from == "teacher" else super().check_model(config, predict)

    def notes(self) -> tuple[str, ...]:
        """What was found or guessed in the data: columns, classes, and what is odd about the rows."""
        if self.answers_from == "teacher":
            return _notes_on_texts(self)
        task = self if self.kind == "score" or (self.kind != "auto" and self.labels) else self.settled()
        sources = task._sources()
        texts: dict[Split, list[tuple[str, ...]]] = {}
        for name in Split:
            if name is Split.DEV or "train" in sources:
                texts[name] = [item.texts for item in task.split(name)]
        table = task._table(Split.TRAIN, any_split=True)
        if task.kind == "score":
            remark(f"{table.where}: the labels are scores.")
            firsts = [row[0] for rows in texts.values() for row in rows if len(row) > 1]
            if len(firsts) > 1.5 * len({*firsts}):
                remark(
                    f"{table.where}: most first texts come several times, as queries with several passages do; their order is what "
                    "--task reranking judges."
                )
        elif task.kind == MULTI:
            sets = task._sets(table, str(task.label))
            mean, none = sum(map(len, sets)) / len(sets), sum(not names for names in sets)
            remark(
                f"{table.where}: {len(task.labels)} labels, of which a row has any number: {mean:.1f} on average, none in {none:,} of "
                f"{len(sets):,} rows; in the order of their ids: {enumerate_labels(task.labels)}"
            )
            counts = Counter(name for item in task.split(Split.TRAIN) for name in item.answer) if "train" in sources else {}
            rare = [name for name in task.labels if counts and counts.get(name, 0) < _RARE]
            if rare:
                remark(f"{table.where}: fewer than {_RARE} rows to train on have the label {enumerate_labels(rare)}.")
        else:
            remark(f"{table.where}: {len(task.labels)} classes, in the order of their ids: {enumerate_labels(task.labels)}")
            for said in _odd_labels(_raw_labels(table, str(task.label)), task.labels):
                remark(f"{table.where}: {said}")
            counts = Counter(item.answer for item in task.split(Split.TRAIN)) if "train" in sources else {}
            rare = [name for name in task.labels if 0 < counts.get(name, 0) < _RARE]
            if rare:
                remark(f"{table.where}: fewer than {_RARE} rows to train on have the label {enumerate_labels(rare)}.")
        broken = sum(bool(_MOJIBAKE.search(text)) for rows in texts.values() for row in rows for text in row)
        if broken:
            remark(f"{table.where}: {broken:,} texts look like UTF-8 that was read as Latin-1 before they were saved.")
        blank = sum(not text.strip() for rows in texts.values() for row in rows for text in row)
        if blank:
            remark(f"{table.where}: {blank:,} texts are empty.")
        seen = {_folded(row) for name in (Split.TRAIN, Split.VALIDATION) for row in texts.get(name, ())}
        leaked = sum(_folded(row) in seen for row in texts[Split.DEV])
        if leaked:
            remark(
                f"{task._table(Split.DEV).where}: {leaked:,} of {len(texts[Split.DEV]):,} inputs of dev are in the training data too, "
                "so scores on dev are too good."
            )
        return remarks_on(self.data)


# ---- reading


@lru_cache(maxsize=4)
def _read_tables(data: str, glue: str | None, _key: Stamp, untold: bool = False) -> Mapping[str, Table]:
    """The tables "train", "dev" and, without dev, "test", as far as they are there; if `untold`, without "train"."""

    def read(files: Sequence[Path]) -> Table:
        if untold and is_training(files[0]):
            return Table(str(files[0]), {}, ())
        tables = [read_table(file) if glue is None else read_glue(file, GLUE[glue]) for file in files]
        return spread(with_kept_names(join_tables(tables), files[0]))

    form = Format(
        task="classification",
        suffixes=SUFFIXES,
        match=lambda files, name: [file for file in files if SHARD.sub("", stem_of(file)).lower() == name],
        read=read,
        read_hub=lambda name: {split: spread(table) for split, table in read_hub(name).items()},
        example="./reviews",
        forms="a folder or a file",
        read_splits=lambda file: {split: spread(table) for split, table in read_splits(file).items()},
    )
    return read_sources(data, form, hub=f"nyu-mll/glue:{glue}" if data == f"glue/{glue}" else None)


@lru_cache(maxsize=8)
def _settled_tables(task: Classification, key: Stamp) -> Mapping[str, Table]:
    """The tables "train" and "dev", one or both of them; test data stands in for dev if it has labels."""
    tables = dict(_read_tables(task.data, task.glue, key, task.answers_from == "dev"))
    if task.answers_from == "dev":
        tables = {name: table for name, table in tables.items() if name != "train"}
        if not tables:
            raise DataError(
                f"{task.data} has no dev data, and labels: dev says that only that has labels.",
                help="add a dev file with labels.",
            )
    flags = flag_columns(next(iter(tables.values())), task.label) if task.glue is None else ()
    for name, table in tables.items() if flags else ():
        if {*flags} <= {*table.columns}:
            with suppress(DataError) if name == "test" else nullcontext():  # a test file often holds -1 for "not told"
                tables[name] = with_flags(table, flags)
    return settle_dev(tables, lambda table: table.where, lambda test: task._lacking(tables.get("train", test), test))


def _guess(table: Table, column: str) -> Literal["classes", "score", "multi_label"]:
    """What a column holds."""
    several = _several_in(table.column(column))
    if several:
        remark(
            f"{table.where}: rows of column '{column}' may have several labels: {several}. If each is one name, say --kind classes."
        )
        return MULTI
    return guess_kind(_raw_labels(table, column))


def _several_in(values: Sequence[Any]) -> str:
    """How these rows may have several labels, in a clause; "" if each has one, or if a list among them is a mistake."""
    lists = [is_collection(value) for value in values if value is not None]
    if single_labels(values) is not None or (any(lists) and not all(lists)):
        return ""
    return several_labels(values)


def _raw_labels(table: Table, column: str) -> list[str]:
    """The label of each row as the data spells it; DataError with the row if one is missing, or if a row has several."""
    values = table.column(column)
    alone = single_labels(values)
    if alone is not None:
        remark(f"{table.where}: each list in column '{column}' holds one label, which is taken.")
        values = alone
    row = next((row for row, value in enumerate(values) if not isinstance(value, (str, int, float, type(None)))), None)
    if row is not None:
        raise DataError(
            f"{table.place(row)}: no label but a list in column '{column}' ({shown(values[row], 40)}).",
            help="give each row one label, or say kind: multi_label if a row may have several.",
        )
    labels = spell_labels(values)
    if None in labels:
        row = labels.index(None)
        raise DataError(
            f"{table.place(row)}: no label in column '{column}' ({shown(values[row], 40)}).",
            facts=[f"rows without a label: {labels.count(None):,} of {len(labels):,}"],
            help="give the row a label or leave it out.",
        )
    local = next(
        (row for row, text in enumerate(labels) if is_number(text or "") and not is_number(spell_label(values[row]) or "")),
        None,
    )
    if local is not None:
        remark(
            f"{table.where}: the numbers in column '{column}' are read as written locally: {values[local]} is {labels[local]}"
        )
    return [text for text in labels if text is not None]


def _odd_labels(raw: Sequence[str], names: Sequence[str]) -> Iterable[str]:
    """What a person should know of how labels became classes."""
    merged = [f"{shown(text, 40)} is {shown(name, 40)}" for text, name in sorted(one_spelling(raw).items())
              if text != name and text not in names]  # fmt: skip
    if merged and set(one_spelling(raw).values()) <= {*names}:
        yield f"labels that differ in case or spaces alone are one class: {_some(merged)}"
    strange = maybe_none(set(raw))
    if strange:
        yield f"{enumerate_labels(strange)} counts as a class; rows that have no label must be left out."


def _some(parts: Sequence[str]) -> str:
    return ", ".join(parts[:8]) + (", ..." if parts[8:] else "")


def _ambiguous(raw: Sequence[str], names: Sequence[str]) -> DataError:
    """The error for numbers that could be ids of the model's classes in more than one way."""
    values = [value for value in map(id_of, raw) if value is not None]
    low, high = min(values), max(values)
    what = f"no ids above {high}" if low == 0 else f"numbers from {low} to {high}"
    ids = f"the ids of the model run from 0 to {len(names) - 1}" if low else f"the last of its ids is {len(names) - 1}"
    return DataError(
        f"the data has {what}, the model has {len(names)} classes: {enumerate_labels(names)}.",
        facts=[f"{ids}: which number means which class would be a guess, perhaps wrong by one"],
        help="write the labels in the data by the model's names.",
    )


def _folded(texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(" ".join(text.casefold().split()) for text in texts)


def _scores(table: Table, raw: Sequence[str]) -> list[float]:
    for row, text in enumerate(raw):
        if not is_number(text):
            raise DataError(f"{table.place(row)}: {shown(text, 60)} is no number.", help="for classes, say kind: classes.")
    return [float(text) for text in raw]


@lru_cache(maxsize=4)
def _bare_rows(
    data: str, glue: str | None, text: str | None, text_pair: str | None, key: Stamp
) -> Mapping[str, tuple[tuple[str, ...], ...]]:
    """The texts of each row, "train" and "dev", one or both of them; no label is looked for."""
    if glue is None and is_plain(data):
        plain = read_plain(data, None, MOST_TEXTS, key)
        return {name: tuple((line,) for line in texts.texts) for name, texts in plain.items()}
    found: dict[str, tuple[tuple[str, ...], ...]] = {}
    lines = [place for name in TRAIN_NAMES if is_plain(str(place := Path(os.path.expanduser(data)) / f"{name}.txt"))]
    if lines:  # texts to learn from beside a table that is only judged by
        found["train"] = tuple((line,) for line in read_plain(str(lines[0]), None, MOST_TEXTS, key)["train"].texts)
    for name, table in _read_tables(data, glue, key, bool(lines)).items():
        if name in found:
            continue
        columns = find_texts(table, text, text_pair)
        parts = [(column, table.column(column)) for column in columns]
        found[name] = tuple(
            tuple(_text(table, row, values[row], column) for column, values in parts) for row in range(len(table))
        )
    if "test" in found:
        found.setdefault("dev", found.pop("test"))
    return found


def _without_labels(task: Classification, name: Split, key: Stamp, rows_key: Stamp) -> tuple[Example, ...]:
    """The examples where the data, or its training part, tells no labels."""
    taught = task.answers_from == "teacher"
    if not taught and name is not Split.TRAIN:
        told = _told_examples(task, Split.DEV, key, rows_key)
        return tuple(half_of_dev(told, name, task.data, "dev rows with labels"))
    sources = _bare_rows(task.data, task.glue, task.text, task.text_pair, key)
    if "train" not in sources and not (name is Split.DEV and "dev" in sources):
        raise no_training_data(task.data, "name the file of texts train.txt, .csv, .jsonl or .parquet.")
    counts = {kind: len(texts) for kind, texts in sources.items()}

    def chosen(rows: list[int]) -> list[int]:
        return _chosen(task.train_rows, rows, counts["train"])

    kind, rows = untold_rows(counts, name, task.validation_share if taught else None, chosen)
    if not rows:
        raise DataError(
            f"{task.data}: {counts[kind]} texts are too few to set some aside.", help=f"give at least {FEWEST_TOLD}."
        )
    return tuple(Example(f"{kind}/{row}", sources[kind][row], None) for row in rows)


def _notes_on_texts(task: Classification) -> tuple[str, ...]:
    """What is said of data whose labels nobody reads."""
    remark(
        f"{task.data}: no labels are read; what is measured is how often the answer is the teacher's, not how often it is right."
    )
    seen = {_folded(item.texts) for name in (Split.TRAIN, Split.VALIDATION) for item in task.split(name)}
    dev = task.split(Split.DEV)
    leaked = sum(_folded(item.texts) in seen for item in dev)
    if leaked:
        remark(
            f"{task.data}: {leaked:,} of {len(dev):,} inputs of dev are in the training data too, so scores on dev are too good."
        )
    return remarks_on(task.data)


@lru_cache(maxsize=8)
def _examples(task: Classification, name: Split, key: Stamp, rows_key: Stamp) -> tuple[Example, ...]:
    if task.answers_from != "data":
        return _without_labels(task, name, key, rows_key)
    return _told_examples(task, name, key, rows_key)


def _told_examples(task: Classification, name: Split, _key: Stamp, _rows_key: Stamp) -> tuple[Example, ...]:
    """The examples of a split with their labels."""
    if task.kind == "auto" or (task.kind != "score" and not task.labels):
        task = task.settled()
    table = task._table(name)
    texts, label = task._columns(table)
    if task.kind == MULTI:
        sets = task._id_sets(table, task._sets(table, label))
        return _as_examples(task, name, table, texts, [tuple(task.labels[index] for index in ids) for ids in sets], None)
    raw = _raw_labels(table, label)
    ids = task._class_ids(table, raw) if task.kind == "classes" else None
    answers: Sequence[Any] = [task.labels[index] for index in ids] if ids is not None else _scores(table, raw)
    return _as_examples(task, name, table, texts, answers, ids)


def _as_examples(
    task: Classification, name: Split, table: Table, texts: Sequence[str], answers: Sequence[Any], ids: Sequence[int] | None
) -> tuple[Example, ...]:
    """The examples of a split, of the answers of all rows; `ids`: the classes, of which each split gets its share."""
    rows = _rows(task, name, table, ids)
    parts = [(column, table.column(column)) for column in texts]
    split = "dev" if name is Split.DEV else "train"
    return tuple(
        Example(f"{split}/{row}", tuple(_text(table, row, values[row], column) for column, values in parts), answers[row])
        for row in rows
    )


def _rows(task: Classification, name: Split, table: Table, ids: Sequence[int] | None) -> list[int]:
    """The rows of a split; DataError if none are left, or none but those of one class."""
    rows = list(range(len(table)))
    if "dev" not in task._sources():
        dev = draw_rows(rows, ids, dev_count(len(rows)), FOR_DEV)
        rows = [row for row in rows if (row in dev) == (name is Split.DEV)]
    if name is not Split.DEV:
        rows = _chosen(task.train_rows, rows, len(table))
        if ids is not None and rows and len({ids[row] for row in rows}) < 2:
            raise DataError(
                f"{table.where}: all {len(rows)} training rows have the label '{task.labels[ids[rows[0]]]}'.",
                help="a classifier needs two classes; is it the right column, and the whole file?",
            )
        validation = draw_rows(rows, ids, validation_count(task.validation_share, len(rows)), FOR_VALIDATION)
        rows = [row for row in rows if (row in validation) == (name is Split.VALIDATION)]
    if not rows:
        raise DataError(f"{table.where}: {len(table)} rows are too few to set some aside.", help="give at least 20 examples.")
    return rows


def _chosen(wanted: str | int | None, rows: Sequence[int], total: int) -> list[int]:
    """The rows to train on, in order: all, those listed in a file, or so many at random."""
    if wanted is None:
        return list(rows)
    if isinstance(wanted, int):
        return draw_some(rows, wanted, "rows")
    shape = 'it should hold {"train_rows": [0, 5, ...]}.'
    content = read_json_option(wanted, "train_rows", "rows", shape)
    numbers = content.get("train_rows") if isinstance(content, dict) else content
    if not isinstance(numbers, list) or not numbers or any(type(number) is not int for number in numbers):
        raise DataError(f"{wanted} holds no list of row numbers.", help=shape)
    wrong = [number for number in numbers if not 0 <= number < total]
    if wrong:
        raise DataError(f"{wanted} names row {wrong[0]}, the training data has {total}.", help="rows are counted from 0.")
    inside = set(rows)
    return sorted({number for number in numbers if number in inside})


def _text(table: Table, row: int, value: Any, column: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value != value:
        raise DataError(
            f"{table.place(row)}: no text in column '{column}' ({shown(value, 40)}).", help="fill the row or leave it out."
        )
    return repair_text(str(value))
