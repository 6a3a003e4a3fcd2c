"""Options as plain data: a frozen dataclass becomes what YAML holds, its defaults left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimformer.registry import name_of


def changed_options(item: Any) -> dict[str, Any]:
    """Fields that differ from their defaults, as plain data; `methods` and `method` are left to whoever writes a stage."""
    changed = {}
    for entry in dataclasses.fields(item):
        value = getattr(item, entry.name)
        default = entry.default_factory() if entry.default_factory is not dataclasses.MISSING else entry.default
        if entry.name not in {"methods", "method"} and (default is dataclasses.MISSING or value != default):
            changed[entry.name] = _plain(value)
    return changed


def named_options(item: Any) -> dict[str, Any]:
    """The same with the plug-in's name: {use: name, option: value, ...}."""
    return {"use": name_of(item), **changed_options(item)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return str(value) if isinstance(value, Path) else value
