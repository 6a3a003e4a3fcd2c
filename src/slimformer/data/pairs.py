"""Reads pairs of a text and what should be written for it: a translation, a summary, or several of them that count as right.

They come from texts that are parallel line by line (`parallel`), from tables, from the hub, or from memory. Which columns hold which is
told by the user or by their usual names, and said. Pairs with an empty side are left out and counted.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimformer.data.files import SHARD, SUFFIXES, Table, is_hub_name, join_tables, read_hub, read_splits, read_table, spread
from slimformer.data.parallel import (
    Corpus,
    by_split,
    choose_sides,
    corpus_of,
    find_corpora,
    is_language,
    read_lines,
    read_parallel,
    refuse_alone,
)
from slimformer.data.sources import Format, Stamp, data_homes, read_sources, settle_dev, stamp
from slimformer.data.texts import repair_text, stem_of, suffix_of
from slimformer.errors import DataError, nearest, shown
from slimformer.log import remark

# Names of columns in the order in which they are looked for; case and marks do not count.
_COLUMNS = {
    "translation": (("source", "target"), ("src", "tgt"), ("src", "trg"), ("source text", "target text"), ("source", "reference"),
                    ("src", "ref"), ("source sentence", "target sentence"), ("input", "output"), ("input text", "target text"),
                    ("original", "translation"), ("text", "translation"), ("sentence", "translation")),
    "summarization": (("document", "summary"), ("article", "highlights"), ("dialogue", "summary"), ("text", "summary"),
                      ("article", "summary"), ("article", "abstract"), ("source", "target"), ("document", "target"), ("src", "tgt"),
                      ("content", "summary"), ("body", "summary"), ("transcript", "summary"), ("report", "summary"),
                      ("input", "output"), ("input text", "target text"), ("source", "summary"), ("abstract", "title"),
                      ("article", "title"), ("text", "headline"), ("text", "title"), ("news", "headline")),
}  # fmt: skip
_COPIES = (
    0.2  # of the pairs; so many equal sides are a mistake, while names and numbers are translated by themselves now and then
)


@dataclass(frozen=True)
class Targets:
    """What may be written for a text: all references count in scores, and `train` is what a model is trained on."""

    references: tuple[str, ...]
    train: str

    def __str__(self) -> str:
        """The references, as a page shows them."""
        return " | ".join(self.references)


@dataclass(frozen=True)
class Pairs:
    """Texts with their references, and the number (from 0) that each has in its file."""

    where: str
    sides: tuple[str, str]  # names of the columns, languages or files
    sources: Sequence[str]
    references: Sequence[tuple[str, ...]]
    numbers: Sequence[int]
    total: int  # of rows in the file, also those that are left out

    def __len__(self) -> int:
        return len(self.sources)


@dataclass(frozen=True)
class Place:
    """Where pairs are: the options of a task that say so. `task` is "translation" or "summarization"."""

    task: str
    data: str
    target_data: str | None = None
    dev: str | None = None
    source: str | None = None
    target: str | None = None

    def stamp(self) -> Stamp:
        """What changes when one of the files does: a key for caches."""
        data = Path(os.path.expanduser(self.data))
        folder = str(data.parent) if data.is_file() else self.data  # the other side lies beside it
        return (*stamp(folder), *stamp(self.data), *stamp(self.target_data), *stamp(self.dev))


def read_pairs(place: Place) -> dict[str, Pairs]:
    """The "train" and "dev" pairs, one or both; DataError for whatever is wrong with the data."""
    sources, others = _sources(place, place.data)
    if place.dev is not None:
        apart = others.get(place.dev)
        if apart is None:
            apart = _dev(place, others)
        sources = {kind: pairs for kind, pairs in sources.items() if kind == "train"} | {"dev": apart}
    settled = settle_dev(sources, lambda pairs: pairs.where, lambda _: "")
    if {"train", "dev"} <= settled.keys():
        _tell_leaks(settled["train"], settled["dev"])
    return settled


def _dev(place: Place, others: Mapping[str, Pairs]) -> Pairs:
    """The pairs that the option `dev` names by a path."""
    name = str(place.dev)
    if not os.path.exists(os.path.expanduser(name)) and not is_hub_name(name):
        raise DataError(
            f"dev: {place.data} holds no '{name}', and no file has this name.",
            help=f"{nearest(name, others)}." if others else "name a file, or a split of the data.",
        )
    found, _ = _sources(Place(place.task, name, None, None, place.source, place.target), name)
    return found.get("dev") or found.get("test") or found["train"]


def _sources(place: Place, data: str) -> tuple[dict[str, Pairs], dict[str, Pairs]]:
    """The pairs by their use, and all parts of the data that can be named."""
    if not data:
        raise DataError(f"the task {place.task} has no data.", help="name a folder, a file or a hub name: --data ./folder.")
    path = Path(os.path.expanduser(data))
    if os.path.isdir(path):
        for home in data_homes(path):
            corpora = _corpora(home, place)
            if corpora:
                return _of_corpora(place, home, corpora)
    elif os.path.isfile(path):
        if place.target_data is not None:
            return _one(_of_files(place, [path, Path(os.path.expanduser(place.target_data))], _two_names(path, place)))
        mine = corpus_of(path, _corpora(path.parent, place)) if _may_be_text(path) else None
        if mine is not None:
            sides = choose_sides(mine[0], place.source, place.target, "" if place.source else mine[1])
            return _one(_of_corpus(place, mine[0], *sides))
        if _may_be_text(path) and suffix_of(path) not in SUFFIXES:
            raise DataError(
                f"{path} is one text, and there is no file of the other side beside it.",
                help="name that file: --target-data <file>; or call both alike, such as train.en and train.de.",
            )
    if place.target_data is not None:
        raise DataError(
            f"target_data names the file {place.target_data}, and {data} is no file.",
            help="name the two files, or a folder alone.",
        )
    return _of_tables(place, data)


def _one(pairs: Pairs) -> tuple[dict[str, Pairs], dict[str, Pairs]]:
    return {"train": pairs}, {}


# -- Parallel texts ------------------------------------------------------------------------------------------------------------


def _corpora(folder: Path, place: Place) -> list[Corpus]:
    return find_corpora(folder, [name for name in (place.source, place.target) if name])


def _may_be_text(path: Path) -> bool:
    return suffix_of(path) not in {*SUFFIXES} - {".txt"}


def _of_corpora(place: Place, folder: Path, corpora: Sequence[Corpus]) -> tuple[dict[str, Pairs], dict[str, Pairs]]:
    titles = {corpus.title: corpus for corpus in corpora}
    if place.dev in titles:
        chosen = by_split(folder, [corpus for corpus in corpora if corpus.title != place.dev])
        chosen = {kind: corpus for kind, corpus in chosen.items() if kind == "train"} | {"dev": titles[str(place.dev)]}
    else:
        chosen = by_split(folder, corpora)
    refuse_alone(folder, [name for name in (place.source, place.target) if name], chosen)
    if "train" not in chosen and not chosen:
        raise DataError(
            f"{folder} holds parallel texts, and none is called as training data.",
            facts=[f"there are: {', '.join(titles)}"],
            help="call them train.<side>, or name a file: --data <file>.",
        )
    usual: tuple[str, str] | None = None
    found = {}
    for kind, corpus in chosen.items():
        first, seconds = choose_sides(corpus, place.source, place.target, "", usual)
        usual = usual or (first, seconds[0])
        found[kind] = _of_corpus(place, corpus, first, seconds)
    others = {place.dev: found["dev"]} if place.dev in titles and place.dev is not None else {}
    return found, others


def _of_corpus(place: Place, corpus: Corpus, source: str, targets: Sequence[str]) -> Pairs:
    return _of_files(place, [corpus.files[side] for side in (source, *targets)], (source, targets[0]))


def _two_names(path: Path, place: Place) -> tuple[str, str]:
    return place.source or path.name, place.target or Path(str(place.target_data)).name


def _of_files(place: Place, files: Sequence[Path], sides: tuple[str, str]) -> Pairs:
    sources, *references = read_parallel(files)
    where = f"{files[0]} and {', '.join(file.name for file in files[1:])}"
    return _cleaned(place, where, sides, sources, list(zip(*references, strict=True)), "line")


# -- Tables --------------------------------------------------------------------------------------------------------------------


def _of_tables(place: Place, data: str) -> tuple[dict[str, Pairs], dict[str, Pairs]]:
    path = Path(os.path.expanduser(data))
    others: dict[str, Table] = {}

    def read_all(name: str) -> dict[str, Table]:
        tables = {split: spread(table) for split, table in read_hub(name).items()}
        others.update(tables)
        return tables

    form = Format(
        task=place.task,
        suffixes=SUFFIXES,
        match=lambda files, name: [file for file in files if SHARD.sub("", stem_of(file)).lower() == name],
        read=lambda files: spread(join_tables([read_table(file) for file in files])),
        read_hub=read_all,
        read_splits=lambda file: {split: spread(table) for split, table in read_splits(file).items()},
        example="./folder",
        forms="a folder with train.en and train.de or with tables, or a file",
    )
    try:
        tables = read_sources(data, form)
    except DataError as error:
        if os.path.isdir(path) and (alone := _lone_texts(path)):
            raise DataError(
                f"{path} holds texts of one side alone: {', '.join(alone)}.",
                help="call the two files of a split alike, such as train.en and train.de, train.src and train.tgt; "
                "other sides are named by --source and --target.",
            ) from None
        raise error
    if place.dev is not None and os.path.isdir(path):
        named = [
            file
            for file in sorted(path.iterdir())
            if file.is_file() and stem_of(file) == place.dev and suffix_of(file) in SUFFIXES
        ]
        others |= {place.dev: form.read(named)} if named else {}
    found = {kind: of_table(place, table) for kind, table in tables.items() if _has_targets(place, kind, table, tables)}
    return found, {place.dev: of_table(place, others[place.dev])} if place.dev in others and place.dev is not None else {}


def _lone_texts(folder: Path) -> list[str]:
    """Names of files that look like one side of parallel texts."""
    return [
        file.name
        for file in sorted(folder.iterdir())
        if file.is_file()
        and _may_be_text(file)
        and not file.name.startswith(".")
        and is_language(file.name.removesuffix(".gz").rpartition(".")[2])
    ]


def _has_targets(place: Place, kind: str, table: Table, tables: Mapping[str, Table]) -> bool:
    """Whether a table is of use; a test table without references cannot stand in for dev."""
    if kind != "test" or "train" not in tables:
        return True
    try:
        source, target = find_sides(tables["train"], place)
    except DataError:
        return True  # what is wrong with the training data is said then
    if source in table.columns and target in table.columns and any(map(_says_something, table.columns[target])):
        return True
    remark(
        f"{table.where} has no references (column '{target}'): it is left out, and a tenth of the training data becomes dev."
    )
    return False


def of_table(place: Place, table: Table) -> Pairs:
    """The pairs of a table, its columns named or found by their usual names."""
    source, target = find_sides(table, place)
    if source == target:
        raise DataError(f"{table.where}: column '{source}' is given for both sides.", help="name the column of the other side.")
    sources = [_source(table, row, value, source) for row, value in enumerate(table.column(source))]
    references = [_references(table, row, value, target) for row, value in enumerate(table.column(target))]
    return _cleaned(place, table.where, (source, target), sources, references, table.unit, table.places)


def find_sides(table: Table, place: Place) -> tuple[str, str]:
    """The columns of the source and of the target; each guess is said. DataError if there is none, or no telling which."""
    ends: dict[str, list[str]] = {}
    for name in table.columns:
        ends.setdefault(_folded(name.rpartition(".")[2]), []).append(name)
    known = {end: names[0] for end, names in ends.items() if len(names) == 1} | {_folded(name): name for name in table.columns}

    def named(name: str) -> str:
        found = name if name in table.columns else known.get(_folded(name), name)
        table.column(found)
        return found

    first = named(place.source) if place.source else None
    second = named(place.target) if place.target else None
    if first is None or second is None:
        first, second = _usual(place, table, known, first, second)
        remark(f"{table.where}: taking source '{first}', target '{second}'")
    return first, second


def _usual(place: Place, table: Table, known: Mapping[str, str], first: str | None, second: str | None) -> tuple[str, str]:
    for names in _COLUMNS[place.task]:
        source, target = (known.get(_folded(name)) for name in names)
        if source and target and source != target and first in (None, source) and second in (None, target):
            return source, target
    if place.task == "translation":
        spoken = [name for end, name in known.items() if is_language(end.replace(" ", "_"))]
        spoken = [name for name in dict.fromkeys(spoken) if _folded(name) != "id" or len(spoken) < 3]  # Indonesian, or numbers
        english = [name for name in spoken if _folded(name.rpartition(".")[2])[:2] == "en" and name != second]
        if first is None:
            first = english[0] if english else next((name for name in spoken if name != second), None) if second else None
        others = [name for name in spoken if name != first]
        if first is not None and second is None and len(others) == 1:
            second = others[0]
        if first is not None and second is not None:
            return first, second
    else:
        texts = [name for name in table.columns if name not in (first, second) and isinstance(table.columns[name][0], str)]
        if (first is None) != (second is None) and len(texts) == 1:
            return (first or texts[0]), (second or texts[0])
    missing = [name for name, value in (("source", first), ("target", second)) if value is None]
    usual = ", ".join(f"{source}/{target}" for source, target in _COLUMNS[place.task][:8])
    raise DataError(
        f"{table.where}: cannot tell which column is the {' and which the '.join(missing)}.",
        facts=[
            table.named_columns(),
            f"looked for: {usual}" + (", and two languages of which one is English" if place.task == "translation" else ""),
        ],
        help=f"name {'them' if len(missing) > 1 else 'it'}: {' '.join(f'--{name} <column>' for name in missing)}.",
    )


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.strip())).lower()


def _source(table: Table, row: int, value: Any, column: str) -> str:
    """A text; sentences in a list are joined."""
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return " ".join(item.strip() for item in value if item.strip())
    return _text(table, row, value, column)


def _references(table: Table, row: int, value: Any, column: str) -> tuple[str, ...]:
    """The references of a row; those in a list all count."""
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return tuple(value)
    return (_text(table, row, value, column),)


def _says_something(value: Any) -> bool:
    return bool(value) and value == value


def _text(table: Table, row: int, value: Any, column: str) -> str:
    if value is None or value != value:
        return ""  # as an empty line: left out and counted
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(
            f"{table.place(row)}: no text in column '{column}' ({shown(value, 40)}).",
            help="a text, a list of sentences (source) or a list of references (target) is read.",
        )
    return str(value)


# -- What is wrong with pairs --------------------------------------------------------------------------------------------------


def _cleaned(
    place: Place,
    where: str,
    sides: tuple[str, str],
    sources: Sequence[str],
    references: Sequence[Sequence[str]],
    unit: str,
    places: Sequence[int] | None = None,
) -> Pairs:
    """The pairs with something on both sides; DataError if none are left, or if both sides are the same."""
    texts = [repair_text(text).strip() for text in sources]
    wanted = [tuple(repair_text(item).strip() for item in items if item.strip()) for items in references]
    numbers = [number for number, (text, items) in enumerate(zip(texts, wanted, strict=True)) if text and items]
    lost = len(texts) - len(numbers)
    if not numbers:
        side = sides[1] if any(texts) else sides[0]
        raise DataError(f"{where}: '{side}' is empty in every {unit}.", help="are the right columns or files named?")
    if lost:
        taken = set(numbers)
        first = next(number for number in range(len(texts)) if number not in taken)
        remark(
            f"{where}: {lost:,} of {len(texts):,} {unit}s have an empty side and are left out; the first is {unit} "
            f"{places[first] if places is not None else first + 1}."
        )
    copies = sum(texts[number] in wanted[number] for number in numbers)
    if copies > 1 and copies == len(numbers):
        raise DataError(
            f"{where}: '{sides[0]}' and '{sides[1]}' hold the same texts in every {unit}.",
            help="name two different sides: --source, --target.",
        )
    if copies > 1 and copies > _COPIES * len(numbers):
        remark(f"{where}: in {copies:,} of {len(numbers):,} {unit}s both sides are the same text, as if it was not translated.")
    several = sum(len(wanted[number]) > 1 for number in numbers)
    if several:
        remark(
            f"{where}: {several:,} of {len(numbers):,} texts have several references: all count in scores, the first is trained on."
        )
    return Pairs(
        where, sides, [texts[number] for number in numbers], [wanted[number] for number in numbers], numbers, len(texts)
    )


def _tell_leaks(train: Pairs, dev: Pairs) -> None:
    seen = set(map(_plain, train.sources))
    leaked = sum(_plain(text) in seen for text in dev.sources)
    if leaked:
        remark(
            f"{dev.where}: {leaked:,} of {len(dev):,} texts of dev are in the training data too, so scores on dev are too good."
        )


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


# -- Other targets to train on -------------------------------------------------------------------------------------------------


def read_targets(name: str, train: Pairs) -> dict[int, str]:
    """Row number -> the text to train on instead of the reference, such as a teacher's translation.

    The file is a text with a line for each row of the training data, or a table with the columns `id` (as examples have it, "train/17")
    and `text`. DataError if the numbers of lines differ, or if no id is one of the training data.
    """
    path = Path(os.path.expanduser(name))
    if path.is_file() and _may_be_text(path):
        lines = read_lines(path)
        if len(lines) != train.total:
            raise DataError(
                f"{name} has {len(lines):,} lines, and {train.where} has {train.total:,}: they are not parallel.",
                help="write a line for each row of the training data, or a table with the columns id and text.",
            )
        return {number: line.strip() for number, line in enumerate(lines) if line.strip()}
    if path.is_dir():
        path = path / "train.jsonl"  # a mapping from memory
    table = read_table(path)
    ids, texts = table.column("id"), table.column("text")
    known = {f"train/{number}": number for number in train.numbers}
    found = {known[str(key)]: str(text).strip() for key, text in zip(ids, texts, strict=True) if str(key) in known and text}
    if not found:
        raise DataError(
            f"{name} has no text for any of the {len(train):,} training examples.",
            facts=[f"its ids: {', '.join(shown(key, 30) for key in ids[:3])}, ...", f"theirs: {next(iter(known))}, ..."],
            help="ids are those of the examples: train/ and the number of the row, from 0.",
        )
    return found
