"""Classes or a score for one text or a pair of texts: reviews, intents, entailment, similarity, all of GLUE.

Columns, classes, kind and metric are found from the data and the model, and every one of them can be overruled by an option. The data
is a folder with a train and a dev file, one file (a tenth of it becomes dev), or a data set of the hub. Reading and scoring need
neither torch nor transformers.
"""

from __future__ import annotations

import os.path
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from slimformer.data.columns import find_columns
from slimformer.data.files import SHARD, SUFFIXES, Table, join_tables, read_hub, read_table, spread
from slimformer.data.glue import GLUE, Glue, read_glue
from slimformer.data.labels import (
    ambiguous_ids,
    are_placeholders,
    enumerate_labels,
    guess_kind,
    id_of,
    is_number,
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
from slimformer.data.sources import TRAIN_NAMES, Format, Stamp, read_sources, settle_dev, stamp
from slimformer.data.splits import (
    FOR_DEV,
    FOR_VALIDATION,
    dev_count,
    draw_rows,
    draw_some,
    read_json_option,
    validation_count,
)
from slimformer.data.texts import repair_text, stem_of
from slimformer.errors import DataError, RecipeError, nearest, shown
from slimformer.log import remark, remarks_on
from slimformer.tasks._labelled import Labelled
from slimformer.tasks._metrics import CLASS_METRICS, SCORE_METRICS
from slimformer.tasks.base import Example, Split, option

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_RARE = 3  # rows; a class with fewer is perhaps none
_MOJIBAKE = re.compile("\u00c3[\u0080-\u00bf]|\u00e2\u20ac[\u0080-\u2122]")  # two letters that one became
_FEWEST = 20  # rows from which a column of classes repeats them


@dataclass(frozen=True)
class Classification(Labelled):
    """Text classification, or scoring.

    `data` is a folder with train.* and dev.* (or validation.*), one file, `owner/name[:config][@revision]` on the hub, or `glue/sst2`;
    or data in memory: a list of dicts, a DataFrame, a Dataset, a DatasetDict, or a dict of such data by split. That is kept in the
    user's cache (`data/memory.py`). `glue` names a GLUE task, which settles columns, class order and metric. `text`, `text_pair` and
    `label` name columns; without them the usual names are looked for, and the log says what was taken. `kind` is "classes" or
    "score"; "auto" takes labels with fractions for scores. `metric` "auto" is accuracy for classes, spearman for scores, or GLUE's
    own; `f1` takes the last of two classes as positive and is the macro mean for more.

    `train_rows` is a JSON file with the row numbers (from 0) to train on, or how many rows to draw. `validation_share` of the training
    data, but between 200 and 2,000 examples and at most a fifth, is set aside as validation examples. `labels` are the class names in
    the order of the model's ids; `bind` fills them.

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
    kind: Literal["auto", "classes", "score"] = "auto"
    metric: str = option("auto", "The metric that counts: accuracy, f1, f1_macro, matthews, pearson, spearman.")
    max_length: int = option(128, "Tokens an input may have; longer ones are cut off.")
    validation_share: float = 0.05
    train_rows: str | int | None = option(None, "How many rows to train on, or a JSON file of row numbers.")
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", data_source(self.data))
        object.__setattr__(self, "labels", tuple(map(str, self.labels)))
        if self.glue is None and re.fullmatch(r"glue/\w+", self.data) and not os.path.exists(self.data):
            object.__setattr__(self, "glue", self.data.removeprefix("glue/"))
        mistakes = list(self._mistakes())
        if mistakes:
            raise RecipeError(
                "the task classification cannot be set up like that.",
                facts=mistakes,
                help="mend the option, or leave it out: what is not said is found from the data.",
            )
        if self.glue is not None:
            object.__setattr__(self, "kind", "classes" if GLUE[self.glue].labels else "score")
            if self.metric == "auto":
                object.__setattr__(self, "metric", GLUE[self.glue].metric)
        elif self.metric == "auto" and self.kind != "auto":
            object.__setattr__(self, "metric", "accuracy" if self.kind == "classes" else "spearman")

    def _mistakes(self) -> Iterable[str]:
        known = {"auto": (*CLASS_METRICS, *SCORE_METRICS), "classes": CLASS_METRICS, "score": SCORE_METRICS}
        if self.glue is not None and self.glue not in GLUE:
            yield f"glue: there is no '{self.glue}'; {nearest(self.glue, GLUE)}"
        if self.kind not in known:
            yield f"kind: '{self.kind}'; known: {', '.join(known)}"
        elif self.metric != "auto" and self.metric not in known[self.kind]:
            of_kind = "" if self.kind == "auto" else f" for {self.kind}"
            yield f"metric: there is no '{self.metric}'{of_kind}; {nearest(self.metric, known[self.kind])}"
        if self.text_pair is not None and self.text is None:
            yield "text_pair: name the first text column too (text)"
        if not 0 < self.validation_share < 0.5:
            yield f"validation_share: a share above 0 and below 0.5, not {self.validation_share}"
        if not 4 <= self.max_length <= 100_000:
            yield f"max_length: at least 4 tokens, not {self.max_length}"
        if isinstance(self.train_rows, int) and self.train_rows < 10:
            yield f"train_rows: at least 10, not {self.train_rows}"

    def title(self) -> str:
        if self.glue is not None:
            return f"glue/{self.glue}"
        return f"classification {Path(self.data).resolve().name}" if self.data else "classification"

    @property
    def classes(self) -> tuple[str, ...]:
        settled = self.kind == "score" or (self.kind == "classes" and self.labels)
        task = self if settled else self.settled()
        return () if task.kind == "score" else task.labels

    # ---- what the data says

    def split(self, name: Split) -> Sequence[Example]:
        return _examples(self, Split(name), stamp(self.data), stamp(self.train_rows))

    def settled(self) -> Classification:
        """This task with columns, kind, metric and class names filled from its data; what was filled before stays."""
        table = self._table(Split.TRAIN, any_split=True)
        texts, label = self._columns(table)
        raw = _raw_labels(table, label)
        kind = self.kind if self.kind != "auto" else guess_kind(raw)
        names: tuple[str, ...] = ()
        if kind == "classes":
            names = self.labels or self._known_names(table, label)
            if not names:
                names = sort_labels(one_spelling(raw).values())
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
        metric = self.metric if self.metric != "auto" else "accuracy" if kind == "classes" else "spearman"
        if metric in (CLASS_METRICS if kind == "score" else SCORE_METRICS):
            holds = "classes" if kind == "classes" else "scores (numbers with a fraction)"
            raise DataError(
                f"the metric '{metric}' does not fit: column '{label}' of {table.where} holds {holds}.",
                help=f"for {kind}: {', '.join(CLASS_METRICS if kind == 'classes' else SCORE_METRICS)}.",
            )
        if metric == "f1" and len(names) > 2:
            metric = "f1_macro"
        pair = texts[1] if len(texts) > 1 else None
        return replace(self, text=texts[0], text_pair=pair, label=label, kind=kind, metric=metric, labels=names)

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
        raise DataError(
            f"{self.data} has no training data.",
            facts=[f"looked for: {', '.join(TRAIN_NAMES)} with {', '.join(SUFFIXES)}"],
            help="name the training file train.tsv, .csv, .jsonl or .parquet.",
        )

    def _form(self) -> Glue | None:
        return GLUE[self.glue] if self.glue is not None else None

    def _columns(self, table: Table) -> tuple[tuple[str, ...], str]:
        return find_columns(table, self.text, self.text_pair, self.label, self._form())

    def _known_names(self, table: Table, label: str) -> tuple[str, ...]:
        """The names that GLUE or the data itself gives to class ids; none if it gives none."""
        form = self._form()
        return form.labels if form is not None else table.class_names.get(label, ())

    def _ids(self, table: Table, raw: Sequence[str]) -> list[int]:
        """The class id of each row's label; DataError with the first row whose label is unknown."""
        label = self._columns(table)[1]
        ids = match_labels(set(raw), self.labels, self._known_names(table, label))
        unknown = [text for text in dict.fromkeys(raw) if text not in ids]
        if unknown:  # 1 and 3 may be ids, and are none beside 4.5: that is named
            known = self._known_names(table, label)
            text = next((text for text in unknown if not match_labels([text], self.labels, known)), unknown[0])
            quoted = f"'{text}'" if len(text) <= 60 else shown(text, 60)
            raise DataError(
                f"{table.place(raw.index(text))}: the label {quoted} in column '{label}' is not a known one.",
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

    def bind(self, config: PretrainedConfig | Mapping[str, Any]) -> Classification:
        names, problem = model_labels(config)
        if problem == "multi_label_classification":
            raise DataError(
                "the model gives a row several labels (problem_type: multi_label_classification): its classes do not exclude each other, "
                "and those of this task do.",
                facts=[f"the model's labels: {enumerate_labels(names)}"],
                help="start from a model that was trained to give one label, or from an encoder, with data of one label a row.",
            )
        kind = self.kind
        if kind == "auto":
            kind = "score" if len(names) == 1 or problem == "regression" else "classes"
        task = replace(self, kind=kind, labels=()).settled()
        table = task._table(Split.TRAIN, any_split=True)
        label = task._columns(table)[1]
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
        bound._ids(table, raw)
        return bound

    def notes(self) -> tuple[str, ...]:
        """What was found or guessed in the data: columns, classes, and what is odd about the rows."""
        task = self if self.kind == "score" or self.labels else self.settled()
        sources = task._sources()
        texts: dict[Split, list[tuple[str, ...]]] = {}
        for name in Split:
            if name is Split.DEV or "train" in sources:
                texts[name] = [item.texts for item in task.split(name)]
        table = task._table(Split.TRAIN, any_split=True)
        if task.kind == "score":
            remark(f"{table.where}: the labels are scores, numbers with a fraction.")
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
def _read_tables(data: str, glue: str | None, _key: Stamp) -> Mapping[str, Table]:
    """The tables "train", "dev" and, without dev, "test", as far as they are there."""

    def read(files: Sequence[Path]) -> Table:
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
    )
    return read_sources(data, form, hub=f"nyu-mll/glue:{glue}" if data == f"glue/{glue}" else None)


@lru_cache(maxsize=8)
def _settled_tables(task: Classification, key: Stamp) -> Mapping[str, Table]:
    """The tables "train" and "dev", one or both of them; test data stands in for dev if it has labels."""
    tables = _read_tables(task.data, task.glue, key)
    return settle_dev(tables, lambda table: table.where, lambda test: task._lacking(tables.get("train", test), test))


def _raw_labels(table: Table, column: str) -> list[str]:
    """The label of each row as the data spells it; DataError with the row if one is missing, or if a row has several."""
    values = table.column(column)
    alone = single_labels(values)
    if alone is not None:
        remark(f"{table.where}: each list in column '{column}' holds one label, which is taken.")
        values = alone
    several = several_labels(values)
    if several:
        row = next((row for row, value in enumerate(values) if not isinstance(value, (str, int, float, type(None)))), None)
        at = table.where if row is None else f"{table.place(row)}: no label but a list in column '{column}'"
        raise DataError(
            f"{at}: rows of column '{column}' may have several labels (multi-label): {several}. The classes of this task exclude each "
            "other.",
            help="give each row one label; for one class against all others, write a column of 0 and 1.",
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


@lru_cache(maxsize=8)
def _examples(task: Classification, name: Split, _key: Stamp, _rows_key: Stamp) -> tuple[Example, ...]:
    if task.kind == "auto" or (task.kind == "classes" and not task.labels):
        task = task.settled()
    table = task._table(name)
    texts, label = task._columns(table)
    raw = _raw_labels(table, label)
    ids = task._ids(table, raw) if task.kind == "classes" else None
    answers: Sequence[Any] = [task.labels[index] for index in ids] if ids is not None else _scores(table, raw)
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
