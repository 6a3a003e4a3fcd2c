"""Reads questions with their contexts (SQuAD JSON, rows of a hub data set) and scores answers as SQuAD's own scripts do.

A question keeps every right answer for scoring, but a place in its context only if that place is certain, because a guessed one
teaches the wrong words. Scores: Rajpurkar et al. 2016 (https://arxiv.org/abs/1606.05250, section 6.1) and 2018
(https://arxiv.org/abs/1806.03822), with the details of the evaluation scripts v1.1 and v2.0. Models are the business of
`tasks/question_answering.py`.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from slimformer.data.files import SUFFIXES, Table, load_hub, read_table
from slimformer.data.sources import Stamp, stamp
from slimformer.data.texts import read_text, repair_text, stem_of, suffix_of
from slimformer.errors import DataError, nearest, shown
from slimformer.log import remark
from slimformer.tasks.base import Example

Version = Literal["v1", "v2"]  # v1: every question has an answer; v2: some have none
QUESTION_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow")
NOTHING = "(no answer)"  # how no answer is shown
_NEAR = 3  # characters that a told start may be beside the answer: marks of byte order, spaces and line ends shift it
_COLUMNS = ("id", "question", "context", "answers")
VERSION_IN_NAME = re.compile(r"v?([12])\.\d")  # train-v2.0.json
SHAPE = (
    'a SQuAD file looks like {"data": [{"paragraphs": [{"context": "...", "qas": [{"id": "1", "question": "...", '
    '"answers": [{"text": "...", "answer_start": 7}]}]}]}]}.'
)
ROW_SHAPE = 'a row has id, question, context and answers: {"text": ["..."], "answer_start": [7]}.'


@dataclass(frozen=True)
class Answer:
    """The texts that count as right; none if the context holds no answer.

    `start` is the character of the context at which texts[0] begins. It is None if the text does not occur there, or occurs several
    times and the right place is not known.
    """

    texts: tuple[str, ...] = ()
    start: int | None = None

    def __str__(self) -> str:
        return " | ".join(dict.fromkeys(self.texts)) or NOTHING


@dataclass(frozen=True)
class Questions:
    """All questions of a file. An example's texts are question and context, and its answer is an `Answer`."""

    where: str
    examples: tuple[Example, ...]
    absent: frozenset[str]  # ids of questions whose answers do not occur in their context
    guessed: frozenset[str]  # ids of questions whose answers occur in several places

    @property
    def unanswerable(self) -> int:
        """How many questions have no answer."""
        return sum(not example.answer.texts for example in self.examples)


# ---- files


def match_files(files: Sequence[Path], name: str, version: Version | None) -> list[Path]:
    """The files of the split `name`: train.json, train-v1.1.json, shards; of several, those of the version if it is known."""
    matches = [file for file in files if re.match(rf"{name}([-_.]|$)", stem_of(file), re.IGNORECASE)]
    if len(matches) > 1 and version is not None:
        matches = [file for file in matches if _version_in(file) in (None, version)]
    return matches


def _version_in(file: Path) -> Version | None:
    found = VERSION_IN_NAME.search(file.name)
    return None if found is None else "v1" if found[1] == "1" else "v2"


def read_questions(files: Sequence[Path]) -> Questions:
    """The questions in a SQuAD file, or in shards of one; DataError for whatever is wrong with them."""
    parts = [_read(str(file), stamp(str(file))) for file in files]
    if len(parts) == 1:
        return parts[0]
    examples = tuple(example for part in parts for example in part.examples)
    where = f"{parts[0].where} and {len(parts) - 1} more"
    _distinct(where, [(f"{where}, row {row}", example.id) for row, example in enumerate(examples, 1)])
    absent, guessed = (frozenset().union(*(getattr(part, name) for part in parts)) for name in ("absent", "guessed"))
    return Questions(where, examples, absent, guessed)


@lru_cache(maxsize=6)
def _read(name: str, _key: Stamp) -> Questions:
    file = Path(name)
    if suffix_of(file) in {".jsonl", ".ndjson", ".parquet", ".arrow"}:
        return _of_table(file)
    if suffix_of(file) != ".json":
        raise DataError(
            f"{file} is not a kind of file that questions can be read from.",
            help=f"known: .json (SQuAD), .jsonl, .parquet, .arrow; tables for classification are {', '.join(SUFFIXES)}.",
        )
    text = read_text(file, SHAPE)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}.", help=SHAPE) from None
    if isinstance(content, list):
        if not content or not all(isinstance(item, dict) and "paragraphs" in item for item in content):
            return _of_table(file)
        content = {"data": content}
    return _questions(str(file), _nested(str(file), content))


def read_hub_questions(name: str) -> dict[str, Questions]:
    """Splits of a hub data set in SQuAD's flat form: rows with id, question, context and answers."""
    found = {}
    for split, data in load_hub(name).items():
        where = f"{name} [{split}]"
        missing = _missing(data.column_names)
        if missing:
            raise DataError(
                f"{where} has no column '{missing}'.",
                facts=[f"columns: {', '.join(data.column_names)}"],
                help=f"{ROW_SHAPE} Examples of such data sets: rajpurkar/squad, rajpurkar/squad_v2.",
            )
        found[split] = _questions(where, ((f"{where}, row {row}", {"id": row} | item) for row, item in enumerate(data, 1)))
    return found


def _of_table(file: Path) -> Questions:
    table = read_table(file)
    if {"context", "qas"} <= {*table.columns}:
        return _questions(str(file), _of_paragraphs(table))
    missing = _missing(table.columns)
    if missing:
        raise DataError(
            f"{file} has no column '{missing}'.",
            facts=[table.named_columns()],
            help=f"{nearest(missing, table.columns)}. {ROW_SHAPE} Or SQuAD's own form: {SHAPE}",
        )
    if "id" not in table.columns:
        remark(f"{file} has no ids: the numbers of the rows are taken.")
    names = [name for name in table.columns if name in _COLUMNS]
    rows = ({"id": row + 1} | {name: table.columns[name][row] for name in names} for row in range(len(table)))
    return _questions(str(file), ((table.place(row), item) for row, item in enumerate(rows)))


def _of_paragraphs(table: Table) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each question of rows that are paragraphs of SQuAD, with a context and the list of its questions; an id may be missing."""
    number = 0
    for row, (context, questions) in enumerate(zip(table.columns["context"], table.columns["qas"], strict=True)):
        if not isinstance(questions, list) or not all(isinstance(item, dict) for item in questions):
            raise DataError(f"{table.place(row)}: 'qas' is no list of questions.", help=SHAPE)
        for place, item in enumerate(questions):
            number += 1
            yield f"{table.place(row)}, qas[{place}]", {"id": number} | item | {"context": context}


def _missing(columns: Collection[str]) -> str:
    """The first column that rows of questions need and that is not there; ids can be made up if the rest is there."""
    missing = [name for name in _COLUMNS if name not in columns]
    return "" if missing in ([], ["id"]) else missing[0]


# ---- questions


def _nested(where: str, content: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each question of a SQuAD file as a flat row, with its place."""
    for number, article in enumerate(_list(content, "data", where)):
        at = f"{where}: data[{number}]"
        for index, paragraph in enumerate(_list(article, "paragraphs", at)):
            inside = f"{at}.paragraphs[{index}]"
            for position, item in enumerate(_list(paragraph, "qas", inside)):
                place = f"{inside}.qas[{position}]"
                if not isinstance(item, dict):
                    raise DataError(f"{place} is not an object.", help=SHAPE)
                yield place, item | {"context": paragraph.get("context")}


def _list(item: Any, name: str, where: str) -> list[Any]:
    if not isinstance(item, dict):
        raise DataError(f"{where} is not a JSON object, so not SQuAD.", help=SHAPE)
    if not isinstance(item.get(name), list):
        what = "is no list" if name in item else "is missing"
        raise DataError(f"{where}: '{name}' {what}, so this is not SQuAD.", help=SHAPE)
    return item[name]  # type: ignore[no-any-return]


def _questions(where: str, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Questions:
    examples: list[Example] = []
    places: list[tuple[str, str]] = []
    kinds: dict[str, list[str]] = {"absent": [], "guessed": [], "sure": [], "none": []}
    moved = impossible = 0
    contexts: dict[str, str] = {}
    for place, row in rows:
        name = row.get("id")
        if isinstance(name, bool) or not isinstance(name, (str, int)) or not str(name).strip():
            raise DataError(f"{place} has no id.", help="give each question an id of its own: answers are told apart by them.")
        question = _told(row.get("question"), "question", place, str(name))
        context = _told(row.get("context"), "context", place, str(name))
        context = contexts.setdefault(context, context)  # one copy for all its questions
        golds = list(_golds(row.get("answers"), place))
        if row.get("is_impossible") is True:
            impossible += bool(golds)
            golds = []
        answer, found = placed(context, golds)
        starts = {start + len(text) - len(text.lstrip()) for text, start, _ in golds if start is not None}
        moved += bool(starts) and answer.start is not None and answer.start not in starts
        kinds[found].append(str(name))
        examples.append(Example(str(name), (question, context), answer))
        places.append((place, str(name)))
    if not examples:
        raise DataError(f"{where} holds no questions.", help=SHAPE)
    _distinct(where, places)
    if impossible:
        remark(f"{where}: {impossible:,} questions are marked is_impossible and have answers: they are taken to have none.")
    if moved:
        remark(
            f"{where}: {moved:,} of {len(examples):,} answers do not begin where answer_start says: the only place "
            f"of the text, or the one that is at most {_NEAR} characters away, is taken."
        )
    return Questions(where, tuple(examples), frozenset(kinds["absent"]), frozenset(kinds["guessed"]))


def _told(value: Any, what: str, place: str, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        said = "is empty" if isinstance(value, str) else "is missing" if value is None else "is no text"
        raise DataError(f"{place} (id '{name}'): its {what} {said}.", help=f"fill in the {what}, or leave the question out.")
    return repair_text(value)


def _golds(answers: Any, place: str) -> Iterator[tuple[str, int | None, int]]:
    """Text, start (None if the data has none) and number of occurrences of each answer, from either of SQuAD's forms."""
    if answers is None:
        answers = []
    if isinstance(answers, dict):  # the form of the hub: a list per field
        texts, starts = answers.get("text"), answers.get("answer_start")
        starts = [None] * len(texts or ()) if starts is None else starts
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise DataError(f"{place}: its answers are not lists 'text' and 'answer_start' of one length.", help=ROW_SHAPE)
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(answers, list):
        raise DataError(f"{place}: its answers are no list.", help=SHAPE)
    for answer in answers:
        if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
            raise DataError(f"{place}: an answer has no 'text'.", help=SHAPE)
        start, times = answer.get("answer_start"), answer.get("n_occ", 1)
        yield repair_text(answer["text"]), _whole(start), times if type(times) is int else 1


def _whole(value: Any) -> int | None:
    """A whole number, also as tables write it: "9", 9.0. None for anything else."""
    if isinstance(value, str) and value.strip().isdigit():
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def placed(context: str, golds: Sequence[tuple[str, int | None, int]]) -> tuple[Answer, str]:
    """The answer that golds (text, start, occurrences) make, and how certain its place is: "sure", "guessed", "absent" or "none".

    A start that does not hold the text is moved to the only place that does, or to the only one a few characters beside it. More
    than one occurrence (`n_occ`) says that the start was itself a guess.
    """
    golds = [gold for gold in golds if gold[0].strip()]
    if not golds:
        return Answer(), "none"
    texts = tuple(text for text, _, _ in golds)
    found = "absent"
    for index, (text, start, occurrences) in enumerate(golds):
        bare = text.strip()
        at = None if start is None else start + len(text) - len(text.lstrip())
        if occurrences > 1:
            found = "guessed"
        elif at is not None and at >= 0 and context[at : at + len(bare)] == bare:
            return _answer(texts, index, bare, at), "sure"
        elif bare in context:
            first = context.find(bare)
            if context.find(bare, first + 1) >= 0:
                near = [] if at is None else _places_near(context, bare, at)
                if len(near) != 1:
                    found = "guessed"
                    continue
                first = near[0]
            return _answer(texts, index, bare, first), "sure"
    return Answer(texts), found


def _places_near(context: str, text: str, at: int) -> list[int]:
    begin = max(0, at - _NEAR)
    return [place for place in range(begin, at + _NEAR + 1) if context.startswith(text, place)]


def _answer(texts: tuple[str, ...], index: int, bare: str, start: int) -> Answer:
    return Answer((bare, *texts[:index], *texts[index + 1 :]), start)


def _distinct(where: str, places: Sequence[tuple[str, str]]) -> None:
    first: dict[str, str] = {}
    for place, name in places:
        if name in first:
            count = len(places) - len({name for _, name in places})
            raise DataError(
                f"{place}: the id {shown(name)} was there before.",
                facts=[f"first: {first[name]}", f"questions of {where} with an id that was there before: {count:,}"],
                help="give each question an id of its own; a file that was joined to itself looks like this.",
            )
        first[name] = place


# ---- the official scores


ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
PUNCTUATION = str.maketrans("", "", string.punctuation)


@lru_cache(maxsize=1 << 17)
def normalized(text: str) -> str:
    """Lower case, no ASCII punctuation, no English articles, single spaces: what two answers are compared in."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact(prediction: str, answer: Answer, version: Version) -> float:
    """1 if the normalized prediction equals a normalized right answer, else 0; the prediction "" means no answer."""
    return float(any(normalized(prediction) == normalized(gold) for gold in _counted(answer, version)))


def f1(prediction: str, answer: Answer, version: Version) -> float:
    """Harmonic mean of precision and recall of words; the best one over all right answers."""
    return max((_f1(prediction, gold, version) for gold in _counted(answer, version)), default=0.0)


def _counted(answer: Answer, version: Version) -> tuple[str, ...]:
    """The right answers. v2.0 drops those that normalize to nothing, and takes "" if none remains; v1.1 keeps all."""
    if version == "v1":
        return answer.texts
    return tuple(text for text in answer.texts if normalized(text)) or ("",)


@lru_cache(maxsize=1 << 17)
def _f1(prediction: str, gold: str, version: Version) -> float:
    ours, theirs = normalized(prediction).split(), normalized(gold).split()
    if version == "v2" and (not ours or not theirs):
        return float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)
