"""Finds the text and label columns of a table by their usual names, and says which ones were guessed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from slimformer.data.files import Table
from slimformer.data.glue import Glue
from slimformer.data.label_sets import told_by
from slimformer.errors import DataError, shown
from slimformer.log import remark

# Names in the order in which they are looked for; case, spaces, hyphens and underscores do not count.
_PAIRS = (
    ("sentence1", "sentence2"), ("#1 string", "#2 string"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("text1", "text2"), ("text_a", "text_b"), ("query", "passage"), ("text", "text_pair"),
    ("sentence_a", "sentence_b"), ("sent1", "sent2"), ("question", "answer"), ("question", "passage"), ("question", "context"),
    ("query", "document"), ("claim", "evidence"), ("context", "response"),
)  # fmt: skip
_TEXTS = ("sentence", "text", "review", "sentences", "texts", "content", "utterance", "comment", "message", "tweet", "body",
          "document", "question", "query", "title", "review_text", "text_review", "comment_text", "tweet_text", "review_body",
          "clean_text", "cleaned_text", "full_text", "description", "headline", "news", "article", "sms", "phrase", "input",
          "prompt")  # fmt: skip
_LABELS = ("label", "labels", "score", "target", "class", "category", "intent", "sentiment", "rating", "gold_label",
           "quality", "is_duplicate", "stars", "y", "emotion", "polarity", "class_label", "label_id", "class_name", "topic", "output",
           "airline_sentiment", "review_rating", "sentiment_label", "overall", "classification", "targets", "outcome")  # fmt: skip
_NO_DATA = re.compile(
    r"(unnamed:?_?\d*|column_\d+|index|level_\d+|id|_?idx|ids|guid|uuid|_id|row_?(id|number)?|\w+_id|split|fold)"
)

_NAMES_BESIDE = ("_text", "_name", "_str", "_string")


def find_columns(
    table: Table, text: str | None, text_pair: str | None, label: str | None, glue: Glue | None
) -> tuple[tuple[str, ...], str]:
    """The text columns (one or two) and the label column: as named by the user, as GLUE names them, or guessed.

    A column that `with_flags` added holds the labels that columns of 0 and 1 told. Each guess is logged once. DataError if a named column
    is missing, or if there is none with a usual name.
    """
    folded = folded_names(table)
    told = label is not None and text is not None
    if label is None:
        label = _guess_label(table, folded, glue, text)
    table.column(label)
    if text is not None:
        texts: tuple[str, ...] = (text,) if text_pair is None else (text, text_pair)
    else:
        texts = _guess_texts(table, folded, label, glue)
    for name in texts:
        table.column(name)
    if not told and glue is None:
        remark(f"{table.where}: taking text {' and '.join(map(repr, texts))}, label '{label}'")
    return texts, label


def find_texts(table: Table, text: str | None, text_pair: str | None) -> tuple[str, ...]:
    """The text columns (one or two) of a table whose labels nobody wants: as named by the user, or guessed. DataError as above."""
    if text is not None:
        texts: tuple[str, ...] = (text,) if text_pair is None else (text, text_pair)
    elif len(table.columns) == 1:
        texts = tuple(table.columns)
    else:
        texts = _guess_texts(table, folded_names(table), "", None)
        remark(f"{table.where}: taking text {' and '.join(map(repr, texts))}, and no labels")
    for name in texts:
        table.column(name)
    return texts


def folded_names(table: Table) -> dict[str, str]:
    """Columns by their names as `fold_name` gives them, and by the last part of a nested name that no other column shares."""
    last = [name for name in table.columns if "." in name]  # "reviews.text", or a field of a nested row
    folded = {ending: name for name in last if _is_only(ending := fold_name(name.rpartition(".")[2]), last)}
    return folded | {fold_name(name): name for name in reversed(list(table.columns))}


def fold_name(name: str) -> str:
    """The name of a column as names are compared: case, spaces, hyphens and underscores do not count."""
    return re.sub(r"[\s_-]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip())).lower()


def _is_only(ending: str, names: Sequence[str]) -> bool:
    return sum(fold_name(name.rpartition(".")[2]) == ending for name in names) == 1


def flag_columns(table: Table, label: str | None) -> tuple[str, ...]:
    """The columns that tell by 0 and 1 which labels a row has: those that `label` names with commas between, or two or more that hold
    nothing else where no column has the usual name of a label. Empty if labels stand in one column.
    """
    if label is not None:
        named = tuple(part.strip() for part in label.split(","))
        return named if label not in table.columns and len(named) > 1 and {*named} <= {*table.columns} else ()
    if {fold_name(name.rpartition(".")[2]) for name in table.columns} & {*_LABELS}:
        return ()
    found = _indicators(table)
    return tuple(found) if len(found) > 1 else ()


def names_beside(table: Table, label: str) -> tuple[str, ...]:
    """The names of a column's ids, from a column beside it such as `label_text`; none without such a column, or if it is not clear.

    >>> names_beside(Table("rows", {"label": [1, 0], "label_text": ["good", "bad"]}, range(1, 3)), "label")
    ('bad', 'good')
    """
    beside = next((f"{label}{end}" for end in _NAMES_BESIDE if f"{label}{end}" in table.columns), None)
    if beside is None:
        return ()
    pairs = {(str(value), str(name)) for value, name in zip(table.columns[label], table.columns[beside], strict=True)}
    names = {int(value): name for value, name in pairs if value.isascii() and value.isdigit()}
    if not len(pairs) == len(names) == len({*names.values()}) or max(names) > 10 * len(names):
        return ()
    return tuple(names.get(place, str(place)) for place in range(max(names) + 1))


def _guess_label(table: Table, folded: dict[str, str], glue: Glue | None, text: str | None) -> str:
    flags = ",".join(flag_columns(table, None)) if glue is None else ""
    if flags in table.columns:
        return flags
    exact = [name for name in (*(glue.label if glue is not None else ()), *_LABELS) if name in table.columns]
    names = [*exact, *(folded[name] for name in _LABELS if name in folded)]
    if names:
        return names[0]
    if text is None and not any(fold_name(name) in _TEXTS for name in table.columns):
        pairs = [name for pair in _PAIRS for name in pair if name in folded]
        texts = {folded[name] for name in pairs}
    else:
        texts = {name for name in table.columns if name == text or fold_name(name) in _TEXTS}
    others = [name for name in table.columns if name not in texts and not _NO_DATA.fullmatch(fold_name(name))]
    if texts and len(others) == 1 and _is_repeated(table.columns[others[0]]):
        return others[0]
    endings = [name for name in others if fold_name(name).rpartition("_")[2] in _LABELS[:13]]
    if len(endings) == 1:
        return endings[0]
    if len(others) == 2 and not texts:  # two columns of unusual names: one repeats few values, the other does not
        repeated = [name for name in others if _is_repeated(table.columns[name])]
        if len(repeated) == 1 and _is_text(table.columns[next(name for name in others if name != repeated[0])]):
            return repeated[0]
    raise _no_column(table, "a label column", "label", _LABELS[:14])


def _guess_texts(table: Table, folded: dict[str, str], label: str, glue: Glue | None) -> tuple[str, ...]:
    forms = glue.texts if glue is not None else ()
    exact = [form for form in forms if all(name in table.columns for name in form)]
    pairs = [*exact, *(tuple(folded[name] for name in pair) for pair in _PAIRS if all(name in folded for name in pair))]
    if pairs and label not in pairs[0]:
        return pairs[0]
    singles = [folded[name] for name in _TEXTS if name in folded and folded[name] != label]
    if singles:
        unused = [name for name in table.columns if name not in {label, singles[0]} and _is_text(table.columns[name])]
        if unused:
            names = ", ".join(shown(name, 30) for name in unused[:6])
            remark(f"{table.where}: text stands in {names} too, which is not used; --text and --text-pair name columns.")
        return (singles[0],)
    others = [name for name in table.columns if name != label]
    if len(others) == 1:
        return (others[0],)
    others = [name for name in others if not _NO_DATA.fullmatch(fold_name(name)) and _is_text(table.columns[name])]
    if len(others) == 1:
        return (others[0],)
    raise _no_column(table, "a text column", "text", _TEXTS[:15])


def _indicators(table: Table) -> list[str]:
    """Columns that hold nothing but 0 and 1, and both of them. A column beside them that holds one of these alone is told."""
    found, alone = [], []
    for name, column in table.columns.items():
        values = _flags_in(column)
        if len(values) == 2:
            found.append(name)
        elif values:
            alone.append(f"'{name}' ({min(values):d})")
    if len(found) > 1 and alone:
        remark(f"{table.where}: columns that say the same in every row are no labels: {', '.join(alone)}")
    return found


def _flags_in(column: Sequence[Any]) -> set[bool]:
    """What stands in a column of 0 and 1; empty if anything else does."""
    found: set[bool] = set()
    for value in column:
        flag = told_by(value)
        if flag is None:
            return set()
        found.add(flag)
    return found


def _is_repeated(column: Sequence[Any]) -> bool:
    values = {str(value) for value in column}
    return 1 < len(values) <= max(2, len(column) // 4)


def _is_text(column: Sequence[Any]) -> bool:
    """Whether values are text rather than numbers or classes: most of them differ, or hold several words."""
    some = [value for value in column[:500] if value is not None]
    words = sum(isinstance(value, str) and len(value.split()) > 1 for value in some)
    return 2 * words > len(some)


def _no_column(table: Table, what: str, option: str, tried: Sequence[str]) -> DataError:
    return DataError(
        f"{table.where}: cannot tell which is {what}.",
        facts=[table.named_columns(), f"looked for: {', '.join(tried)}"],
        help=f"name it: --{option} <column>." + (" If there are none, say --labels none." if option == "label" else ""),
    )
