"""Finds the text and label columns of a table by their usual names, and says which ones were guessed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache

from slimformer.data.files import Table
from slimformer.data.glue import Glue
from slimformer.errors import DataError

_log = logging.getLogger(__name__)

# Lower-case names in the order in which they are looked for.
_PAIRS = (
    ("sentence1", "sentence2"), ("#1 string", "#2 string"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("text1", "text2"), ("text_a", "text_b"), ("query", "passage"), ("text", "text_pair"),
)  # fmt: skip
_TEXTS = ("sentence", "text", "review", "sentences", "texts", "content", "utterance", "comment", "message", "tweet", "body",
          "document", "question", "query", "title")  # fmt: skip
_LABELS = ("label", "labels", "score", "target", "class", "category", "intent", "sentiment", "rating", "gold_label",
           "quality", "is_duplicate", "stars", "y")  # fmt: skip


def find_columns(
    table: Table, text: str | None, text_pair: str | None, label: str | None, glue: Glue | None
) -> tuple[tuple[str, ...], str]:
    """The text columns (one or two) and the label column: as named by the user, as GLUE names them, or guessed.

    Each guess is logged once. DataError if a named column is missing, or if there is none with a usual name.
    """
    folded = {name.strip().lower(): name for name in reversed(list(table.columns))}
    guesses = []
    if label is None:
        label = _guess_label(table, folded, glue)
        guesses.append(f"label '{label}'")
    table.column(label)
    if text is not None:
        texts: tuple[str, ...] = (text,) if text_pair is None else (text, text_pair)
    else:
        texts = _guess_texts(table, folded, label, glue)
        guesses.append(f"text {' and '.join(map(repr, texts))}")
    for name in texts:
        table.column(name)
    if guesses and glue is None:
        _say_guesses(table.where, ", ".join(reversed(guesses)))
    return texts, label


def _guess_label(table: Table, folded: dict[str, str], glue: Glue | None) -> str:
    exact = [name for name in (*(glue.label if glue is not None else ()), *_LABELS) if name in table.columns]
    names = [*exact, *(folded[name] for name in _LABELS if name in folded)]
    if not names:
        raise _no_column(table, "a label column", "label", _LABELS)
    return names[0]


def _guess_texts(table: Table, folded: dict[str, str], label: str, glue: Glue | None) -> tuple[str, ...]:
    forms = glue.texts if glue is not None else ()
    exact = [form for form in forms if all(name in table.columns for name in form)]
    pairs = [*exact, *(tuple(folded[name] for name in pair) for pair in _PAIRS if all(name in folded for name in pair))]
    if pairs and label not in pairs[0]:
        return pairs[0]
    singles = [folded[name] for name in _TEXTS if name in folded and folded[name] != label]
    if singles:
        return (singles[0],)
    others = [name for name in table.columns if name != label]
    if len(others) == 1:
        return (others[0],)
    raise _no_column(table, "a text column", "text", _TEXTS)


@lru_cache(maxsize=64)
def _say_guesses(where: str, columns: str) -> None:
    """Logs a guess the first time it is made."""
    _log.info("%s: taking %s", where, columns)


def _no_column(table: Table, what: str, option: str, tried: Sequence[str]) -> DataError:
    return DataError(
        f"{table.where}: cannot tell which is {what}.",
        facts=[f"columns: {', '.join(map(repr, table.columns))}", f"looked for: {', '.join(tried)}"],
        help=f"name it: --{option} <column>.",
    )
