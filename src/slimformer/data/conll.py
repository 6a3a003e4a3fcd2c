"""Reads text files with a word and its tags on each line and a blank line behind each sentence, as the CoNLL shared tasks have them.

Fields are separated by tabs or by spaces. Sentences are told apart by blank lines and by -DOCSTART-; lines of comments, column names and
CoNLL-U's lines of several words are left out. A line with another number of fields is a mistake that shifts tags, so it is refused with
its place.
"""

from __future__ import annotations

import os.path
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from slimformer.data.texts import read_text, suffix_of
from slimformer.errors import DataError, shown
from slimformer.log import remark

LINES_SHAPE = "a line for each word, 'Berlin B-LOC' with a tab or a space in between, and a blank line behind each sentence."
LINE_SUFFIXES = (
    *(".conll", ".conllu", ".iob", ".iob2", ".bio", ".bioes", ".bilou", ".bmes"),
    *(".train", ".testa", ".testb", ".annotated"),  # eng.testa is CoNLL-2003's dev, emerging.test.annotated WNUT17's test
)
HEADINGS = frozenset({"word", "words", "token", "tokens", "text", "form"})
_DOCUMENT = "-DOCSTART-"
_CONLLU, _FORM, _UPOS = ".conllu", 2, 4
_TAG = re.compile(r"O|[BIMLEUS]-\S+")


@dataclass(frozen=True)
class TaggedWords:
    """The words of a sentence with a tag for each, and the line or row that each sentence begins at."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    place: int


def reads_lines(path: Path) -> bool:
    """Whether a file holds a word on each line, by its suffix or, if that says nothing, by its first lines."""
    suffix = suffix_of(path)
    if suffix in LINE_SUFFIXES:
        return True
    if suffix not in {".txt", ".tsv"}:
        return False
    rows = [_fields(line) for line in read_text(path, LINES_SHAPE).split("\n")[:1000]]
    full = [row for row in rows if row]
    if not full or any(field.lower().startswith(("sentence", "sent_")) for field in full[0]):
        return False  # a table whose column tells sentences apart
    even = len(set(map(len, full))) == 1 or len(full) < len(rows[:-1])
    return even and not any(" " in row[-1] for row in full)


def claims_lines(data: str) -> bool:
    """Whether a file, or a folder by all of its data files, has a suffix that no other form of data has."""
    path = Path(os.path.expanduser(data))
    if not os.path.isdir(path):
        return suffix_of(path) in LINE_SUFFIXES
    try:
        found = {suffix_of(file) for file in path.iterdir() if file.is_file()}
    except OSError:
        return False
    return bool(found & set(LINE_SUFFIXES)) and not found & {".csv", ".tsv", ".json", ".jsonl", ".parquet"}


def read_word_lines(path: Path, word: str | None = None, tag: str | None = None) -> tuple[list[TaggedWords], str]:
    """The sentences of a file, and what was taken for words and tags. `word` and `tag` are numbers of columns, from 1.

    DataError with the line if one has another number of fields than the others, a tag without a word, or a word without a tag.
    """
    text = read_text(path, LINES_SHAPE)
    sentences = list(_sentences(path, text))
    if not sentences:
        raise DataError(f"{path} has no line with a word.", help=LINES_SHAPE)
    count = len(sentences[0][0][1])
    if count < 2:
        line, fields = sentences[0][0]
        raise DataError(f"{path}, line {line}: '{fields[0][:60]}' stands alone, without a tag.", help=LINES_SHAPE)
    words, tags = _columns(path, sentences, word, tag)
    names = sentences[0][0][1]
    if names[words].strip().lower() in HEADINGS and len(names[tags]) > 1 and not _TAG.fullmatch(names[tags]):
        remark(f"{path}: its first line names the columns, and is left out.")
        sentences = [rest for rest in (sentences[0][1:], *sentences[1:]) if rest]
    found = []
    for rows in sentences:
        for line, fields in rows:
            if not fields[words]:
                raise DataError(f"{path}, line {line}: no word owns the tag '{fields[tags][:60]}'.", help=LINES_SHAPE)
            if not fields[tags]:
                raise DataError(f"{path}, line {line}: the word '{fields[words][:60]}' has no tag.", help=LINES_SHAPE)
        found.append(
            TaggedWords(tuple(fields[words] for _, fields in rows), tuple(fields[tags] for _, fields in rows), rows[0][0])
        )
    what = f"column {words + 1} for the words, column {tags + 1} for the tags"
    return found, f"{what} (of {count})" if count > 2 else what


Lined = list[tuple[int, list[str]]]  # the fields of each line of a sentence


def _sentences(path: Path, text: str) -> Iterator[Lined]:
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    full = [line for line in lines if line.strip(" \t") and not line.startswith((_DOCUMENT, "#"))]
    tabs = 2 * sum("\t" in line for line in full) > len(full)
    sizes = Counter(len(_fields(line, tabs)) for line in full)
    common = sizes.most_common(1)[0][0] if sizes else 0
    universal = suffix_of(path) == _CONLLU
    heads = [line for before, line in pairwise(["", *lines]) if line.strip(" \t") and not before.strip(" \t")]
    headed = universal or (len(heads) > 1 and all(line.startswith(("# ", "#\t")) for line in heads))
    rows: Lined = []
    comments, wrong = 0, []
    for number, line in enumerate(lines, 1):
        fields = _fields(line, tabs)
        if not fields or line.startswith(_DOCUMENT):
            if rows:
                yield rows
            rows = []
        elif line.startswith("#") and not rows and (headed or len(fields) != common):
            comments += 1
        elif len(fields) != common:
            wrong.append((number, fields))
        elif not (universal and re.fullmatch(r"\d+[-.]\d+", fields[0])):
            rows.append((number, fields))
    if rows:
        yield rows
    if wrong:
        raise _uneven(path, wrong, common, len(full))
    if comments:
        remark(f"{path}: {comments:,} lines that begin with # before a sentence are comments, and are left out.")


def _uneven(path: Path, wrong: Sequence[tuple[int, list[str]]], common: int, total: int) -> DataError:
    """The error for lines with another number of fields than most."""
    line, fields = wrong[0]
    what = f"{len(fields)} field{'s' * (len(fields) != 1)}, {shown(' '.join(fields), 60)}, where other lines have {common}"
    if 3 * len(wrong) > total:
        return DataError(
            f"{path} is no list of words with tags: its lines have different numbers of fields (line {line} has {what}).",
            help=LINES_SHAPE,
        )
    help = "a word without a tag, or one with a space in it? Separate words and tags by tabs if words hold spaces."
    return DataError(
        f"{path}, line {line}: {what}.",
        facts=[f"such lines: {len(wrong):,} of {total:,}"],
        help=f"{help} It should have {LINES_SHAPE}",
    )


def _fields(line: str, tabs: bool | None = None) -> list[str]:
    """The fields of a line, none if it is blank. Only a space and a tab separate: other signs of space may be words."""
    line = line.removesuffix("\r")
    if not line.strip(" \t"):
        return []
    if tabs or (tabs is None and "\t" in line):
        return [field.strip(" ") for field in line.split("\t")]
    return re.split(r"[ \t]+", line.strip(" \t"))


def _columns(path: Path, sentences: Sequence[Lined], word: str | None, tag: str | None) -> tuple[int, int]:
    """The columns of words and tags, from 0: as they are named, or the first that is no number of a word, and the last."""
    count = len(sentences[0][0][1])
    if suffix_of(path) == _CONLLU:
        guess = [_FORM - 1, min(_UPOS, count) - 1]
    else:
        numbered = count > 2 and all(
            fields[0] == str(place) for rows in sentences[:20] for place, (_, fields) in enumerate(rows, 1)
        )
        guess = [int(numbered), count - 1]
        first, last = ({fields[place] for rows in sentences[:200] for _, fields in rows} for place in (guess[0], guess[1]))
        if all(map(_TAG.fullmatch, first)) and not all(map(_TAG.fullmatch, last)):
            guess.reverse()
            remark(f"{path}: its first column holds tags, its last one words.")
    for place, (name, what) in enumerate(((word, "text"), (tag, "label"))):
        if name is None:
            continue
        if not re.fullmatch(r"\d{1,3}", name) or not 1 <= int(name) <= count:
            raise DataError(
                f"{path} has no column '{name[:60]}'.",
                help=f"its columns have numbers, 1 to {count}: --{what} {1 if what == 'text' else count}.",
            )
        guess[place] = int(name) - 1
    if guess[0] == guess[1]:
        raise DataError(f"{path}: column {guess[0] + 1} cannot hold both the words and the tags.", help=LINES_SHAPE)
    return guess[0], guess[1]
