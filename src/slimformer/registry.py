"""Finds families, methods, forms, tasks, exporters and runtimes: kind + name -> class.

The name is the file name. Files in our own folders are found by listing them, third parties' by the entry-point group
`slimformer.<kind>`. A file is imported only when its name is asked for, so that listing stays quick.
"""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cache
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path
from typing import Any

from slimformer.errors import RecipeError, nearest

KINDS = {
    "families": "Family",
    "methods": "Method",
    "forms": "Form",
    "tasks": "Task",
    "exporters": "Exporter",
    "runtimes": "Runtime",
}


@cache
def names(kind: str) -> tuple[str, ...]:
    """Names of one kind, ours and third parties', sorted."""
    folder = Path(__file__).parent / kind
    own = {file.stem for file in folder.glob("*.py") if not file.stem.startswith("_") and file.stem != "base"}
    return tuple(sorted(own | {point.name for point in _plugins(kind)}))


@cache
def find(kind: str, name: str) -> type[Any]:
    """The class of that name; RecipeError with the nearest name if there is none."""
    if name not in names(kind):
        raise RecipeError(f"there is no '{name}' among the {kind}.", help=nearest(name, names(kind)))
    for point in _plugins(kind):
        if point.name == name:
            found: type[Any] = point.load()
            return found
    base = getattr(importlib.import_module(f"slimformer.{kind}.base"), KINDS[kind])
    module = importlib.import_module(f"slimformer.{kind}.{name}")
    classes = [
        item
        for item in vars(module).values()
        if inspect.isclass(item) and issubclass(item, base) and item is not base and item.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise TypeError(f"{module.__name__} must define exactly one {KINDS[kind]}, found {len(classes)}")
    return classes[0]


@cache
def classes(kind: str) -> dict[str, str]:
    """Class names of one kind, each with its plug-in's name. Our files are read for it and not imported, so that it is quick."""
    theirs = {point.name: point.attr for point in _plugins(kind) if point.attr}
    return {theirs.get(name) or _class_in(kind, name): name for name in names(kind)}


def _class_in(kind: str, name: str) -> str:
    """The name of the class that a file of ours holds: the only public one with a base, or else the one that an import finds."""
    file = Path(__file__).parent / kind / f"{name}.py"
    derived = re.findall(r"^class ([A-Z]\w*)\(", file.read_text(encoding="utf-8"), re.MULTILINE) if file.is_file() else []
    return str(derived[0]) if len(derived) == 1 else find(kind, name).__name__


def exported(kind: str, name: str) -> type[Any]:
    """The class `name` of a folder of plug-ins, for its module's `__getattr__`: one of the plug-ins, or the base class of the kind."""
    if name in classes(kind):
        return find(kind, classes(kind)[name])
    if name == KINDS[kind]:
        base: type[Any] = getattr(importlib.import_module(f"slimformer.{kind}.base"), name)
        return base
    raise AttributeError(f"module 'slimformer.{kind}' has no attribute '{name}'")


@cache
def source(kind: str, name: str) -> str:
    """The package that a plug-in comes from: "slimformer", or the name and version of a third party's distribution."""
    for point in _plugins(kind):
        if point.name == name:
            return f"{point.dist.name} {point.dist.version}" if point.dist else point.value
    return "slimformer"


@cache
def _plugins(kind: str) -> EntryPoints:
    """The entry points of one kind, read once: that takes longer than importing a task."""
    return entry_points(group=f"slimformer.{kind}")


def forget() -> None:
    """Forgets what was found, so that packages that were installed since are found too."""
    for function in (names, find, classes, source, _plugins):
        function.cache_clear()


def summary(kind: str, name: str) -> str:
    """The first line of the docstring of the file that holds it."""
    cls = find(kind, name)
    text = inspect.getdoc(importlib.import_module(cls.__module__)) or inspect.getdoc(cls) or ""
    return text.strip().splitlines()[0] if text.strip() else ""


def name_of(item: object) -> str:
    """The registry name of an instance or class: the name of its file."""
    cls = item if inspect.isclass(item) else type(item)
    return str(cls.__module__).rsplit(".", 1)[-1]
