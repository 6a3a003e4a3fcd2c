"""Tasks whose labels nobody told: the teacher answers, and how far two models agree is all that can be measured.

`labels: none` says so of all data, `labels: dev` of the training data alone. The losses on labels then are draws from the model's own
distribution, by which methods rank units: the squared gradient is, in the mean over draws, the Fisher information.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from slimformer.errors import RecipeError, shown

if TYPE_CHECKING:
    import torch

Telling = Literal["data", "dev", "teacher"]  # who tells the right answers: the data, the dev data alone, or the teacher

TELLINGS: tuple[Telling, ...] = get_args(Telling)
AGREEMENT = "agreement"  # the metric of what the teacher answered
AGREEMENTS = (AGREEMENT, "same_first")
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

    mask = batch.get("attention_mask")
    drawn = []
    for row, ids in enumerate(batch["input_ids"]):
        real = ids if mask is None else ids[mask[row] == 1]
        seed = zlib.crc32(real.cpu().numpy().tobytes())
        drawn.append(torch.rand(count, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(drawn).to(batch["input_ids"].device)
