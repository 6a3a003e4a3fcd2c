"""Importance: gain against finite differences, leave-one-out against cut models, random by its seed; each within its budget."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny
from toy_task import with_model

from slimformer.core import cost
from slimformer.core.anatomy import Kind
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.errors import TargetError
from slimformer.families.base import anatomy_of
from slimformer.hooks.gating import gated
from slimformer.methods import _gradients, importance
from slimformer.methods.base import State
from slimformer.methods.importance import Importance
from slimformer.testing.checks import tiny_context

WIDE = {"intermediate_size": 512, "hidden_size": 128, "num_attention_heads": 16}  # fine enough for 2 % of a budget


def wide(unit: str):
    """A context around a model with many small units."""
    model = tiny("bert", **WIDE)
    anatomy = anatomy_of(model)
    table = {Kind.HEADS: {1: 0.5, 8: 0.7, 16: 1.4}, Kind.NEURONS: {16: 0.4, 256: 0.9, 512: 2.0}}
    costs = {
        "macs": lambda: cost.macs(anatomy, np.array([7, 30])),
        "parameters": lambda: cost.parameters(model, anatomy),
        "latency": lambda: cost.latency(anatomy, 0.1, table),
    }
    return replace(with_model(tiny_context(), model, anatomy), cost=costs[unit]())


def sites_of(context, *kinds):
    return [site for site in context.anatomy.sites.values() if site.kind in kinds]


def given(inputs):
    return {name: value for name, value in inputs.items() if name != "labels"}


def mean_loss(model, context, examples):
    total = rows = 0
    with torch.no_grad():
        for inputs in context.batches(examples):
            total += float(torch.nn.functional.cross_entropy(model(**given(inputs)).logits, inputs["labels"], reduction="sum"))
            rows += len(inputs["labels"])
    return total / rows


def test_gain_is_the_mean_absolute_finite_difference_of_each_example(monkeypatch):
    monkeypatch.setattr(_gradients, "quick_autocast", lambda _: nullcontext())  # bfloat16 is for speed alone
    context = tiny_context()
    context.model.double()
    found = importance.gain(context, sites_of(context, Kind.HEADS, Kind.NEURONS), 8)
    step = 1e-4
    for name, unit in (("encoder.0.heads", 2), ("encoder.2.heads", 0), ("encoder.0.neurons", 5), ("encoder.1.neurons", 23)):
        slopes = []
        for inputs in context.batches(8):
            for row in range(len(inputs["labels"])):
                one = {key: value[row : row + 1] for key, value in inputs.items()}
                losses = []
                for sign in (1, -1):
                    gate = torch.ones(context.anatomy.sites[name].size, dtype=torch.float64)
                    gate[unit] += sign * step
                    with torch.no_grad(), gated(context.model, context.anatomy, {name: gate}):
                        losses.append(float(context.task.loss(context.model(**given(one)), one)))
                slopes.append((losses[0] - losses[1]) / (2 * step))
        assert min(slopes) < 0 < max(slopes)  # or the place of the absolute value would not matter
        assert found[name][unit] == pytest.approx(np.abs(slopes).mean(), rel=1e-4)


@pytest.mark.slow
def test_a_gain_is_worth_what_its_unit_costs():
    context = tiny_context()
    sites = sites_of(context, Kind.HEADS, Kind.NEURONS)
    plain, ranked = importance.gain(context, sites, 8), Importance(examples=8).rank(context, sites)
    for name, value in ranked.items():
        per_unit = context.cost.curves[name][1]  # MACs are in proportion
        np.testing.assert_allclose(value, plain[name] / per_unit)


def test_left_out_is_the_loss_of_the_model_without_that_head():
    context = tiny_context()
    found = importance.left_out(context, sites_of(context, Kind.HEADS), 32)
    whole = mean_loss(context.model, context, 32)
    for name, rises in found.items():
        for head in range(4):
            small = shrink(context.model, context.anatomy, Plan({name: tuple(unit for unit in range(4) if unit != head)}))
            assert rises[head] == pytest.approx(mean_loss(small, context, 32) - whole, abs=2e-6)
    assert min(rises.min() for rises in found.values()) < 0  # some heads do harm: those go first


def test_leave_one_out_keeps_the_heads_that_are_missed_most():
    context = tiny_context()
    method = Importance("leave_one_out", units="heads", keep=0.7, examples=16, sublayers=True)
    plan = method.decide(State(), context).plan
    rises = importance.left_out(context, sites_of(context, Kind.HEADS), 16)
    ranking = sorted(((value, name, unit) for name, values in rises.items() for unit, value in enumerate(values)), reverse=True)
    left = round((0.7 - 0.2526) * 4 / 0.2491)  # heads of 12: three layers cost 0.7474, neurons 0.2526
    expected: dict[str, tuple[int, ...]] = {}
    for _, name, unit in ranking[:left]:
        expected[name] = tuple(sorted((*expected.get(name, ()), unit)))
    for name in rises:
        gone = plan.keep.get(context.anatomy.sites[name].sublayer) == ()
        assert (() if gone else plan.keep.get(name, (0, 1, 2, 3))) == expected.get(name, ())


@pytest.mark.parametrize("unit", ["macs", "parameters", "latency"])
@pytest.mark.parametrize("how", ["random", "gain"])
def test_budgets_are_filled_within_two_percent(unit, how):
    context = wide(unit)
    for keep in (0.5, 0.7):
        plan = Importance(how, keep=keep, examples=4, cost=unit).decide(State(), context).plan
        left = context.cost.of(plan, context.anatomy) / context.cost.dense
        assert 0.98 * keep <= left <= keep
        assert not any(name.endswith(("attention", "ffn")) for name in plan.keep)  # no sublayer goes unasked
        assert all(len(kept) % 16 == 0 for name, kept in plan.keep.items() if name.endswith("neurons"))


def test_random_is_a_fair_draw_from_the_runs_seed():
    context = wide("macs")

    def drawn(seed: int) -> Plan:
        around = replace(context, generator=torch.Generator().manual_seed(seed), batches=None)  # looks at no data
        return Importance("random", keep=0.6, neuron_multiple=1).decide(State(), around).plan

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    shares = {"heads": [], "neurons": []}
    for seed in range(30):
        for name, kept in drawn(seed).keep.items():
            shares[name.rpartition(".")[2]].append(len(kept) / context.anatomy.sites[name].size)
    assert np.mean(shares["heads"]) == pytest.approx(0.6, abs=0.04)
    assert np.mean(shares["neurons"]) == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize("units", ["heads", "neurons"])
def test_other_units_stay_whole(units):
    context = wide("macs")
    plan = Importance("gain", units=units, keep=0.8, examples=4).decide(State(), context).plan
    assert plan.keep
    assert all(name.endswith(units) for name in plan.keep)


def test_a_budget_out_of_reach_is_told():
    with pytest.raises(TargetError, match="cannot be reached"):
        Importance("random", units="neurons", keep=0.5).decide(State(), tiny_context())


@pytest.mark.parametrize("how", ["gain", "leave_one_out"])
def test_the_given_model_is_left_as_it_was(how):
    context = tiny_context()
    context.model.train()
    before = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    Importance(how, units="heads", keep=0.7, examples=8).decide(State(), context)
    assert all(torch.equal(tensor, before[name]) for name, tensor in context.model.state_dict().items())
    assert context.model.training
    assert all(parameter.grad is None for parameter in context.model.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"how": "magnitude"},
        {"units": "layers"},
        {"keep": 0},
        {"keep": 1.2},
        {"examples": 0},
        {"neuron_multiple": 0},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Importance(**options)


@pytest.mark.parametrize("units", ["neurons", "both"])
def test_leaving_neurons_out_one_by_one_is_refused(units):
    with pytest.raises(ValueError, match=rf"units must be heads if how is leave_one_out .*got {units}"):
        Importance("leave_one_out", units=units)
