"""The highest of many scores, exactly as many as are asked for."""

from __future__ import annotations

import torch
from torch import Tensor


def highest(scores: Tensor, count: int) -> Tensor:
    """True at exactly `count` of the highest scores, the first of equal ones; scores and mask are flat."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    last = scores.kthvalue(len(scores) - count + 1).values
    above, equal = scores > last, scores == last
    return above | (equal & (equal.cumsum(0) <= count - above.sum()))
