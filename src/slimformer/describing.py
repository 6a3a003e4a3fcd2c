"""Describes the options of plug-ins and stages: default, range and meaning, read from their dataclasses.

The meaning of an option stands beside its field or in the docstring of its class; it is written once, there.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from slimformer import registry
from slimformer.errors import RecipeError, nearest
from slimformer.rules import rules_of

STAGES = {
    "train": "training.stage.Train",
    "trim_vocabulary": "training.stage.TrimVocabulary",
    "export": "running.recipe.Export",
    "bench": "running.recipe.Bench",
}
COMMON_MEANINGS = {  # options that mean the same wherever they are
    "keep": "The share that may stay.",
    "cost": "What `keep` is a share of.",
    "units": "Which units may go.",
    "examples": "How many training examples are looked at.",
    "neuron_multiple": "FFN widths stay multiples of it, which matrix kernels like.",
    "sublayers": "Whether whole sublayers may go.",
    "labels": "The names of the classes in the order of the model's ids; filled by the tool.",
    "max_length": "Tokens an input may have; longer ones are cut off.",
    "metric": "The metric that counts.",
}


@dataclass(frozen=True)
class OptionFacts:
    """An option as a person reads it: what it may be, what it is by default ("" if it has to be given), and what it means."""

    name: str
    default: str
    range: str
    meaning: str


@dataclass(frozen=True)
class Described:
    """A plug-in or stage: its kind, where it comes from, its first line, and its options."""

    name: str
    kind: str
    source: str
    summary: str
    options: tuple[OptionFacts, ...]


def describe(name: str) -> list[Described]:
    """Everything of that name, such as a method and a form; RecipeError with the nearest name if there is none.

    >>> [(item.kind, item.options[0].name, item.options[0].default) for item in describe("gates")]
    [('methods', 'keep', '0.5')]
    """
    items = [
        Described(name, kind, registry.source(kind, name), registry.summary(kind, name), options_of(registry.find(kind, name)))
        for kind in registry.KINDS
        if name in registry.names(kind)
    ]
    if name in STAGES:
        module, _, cls = STAGES[name].rpartition(".")
        stage = getattr(importlib.import_module(f"slimformer.{module}"), cls)
        items.append(Described(name, "stages", "slimformer", _lines(stage)[0], options_of(stage)))
    if not items:
        known = {*STAGES, *(other for kind in registry.KINDS for other in registry.names(kind))}
        raise RecipeError(f"there is nothing called '{name}'.", help=nearest(name, known))
    return items


def options_of(cls: type[Any]) -> tuple[OptionFacts, ...]:
    """The options of a class, in the order of its fields; none if it is no dataclass."""
    if not dataclasses.is_dataclass(cls):
        return ()
    rules, hints, comments = rules_of(cls), get_type_hints(cls), _comments(cls)
    return tuple(
        OptionFacts(
            entry.name,
            _default(entry),
            rules[entry.name].says if entry.name in rules else _spelled(hints[entry.name]),
            _ended(
                entry.metadata.get("help")
                or _meaning(cls, entry.name)
                or comments.get(entry.name)
                or _mention(cls, entry.name)
                or COMMON_MEANINGS.get(entry.name, "")
            )
            + _choices(cls, hints[entry.name]),
        )
        for entry in dataclasses.fields(cls)
        if entry.name not in {"methods", "method", "options"} and entry.init
    )


def _default(entry: dataclasses.Field[Any]) -> str:
    if entry.metadata.get("required"):
        return ""
    if entry.default is dataclasses.MISSING:
        return "" if entry.default_factory is dataclasses.MISSING else str(entry.default_factory())
    value = entry.default
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    spelled = {None: "null", True: "true", False: "false", "": '""'}
    return next((text for key, text in spelled.items() if key is value or (key == "" and value == "")), str(value))


def _spelled(hint: Any) -> str:
    """A type as words: "a whole number or null". Anything is a text in a recipe."""
    words = {str: "text", Any: "text", int: "a whole number", float: "a number", type(None): "null", Path: "a path"}
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(str, parts))
    if origin in (Union, UnionType):
        return " or ".join(map(_spelled, parts))
    return "a list" if origin is tuple else words.get(hint) or str(getattr(hint, "__name__", hint))


def _lines(cls: type[Any]) -> list[str]:
    return (inspect.getdoc(cls) or "").splitlines() or [""]


def _meaning(cls: type[Any], name: str) -> str:
    """What a docstring says of an option: its entry, or what follows "`name`:"."""
    text = (inspect.getdoc(cls) or "").partition(">>>")[0]
    entry = re.search(rf"^    {name}: (.*(?:\n        .*)*)", text, re.MULTILINE)
    if entry:
        return _joined(entry[1])
    told = re.search(rf"`{name}`: ((?:(?!\n\n|\n- |\s`\w+`:).)*)", text, re.DOTALL)
    return _capital(_joined(told[1])) if told else ""


def _mention(cls: type[Any], name: str) -> str:
    """The first sentence of a docstring that names an option."""
    text = (inspect.getdoc(cls) or "").partition(">>>")[0]
    for paragraph in re.split(r"\n\n|\n- ", text):
        for sentence in re.split(r"(?<=[.;]) (?=[A-Z`])", _joined(paragraph)):
            if f"`{name}`" in sentence:
                return sentence.removeprefix("- ")
    return ""


def _choices(cls: type[Any], hint: Any) -> str:
    """What a list in a docstring says of the words that an option may be: " "top_k": ...", or ""."""
    words = {str(word) for word in get_args(hint)} if get_origin(hint) is Literal else set()
    text = (inspect.getdoc(cls) or "").partition(">>>")[0]
    entries = re.findall(r"^- (\"(\w+)\".*(?:\n  .*)*)", text, re.MULTILINE)
    return "".join(f" {_ended(_joined(entry))}" for entry, word in entries if word in words)


def _ended(text: str) -> str:
    """A sentence with its full stop."""
    text = text.rstrip(" ;:,")
    return text if not text or text.endswith((".", "!", "?")) else f"{text}."


def _comments(cls: type[Any]) -> dict[str, str]:
    """The comments that stand behind fields."""
    found: dict[str, str] = {}
    for parent in reversed(cls.__mro__[:-1]):
        try:
            lines = inspect.getsource(parent).splitlines()
        except (OSError, TypeError):
            continue
        for line in lines:
            match = re.match(r"    (\w+): .*?  # (.+)$", line)
            if match:
                found[match[1]] = _capital(match[2])
    return found


def _joined(text: str) -> str:
    return " ".join(text.split())


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def lines_of(item: Described, width: int = 79) -> Iterator[str]:
    """A description as lines of at most `width` characters."""
    origin = "" if item.source == "slimformer" else f", from the package {item.source}"
    yield f"{item.name} ({item.kind}{origin})"
    yield from textwrap.wrap(item.summary, width, initial_indent="  ", subsequent_indent="  ")
    for option in item.options:
        yield ""
        head = f"  {option.name}: {option.default or 'must be given'}"
        yield from textwrap.wrap(f"{head}  ({option.range})", width, subsequent_indent="      ")
        yield from textwrap.wrap(option.meaning, width, initial_indent="      ", subsequent_indent="      ")
    if not item.options:
        yield "  It has no options."
