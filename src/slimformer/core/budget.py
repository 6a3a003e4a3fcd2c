"""Chooses the units to keep under a budget: the best sum of importance that fits, or the top of one ranking.

`allocate` is exact, by dynamic programming. Units of one sublayer are taken in order of importance, so a choice is a
*level* (how many stay) per sublayer, and cost and value add up over sublayers: a multiple-choice knapsack. Costs are
rounded up to 1/4096 of the budget, so that a plan never exceeds it. `strongest` is plain top-k over all sites, for
methods whose scores cannot be added up.

The program over discretised cost is that of SPDY (Frantar and Alistarh, ICML 2022); the separable importance that of
Kwon et al. (NeurIPS 2022). Ours takes heads and neurons in one program and may drop whole sublayers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from slimformer.core.anatomy import Anatomy, Kind
from slimformer.core.cost import Cost
from slimformer.core.plan import Plan
from slimformer.errors import TargetError

BUCKETS = 4096


def levels(size: int, multiple: int, *, may_vanish: bool) -> np.ndarray:
    """Counts a site may keep: 0 if it may vanish, then every `multiple`, and the full size."""
    between = list(range(multiple, size, multiple)) or ([1] if size > 1 else [])
    return np.array(([0] if may_vanish else []) + between + [size])


def allocate(
    anatomy: Anatomy,
    importance: Mapping[str, np.ndarray],
    cost: Cost,
    budget: float,
    *,
    values: Mapping[str, np.ndarray] | None = None,
    neuron_multiple: int = 1,
    sublayers: bool = True,
) -> Plan:
    """The plan that keeps the most importance at a `cost` of at most `budget`, which has the unit of the cost.

    Args:
        anatomy: The anatomy of the model.
        importance: Site -> (size,), not negative; units of low importance go first. Sites that are not named stay whole.
        cost: The cost of plans, such as `slimformer.core.cost.macs` counts it.
        budget: What may be left, in the unit of the cost.
        values: Site -> (size + 1,), the value of keeping 0, 1, ... units; by default the sum of their importance.
        neuron_multiple: FFN widths stay multiples of it, which matrix kernels like; at least 1.
        sublayers: Whether whole sublayers may go.

    Returns:
        The plan, with every site that loses units.

    Raises:
        TargetError: Even the smallest possible cost, which the message names, exceeds the budget.

    Example:
        >>> import numpy as np
        >>> from slimformer import allocate, anatomy_of
        >>> from slimformer.core.cost import macs
        >>> from slimformer.testing.tiny import tiny
        >>> anatomy = anatomy_of(tiny("bert"))
        >>> cost = macs(anatomy, np.array([16]))  # of sentences of 16 tokens
        >>> importance = {name: np.arange(site.size) + 1.0 for name, site in anatomy.sites.items() if name.endswith("heads")}
        >>> plan = allocate(anatomy, importance, cost, budget=0.7 * cost.dense)
        >>> plan.keep["encoder.1.heads"]
        (2, 3)
        >>> bool(cost.of(plan, anatomy) <= 0.7 * cost.dense)
        True
    """
    names = list(importance)
    choices = {
        name: levels(
            anatomy.sites[name].size,
            neuron_multiple if anatomy.sites[name].kind is Kind.NEURONS else 1,
            may_vanish=sublayers and anatomy.sites[name].sublayer is not None,
        )
        for name in names
    }
    fixed = cost.fixed + float(sum(curve[-1] for name, curve in cost.curves.items() if name not in choices))
    least = fixed + float(sum(cost.curves[name][choices[name]].min() for name in names))
    if budget < least:
        raise _out_of_reach(budget, least, cost)
    curves = {
        name: np.concatenate([[0.0], np.cumsum(np.sort(importance[name])[::-1])]) if values is None else values[name]
        for name in names
    }
    picks = best_levels(
        [cost.curves[name][choices[name]] for name in names], [curves[name][choices[name]] for name in names], budget - fixed
    )
    if picks is None:
        raise TargetError(
            f"the budget of {budget:.4g} {cost.unit} is too close to the smallest possible, {least:.4g}.",
            help=f"ask for {least * 1.02 / cost.dense:.0%} of the dense cost or more.",
        )
    keep: dict[str, tuple[int, ...]] = {}
    for name, pick in zip(names, picks, strict=True):
        keep |= _kept(anatomy, name, importance[name], int(choices[name][pick]))
    return Plan(keep)


def best_levels(costs: Sequence[np.ndarray], values: Sequence[np.ndarray], room: float) -> list[int] | None:
    """One level of each item, with the largest sum of values whose costs, rounded up, fit into `room`; None if nothing fits.

    `costs`, `values`: per item, (levels,).
    """
    best = np.zeros(BUCKETS + 1)  # best[c]: most value within c buckets
    if room > 0:
        needs = [np.ceil(cost * (BUCKETS / room) - 1e-9).astype(int) for cost in costs]
    else:
        needs = [np.where(cost > 0, BUCKETS + 1, 0) for cost in costs]
    tables: list[np.ndarray] = []
    for need, value in zip(needs, values, strict=True):
        table = np.full((len(need), BUCKETS + 1), -np.inf)
        for row, (gain, buckets) in enumerate(zip(value, need, strict=True)):
            if buckets <= BUCKETS:
                table[row, buckets:] = best[: BUCKETS + 1 - buckets] + gain
        tables.append(np.argmax(table, axis=0))
        best = np.max(table, axis=0)
    if room < 0 or not np.isfinite(best[-1]):
        return None
    picks = []
    left = BUCKETS
    for need, chosen in zip(reversed(needs), reversed(tables), strict=True):
        picks.append(int(chosen[left]))
        left -= int(need[picks[-1]])
    return picks[::-1]


def strongest(
    anatomy: Anatomy,
    score: Mapping[str, np.ndarray],
    cost: Cost,
    budget: float,
    *,
    neuron_multiple: int = 1,
    sublayers: bool = True,
) -> Plan:
    """The plan that keeps the k units of highest `score`, all sites in one ranking, with the largest k that fits the budget.

    `score`: site -> (size,), comparable between sites, of any sign. k is found by bisection: more units never cost less. Raises
    TargetError, naming the smallest possible cost, if even that exceeds the budget.
    """
    names = list(score)
    owner = np.repeat(np.arange(len(names)), [len(score[name]) for name in names])  # (units,)
    order = np.argsort(-np.concatenate([score[name] for name in names]), kind="stable")

    def keeping(k: int) -> Plan:
        counts = np.bincount(owner[order[:k]], minlength=len(names))
        wanted = {name: int(count) for name, count in zip(names, counts, strict=True)}
        return leading(anatomy, score, wanted, neuron_multiple=neuron_multiple, sublayers=sublayers)

    low, high = 0, len(order)
    least = cost.of(keeping(0), anatomy)
    if budget < least:
        raise _out_of_reach(budget, least, cost)
    while low < high:
        middle = (low + high + 1) // 2
        if cost.of(keeping(middle), anatomy) <= budget:
            low = middle
        else:
            high = middle - 1
    return keeping(low)


def leading(
    anatomy: Anatomy,
    score: Mapping[str, np.ndarray],
    counts: Mapping[str, int],
    *,
    neuron_multiple: int = 1,
    sublayers: bool = True,
) -> Plan:
    """The plan that keeps the `counts[site]` best units of each site, or the nearest number that `levels` allows."""
    keep: dict[str, tuple[int, ...]] = {}
    for name, count in counts.items():
        site = anatomy.sites[name]
        multiple = neuron_multiple if site.kind is Kind.NEURONS else 1
        allowed = levels(site.size, multiple, may_vanish=sublayers and site.sublayer is not None)
        keep |= _kept(anatomy, name, score[name], int(allowed[np.abs(allowed - count).argmin()]))
    return Plan(keep)


def something_left(anatomy: Anatomy, plan: Plan) -> None:
    """Raises TargetError if a plan takes every sublayer of a stack: only a bag of embeddings would be left."""
    sublayers = anatomy.of_kind(Kind.SUBLAYER)
    for stack in anatomy.stacks:
        inside = [site.id for site in sublayers if anatomy.stack_of(site.layer) is stack]
        if inside and all(plan.keep.get(name) == () for name in inside):
            raise TargetError(
                f"nothing of the {stack.name} would be left: every sublayer would go.",
                help="ask for a larger share, or keep one unit in each sublayer with `sublayers: false`.",
            )


def _out_of_reach(budget: float, least: float, cost: Cost) -> TargetError:
    return TargetError(
        f"the budget of {budget:.4g} {cost.unit} cannot be reached: {least:.4g} remain with all cut that can be.",
        help=f"ask for {least / cost.dense:.0%} of the dense cost or more.",
    )


def _kept(anatomy: Anatomy, name: str, importance: np.ndarray, count: int) -> dict[str, tuple[int, ...]]:
    site = anatomy.sites[name]
    if count == 0:
        assert site.sublayer is not None
        return {site.sublayer: ()}
    if count == site.size:
        return {}
    top = np.argsort(-importance, kind="stable")[:count]
    return {name: tuple(int(unit) for unit in np.sort(top))}
