"""Tasks whose labels nobody told: the teacher answers, and how far two models agree is all that can be measured.

`labels: none` says so of all data, `labels: dev` of the training data alone. The losses on labels then are draws from the model's own
distribution, by which methods rank units: the squared gradient is, in the mean over draws, the Fisher information.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from slimformer.data.splits import FOR_DEV, FOR_VALIDATION, dev_count, draw_rows, validation_count
from slimformer.errors import DataError, RecipeError, shown
from slimformer.tasks.base import Example, Split

if TYPE_CHECKING:
    import torch

Telling = Literal["data", "dev", "teacher"]  # who tells the right answers: the data, the dev data alone, or the teacher

TELLINGS: tuple[Telling, ...] = get_args(Telling)
AGREEMENT = "agreement"  # the metric of what the teacher answered
AGREEMENTS = (AGREEMENT, "same_first")
FEWEST_TOLD = 20  # examples of dev
_WORDS: dict[str, Telling] = {"none": "teacher", "dev": "dev"}  # what people write in the place of labels


def telling_of(labels: object) -> Telling | None:
    """Who tells the answers, if the option `labels` says that and names no labels.

    >>> telling_of("none"), telling_of(["good", "bad"])
    ('teacher', None)
    """
    return _WORDS.get(labels.strip().lower()) if isinstance(labels, str) else None


def told_names(labels: Any) -> tuple[str, ...]:
    """Class names, also as the command line has them, with commas between; RecipeError for what holds no names."""
    if not isinstance(labels, (str, Sequence)):
        raise RecipeError(f"labels: a list of names, none or dev, not {shown(labels)}.")
    parts = labels.split(",") if isinstance(labels, str) else labels
    return tuple(str(name).strip() if isinstance(labels, str) else str(name) for name in parts)


def drawn_shares(batch: Mapping[str, torch.Tensor], count: int) -> torch.Tensor:
    """`count` numbers between 0 and 1 for each row, by its own tokens alone: (batch, count)."""
    import torch

    return own_draws(batch, count, torch.rand)


def own_draws(batch: Mapping[str, torch.Tensor], count: int, draw: Callable[..., torch.Tensor]) -> torch.Tensor:
    """`count` numbers for each row, by `draw` (torch.rand, torch.randn) and the row's own tokens alone: (batch, count)."""
    import torch

    mask = batch.get("attention_mask")
    drawn = []
    for row, ids in enumerate(batch["input_ids"]):
        real = ids if mask is None else ids[mask[row] == 1]
        seed = zlib.crc32(real.cpu().numpy().tobytes())
        drawn.append(draw(count, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(drawn).to(batch["input_ids"].device)


def drawn_classes(logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """A class for each row by its own distribution: (rows, classes) and (rows, 1) between 0 and 1 -> (rows,)."""
    below = logits.softmax(-1).cumsum(-1) < shares  # (rows, classes)
    return below.sum(-1).clamp(max=logits.shape[-1] - 1)


def untold_rows(
    counts: Mapping[str, int], name: Split, share: float | None, chosen: Callable[[list[int]], list[int]]
) -> tuple[str, list[int]]:
    """Which rows of data without labels are a split's: "train" or "dev", and their numbers.

    `counts`: how many rows each has; without "dev" a part of "train" stands for it. `share`: of the training rows that are set aside for
    validation; None if nothing of them is set aside, because dev has labels. `chosen`: those to train on and to choose on.
    """
    kind = "dev" if name is Split.DEV and "dev" in counts else "train"
    rows = list(range(counts[kind]))
    if share is not None and "dev" not in counts:
        dev = draw_rows(rows, None, dev_count(len(rows)), FOR_DEV)
        rows = [row for row in rows if (row in dev) == (name is Split.DEV)]
    if name is not Split.DEV:
        rows = chosen(rows)
        if share is not None:
            held = draw_rows(rows, None, validation_count(share, len(rows)), FOR_VALIDATION)
            rows = [row for row in rows if (row in held) == (name is Split.VALIDATION)]
    return kind, rows


def half_of_dev(told: Sequence[Example], name: Split, data: str, what: str) -> Sequence[Example]:
    """Every second labelled example of dev, where training data has no labels: one half to choose on, the other to report on.

    DataError if they are too few. `what` they are, for the message.
    """
    if len(told) < FEWEST_TOLD:
        raise DataError(
            f"{data}: {len(told)} {what} are too few to choose on one half and to report on the other.",
            help=f"give at least {FEWEST_TOLD}.",
        )
    return told[name is Split.DEV :: 2]
