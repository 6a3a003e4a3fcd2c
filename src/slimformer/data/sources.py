"""Finds the training and the dev data that a name stands for: a folder with a file for each, one file, or a data set of the hub."""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from slimformer.data.files import SHARD, is_hub_name
from slimformer.data.splits import DEV_NAMES, SPLIT_NAMES, TEST_NAMES, TRAIN_NAMES
from slimformer.data.texts import stem_of, suffix_of
from slimformer.errors import DataError, nearest
from slimformer.files import read_small
from slimformer.log import remark

Data = TypeVar("Data")
Stamp = tuple[tuple[str, int, int, int], ...]

_OF_DATASETS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "dataset.json")
_OTHER_KINDS = {
    **dict.fromkeys((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".zip", ".7z", ".rar", ".zst"), "unpack it."),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save it as 'CSV UTF-8'."),
    **dict.fromkeys(
        (".pkl", ".pickle", ".joblib", ".pt", ".npy", ".npz"), "pickles are never read; save it as .csv, .jsonl or .parquet."
    ),
    **dict.fromkeys((".feather", ".arrows", ".ipc"), "call it .arrow."),
    **dict.fromkeys((".xml", ".yaml", ".yml", ".db", ".sqlite", ".html"), "write a table of it: .csv, .jsonl or .parquet."),
}


@dataclass(frozen=True)
class Format(Generic[Data]):
    """How the data of one task is found and read.

    `match` gives those of a folder's files that hold the split of a name ("train", "dev", ...). `read` reads a file or the shards
    of one, `read_hub` all splits of a hub data set, and `read_splits` those of one file that may hold several. The rest is for
    messages: `example` is what a user could name as data, `forms` are the forms data may have, and `advice` helps to choose between
    two files.
    """

    task: str
    suffixes: tuple[str, ...]
    match: Callable[[Sequence[Path], str], list[Path]]
    read: Callable[[Sequence[Path]], Data]
    read_hub: Callable[[str], Mapping[str, Data]]
    example: str
    forms: str
    advice: str = ""
    read_splits: Callable[[Path], Mapping[str, Data]] = lambda _: {}
    named: bool = True  # whether the name of a single file tells if it is training data


def read_sources(data: str, form: Format[Data], hub: str | None = None) -> dict[str, Data]:
    """The "train" and "dev" data, one or both, and "test" if there is no dev; a single file is all "train", or what its name says.

    `hub`: what `data` is called on the hub.
    """
    if not data:
        raise DataError(f"the task {form.task} has no data.", help=f"name {form.forms}: data: {form.example}.")
    path, hub = Path(os.path.expanduser(data)), hub or data
    if os.path.isdir(path):  # os.path takes any text, pathlib raises if a name is too long
        return _read_folder(path, form)
    if os.path.isfile(path):
        return _of_one_file(path, form.read_splits(path)) or {_kind_of(path, form): form.read([path])}
    if os.path.exists(path):
        raise DataError(f"{data} is no ordinary file.", help="write the data to a file and name that.")
    if not is_hub_name(hub) or suffix_of(Path(hub)) in form.suffixes:
        raise DataError(
            f"{data} does not exist.", help=f"{_why_not(path)} Or name {form.forms}, or a hub data set: owner/name."
        )
    remark(f"{data} is no file here: loading it from the hub")
    return of_splits(form.read_hub(hub), hub)


def _kind_of(file: Path, form: Format[Data]) -> str:
    """Which data a file holds that was named by itself: "dev" or "test" if that is its name, else "train"."""
    stem = SHARD.sub("", stem_of(file)).lower()
    if form.named and (stem in DEV_NAMES or stem in TEST_NAMES):
        return "dev" if stem in DEV_NAMES else "test"
    if stem in TRAIN_NAMES:
        beside = [item.name for item in _files_in(file.parent, form.suffixes) if stem_of(item).lower() in DEV_NAMES]
        if beside:
            remark(f"{file}: {beside[0]} beside it is not used; name the folder, {file.parent}, to report on that.")
    return "train"


def of_splits(splits: Mapping[str, Data], where: str) -> dict[str, Data]:
    """The "train" and "dev" data, one or both, and "test" if there is no dev, of splits by the names that people give them."""
    sources = {}
    folded = {str(name).strip().lower(): data for name, data in splits.items()}
    for kind, names in (("train", TRAIN_NAMES), ("dev", DEV_NAMES), ("test", TEST_NAMES)):
        first = next((folded[name] for name in names if name in folded), None)
        if first is not None and not (kind == "test" and "dev" in sources):
            sources[kind] = first
    if not sources:
        raise DataError(
            f"{where} has no train split.",
            facts=[f"splits: {', '.join(map(str, splits))}"],
            help=f"name other data; splits are called {', '.join((*TRAIN_NAMES, *DEV_NAMES, *TEST_NAMES))}.",
        )
    return sources


def _of_one_file(file: Path, splits: Mapping[str, Data]) -> dict[str, Data]:
    """The splits that one file holds; none if it holds none."""
    if not splits:
        return {}
    taken = of_splits(splits, str(file))
    others = [name for name, data in splits.items() if not any(data is mine for mine in taken.values())]
    said = f"{file}: the splits in it ({', '.join(splits)}) are taken as they are called there"
    remark(f"{said}; {', '.join(others)} {'are' if len(others) > 1 else 'is'} left out." if others else f"{said}.")
    return taken


def _read_folder(folder: Path, form: Format[Data]) -> dict[str, Data]:
    files: dict[str, list[Path]] = {}
    for home in data_homes(folder):
        files = files or find_files(home, form)
    if not files:
        whole = {file: splits for file in _files_in(folder, form.suffixes) if (splits := form.read_splits(file))}
        if len(whole) == 1:
            return _of_one_file(*next(iter(whole.items())))
        raise _no_data(folder, form)
    if [*files] == ["train"] and len(files["train"]) == 1 and (splits := form.read_splits(files["train"][0])):
        return _of_one_file(files["train"][0], splits)
    sources = {}
    for kind, parts in files.items():
        try:
            sources[kind] = form.read(parts)
        except DataError as error:
            if kind != "test" or "train" not in sources:
                raise
            remark(f"{parts[0]} cannot stand in for a dev file: {error.what}")
    return sources


def data_homes(folder: Path) -> list[Path]:
    """The folders in which the files of a data folder may lie: itself, `data` as on the hub, or the only folder in it."""
    inner = _folders(folder)
    named = [item for item in inner if item.name == "data"]
    return [folder, *(named or (inner if len(inner) == 1 else []))]


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(item for item in folder.iterdir() if item.is_dir() and not item.name.startswith("."))
    except OSError:
        return []


def _files_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    try:
        items = sorted(item for item in folder.iterdir() if item.is_file() and not item.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}.", help="check its permissions.") from None
    kept = _saved_by_datasets(folder)
    items = [item for item in items if suffix_of(item) in suffixes and item.name not in _OF_DATASETS]
    return items if kept is None else [item for item in items if item.name in kept]


def _saved_by_datasets(folder: Path) -> set[str] | None:
    """The files that `save_to_disk` of `datasets` wrote, by its state.json; others, such as cache-*.arrow, came when it was opened."""
    try:
        state = json.loads(read_small(folder / "state.json"))
        return {str(item["filename"]) for item in state["_data_files"]}
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return None


def find_files(folder: Path, form: Format[Data]) -> dict[str, list[Path]]:
    """Files of the "train", "dev" and "test" data in a folder (shards in order); "test" only if there is no dev."""
    files = _files_in(folder, form.suffixes)
    inner = {item.name.lower(): item for item in _folders(folder)}

    def first_of(names: Sequence[str]) -> list[Path]:
        for name in names:
            matches = form.match(files, name)
            complete = [file for file in matches if not SHARD.search(stem_of(file))]
            if len(complete) > 1 or (complete and len(matches) > 1):
                raise DataError(
                    f"{folder} holds {' and '.join(file.name for file in matches)}: which one is meant?",
                    help=f"{form.advice}leave one of them, or name the file itself.",
                )
            if matches:
                return matches
        parts = [file for file in files for name in names if re.search(rf"(^|[-_. ]){name}([-_. ]|$)", stem_of(file).lower())]
        if len(parts) == 1:  # reviews_train.csv
            remark(f"{folder}: taking {parts[0].name} for the {names[0]} data.")
            return parts
        for name in names:  # train/part-0.csv, part-1.csv
            parts = _files_in(inner[name], form.suffixes) if name in inner else []
            if parts and len({suffix_of(part) for part in parts}) == 1:
                remark(f"{folder}: taking the {_count(parts)} in {inner[name].name}/ for the {names[0]} data.")
                return parts
        return []

    found = {"train": first_of(TRAIN_NAMES), "dev": first_of(DEV_NAMES)}
    if not found["dev"]:
        found["test"] = first_of(TEST_NAMES)
    if not any(found.values()) and files and len({SHARD.sub("", stem_of(file)) for file in files}) == 1:
        remark(
            f"{folder}: taking its only file, {files[0].name}." if len(files) == 1 else f"{folder}: taking its {_count(files)}."
        )
        found["train"] = files
    return {kind: parts for kind, parts in found.items() if parts}


def is_training(file: Path) -> bool:
    """Whether a file of a folder holds training data, by its name or that of its folder."""
    words = re.split(r"[-_. ]+", file.name.lower())
    return any(name in words or file.parent.name.lower() == name for name in TRAIN_NAMES)


def _holds_texts(folder: Path) -> bool:
    try:
        return any(item.suffix == ".txt" for item in folder.iterdir())
    except OSError:
        return False


def _count(files: Sequence[Path]) -> str:
    return f"file {files[0].name}" if len(files) == 1 else f"{len(files)} files ({files[0].name}, ...)"


def no_training_data(data: str, help: str, looked_for: str = "") -> DataError:
    """The error for data without a training part: what it holds instead, or that its name says what it is for."""
    facts = [*_held_by(data), *([f"looked for: {looked_for}"] if looked_for else [])]
    return DataError(f"{data} has no training data.", facts=facts, help=help)


def _held_by(data: str) -> list[str]:
    """What a folder holds, as a fact of an error; nothing if it is none."""
    folder = Path(os.path.expanduser(data))
    if os.path.isfile(folder):
        return [f"by its name, {folder.name} is data to report on; to train on it too, give it another name"]
    if not os.path.isdir(folder):
        return []
    there = sorted(item for item in folder.iterdir() if not item.name.startswith("."))
    names = [f"{item.name}/" if item.is_dir() else item.name for item in there]
    return [f"it holds: {', '.join(names[:8])}{', ...' if names[8:] else ''}" if names else "it is empty"]


def _no_data(folder: Path, form: Format[Data]) -> DataError:
    """The error for a folder without data files, by what it holds instead."""
    inner, there = _folders(folder), sorted(item for item in folder.iterdir() if not item.name.startswith("."))
    facts = _held_by(str(folder))
    tables = [item.name for item in there if item.is_file() and suffix_of(item) in form.suffixes]
    texts = next(
        (item for item in (*inner, *(below for item in inner for below in _folders(item))) if _holds_texts(item)), None
    )
    other = next((item.name for item in there if item.name.lower().endswith(tuple(_OTHER_KINDS))), None)
    if tables:
        help = f"name one of them as the data, or call them train{form.suffixes[0]} and dev{form.suffixes[0]}: {', '.join(tables[:4])}"
    elif texts is not None:
        what = f"{folder} holds a file for each text, in folders such as {texts.relative_to(folder)}/."
        return DataError(
            what, facts=facts, help='write one table: a line {"text": ..., "label": ...} for each of them, as .jsonl.'
        )
    elif other is not None:
        help = next(advice for end, advice in _OTHER_KINDS.items() if other.lower().endswith(end))
        return DataError(f"{folder} holds no train file that can be read.", facts=facts, help=f"{other}: {help}")
    else:
        help = f"name the files train{form.suffixes[0]} and dev{form.suffixes[0]}, or give the file itself."
    looked = f"looked for: {', '.join(TRAIN_NAMES)} and {', '.join(DEV_NAMES)} with {', '.join(form.suffixes)}"
    return DataError(f"{folder} holds no train file.", facts=[*facts, looked], help=help)


def settle_dev(sources: Mapping[str, Data], where: Callable[[Data], str], lacks: Callable[[Data], str]) -> dict[str, Data]:
    """The sources with "test" as "dev" if it has labels; `lacks` says what it is without, "" if nothing. What was done is logged."""
    settled = {kind: data for kind, data in sources.items() if kind != "test"}
    if "test" in sources:
        test = sources["test"]
        lack = lacks(test)
        if lack and settled:
            remark(f"{where(test)} has no labels ({lack}): it is left out, and a tenth of the training data becomes dev.")
        else:
            settled["dev"] = test
            remark(f"there is no dev data: {where(test)} stands in.")
    elif "dev" not in sources:
        remark(f"{where(sources['train'])}: no dev data was given, and a tenth of it becomes dev.")
    return settled


def _why_not(path: Path) -> str:
    """What to do about a path that does not exist."""
    text = str(path)
    if re.match(r"\w+:/", text):
        return "Addresses are not read: download it, and name the file."
    if re.search(r"[*?]", text):
        return "Patterns are not read: name the folder that holds the files."
    if "$" in text:
        return "Variables are the shell's: leave out the quotes around it."
    try:
        names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError:
        names = []
    close = nearest(path.name, names).partition("known:")[0].strip() if names else ""
    return close or "check the path."


def stamp(source: str | int | None) -> Stamp:
    """What changes when a file, or a file of a folder, does: a key for caches of what was read.

    The time of the last change of any kind is in it, because copying tools set the time of writing back.
    """
    if not isinstance(source, str) or not source or not os.path.exists(os.path.expanduser(source)):
        return ()
    path = Path(os.path.expanduser(source))
    homes = data_homes(path) if path.is_dir() else []
    folders = [*homes, *(inner for home in homes for inner in _folders(home) if inner.name.lower() in SPLIT_NAMES)]
    files = sorted(item for folder in folders for item in folder.iterdir() if item.is_file()) or [path]
    stats = [(str(file), file.stat()) for file in files]
    return tuple((name, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size) for name, stat in stats)
