"""Rows with several labels, as data sets write them: lists, texts of lists, names with marks between them, a column of 0 and 1 each."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from slimformer.data.files import Table
from slimformer.data.labels import are_lists, is_collection, joint_of, spell_label
from slimformer.errors import DataError, shown

YES_AND_NO = {"0": False, "1": True, "false": False, "true": True}
SURE_MARKS = ("|", ";", ",")
LabelSet = tuple[str, ...]  # the labels of one row, as the data spells them


def told_by(value: Any) -> bool | None:
    """What a cell of 0 and 1 says; None if it holds anything else."""
    return YES_AND_NO.get((spell_label(value) or "").lower())


def label_sets(table: Table, column: str, joint: str | None = None) -> list[LabelSet]:
    """The labels of each row; none at all is an answer too. DataError with the row whose labels cannot be read.

    `joint` stands between names, "" for nothing; without it that is found from the rows. Rows of as many 0 and 1 each tell by their
    places which labels they have: these are spelled as ids, "0", "1", ...

    >>> label_sets(Table("reviews", {"label": ["a|b", "", "b", "a"]}, range(1, 5)), "label")
    [('a', 'b'), (), ('b',), ('a',)]
    """
    values = table.column(column)
    joint = mark_between(table, column) if joint is None else joint
    listed = are_lists([value for value in values if isinstance(value, str)])
    rows = [_items(table, row, value, joint, column, listed=listed) for row, value in enumerate(values)]
    flags = _as_flags(rows)
    found = flags if flags is not None else _spelled(rows)
    return [tuple(dict.fromkeys(item for item in items if item is not None)) for items in found]


def _spelled(rows: Sequence[Sequence[Any]]) -> list[list[str | None]]:
    """The labels of each row as text. "NA", or another word for none, is a label if a row has it beside others: Namibia has that code."""
    texts = [[spell_label(item, words_for_none=False) for item in items] for items in rows]
    beside = {text for items in texts if len({*items} - {None}) > 1 for text in items}
    return [[text if text in beside else spell_label(text) for text in items] for items in texts]


def mark_between(table: Table, column: str, *, sure: bool = False) -> str:
    """The mark between the names of several labels of a row; "" if there is none.

    `sure`: rows surely may have several, so that the first usual mark that occurs is taken even if no name occurs by itself.
    """
    texts = {value.strip() for value in table.column(column) if isinstance(value, str)}
    found = joint_of(texts)
    if found or not sure or are_lists([*texts]):
        return found
    return next((mark for mark in SURE_MARKS if any(mark in text for text in texts)), "")


def _items(table: Table, row: int, value: Any, joint: str, column: str, *, listed: bool) -> list[Any]:
    if is_collection(value):
        items = list(value)
        if any(is_collection(item) for item in items):
            raise DataError(
                f"{table.place(row)}: a list of lists in column '{column}' ({shown(value, 40)}).", help="write one list a row."
            )
        return items
    if value is None or (isinstance(value, float) and value != value):
        return []
    if not isinstance(value, str):
        return [value]
    text = value.strip()
    if listed and re.fullmatch(r"[\[({].*[\])}]", text, re.DOTALL):
        return _written(text)
    return [part.strip() for part in text.split(joint)] if joint else [text]


def _written(text: str) -> list[Any]:
    """The items of a list that was written as text: by JSON, by Python, by numpy, or with names without quotes."""
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
        if isinstance(found, Mapping):
            return [name for name, there in found.items() if there]
        return list(found) if is_collection(found) else [found]
    inner = text[1:-1].strip()
    if not inner:
        return []
    parts = inner.split(",") if "," in inner else inner.split()
    return [part.strip().strip("'\"") for part in parts]


def _as_flags(rows: Sequence[Sequence[Any]]) -> list[list[str | None]] | None:
    """Ids of the places with a 1, if all rows are as many 0 and 1, two or more; None if they are not."""
    widths = {len(items) for items in rows}
    if len(widths) != 1 or widths == {0} or widths == {1}:
        return None
    spelled = [[told_by(item) for item in items] for items in rows]
    if any(flag is None for flags in spelled for flag in flags):
        return None
    return [[str(place) for place, flag in enumerate(flags) if flag] for flags in spelled]


def flag_width(table: Table, column: str) -> int:
    """How many 0 and 1 each row holds, if that is how labels are told; 0 if it is not."""
    values = table.column(column)
    listed = are_lists([value for value in values if isinstance(value, str)])
    rows = [_items(table, row, value, "", column, listed=listed) for row, value in enumerate(values)]
    return len(rows[0]) if _as_flags(rows) is not None else 0


def with_flags(table: Table, columns: Sequence[str]) -> Table:
    """The table with one more column, the lists of those of `columns` that hold a 1; its name is theirs with commas between.

    DataError with the row that holds anything but 0 and 1.
    """
    short = dict(zip(columns, without_parent(columns), strict=True))
    lists: list[list[str]] = [[] for _ in range(len(table))]
    for name in columns:
        for row, value in enumerate(table.column(name)):
            flag = told_by(value)
            if flag is None:
                raise DataError(
                    f"{table.place(row)}: column '{name}' holds {shown(value, 30)}, and should hold 0 or 1.",
                    help="-1 often marks rows that were not labelled: leave those out.",
                )
            if flag:
                lists[row].append(short[name])
    return replace(table, columns={**table.columns, ",".join(columns): lists})


def told_apart(table: Table, column: str) -> tuple[str, ...]:
    """The columns of 0 and 1 that a column of `with_flags` was made of; empty if it is another one."""
    names = tuple(column.split(","))
    return without_parent(names) if len(names) > 1 and {*names} <= {*table.columns} else ()


def without_parent(names: Sequence[str]) -> tuple[str, ...]:
    """Names of the fields of one nested column without that column's own.

    >>> without_parent(["labels.toxic", "labels.insult"]), without_parent(["a.b", "c"])
    (('toxic', 'insult'), ('a.b', 'c'))
    """
    parents = {name.rpartition(".")[0] for name in names}
    return tuple(name.rpartition(".")[2] for name in names) if len(parents) == 1 else tuple(names)
