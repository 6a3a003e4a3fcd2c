"""Reads texts without labels: a text on each line, a column of a table, or a folder of such files; as many as memory should hold.

A file of lines is streamed, and of more lines than are wanted every second, fourth, ... is kept, so that memory is bounded whatever
the file holds. Blank lines and texts that occurred before are left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from slimformer.data.files import SHARD, SUFFIXES, Table, join_tables, read_hub, read_table
from slimformer.data.sources import Format, Stamp, read_sources
from slimformer.data.splits import DEV_NAMES, TEST_NAMES, TRAIN_NAMES
from slimformer.data.texts import repair_text, stem_of, stream_lines, suffix_of
from slimformer.errors import DataError, nearest
from slimformer.log import remark

MOST_TEXTS = 200_000  # of a split; about 100 MB with their rows, and more than a distillation of minutes reads
TEXTS_SHAPE = "put a text on each line of a .txt file, or in a column 'text' of a table."
_LINES = (".txt", ".text", ".en", ".de", ".fr", ".md")  # a text on each line
_COLUMNS = (
    "text",
    "sentence",
    "texts",
    "sentences",
    "passage",
    "content",
    "document",
    "body",
    "query",
    "question",
    "sentence1",
    "title",
)


@dataclass(frozen=True)
class PlainTexts:
    """Texts, and the name of what they were read from. `total`: of texts there, also those that are left out."""

    where: str
    texts: tuple[str, ...]
    total: int


@lru_cache(maxsize=4)
def read_plain(data: str, column: str | None, most: int, _key: Stamp) -> Mapping[str, PlainTexts]:
    """The texts "train" and "dev", one or both of them; at most `most` of each. DataError for whatever is wrong with the data."""
    path = Path(os.path.expanduser(data))
    if path.is_dir():
        names = {*TRAIN_NAMES, *DEV_NAMES, *TEST_NAMES}
        files = sorted(item for item in path.iterdir() if item.is_file() and not item.name.startswith("."))
        lines = [item for item in files if suffix_of(item) in _LINES]
        if lines and not any(stem_of(item).lower() in names for item in files if suffix_of(item) in (*SUFFIXES, *_LINES)):
            remark(f"{path}: taking the texts of {len(lines)} files ({lines[0].name}, ...), a text on each line.")
            return {"train": _of_lines(lines, most)}
    form = Format(
        task="embedding",
        suffixes=(*SUFFIXES, *_LINES),
        match=lambda files, name: [file for file in files if SHARD.sub("", stem_of(file)).lower() == name],
        read=lambda files: _read(files, column, most),
        read_hub=lambda name: {split: _of_table(table, column, most) for split, table in read_hub(name).items()},
        example="./texts.txt",
        forms="a folder or a file",
        named=False,
    )
    sources = dict(read_sources(data, form))
    if "test" in sources:
        sources["dev"] = sources.pop("test")
    return sources


def _read(files: Sequence[Path], column: str | None, most: int) -> PlainTexts:
    if all(suffix_of(file) in _LINES for file in files):
        return _of_lines(files, most)
    return _of_table(join_tables([read_table(file) for file in files]), column, most)


def _of_lines(files: Sequence[Path], most: int) -> PlainTexts:
    where = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    return _kept(where, (line for file in files for line in stream_lines(file)), most)


def _of_table(table: Table, column: str | None, most: int) -> PlainTexts:
    folded = {name.lower().replace("_", " ").strip(): name for name in table.columns}
    if column is not None:
        values = table.column(column)
    else:
        found = next((folded[name] for name in _COLUMNS if name in folded), None)
        if found is None and len(table.columns) == 1:
            found = next(iter(table.columns))
        if found is None:
            raise DataError(
                f"{table.where}: cannot tell which column holds the texts.",
                facts=[table.named_columns()],
                help=f"name it: --text <column>. {nearest('text', table.columns)}",
            )
        values = table.columns[found]
        remark(f"{table.where}: taking the texts of column '{found}'.")
    return _kept(table.where, (value if isinstance(value, str) else "" for value in values), most)


def _kept(where: str, lines: Iterable[str], most: int) -> PlainTexts:
    """The texts that are kept; DataError if there are none, or one."""
    texts, total, twice, every = _evenly(lines, most)
    if total < 2:
        found = "no text" if total == 0 else "one text"
        raise DataError(f"{where} holds {found}.", help=f"give some hundreds of texts: {TEXTS_SHAPE}")
    if every > 1:
        remark(
            f"{where}: {total:,} texts; one of every {every} is read, {len(texts):,} in all, to bound memory (train_rows says how many)."
        )
    if twice:
        remark(f"{where}: {twice:,} texts that occurred before are left out.")
    return PlainTexts(where, tuple(texts), total)


def _evenly(lines: Iterable[str], most: int) -> tuple[list[str], int, int, int]:
    """At most `most` different texts, evenly spaced; the number of all, of those that occurred before, and each how many is kept."""
    kept: dict[str, None] = {}
    total = twice = 0
    every = 1
    for text in _clean(lines):
        if total % every == 0:
            twice += text in kept
            kept[text] = None
        total += 1
        if len(kept) > 2 * most:  # drops every other, and takes every other from here on
            kept = dict.fromkeys(list(kept)[::2])
            every *= 2
    texts = list(kept)
    if len(texts) > most:
        step = len(texts) / most
        texts = [texts[int(place * step)] for place in range(most)]
    return texts, total, twice if every == 1 else 0, every


def _clean(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        text = line.strip()
        if text:
            yield repair_text(text)


def is_plain(data: str) -> bool:
    """Whether data is surely plain text: a .txt file whose lines are no table, or a folder of such files alone."""
    path = Path(os.path.expanduser(data))
    if path.is_dir():
        files = [item for item in path.iterdir() if item.is_file() and not item.name.startswith(".")]
        return (
            bool(files) and all(suffix_of(item) in _LINES for item in files) and all(is_plain(str(item)) for item in files[:8])
        )
    if not path.is_file() or suffix_of(path) not in _LINES:
        return False
    lines = [line for line, _ in zip(stream_lines(path), range(50), strict=False) if line.strip()]
    return bool(lines) and 2 * sum("\t" in line for line in lines) < len(lines)
