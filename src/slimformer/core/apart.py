"""Two segments that attend apart up to a layer: the junction at which they meet, as a plan names it.

Only data stands here, small enough for plan.json; `dividing.py` computes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, final

APART = "apart"  # what plan.json calls it


@final
@dataclass(frozen=True)
class Apart:
    """Up to the layer that a plan names, and within it, each token attends to its own segment alone; behind it to both.

    The first segment holds what comes up to its separator: the question, with the token in front of it. The second is the passage, with
    the token that ends it. It begins at the position `start`, counted from 0, however long the first one is, so that nothing of it
    depends on that; some of their positions may be the same, and tokens beyond the model's last position share that.

    `separator`: the id of the token that ends a segment; None if the model reads the segment of each token (token_type_ids). Of
    two separators between the segments, as RoBERTa has them, the other belongs to the second. `first_position`: the number of a
    model's first position: RoBERTa counts from 2.

    >>> Apart(start=16, separator=2, first_position=2).to_data()
    {'use': 'apart', 'start': 16, 'separator': 2, 'first_position': 2}
    """

    start: int = 0
    separator: int | None = None
    first_position: int = 0

    def problem(self) -> str | None:
        """Why there can be no such junction; None if there can."""
        numbers = (self.start, self.separator if self.separator is not None else 0, self.first_position)
        if any(type(number) is not int or number < 0 for number in numbers):
            return "start and first_position are whole numbers from 0, and separator is the id of a token, or null"
        return None

    def parameters(self, width: int) -> int:
        """Numbers stored: none, at any width of the hidden states."""
        return 0

    def to_data(self) -> dict[str, Any]:
        """The junction as plain data; `junction_from_data` gives it back."""
        return {"use": APART} | dataclasses.asdict(self)
