"""One file for each task type: its data, its options, its loss, its metrics, and the code that reads an exported file."""

from __future__ import annotations

from typing import Any

from slimformer import registry as _registry


def __getattr__(name: str) -> Any:
    """The class of a plug-in, ours or a third party's: `from slimformer.tasks import Classification`."""
    return _registry.exported("tasks", name)


def __dir__() -> list[str]:
    return sorted([*_registry.classes("tasks"), "Task"])
