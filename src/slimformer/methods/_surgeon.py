"""Second-order removal: units leave a sublayer's output matrix one at a time, and those that stay make up for each before the next goes.

Hassibi and Stork: Optimal Brain Surgeon (NeurIPS 1992); for whole heads and neurons Kurtic, Frantar, Alistarh: ZipLM (NeurIPS 2023),
section 3.1. Of two units that do the same work, each seems idle by itself. The first that goes costs nothing, and then the other
carries both and costs much: no score that is taken once sees that.

The loss is the squared error of what the matrix gives, over inputs of the dense model. Theirs counts all tokens alike; here a token
weighs as much as the loss of its example feels it, as in the repair of `fisher`, and a bias is solved for too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

LAZY = 64  # removals between two updates of the whole inverse: its columns are brought up to date when they are read


@dataclass(frozen=True)
class Removal:
    """The way of a sublayer's units out of it.

    Attributes:
        order: Units, from the first that goes to the last.
        damage: What each adds to the squared error, in that order.
        refits: At some numbers of units that are left, the matrix that makes up best for those that went: (out, inputs + bias).
    """

    order: tuple[int, ...]
    damage: tuple[float, ...]
    refits: Mapping[int, Tensor] = field(default_factory=dict)


def removal(weight: Tensor, gram: Tensor, size: int, unit: int, counts: Collection[int] = ()) -> Removal:
    """Removes all units, one at a time, always the one whose loss the others make up for best.

    Args:
        weight: (out, n): the matrix; columns behind those of the units, such as a bias, stay.
        gram: (n, n): the sum of x x' over inputs, positive definite.
        size: How many units there are.
        unit: How many columns each has.
        counts: Of how many units that are left `refits` are wanted.
    """
    weight, inverse = weight.double().clone(), torch.linalg.inv(gram.double())
    left = torch.ones(size, dtype=torch.bool, device=weight.device)
    walk = _Lazy(inverse) if unit == 1 else _Whole(inverse, unit)
    order: list[int] = []
    damage: list[float] = []
    refits: dict[int, Tensor] = {size: weight.clone()} if size in counts else {}
    for count in range(size - 1, -1, -1):
        scores = walk.scores(weight)[:size]
        gone = int(torch.where(left, scores, torch.inf).argmin())
        order.append(gone)
        damage.append(max(0.0, float(scores[gone])))
        weight -= walk.remove(weight, gone)
        weight[:, gone * unit : (gone + 1) * unit] = 0.0
        left[gone] = False
        if count in counts:
            refits[count] = weight.clone()
    return Removal(tuple(order), tuple(damage), refits)


class _Lazy:
    """The inverse for units of one column each; a removal is kept as a column, and taken out of the whole inverse with others."""

    def __init__(self, inverse: Tensor) -> None:
        self._inverse, self._diagonal = inverse, inverse.diagonal().clone()
        self._columns: list[Tensor] = []  # (n,) each, divided by the root of its pivot

    def scores(self, weight: Tensor) -> Tensor:
        """(n,)."""
        return weight.square().sum(0) / self._diagonal.clamp_min(1e-30)

    def remove(self, weight: Tensor, gone: int) -> Tensor:
        """What the matrix loses by it: (out, n)."""
        column = self._inverse[:, gone].clone()
        for other in self._columns:
            column -= other * other[gone]
        pivot = column[gone].clamp_min(1e-30)
        change = weight[:, gone, None] * (column / pivot)
        own = column / pivot.sqrt()
        self._columns.append(own)
        self._diagonal -= own.square()
        if len(self._columns) == LAZY:
            block = torch.stack(self._columns, 1)  # (n, LAZY)
            self._inverse -= block @ block.T
            self._columns.clear()
        return change


class _Whole:
    """The inverse for units of several columns each: a few heads."""

    def __init__(self, inverse: Tensor, unit: int) -> None:
        self._inverse, self._unit = inverse, unit

    def scores(self, weight: Tensor) -> Tensor:
        """(units,)."""
        count = weight.shape[1] // self._unit  # a bias is less than a unit
        found = [self._solved(weight, unit).mul(self._own(weight, unit)).sum() for unit in range(count)]
        return torch.stack(found)

    def remove(self, weight: Tensor, gone: int) -> Tensor:
        """What the matrix loses by it: (out, n)."""
        place = self._place(gone)
        rows = self._inverse[place]
        change = self._solved(weight, gone) @ rows
        self._inverse -= rows.T @ torch.linalg.solve(rows[:, place], rows)
        keep = torch.arange(self._unit)
        self._inverse[place, :] = self._inverse[:, place] = 0.0
        self._inverse[place.start + keep, place.start + keep] = 1.0  # so that it can still be solved for
        return change

    def _place(self, unit: int) -> slice:
        return slice(unit * self._unit, (unit + 1) * self._unit)

    def _own(self, weight: Tensor, unit: int) -> Tensor:
        return weight[:, self._place(unit)]

    def _solved(self, weight: Tensor, unit: int) -> Tensor:
        """W_S (inverse_SS)^-1: (out, unit)."""
        place = self._place(unit)
        return torch.linalg.solve(self._inverse[place, place], self._own(weight, unit).T).T
