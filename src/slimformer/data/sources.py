"""Finds the training and the dev data that a name stands for: a folder with a file for each, one file, or a data set of the hub."""

from __future__ import annotations

import logging
import os.path
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from slimformer.data.files import SHARD, is_hub_name
from slimformer.errors import DataError, nearest

_log = logging.getLogger(__name__)

Data = TypeVar("Data")
Stamp = tuple[tuple[str, int, int], ...]

TRAIN_NAMES = ("train", "training")
DEV_NAMES = ("dev", "validation", "valid", "val", "eval", "dev_matched", "validation_matched", "test")  # test: last resort


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
    """The "train" and "dev" data, one or both; a single file is all "train". `hub`: what `data` is called on the hub."""
    if not data:
        raise DataError(f"the task {form.task} has no data.", help=f"name {form.forms}: data: {form.example}.")
    path, hub = Path(data).expanduser(), hub or data
    if os.path.isdir(path):  # os.path takes any text, pathlib raises if a name is too long
        return _read_folder(path, form)
    if os.path.isfile(path):
        return {"train": form.read([path])}
    if not is_hub_name(hub):
        raise DataError(
            f"{data} does not exist.", help=f"{_neighbours(path)} Or name {form.forms}, or a hub data set: owner/name."
        )
    _log.info("%s is no file here: loading it from the hub", data)
    splits = form.read_hub(hub)
    sources = {}
    for kind, names in (("train", TRAIN_NAMES), ("dev", DEV_NAMES)):
        first = next((splits[name] for name in names if name in splits), None)
        if first is not None:
            sources[kind] = first
    if not sources:
        raise DataError(f"{hub} has no train split.", facts=[f"splits: {', '.join(splits)}"], help="name another data set.")
    return sources


def _read_folder(folder: Path, form: Format[Data]) -> dict[str, Data]:
    train, dev = find_files(folder, form)
    if not train and not dev:
        raise DataError(
            f"{folder} holds no train file.",
            facts=[f"looked for: {', '.join(TRAIN_NAMES)} and {', '.join(DEV_NAMES)} with {', '.join(form.suffixes)}"],
            help=f"name the files train{form.suffixes[0]} and dev{form.suffixes[0]}, or give the file itself.",
        )
    if dev and dev[0].stem.lower().startswith("test"):
        _log.info("%s has no dev file: %s stands in", folder, dev[0].name)
    return {kind: form.read(files) for kind, files in (("train", train), ("dev", dev)) if files}


def find_files(folder: Path, form: Format[Data]) -> tuple[list[Path], list[Path]]:
    """Files of the training and of the dev data in a folder (shards in order); an empty list for what is not there."""
    try:
        files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in form.suffixes)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}.", help="check its permissions.") from None

    def first_of(names: Sequence[str]) -> list[Path]:
        for name in names:
            matches = form.match(files, name)
            complete = [file for file in matches if not SHARD.search(file.stem)]
            if len(complete) > 1 or (complete and len(matches) > 1):
                raise DataError(
                    f"{folder} holds {' and '.join(file.name for file in matches)}: which one is meant?",
                    help=f"{form.advice}leave one of them, or name the file itself.",
                )
            if matches:
                return matches
        return []

    return first_of(TRAIN_NAMES), first_of(DEV_NAMES)


def _neighbours(path: Path) -> str:
    try:
        names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError:
        names = []
    close = nearest(path.name, names).partition("known:")[0].strip() if names else ""
    return close or "check the path."


def stamp(source: str | int | None) -> Stamp:
    """What changes when a file, or a file of a folder, does: a key for caches of what was read."""
    if not isinstance(source, str) or not source or not os.path.exists(Path(source).expanduser()):
        return ()
    path = Path(source).expanduser()
    files = sorted(item for item in path.iterdir() if item.is_file()) if path.is_dir() else [path]
    return tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
