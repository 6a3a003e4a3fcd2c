"""Reads the rows of a JSON file: one object a line, one list of objects, or one object that holds rows or columns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from slimformer.errors import DataError, shown
from slimformer.log import remark

_LINES = 'a .jsonl file has one object per line, a .json file may also be one list of objects: [{"text": ...}, ...].'


def json_rows(path: Path, text: str, suffix: str) -> tuple[list[tuple[int, dict[str, Any]]], Literal["line", "row"]]:
    """The objects of a file with the line or row that each one is found at, and which of the two; DataError if one is none."""
    unit: Literal["line", "row"] = "row"
    whole = _whole_object(text) if suffix == ".json" else None
    if whole is not None:
        items = list(enumerate(_rows_of_object(path, whole), 1))
    elif text.lstrip().startswith("[") and not ("\n" in text.strip() and _is_row(text.strip().partition("\n")[0])):
        items = list(enumerate(_parsed(path, text, None), 1))
    else:
        # only \n ends a line: JSON texts may hold other characters that Python's splitlines breaks at
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        apart = None if _is_row(lines[0][1]) else _one_after_another(text)
        if apart is None:
            items, unit = [(number, _parsed(path, line, number)) for number, line in lines], "line"
        else:
            items = list(enumerate(apart, 1))
            remark(f"{path}: its objects do not stand on a line each; {len(items):,} were found one after another.")
    for place, item in items:
        if not isinstance(item, dict):
            raise DataError(
                f"{path}, {unit} {place}: {json.dumps(item)[:60]} is not an object.",
                help='each line must be one object, such as {"text": "fine", "label": 1}.',
            )
    return items, unit


def _is_row(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _one_after_another(text: str) -> list[Any] | None:
    """The values of a text without commas between them, as jq and json.dumps with an indent write them; None if it is not like that."""
    decoder, values, place = json.JSONDecoder(), [], 0
    try:
        while place < len(text):
            if text[place].isspace():
                place += 1
                continue
            value, place = decoder.raw_decode(text, place)
            values.append(value)
    except (ValueError, RecursionError):
        return None
    return values if len(values) > 1 else None


def _whole_object(text: str) -> dict[str, Any] | None:
    """The one object that a .json file consists of, unless it is a row: a list of rows under a name, or columns."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    nested = isinstance(content, dict) and any(isinstance(value, (list, dict)) for value in content.values())
    return content if nested else None


def _rows_of_object(path: Path, content: Mapping[str, Any]) -> list[Any]:
    """The rows of {"data": [rows]}, {"text": [...], "label": [...]}, or of what pandas writes: by columns, by rows, or split."""
    lists = {name: value for name, value in content.items() if isinstance(value, list)}
    tables = [name for name, value in lists.items() if value and all(isinstance(item, dict) for item in value)]
    names = content.get("columns")
    if isinstance(names, list) and all(isinstance(row, list) and len(row) == len(names) for row in lists.get("data", [0])):
        return [dict(zip(map(str, names), row, strict=True)) for row in lists["data"]]
    if len(tables) == 1:
        return lists[tables[0]]
    if tables:
        raise DataError(
            f"{path} holds several lists of rows: {', '.join(shown(name, 30) for name in tables[:6])}.",
            help="write each split into a file of its own (train.json, dev.json), or give them in Python: data=json.load(...).",
        )
    inner = [value for value in content.values() if isinstance(value, dict)]
    if len(inner) == len(content) and all(name.isdigit() for name in content) and not all(map(str.isdigit, inner[0])):
        return inner
    columns = {name: list(value.values()) if isinstance(value, dict) else value for name, value in content.items()}
    sizes = {len(value) if isinstance(value, list) else -1 for value in columns.values()}
    if len(sizes) != 1 or -1 in sizes:
        raise DataError(
            f"{path} is one JSON object, and neither a list of rows nor columns of one length.",
            facts=[f"it holds: {', '.join(shown(name, 40) for name in list(content)[:12])}"],
            help='write one object a line: {"text": "fine", "label": 1}, and each split in a file of its own.',
        )
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def split_rows(text: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of each split in {"train": [...], "val": [...]}: objects, or pairs of a text and its label; none if it is no such text.

    >>> split_rows('{"train": [["hello", "greeting"]], "val": [["bye", "parting"]]}')["train"]
    [{'text': 'hello', 'label': 'greeting'}]
    >>> split_rows('{"train": [1, 2], "val": [3]}')
    {}
    """
    content = _whole_object(text) or {}
    found: dict[str, list[dict[str, Any]]] = {}
    for name, rows in content.items():
        if not isinstance(rows, list):
            return {}
        if all(isinstance(row, dict) for row in rows):
            found[name] = rows
        elif all(isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) for row in rows):
            found[name] = [{"text": row[0], "label": row[1]} for row in rows]
        else:
            return {}
    return found if len(found) > 1 and "train" in map(str.lower, found) else {}


def _parsed(path: Path, text: str, line: int | None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        at = f", line {line}" if line is not None else ""
        python = text.lstrip().startswith(("{'", "[{'"))
        raise DataError(
            f"{path}{at}: not JSON: {'it is written as Python prints it, with single quotes' if python else error}.",
            help="write it with json.dumps." if python else _LINES,
        ) from None
