"""The search under a budget equals brute force, never exceeds the budget, and says when there is no way."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny

from slimformer.core.anatomy import Kind
from slimformer.core.budget import allocate, leading, levels, something_left, strongest
from slimformer.core.cost import Cost, latency, macs, parameters
from slimformer.core.plan import Plan
from slimformer.errors import TargetError
from slimformer.families.base import anatomy_of
from slimformer.forms.low_rank import LowRank

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


def test_levels_by_hand():
    found = {
        (size, step): levels(size, step, may_vanish=False).tolist() for size, step in ((8, 4), (6, 4), (6, 9), (2, 4), (1, 1))
    }
    assert found == {(8, 4): [4, 8], (6, 4): [4, 6], (6, 9): [1, 6], (2, 4): [1, 2], (1, 1): [1]}
    assert levels(6, 4, may_vanish=True).tolist() == [0, 4, 6]


def test_a_site_that_is_not_named_stays_whole_and_is_paid_for():
    cost = Cost("units", 0.5, {SITES[0]: np.arange(5) * 0.1, SITES[1]: np.array([0, 0.1, 0.2, 0.3, 0.4, 0.5, 2.0])})
    importance = {SITES[0]: np.array([4.0, 3.0, 2.0, 1.0])}
    assert allocate(ANATOMY, importance, cost, 2.75).keep == {SITES[0]: (0, 1)}  # 0.25 is left for heads
    assert allocate(ANATOMY, importance, cost, 2.5).keep == {"encoder.0.attention": ()}  # nothing is
    with pytest.raises(TargetError, match="2.5 remain"):
        allocate(ANATOMY, importance, cost, 2.4)
    free = replace(cost, curves={**cost.curves, SITES[0]: np.zeros(5)})
    assert allocate(ANATOMY, importance, free, 2.5).keep == {}  # what costs nothing stays


SCORE = {SITES[0]: np.array([9.0, 1.0, 8.0, 2.0]), SITES[1]: np.array([7.0, 6.0, 5.0, -4.0, 3.0, 0.5])}
UNITS = Cost("units", 1.0, {SITES[0]: np.arange(5) * 8.0, SITES[1]: np.arange(7) * 4.0})


def test_the_strongest_are_the_longest_prefix_of_the_ranking_that_fits():
    ranking = [(0, 0), (0, 2), (1, 0), (1, 1), (1, 2), (1, 4), (0, 3), (0, 1), (1, 5), (1, 3)]  # by SCORE, all sites together
    for count in range(len(ranking) + 1):
        kept = {
            name: tuple(sorted(unit for site, unit in ranking[:count] if site == index)) for index, name in enumerate(SITES)
        }
        spent = 1.0 + 8 * len(kept[SITES[0]]) + 4 * len(kept[SITES[1]])
        gone = {ANATOMY.sites[name].sublayer: () for name, units in kept.items() if not units}
        part = {name: units for name, units in kept.items() if 0 < len(units) < ANATOMY.sites[name].size}
        for budget in (spent, spent + 3.9):  # the next unit costs 4 at least
            assert strongest(ANATOMY, SCORE, UNITS, budget).keep == gone | part
    with pytest.raises(TargetError, match=r"0.9 units cannot be reached: 1 remain[\s\S]*ask for 2%"):
        strongest(ANATOMY, SCORE, UNITS, 0.9)
    with pytest.raises(TargetError, match="13 remain"):  # a head and a neuron
        strongest(ANATOMY, SCORE, UNITS, 12.0, sublayers=False)
    assert strongest(ANATOMY, SCORE, UNITS, 25.0, neuron_multiple=4).keep == {SITES[0]: (0, 2), "encoder.0.ffn": ()}


def test_leading_units_in_the_nearest_number_that_is_allowed():
    assert leading(ANATOMY, SCORE, {SITES[0]: 3, SITES[1]: 5}).keep == {SITES[0]: (0, 2, 3), SITES[1]: (0, 1, 2, 4, 5)}
    found = leading(ANATOMY, SCORE, {SITES[0]: 0, SITES[1]: 3}, neuron_multiple=4).keep
    assert found == {"encoder.0.attention": (), SITES[1]: (0, 1, 2, 4)}
    assert leading(ANATOMY, SCORE, {SITES[0]: 0}, sublayers=False).keep == {SITES[0]: (0,)}
    assert leading(ANATOMY, SCORE, {SITES[1]: 5}, neuron_multiple=4).keep == {
        SITES[1]: (0, 1, 2, 4)
    }  # of two as near the smaller
    assert leading(ANATOMY, SCORE, {SITES[1]: 6}, neuron_multiple=4).keep == {}


def test_a_plan_that_takes_every_sublayer_is_refused():
    attention, ffn = ({f"encoder.0.{name}": ()} for name in ("attention", "ffn"))
    for plan in ({}, attention, ffn, {SITES[0]: (0,)}):
        something_left(ANATOMY, Plan(plan))
    with pytest.raises(TargetError, match="nothing of the encoder would be left"):
        something_left(ANATOMY, Plan(attention | ffn))
    something_left(replace(ANATOMY, sites={}), Plan())  # what has no sublayers loses none


def test_macs_by_hand():
    # 5 tokens; a head: 4 matrices of 32 x 8, and scores and their product of 5 x 5 x 8 each; a neuron: 2 x 32
    cost = macs(ANATOMY, np.array([5, 5]))
    assert cost.curves[SITES[0]][1] == 5 * 4 * 32 * 8 + 2 * 5 * 5 * 8
    assert cost.curves[SITES[1]][2] == 5 * 2 * 2 * 32


def test_parameters_of_an_empty_sublayer_include_its_norm():
    cost = parameters(MODEL, ANATOMY)
    assert cost.curves[SITES[1]][0] == 0
    assert cost.curves[SITES[1]][1] == 2 * 32 + 1 + 32 + 2 * 32  # W1 row, its bias, W2 column; W2 bias, norm weight and bias


def test_the_time_of_a_product_is_a_call_and_its_numbers():
    anatomy = anatomy_of(tiny("bert"))  # feed-forwards of 24 neurons between 32 hidden units: 64 numbers a neuron, two products
    table = {"heads": {4: 1.0, 1: 0.5}, "neurons": {8: 0.3, 24: 0.5}}  # 0.0125 ms a neuron, 0.2 ms a call of both
    cost = latency(anatomy, 0.0, table)
    query, wide = anatomy.matrices["encoder.0.query"], anatomy.matrices["encoder.0.ffn_in"]
    assert cost.matrix(query) == pytest.approx(0.1 + 32 * 32 * 0.0125 / 64)
    assert cost.matrix(replace(query, form=LowRank(8))) == pytest.approx(0.2 + 8 * 64 * 0.0125 / 64)  # as long as the plain one
    assert cost.matrix(wide) == pytest.approx(0.25)
    assert cost.matrix(anatomy.matrices["embeddings.word"]) == 0
    plan = Plan(forms={"encoder.0.query": LowRank(4), "encoder.1.ffn_in": LowRank(2)})
    saved = (0.3 - 0.2 - 4 * 64 * 0.0125 / 64) + (0.25 - 0.2 - 2 * 56 * 0.0125 / 64)
    assert cost.of(plan, anatomy) == pytest.approx(cost.dense - saved)
    assert latency(anatomy, 0.0, table | {"neurons": {24: 0.5}}).matrix is None
    decoding = anatomy_of(tiny("bart"))
    both = {name: {1: 0.1, 24: 0.5} for name in ("heads", "neurons", "decoder_heads", "cross_heads", "decoder_neurons")}
    assert latency(decoding, 0.0, both).matrix is None


def test_latency_is_linear_between_levels_and_never_falls():
    cost = latency(ANATOMY, 0.5, {Kind.HEADS: {4: 4.0, 2: 3.0, 1: 3.5}, Kind.NEURONS: {6: 6.0}})
    assert cost.curves[SITES[0]].tolist() == [0.0, 3.5, 3.5, 3.75, 4.0]
    assert cost.curves[SITES[1]].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert cost.dense == pytest.approx(10.5)
