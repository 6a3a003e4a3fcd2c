"""Reads words with tags: files with a word on each line, tables with lists of words and tags, and texts with the places of their spans.

Whatever form it has, a sentence becomes a text, the place of each of its words in it, and a tag for each word as the data spells it.
Words of a list are joined by spaces. A text with spans is cut into words and signs, and its spans become BIO tags. What the tags mean is
the business of `tasks/_tags.py`.
"""

from __future__ import annotations

import ast
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from slimformer.data.conll import LINE_SUFFIXES, LINES_SHAPE, TaggedWords, read_word_lines, reads_lines
from slimformer.data.files import SHARD, SUFFIXES, Table, join_tables, read_hub, read_table
from slimformer.data.memory import with_kept_names
from slimformer.data.texts import repair_text, stem_of
from slimformer.errors import DataError, shown
from slimformer.log import remark

TAGGED_SUFFIXES = (*LINE_SUFFIXES, *SUFFIXES)
WORD = re.compile(r"\w+|[^\w\s]")  # the words of a text: letters and digits, and each sign by itself
TAGGED_SHAPE = (
    'a row has words and a tag for each, {"tokens": ["in", "Berlin"], "ner_tags": ["O", "B-LOC"]}, or a text and its spans, '
    '{"text": "in Berlin", "entities": [{"start": 3, "end": 9, "label": "LOC"}]}.'
)
# Names in the order in which they are looked for; case, spaces, hyphens and underscores do not count.
_WORDS = ("tokens", "words", "token", "word", "tokenized_text", "forms", "form", "text", "sentence", "content", "document")
_TAGS = ("ner_tags", "tags", "ner", "ner_labels", "named_entities", "entities", "spans", "labels", "label", "tag", "annotations", "bio",
         "iob", "pos_tags", "upos", "pos", "chunk_tags", "xpos")  # fmt: skip
_SENTENCES = (
    "sentence_#",
    "sentence_id",
    "sent_id",
    "sentence_idx",
    "sentence_number",
    "sentence_num",
    "sentence",
    "sent",
    "doc_id",
)
_LABEL_KEYS = ("label", "type", "entity_group", "entity", "tag", "labels", "entity_type")
_START_KEYS, _END_KEYS = ("start", "start_offset", "start_char", "begin"), ("end", "end_offset", "end_char", "stop")
_ALIASES = {"dev": ("testa",), "test": ("testb",)}


@dataclass(frozen=True)
class Sentence:
    """A text, the first and the last character (exclusive) of each of its words, and their tags; `place` is its line or row."""

    text: str
    words: tuple[tuple[int, int], ...]
    tags: tuple[str, ...]
    place: int


@dataclass(frozen=True)
class Tagged:
    """All sentences of a file. `names` are those that the data gives to ids of tags, in their order, if it gives any."""

    where: str
    sentences: Sequence[Sentence]
    unit: Literal["line", "row"]
    names: tuple[str, ...] = ()
    lines: bool = False  # whether each word has a line of its own

    def at(self, sentence: Sentence, word: int) -> str:
        """Where a person finds a word: "train.conll, line 17", or "train.jsonl, line 2, word 5"."""
        if self.lines:
            return f"{self.where}, line {sentence.place + word}"
        return f"{self.where}, {self.unit} {sentence.place}, word {word + 1}"


def match_tagged(files: Sequence[Path], name: str) -> list[Path]:
    """The files of the split `name`: train.conll, eng.train, wnut17train.conll, valid.txt, shards."""
    stems = {file: SHARD.sub("", stem_of(file)).lower() for file in files}
    exact = [file for file, stem in stems.items() if stem == name]
    if exact:
        return exact
    names = (name, *_ALIASES.get(name, ()))
    return [file for file in files if any(re.search(rf"(?<![a-z]){part}(?![a-z])", file.name.lower()) for part in names)]


def read_tagged(files: Sequence[Path], text: str | None = None, label: str | None = None) -> Tagged:
    """The sentences of a file, or of shards of one; `text` and `label` name columns. DataError for whatever is wrong with them."""
    if not reads_lines(files[0]):
        tables = [read_table(file) for file in files]
        return tagged_table(with_kept_names(join_tables(tables), files[0]), text, label)
    parts = []
    for file in files:
        words, what = read_word_lines(file, text, label)
        remark(f"{file}: taking {what}.")
        parts.append(Tagged(str(file), [_joined(item) for item in words], "line", lines=True))
    if len(parts) == 1:
        return parts[0]
    every = [sentence for part in parts for sentence in part.sentences]
    return Tagged(
        f"{files[0]} and {len(parts) - 1} more", [replace(item, place=row) for row, item in enumerate(every, 1)], "row"
    )


def read_hub_tagged(name: str, text: str | None = None, label: str | None = None) -> dict[str, Tagged]:
    """Splits of a hub data set."""
    return {split: tagged_table(table, text, label) for split, table in read_hub(name).items()}


def _joined(item: TaggedWords) -> Sentence:
    return joined_words(item.words, item.tags, item.place)


def joined_words(words: Sequence[str], tags: tuple[str, ...], place: int) -> Sentence:
    """The sentence with its words joined by spaces."""
    places, begin = [], 0
    words = [repair_text(word) for word in words]
    for word in words:
        places.append((begin, begin + len(word)))
        begin += len(word) + 1
    return Sentence(" ".join(words), tuple(places), tags, place)


# -- Tables --------------------------------------------------------------------------------------------------------------------


def tagged_table(table: Table, text: str | None = None, label: str | None = None) -> Tagged:
    """The sentences of a table's rows; DataError with the first row that cannot be used."""
    text, label = _found(table, text, label)
    words, tags = table.column(text), table.column(label)
    if _is_flat(words) and _is_flat(tags):
        return replace(_grouped(table, text, label), names=table.class_names.get(label, ()))
    sentences: list[Sentence] = []
    empty: list[Sentence] = []
    spans = _Spans(table.where)
    for row, (value, told) in enumerate(zip(words, tags, strict=True)):
        at, place = table.place(row), table.places[row]
        found = _spans_of(told, at)
        if found is None:
            sentence = _joined(TaggedWords(*_pair(value, told, at, text, label), place))
        elif isinstance(value, str) and not value.lstrip().startswith("["):
            sentence = spans.cut(repair_text(value), found, at, place)
        else:
            sentence = _joined(TaggedWords(*_spanned(_listed(value, at, f"the words in column '{text}'"), found, at), place))
        (sentences if sentence.words else empty).append(sentence)
    if not sentences:
        raise DataError(f"{table.where} has no row with a word in column '{text}'.", help=TAGGED_SHAPE)
    if empty:
        remark(f"{table.where}: {len(empty):,} rows without a word are left out, the first is {table.unit} {empty[0].place}.")
    spans.tell()
    return Tagged(table.where, sentences, table.unit, table.class_names.get(label, ()))


def _fold(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip()).lower()


def words_column(table: Table, text: str | None) -> str:
    """The column of words or texts, as it is named, or by usual names; DataError if it cannot be told."""
    folded = {_fold(name): name for name in reversed(list(table.columns))}
    found = text or next((folded[name] for name in _WORDS if name in folded), None)
    if found is None and len(table.columns) == 1:
        found = next(iter(table.columns))
    if found is None:
        raise DataError(
            f"{table.where}: cannot tell which column holds the words.",
            facts=[table.named_columns(), f"looked for: {', '.join(_WORDS[:12])}"],
            help="name it: --text <column>.",
        )
    table.column(found)
    return found


def _found(table: Table, text: str | None, label: str | None) -> tuple[str, str]:
    """The columns of words and tags: as they are named, or by usual names; a guess is said."""
    folded = {_fold(name): name for name in reversed(list(table.columns))}
    told = text is not None and label is not None
    for name in (text, label):
        if name is not None:
            table.column(name)
    if label is None:
        label = next((folded[name] for name in _TAGS if name in folded and folded[name] != text), None)
    if text is None:
        text = next((folded[name] for name in _WORDS if name in folded and folded[name] != label), None)
    if text is None or label is None:
        what, flag, tried = ("words", "text", _WORDS) if text is None else ("tags", "label", _TAGS)
        raise DataError(
            f"{table.where}: cannot tell which column holds the {what}.",
            facts=[table.named_columns(), f"looked for: {', '.join(tried[:12])}"],
            help=f"name it: --{flag} <column>. {TAGGED_SHAPE[0].upper()}{TAGGED_SHAPE[1:]}",
        )
    if not told:
        others = [folded[name] for name in _TAGS if name in folded and folded[name] not in (text, label)]
        also = f"; {', '.join(others)} may hold tags too, and --label names another column" if others else ""
        remark(f"{table.where}: taking words '{text}', tags '{label}'{also}.")
    return text, label


def _is_flat(column: Sequence[Any]) -> bool:
    """Whether a column holds one word or one tag in each row."""
    return all(
        value is None or isinstance(value, (int, float)) or (isinstance(value, str) and len(value.split()) < 2)
        for value in column
    )


def _grouped(table: Table, text: str, label: str) -> Tagged:
    """The sentences of a table with a word in each row: a column tells them apart, by a mark in each row or in the first one alone."""
    folded = {_fold(name): name for name in table.columns if name not in (text, label)}
    mark = next((folded[name] for name in _SENTENCES if name in folded), None)
    if mark is None:
        raise DataError(
            f"{table.where} has a word in each row, and no column that tells the sentences apart.",
            facts=[table.named_columns(), f"looked for: {', '.join(_SENTENCES[:4])}"],
            help=f"add one, or write {LINES_SHAPE}",
        )
    remark(f"{table.where}: each row is a word; column '{mark}' tells the sentences apart.")
    groups: list[list[int]] = []
    last: Any = None
    for row, value in enumerate(table.columns[mark]):
        told = None if value is None or not str(value).strip() or value != value else value
        if not groups or (told is not None and told != last):
            groups.append([])
        last = last if told is None else told
        groups[-1].append(row)
    sentences = []
    for rows in groups:
        words, tags = [], []
        for row in rows:
            word, at = table.columns[text][row], table.place(row)
            if word is None or not str(word).strip():
                raise DataError(f"{at}: no word owns the tag {shown(table.columns[label][row], 40)}.", help=LINES_SHAPE)
            words.append(str(word))
            tags.append(_tag(table.columns[label][row], at))
        sentences.append(_joined(TaggedWords(tuple(words), tuple(tags), table.places[rows[0]])))
    return Tagged(table.where, sentences, table.unit)


# -- Words with a tag each -----------------------------------------------------------------------------------------------------


def _pair(words: Any, tags: Any, at: str, text: str, label: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The words of a row and their tags; DataError if there are not as many of both."""
    found = _listed(words, at, f"the words in column '{text}'")
    told = _listed(tags, at, f"the tags in column '{label}'")
    if len(found) != len(told):
        more, unowned = len(told) > len(found), told[len(found) :] or found[len(told) :]
        raise DataError(
            f"{at}: {len(found)} words and {len(told)} tags: " + ("no word owns " if more else "no tag belongs to ")
            + f"{shown(unowned[0], 40)}{' and what follows' if unowned[1:] else ''}.",
            facts=[f"words: {shown(found, 100)}", f"tags: {shown(told, 100)}"],
            help="each word needs one tag. Tags of a tokenizer's pieces (with -100 in between) are not tags of words.",
        )  # fmt: skip
    wrong = next((word for word in found if isinstance(word, bool) or not isinstance(word, (str, int, float))), None)
    if wrong is not None:
        raise DataError(f"{at}: {shown(wrong, 40)} is no word (column '{text}').", help=TAGGED_SHAPE)
    return tuple(map(str, found)), tuple(_tag(tag, at) for tag in told)


def _listed(value: Any, at: str, what: str) -> list[Any]:
    """A list as it came, out of a text that holds one, or a text cut at its spaces; DataError for anything else."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if not isinstance(value, str):
        raise DataError(f"{at}: {what} are {shown(value, 40)}, neither a list nor a string.", help=TAGGED_SHAPE)
    if not value.lstrip().startswith("["):
        return value.split()
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) and not ("'" in value and "," not in value):  # 'a' 'b' without a comma is one string
            return found
    raise DataError(
        f"{at}: {what} look like a list and are none: {shown(value, 60)}.",
        help="write them as JSON, or with spaces in between.",
    )


def _tag(value: Any, at: str) -> str:
    """A tag as text."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if isinstance(value, (bool, float)) or not isinstance(value, (str, int)) else repair_text(str(value)).strip()
    if not text:
        raise DataError(f"{at}: {shown(value, 40)} is no tag.", help="a tag is a name such as B-LOC, or its number.")
    return text


# -- Texts with spans ----------------------------------------------------------------------------------------------------------

TextSpan = tuple[int, int, str, Any]  # first and last place (exclusive), label, and the words that the data says stand there


def _spans_of(told: Any, at: str) -> list[TextSpan] | None:
    """The spans that a row tells of; None if what it holds are tags of words."""
    if isinstance(told, Mapping):
        if "entities" in told:  # spaCy's training data
            return _spans_of(told["entities"], at)
        keys = [next((key for key in keys if key in told), None) for keys in (_START_KEYS, _END_KEYS, _LABEL_KEYS)]
        if None in keys or not all(isinstance(told[key], (list, tuple)) for key in keys):
            return None
        told = [list(item) for item in zip(*(told[key] for key in keys), strict=False)]
    if isinstance(told, str) and re.match(r"\s*\[\s*[\[{(]", told):
        told = _listed(told, at, "the spans")
    if not isinstance(told, (list, tuple)) or not all(isinstance(item, (Mapping, list, tuple)) for item in told):
        return None
    return sorted((_span(item, at) for item in told), key=lambda span: span[:2])


def _span(item: Any, at: str) -> TextSpan:
    if isinstance(item, Mapping):
        keys = [next((key for key in keys if key in item), None) for keys in (_START_KEYS, _END_KEYS, _LABEL_KEYS)]
        parts: list[Any] = [item.get(key) if key is not None else None for key in keys]
        said = next((item[key] for key in ("text", "word") if isinstance(item.get(key), str)), None)
    else:
        parts, said = (list(item) + [None] * 3)[:3], None
    start, end, label = parts
    if isinstance(label, (list, tuple)) and len(label) == 1:
        label = label[0]
    whole = all(isinstance(part, int) and not isinstance(part, bool) for part in (start, end))
    if not whole or isinstance(label, (bool, float)) or not isinstance(label, (str, int)) or not str(label).strip():
        raise DataError(f"{at}: {shown(item, 80)} is no span with a start, an end and a label.", help=TAGGED_SHAPE)
    return int(start), int(end), str(label).strip(), said


class _Spans:
    """Cuts texts into words whose BIO tags say where the spans are, and counts spans that had to be widened to whole words."""

    def __init__(self, where: str) -> None:
        self.where, self.widened, self.first = where, 0, ""

    def cut(self, text: str, spans: Sequence[TextSpan], at: str, place: int) -> Sentence:
        words = tuple(match.span() for match in WORD.finditer(text))
        begins, ends = [begin for begin, _ in words], [end for _, end in words]
        tags, end_before = ["O"] * len(words), 0
        for start, end, label, said in spans:
            what = f"the span {start} to {end} ({shown(label, 30)})"
            if not 0 <= start < end <= len(text):
                raise DataError(
                    f"{at}: {what} lies outside of the text of {len(text)} characters, or is empty.", help=TAGGED_SHAPE
                )
            if start < end_before:
                raise DataError(
                    f"{at}: {what} overlaps the one before it, and a word has one tag.",
                    facts=[f"text: {shown(text, 100)}"],
                    help="leave one of them out.",
                )
            if said is not None and said.split() != text[start:end].split():
                raise DataError(
                    f"{at}: {what} holds {shown(text[start:end], 40)}, and the data says {shown(said, 40)} stands there.",
                    help="starts and ends count characters of the text from 0, not bytes or words.",
                )
            inside = range(bisect_right(ends, start), bisect_left(begins, end))
            if not inside:
                raise DataError(f"{at}: {what} holds no word, only {shown(text[start:end], 40)}.", help=TAGGED_SHAPE)
            if tags[inside[0]] != "O":
                raise DataError(
                    f"{at}: {what} begins in a word that belongs to the span before it.", help="leave one of them out."
                )
            kept = text[start:end].strip()
            if text[words[inside[0]][0] : words[inside[-1]][1]] != kept:
                self.widened += 1
                self.first = self.first or f"{kept!r} in {at.rpartition(', ')[2]}"
            for index in inside:
                tags[index] = f"I-{label}"
            tags[inside[0]] = f"B-{label}"
            end_before = end
        return Sentence(text, words, tuple(tags), place)

    def tell(self) -> None:
        if self.widened:
            remark(
                f"{self.where}: {self.widened:,} spans cut a word and are widened to whole words, the first is {self.first}."
            )


def _spanned(words: Sequence[Any], spans: Sequence[TextSpan], at: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Words with BIO tags out of spans that count words, the last one included."""
    tags = ["O"] * len(words)
    for start, last, label, _ in spans:
        if not 0 <= start <= last < len(words) or any(tag != "O" for tag in tags[start : last + 1]):
            raise DataError(
                f"{at}: the span {start} to {last} ({shown(label, 30)}) lies outside of its {len(words)} words, or overlaps another.",
                help="spans beside a list of words count words from 0, and the last word belongs to the span.",
            )
        tags[start : last + 1] = [f"I-{label}"] * (last + 1 - start)
        tags[start] = f"B-{label}"
    return tuple(map(str, words)), tuple(tags)
