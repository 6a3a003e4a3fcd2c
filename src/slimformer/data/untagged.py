"""Reads texts whose words nobody tagged: a text on each line, a column of texts or of lists of words, or tagged files, tags unread."""

from __future__ import annotations

import os.path
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from slimformer.data.conll import read_word_lines, reads_lines
from slimformer.data.files import Table, join_tables, read_hub, read_table
from slimformer.data.plain_texts import MOST_TEXTS, is_plain, read_plain
from slimformer.data.sources import Format, Stamp, read_sources
from slimformer.data.splits import TRAIN_NAMES
from slimformer.data.tagged import TAGGED_SUFFIXES, WORD, Sentence, joined_words, match_tagged, words_column
from slimformer.data.texts import repair_text, stream_lines
from slimformer.errors import DataError
from slimformer.log import remark


@lru_cache(maxsize=4)
def read_untagged(data: str, text: str | None, key: Stamp) -> Mapping[str, tuple[Sentence, ...]]:
    """The sentences "train" and "dev", one or both of them, none with a tag; DataError for whatever is wrong with the data."""
    folder = Path(os.path.expanduser(data))
    if _holds_texts(folder):
        return {name: _cut(texts.texts) for name, texts in read_plain(data, None, MOST_TEXTS, key).items()}
    lines = [place for name in TRAIN_NAMES if _holds_texts(place := folder / f"{name}.txt")]
    if lines:  # texts to learn from beside a file that is only judged by
        return {"train": _cut(read_plain(str(lines[0]), None, MOST_TEXTS, key)["train"].texts)}
    form = Format(
        task="tagging",
        suffixes=TAGGED_SUFFIXES,
        match=match_tagged,
        read=lambda files: _read_files(files, text),
        read_hub=lambda name: {split: _of_table(table, text) for split, table in read_hub(name).items()},
        example="./texts.txt",
        forms="a folder or a file",
    )
    found = read_sources(data, form)
    if "test" in found:
        found["dev"] = found.pop("test")
    return found


def _holds_texts(path: Path) -> bool:
    """Whether a file, or each file of a folder, has a text on each line, and not a word with its tags."""
    if not is_plain(str(path)):
        return False
    return not any(map(_holds_words, path.iterdir() if path.is_dir() else [path]))


def _holds_words(file: Path) -> bool:
    """Whether a file has a word on each line: all of the first lines then have as many fields."""
    if file.name.startswith(".") or not reads_lines(file):
        return False
    return len({len(line.split()) for line, _ in zip(stream_lines(file), range(200), strict=False) if line.strip()}) == 1


def _cut(texts: Sequence[str]) -> tuple[Sentence, ...]:
    """Each text with its words: letters and digits, and each sign by itself."""
    cut = (Sentence(text, tuple(match.span() for match in WORD.finditer(text)), (), row) for row, text in enumerate(texts, 1))
    return tuple(sentence for sentence in cut if sentence.words)


def _read_files(files: Sequence[Path], text: str | None) -> tuple[Sentence, ...]:
    if not reads_lines(files[0]):
        return _of_table(join_tables([read_table(file) for file in files]), text)
    return tuple(joined_words(item.words, (), item.place) for file in files for item in read_word_lines(file, text, None)[0])


def _of_table(table: Table, text: str | None) -> tuple[Sentence, ...]:
    column = words_column(table, text)
    remark(f"{table.where}: taking words '{column}', and no tags.")
    sentences: list[Sentence] = []
    for row, value in enumerate(table.column(column)):
        if isinstance(value, str) and value.strip():
            sentences += _cut([repair_text(value)])
        elif isinstance(value, (list, tuple)) and value:
            sentences.append(joined_words([str(word) for word in value], (), row))
        elif value:
            raise DataError(f"{table.place(row)}: no text and no list of words in column '{column}'.", help="mend the row.")
    if not sentences:
        raise DataError(f"{table.where} has no row with a word in column '{column}'.", help="name the column: --text <column>.")
    return tuple(sentences)
