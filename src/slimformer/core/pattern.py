"""What a head attends to by a rule instead of, or beside, what it learned: its pattern, as a plan names it.

A `Fixed` head attends by position alone, and needs no queries and keys; its values and its part of the output stay. A head with a
`HeadSpan` attends as it learned to, and no further than so many tokens away. A plan has, for a site of heads, one entry for each head
that is left, and None for a head that attends as it did. Only data stands here, small enough for plan.json; `patterning.py` computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

from slimformer.core.plain_data import made_from
from slimformer.errors import nearest

Attends = Literal["current", "previous", "next", "left", "right", "start", "end"]
ATTENDS: tuple[Attends, ...] = get_args(Attends)
FIXED, SPAN = "fixed", "span"  # what plan.json calls them


@final
@dataclass(frozen=True)
class Fixed:
    """Attention by position, after Raganato, Scherrer and Tiedemann (2020), section 3. Padding never counts.

    `attends`: to the token itself ("current"); to the one before or behind it ("previous", "next"); to all that lie two or more
    before it, the nearest most, with weights that are the cubes of their places counted from the text's beginning ("left"), or behind
    it, with places counted from the end ("right"); to the whole text, with cubes of places counted from the end ("start") or from its
    beginning ("end"). A token that has none such, as the first one has no previous, attends to itself.

    >>> Fixed("previous").problem() is None, Fixed("before").problem()
    (True, "there is no pattern 'before': known: current, end, left, next, previous, right, start")
    """

    attends: Attends

    def problem(self) -> str | None:
        """Why there can be no such pattern; None if there can."""
        if self.attends in ATTENDS:
            return None
        return f"there is no pattern {self.attends!r}: {nearest(str(self.attends), ATTENDS)}"

    def to_data(self) -> dict[str, Any]:
        """The pattern as plain data; `pattern_from_data` gives it back."""
        return {"use": FIXED} | dataclasses.asdict(self)

    def __str__(self) -> str:
        return self.attends


@final
@dataclass(frozen=True)
class HeadSpan:
    """Learned attention to tokens that are at most `reach` tokens away: 0 is the token itself alone.

    >>> HeadSpan(3).problem() is None, HeadSpan(-1).problem()
    (True, 'reach is a whole number from 0')
    """

    reach: int

    def problem(self) -> str | None:
        """Why there can be no such pattern; None if there can."""
        return None if type(self.reach) is int and self.reach >= 0 else "reach is a whole number from 0"

    def to_data(self) -> dict[str, Any]:
        """The pattern as plain data; `pattern_from_data` gives it back."""
        return {"use": SPAN} | dataclasses.asdict(self)

    def __str__(self) -> str:
        return f"within {self.reach}"


HeadPattern = Fixed | HeadSpan
Patterns = tuple[HeadPattern | None, ...]  # of the heads of one attention
_KINDS: Mapping[str, type[HeadPattern]] = {FIXED: Fixed, SPAN: HeadSpan}


def pattern_from_data(data: Any, site: str) -> HeadPattern | None:
    """The pattern that `to_data` wrote for a head of a site, or None for null; PlanError for anything else.

    >>> pattern_from_data(HeadSpan(3).to_data(), "encoder.0.heads")
    HeadSpan(reach=3)
    """
    if data is None:
        return None
    return made_from(_KINDS, data, f"site '{site}'", "pattern")


def asking(patterns: Sequence[HeadPattern | None]) -> tuple[int, ...]:
    """The heads that have queries and keys.

    >>> asking((None, Fixed("next"), HeadSpan(2)))
    (0, 2)
    """
    return tuple(head for head, pattern in enumerate(patterns) if not isinstance(pattern, Fixed))


def over(before: Sequence[HeadPattern | None], later: Sequence[HeadPattern | None]) -> Patterns:
    """The patterns of the same heads, some given before and others later.

    >>> over((None, Fixed("next")), (HeadSpan(2), None))
    (HeadSpan(reach=2), Fixed(attends='next'))
    """
    return tuple(own if new is None else new for own, new in zip(before, later, strict=True))
