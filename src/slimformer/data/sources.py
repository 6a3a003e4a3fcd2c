"""Finds the training and the dev data that a name stands for: a folder with a file for each, one file, or a data set of the hub."""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from slimformer.data.files import SHARD, is_hub_name
from slimformer.data.texts import stem_of, suffix_of
from slimformer.errors import DataError, nearest
from slimformer.log import remark

Data = TypeVar("Data")
Stamp = tuple[tuple[str, int, int, int], ...]

TRAIN_NAMES = ("train", "training")
DEV_NAMES = ("dev", "validation", "valid", "val", "eval", "dev_matched", "validation_matched")
TEST_NAMES = ("test",)  # stands in if there is no dev data, and only if it has labels


@dataclass(frozen=True)
class Format(Generic[Data]):
    """How the data of one task is found and read.

    `match` gives those of a folder's files that hold the split of a name ("train", "dev", ...). `read` reads a file or the shards
    of one, `read_hub` all splits of a hub data set. The rest is for messages: `example` is what a user could name as data,
    `forms` are the forms data may have, and `advice` helps to choose between two files.
    """

    task: str
    suffixes: tuple[str, ...]
    match: Callable[[Sequence[Path], str], list[Path]]
    read: Callable[[Sequence[Path]], Data]
    read_hub: Callable[[str], Mapping[str, Data]]
    example: str
    forms: str
    advice: str = ""


def read_sources(data: str, form: Format[Data], hub: str | None = None) -> dict[str, Data]:
    """The "train" and "dev" data, one or both, and "test" if there is no dev; a single file is all "train".

    `hub`: what `data` is called on the hub.
    """
    if not data:
        raise DataError(f"the task {form.task} has no data.", help=f"name {form.forms}: data: {form.example}.")
    path, hub = Path(os.path.expanduser(data)), hub or data
    if os.path.isdir(path):  # os.path takes any text, pathlib raises if a name is too long
        return _read_folder(path, form)
    if os.path.isfile(path):
        return {"train": form.read([path])}
    if os.path.exists(path):
        raise DataError(f"{data} is no ordinary file.", help="write the data to a file and name that.")
    if not is_hub_name(hub):
        raise DataError(
            f"{data} does not exist.", help=f"{_neighbours(path)} Or name {form.forms}, or a hub data set: owner/name."
        )
    remark(f"{data} is no file here: loading it from the hub")
    return of_splits(form.read_hub(hub), hub)


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


def _read_folder(folder: Path, form: Format[Data]) -> dict[str, Data]:
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise DataError(
            f"{folder} was written by save_to_disk of the package datasets.",
            help=f'in Python, give the data set itself: data=datasets.load_from_disk("{folder.name}"); or save it as Parquet.',
        )
    files = find_files(folder, form)
    inner = folder / "data"
    if not files and inner.is_dir():  # a data set of the hub as it is downloaded
        files = find_files(inner, form)
    if not files:
        raise DataError(
            f"{folder} holds no train file.",
            facts=[f"looked for: {', '.join(TRAIN_NAMES)} and {', '.join(DEV_NAMES)} with {', '.join(form.suffixes)}"],
            help=f"name the files train{form.suffixes[0]} and dev{form.suffixes[0]}, or give the file itself.",
        )
    sources = {}
    for kind, parts in files.items():
        try:
            sources[kind] = form.read(parts)
        except DataError as error:
            if kind != "test" or "train" not in sources:
                raise
            remark(f"{parts[0]} cannot stand in for a dev file: {error.what}")
    return sources


def find_files(folder: Path, form: Format[Data]) -> dict[str, list[Path]]:
    """Files of the "train", "dev" and "test" data in a folder (shards in order); "test" only if there is no dev."""
    try:
        files = sorted(file for file in folder.iterdir() if file.is_file() and suffix_of(file) in form.suffixes)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}.", help="check its permissions.") from None

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
        return []

    found = {"train": first_of(TRAIN_NAMES), "dev": first_of(DEV_NAMES)}
    if not found["dev"]:
        found["test"] = first_of(TEST_NAMES)
    if not any(found.values()) and len(files) == 1:
        remark(f"{folder}: taking its only file, {files[0].name}.")
        found["train"] = files
    return {kind: parts for kind, parts in found.items() if parts}


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
        remark(f"{where(sources['train'])}: there is no dev data beside it, and a tenth of it becomes dev.")
    return settled


def _neighbours(path: Path) -> str:
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
    folders = [path, path / "data"] if path.is_dir() else []
    files = sorted(item for folder in folders if folder.is_dir() for item in folder.iterdir() if item.is_file()) or [path]
    stats = [(str(file), file.stat()) for file in files]
    return tuple((name, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size) for name, stat in stats)
