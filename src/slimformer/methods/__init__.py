"""One file per published idea, each with the same order of parts; `base.py` is the contract: four verbs and `effects`."""

from __future__ import annotations

from typing import Any

from slimformer import registry as _registry


def __getattr__(name: str) -> Any:
    """The class of a plug-in, ours or a third party's: `from slimformer.methods import Gates`."""
    return _registry.exported("methods", name)


def __dir__() -> list[str]:
    return sorted([*_registry.classes("methods"), "Method"])
