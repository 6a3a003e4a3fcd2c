"""What lets a model's own modules do more than their classes of transformers: a class that goes before theirs, and what they hand on.

No hook stays on such a model, its parameters keep their names, and its modules are still of their classes.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

_classes: dict[tuple[type, type], type] = {}


class Line(threading.local):
    """Carries what one module of a model notes in a pass to those behind it; each thread has its own, and so has each copy of a model."""

    def __deepcopy__(self, memo: Any) -> Line:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()


def unpadded_words(mask: Tensor | None, hidden: Tensor) -> Tensor:
    """The words that are no padding: (batch, seq) of booleans; `mask` as transformers hands it to layers."""
    if mask is None:
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    row = mask[:, 0, 0] if mask.ndim == 4 else mask
    there = row > torch.finfo(row.dtype).min / 2 if row.is_floating_point() else row.bool()
    return there.expand(hidden.shape[:2])


def go_before(module: nn.Module, first: type) -> None:
    """Puts `first` before the class of a module, if it is not there."""
    base = type(module)
    if issubclass(base, first):
        return
    if (first, base) not in _classes:
        _classes[first, base] = type(base.__name__, (first, base), {"__module__": base.__module__, "__doc__": base.__doc__})
    module.__class__ = _classes[first, base]


def step_back(module: nn.Module, first: type, *attributes: str) -> None:
    """Gives a module its own class back if `first` went before it, and takes away the attributes that came with that."""
    if isinstance(module, first):
        module.__class__ = type(module).__mro__[2]
        for name in attributes:
            module.__dict__.pop(name, None)
