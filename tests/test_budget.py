"""The search under a budget equals brute force, never exceeds the budget, and says when there is no way."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny

from slimformer.core.anatomy import Kind
from slimformer.core.budget import allocate, levels
from slimformer.core.cost import Cost, latency, macs, parameters
from slimformer.errors import TargetError
from slimformer.families.base import anatomy_of

MODEL = tiny("bert", num_hidden_layers=1, intermediate_size=6)
ANATOMY = anatomy_of(MODEL)
SITES = ("encoder.0.heads", "encoder.0.neurons")


def best_by_brute_force(importance, cost, budget, multiple):
    best = None
    choices = [levels(ANATOMY.sites[name].size, step, may_vanish=True) for name, step in zip(SITES, (1, multiple), strict=True)]
    for counts in itertools.product(*choices):
        spent = cost.fixed + sum(cost.curves[name][count] for name, count in zip(SITES, counts, strict=True))
        value = sum(np.sort(importance[name])[::-1][:count].sum() for name, count in zip(SITES, counts, strict=True))
        if spent <= budget and (best is None or value > best):
            best = value
    return best


@settings(max_examples=60, deadline=None)
@given(
    heads=st.lists(st.integers(0, 50), min_size=4, max_size=4),
    neurons=st.lists(st.integers(0, 50), min_size=6, max_size=6),
    budget=st.integers(4, 64),
    multiple=st.sampled_from([1, 2]),
)
def test_equals_brute_force(heads, neurons, budget, multiple):
    # costs of whole units that divide the 4,096 buckets of a budget, so that rounding up loses nothing
    cost = Cost("units", 0.0, {SITES[0]: np.arange(5) * 8.0, SITES[1]: np.arange(7) * 4.0})
    budget = 2 ** int(np.log2(budget))
    importance = {SITES[0]: np.array(heads, float), SITES[1]: np.array(neurons, float)}
    plan = allocate(ANATOMY, importance, cost, budget, neuron_multiple=multiple)
    assert cost.of(plan, ANATOMY) <= budget
    kept = 0.0
    for name in SITES:
        if plan.keep.get(ANATOMY.sites[name].sublayer) != ():
            units = plan.keep.get(name, range(ANATOMY.sites[name].size))
            kept += importance[name][list(units)].sum()
    assert kept == pytest.approx(best_by_brute_force(importance, cost, budget, multiple))


def test_the_best_units_of_a_site_stay():
    cost = Cost("units", 0.0, {SITES[0]: np.arange(5.0), SITES[1]: np.zeros(7)})
    importance = {SITES[0]: np.array([1.0, 9.0, 3.0, 7.0]), SITES[1]: np.ones(6)}
    assert allocate(ANATOMY, importance, cost, 2.0).keep == {SITES[0]: (1, 3)}


def test_a_budget_below_everything_names_the_least():
    cost = Cost("MACs", 10.0, {SITES[0]: np.arange(5.0), SITES[1]: np.arange(7.0)})
    importance = {name: np.ones(ANATOMY.sites[name].size) for name in SITES}
    with pytest.raises(TargetError, match=r"9 MACs cannot be reached: 10 remain.*\n.*50%"):
        allocate(ANATOMY, importance, cost, 9.0)
    with pytest.raises(TargetError, match="12 remain"):
        allocate(ANATOMY, importance, cost, 11.0, sublayers=False)


def test_macs_by_hand():
    # 5 tokens; a head: 4 matrices of 32 x 8, and scores and their product of 5 x 5 x 8 each; a neuron: 2 x 32
    cost = macs(ANATOMY, np.array([5, 5]))
    assert cost.curves[SITES[0]][1] == 5 * 4 * 32 * 8 + 2 * 5 * 5 * 8
    assert cost.curves[SITES[1]][2] == 5 * 2 * 2 * 32


def test_parameters_of_an_empty_sublayer_include_its_norm():
    cost = parameters(MODEL, ANATOMY)
    assert cost.curves[SITES[1]][0] == 0
    assert cost.curves[SITES[1]][1] == 2 * 32 + 1 + 32 + 2 * 32  # W1 row, its bias, W2 column; W2 bias, norm weight and bias


def test_latency_is_linear_between_levels_and_never_falls():
    cost = latency(ANATOMY, 0.5, {Kind.HEADS: {4: 4.0, 2: 3.0, 1: 3.5}, Kind.NEURONS: {6: 6.0}})
    assert cost.curves[SITES[0]].tolist() == [0.0, 3.5, 3.5, 3.75, 4.0]
    assert cost.curves[SITES[1]].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert cost.dense == pytest.approx(10.5)
