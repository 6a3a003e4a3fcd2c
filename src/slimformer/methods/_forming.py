"""What methods share that give matrices other forms: one search for the forms of least harm within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from slimformer.core.anatomy import Anatomy
from slimformer.core.budget import best_levels
from slimformer.core.cost import Cost
from slimformer.core.form import Form
from slimformer.core.plan import Plan
from slimformer.errors import TargetError


def room_for(costs: Sequence[np.ndarray], share: float, anatomy: Anatomy, cost: Cost, given: Mapping[str, Form]) -> float:
    """What the matrices that have a choice may cost together, if `share` of the dense cost may remain.

    `costs`: of each choice (forms,), the plain matrix first; `given`: the forms of matrices that have none. TargetError if the
    cheapest forms cost more.
    """
    rest = cost.of(Plan(forms=given), anatomy) - float(sum(item[0] for item in costs))
    room, least = share * cost.dense - rest, float(sum(item.min() for item in costs))
    if least > room:
        raise _too_little(share, least - room, cost)
    return room


def best_forms(
    costs: Sequence[np.ndarray],
    harm: Sequence[np.ndarray],
    share: float,
    anatomy: Anatomy,
    cost: Cost,
    given: Mapping[str, Form],
) -> list[int]:
    """The form of each choice, by its place: the least sum of `harm`, (forms,) of each, within the budget; exact.

    TargetError if nothing is within it.
    """
    room = room_for(costs, share, anatomy, cost, given)
    picks = best_levels(costs, [-item for item in harm], room)
    if picks is None:
        raise _too_little(share, float(sum(item.min() for item in costs)) - room, cost)
    return picks


def _too_little(share: float, missing: float, cost: Cost) -> TargetError:
    least = share + missing / cost.dense
    if least > 1 - 1e-9:
        return TargetError(
            f"{share:.1%} of the {cost.unit} cannot be reached: no form of a matrix costs less than the plain one.",
            help="leave the stage out, or count another `cost`.",
        )
    return TargetError(
        f"{share:.1%} of the {cost.unit} cannot be reached: {least:.1%} remain with the smallest factors.",
        help=f"ask to keep {least * 1.02:.1%} or more; the word table counts too, whether it is factored or not.",
    )
