"""What is kept of a model: the whole memory of a compression, small, exact, JSON.

A `Plan` names, for each site, the units that stay, in the numbering of the *original* model. Plans compose with `then`, are
checked against an anatomy before anything is cut, and have a digest. A `Decision` is a plan with the numbers a method wants
folded into the weights. Neither cuts: that is `shrink.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from slimformer.errors import PlanError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from slimformer.anatomy import Anatomy
    from slimformer.ranges import Ranges

VERSION = 1


@dataclass(frozen=True)
class Plan:
    """Units kept per site, in the numbering of the original model; an absent site keeps everything."""

    keep: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        frozen = {site: tuple(int(unit) for unit in units) for site, units in sorted(self.keep.items())}
        object.__setattr__(self, "keep", MappingProxyType(frozen))

    def __hash__(self) -> int:
        return hash(tuple(self.keep.items()))

    def then(self, later: Plan) -> Plan:
        """This plan followed by `later`, which speaks in the numbering that this one leaves."""
        keep = dict(self.keep)
        for site, units in later.keep.items():
            base = keep.get(site)
            if base is not None and units and max(units) >= len(base):
                raise PlanError(
                    f"site '{site}' has {len(base)} units left, the later plan keeps unit {max(units)}.",
                    help="a later plan counts the units that the earlier one leaves, from 0.",
                )
            keep[site] = units if base is None else tuple(base[unit] for unit in units)
        return Plan(keep)

    def check(self, anatomy: Anatomy) -> None:
        """Raises PlanError unless every site exists and its kept units are sorted, distinct and within the site."""
        for name, units in self.keep.items():
            site = anatomy.sites.get(name)
            if site is None:
                raise PlanError(
                    f"the plan names the site '{name}', which this model does not have.",
                    help=f"{nearest(name, anatomy.sites)}; `slimformer inspect` lists them.",
                )
            wrong = [unit for unit in units if not 0 <= unit < site.size]
            if wrong:
                raise PlanError(
                    f"site '{name}' has {site.size} {site.kind}, the plan keeps {site.kind} {wrong[0]}.",
                    facts=[f"kept: {' '.join(map(str, units))}      allowed: 0..{site.size - 1}"],
                    help=f"the plan was made for another model; its digest is {self.digest()}.",
                )
            if list(units) != sorted(set(units)):
                raise PlanError(
                    f"site '{name}': kept units must rise and be distinct, got {' '.join(map(str, units))}.",
                    help="sort them and drop the doubles.",
                )
            if not units and site.sublayer is not None and self.keep.get(site.sublayer) != ():
                raise PlanError(
                    f"site '{name}' keeps nothing, yet its sublayer '{site.sublayer}' stays.",
                    help=f"cut the sublayer too: keep['{site.sublayer}'] = ().",
                )

    def digest(self) -> str:
        """Twelve hexadecimal digits that name this plan."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def to_json(self) -> str:
        """The plan as JSON; `Plan.from_json` gives it back exactly."""
        keep = {site: list(units) for site, units in self.keep.items()}
        return json.dumps({"version": VERSION, "keep": keep}, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan written by `to_json`; PlanError for anything else, whatever it is."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"the plan is not JSON: {error}.", help="it should be a plan.json that save() wrote.") from None
        if not isinstance(data, dict) or set(data) != {"version", "keep"} or not isinstance(data["keep"], dict):
            raise PlanError("the plan is not {version, keep}.", help="it should be a plan.json that save() wrote.")
        if data["version"] != VERSION or isinstance(data["version"], bool):
            raise PlanError(
                f"the plan has version {data['version']!r}, this slimformer reads {VERSION}.",
                help="install the slimformer that wrote it, or make the model again.",
            )
        for site, units in data["keep"].items():
            if not isinstance(units, list) or any(type(unit) is not int or unit < 0 for unit in units):
                raise PlanError(f"site '{site}': kept units must be a list of whole numbers from 0.")
        return Plan({site: tuple(units) for site, units in data["keep"].items()})


@dataclass(frozen=True)
class Decision:
    """A plan, and what to fold into the weights while cutting.

    `scales`: site -> (size,) multiplied at the site's taps, in the numbering before the cut. `weights`: parameter name ->
    new values, in shapes before the cut; a method that repairs what is left sets them. `ranges`: what activations span, where a
    method learned it; it holds for the model as it then is, and the next stage drops it.
    """

    plan: Plan = field(default_factory=Plan)
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    ranges: Ranges | None = None
