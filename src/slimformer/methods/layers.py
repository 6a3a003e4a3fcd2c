"""Drop whole layers, evenly spaced: the smaller dense model that every pruning has to beat.

Paper: Sanh, Debut, Chaumond, Wolf: DistilBERT (2019), which starts from every second layer; Sajjad, Dalvi, Durrani, Nakov: On
the Effect of Dropping Layers of Pre-trained Transformer Models (2020), which compares which layers to drop.

Idea: As many whole layers stay as fit the budget, spaced as evenly as they can be.

Differs: The first and the last layer stay and the rest is spaced evenly between them.

Choose when: plain dense layers of one width matter more than quality. Its own use is as the smaller dense model of every
comparison, distilled with the same budget.

Cost: none: it looks at no data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import numpy as np

from slimformer.core.anatomy import Anatomy, Kind
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision, Plan
from slimformer.errors import TargetError
from slimformer.methods.base import Context, Effects, Method, State
from slimformer.rules import Share


@final
@dataclass(frozen=True)
class Layers(Method):
    """`keep`: share of the dense `cost` that may remain; as many whole layers stay as fit, at least one.

    Example:
        >>> from slimformer import Calibrate
        >>> Calibrate(Layers(keep=0.5)).method.effects().cuts
        True
    """

    keep: Share = 0.5
    cost: Literal["macs", "parameters", "latency"] = "macs"

    def effects(self) -> Effects:
        return Effects(cuts=True, one_shot=True)

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        if cost is not None:
            self.choose(anatomy, cost)

    def decide(self, state: State, context: Context) -> Decision:
        return Decision(self.choose(context.anatomy, context.cost))

    def choose(self, anatomy: Anatomy, cost: Cost) -> Plan:
        """The plan that leaves as many layers as fit; TargetError if not even one does."""
        sublayers = anatomy.of_kind(Kind.SUBLAYER)
        left = sorted({site.layer for site in sublayers})
        budget = self.keep * cost.dense
        for count in range(len(left), 0, -1):
            stay = {left[place] for place in evenly(count, len(left))}
            plan = Plan({site.id: () for site in sublayers if site.layer not in stay})
            needed = cost.of(plan, anatomy)
            if needed <= budget or count == len(left) == 1:
                return plan
        share = f"{needed / cost.dense:.0%}"
        raise TargetError(f"even one layer costs {share} of the dense {cost.unit}.", help=f"ask to keep {share} or more.")


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def evenly(count: int, total: int) -> list[int]:
    """`count` of 0..total-1, evenly spaced, the last always in, the first too from two on: evenly(3, 6) = [0, 2, 5]."""
    if count == 1:
        return [total - 1]
    return [int(place) for place in np.floor(np.linspace(0, total - 1, count))]
