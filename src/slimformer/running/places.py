"""Paths in a file that is written into a result's folder: they are relative to that folder, so that the file works anywhere.

A name that is no path here stays as it is: it may be that of a model or of data on the hub.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any


def seen_from(folder: Path, name: str) -> str:
    """A path as a file in `folder` names it: relative to the folder, and absolute if that is not possible.

    A link keeps its name, which may hold elsewhere too where it leads to another place.
    """
    if not os.path.exists(name):
        return name
    place = Path(os.path.abspath(name))  # `link/..` may be elsewhere
    place = place if os.path.exists(place) and os.path.samefile(place, name) else Path(name).resolve()
    try:
        relative = Path(os.path.relpath(place, folder.resolve())).as_posix()
    except ValueError:  # it lies on another drive of Windows
        return str(place)
    return relative if relative.startswith("..") else f"./{relative}"


def read_in(folder: Path, name: str) -> str:
    """The path that a file in `folder` names, as seen from the working directory.

    A name with a leading dot means a path even if nothing is there, so that nothing else of that name is taken for it.
    """
    anchored, here = name.startswith(("./", "../")) or name in {".", ".."}, Path.cwd()
    there = os.path.exists(folder / name)
    if folder.resolve() == here or Path(name).is_absolute() or not (anchored or there):
        return name
    if not there:
        return os.path.abspath(folder / name)
    place = Path(os.path.abspath(folder / name))  # a link keeps its name, as in `seen_from`
    place = place if os.path.samefile(place, folder / name) else (folder / name).resolve()
    return str(place.relative_to(here)) if place.is_relative_to(here) and place != here else str(place)


def options_seen_from(folder: Path, options: Mapping[str, Any], paths: Collection[str]) -> dict[str, Any]:
    """The options of a task as a file in `folder` holds them; `paths` names those that may be paths, or hold some."""
    return {
        name: each_place(value, lambda place: seen_from(folder, place)) if name in paths else value
        for name, value in options.items()
    }


def each_place(value: Any, change: Callable[[str], str]) -> Any:
    """A path changed, and each of those in a list or behind the names of a mapping; anything else stays.

    >>> each_place({"a": "x", "b": ["y"]}, str.upper)
    {'a': 'X', 'b': ['Y']}
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: each_place(item, change) for name, item in value.items()}
    return [each_place(item, change) for item in value] if isinstance(value, list) else value
