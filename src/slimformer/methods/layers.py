"""Drop whole layers, evenly spaced: the smaller dense model that every pruning has to beat.

DistilBERT (Sanh et al., 2019) starts from every second layer; Sajjad et al. (2020) compare which to drop. Ours keeps the first and
the last and spaces the rest evenly. Its own use is as rival 4 of every comparison, distilled with the same budget; choose it when
plain dense layers of one width matter more than quality.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import numpy as np

from slimformer.core.anatomy import Anatomy, Kind
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision, Plan
from slimformer.errors import TargetError
from slimformer.methods.base import Context, Method, State


@final
@dataclass(frozen=True)
class Layers(Method):
    """`keep`: share of the dense cost that may remain; as many whole layers stay as fit, at least one."""

    keep: float = 0.5
    cost: Literal["macs", "parameters", "latency"] = "macs"

    decides: ClassVar[bool] = True
    trains: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, got {self.keep}")

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        if cost is not None:
            self._chosen(anatomy, cost)

    def decide(self, state: State, context: Context) -> Decision:
        return Decision(self._chosen(context.anatomy, context.cost))

    def _chosen(self, anatomy: Anatomy, cost: Cost) -> Plan:
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


def evenly(count: int, total: int) -> list[int]:
    """`count` of 0..total-1, evenly spaced, the last always in, the first too from two on: evenly(3, 6) = [0, 2, 5]."""
    if count == 1:
        return [total - 1]
    return [int(place) for place in np.floor(np.linspace(0, total - 1, count))]
