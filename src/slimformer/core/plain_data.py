"""Frozen dataclasses out of the plain data that plan.json holds of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from slimformer.errors import PlanError


class Told(Protocol):
    """What plan.json can tell of: `problem` says why there can be no such thing, None if there can."""

    def problem(self) -> str | None: ...


Some = TypeVar("Some", bound=Told)


def made_from(kinds: Mapping[str, type[Some]], data: Any, where: str, noun: str) -> Some:
    """What `to_data` wrote of one of these `kinds`, by their names under "use"; PlanError for anything else.

    `where` and `noun` are for the message: "layer 'encoder.1'", "junction".
    """
    kind = kinds.get(str(data.get("use"))) if isinstance(data, Mapping) else None
    if kind is None or set(data) != {entry.name for entry in dataclasses.fields(kind)} | {"use"}:  # type: ignore[arg-type]
        raise PlanError(
            f"{where}: this slimformer knows no such {noun}: {data!r:.200}.", help="install the slimformer that wrote it."
        )
    made = kind(**{name: value for name, value in data.items() if name != "use"})
    problem = made.problem()
    if problem is not None:
        raise PlanError(f"{where}: {problem}.")
    return made
