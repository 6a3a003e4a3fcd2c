"""Fisher: importance equals per-example finite gradients; the repair is the least-squares solution and absorbs what it can."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from tiny import tiny
from toy_task import with_model

from slimformer.core.plan import Decision, Plan
from slimformer.core.shrink import shrink
from slimformer.errors import TargetError
from slimformer.families.base import anatomy_of
from slimformer.hooks.gating import gated
from slimformer.methods import _gradients, _surgeon, fisher
from slimformer.methods.base import State
from slimformer.methods.fisher import Fisher
from slimformer.testing.checks import tiny_context


def test_information_is_the_mean_square_of_each_examples_gradient(monkeypatch):
    for module in (fisher, _gradients):
        monkeypatch.setattr(module, "quick_autocast", lambda _: nullcontext())  # float32: bfloat16 is for speed alone
    context = tiny_context()
    found = fisher.information(context, 8)
    expected = {name: np.zeros(len(value)) for name, value in found.items()}
    rows = 0
    for inputs in context.batches(8):
        for row in range(len(inputs["labels"])):
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            gates = {name: torch.ones(len(value), requires_grad=True) for name, value in found.items()}
            with gated(context.model, context.anatomy, gates):
                loss = context.task.loss(context.model(**{k: v for k, v in one.items() if k != "labels"}), one)
            for name, gradient in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
                expected[name] += gradient.double().square().numpy()
            rows += 1
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name] / rows, rtol=1e-3, atol=1e-9)


@pytest.mark.slow
def test_an_unused_unit_matters_nothing_and_goes_first():
    context = tiny_context()
    with torch.no_grad():
        context.model.get_submodule("bert.encoder.layer.1.output.dense").weight[:, 5] = 0
    assert fisher.information(context, 8)["encoder.1.neurons"][5] == 0


def gap(model, small, context):
    total = 0.0
    with torch.no_grad():
        for inputs in context.batches(32):
            given = {name: value for name, value in inputs.items() if name != "labels"}
            total += float((model(**given).logits - small(**given).logits).square().sum())
    return total


def test_repair_brings_the_cut_model_back_towards_the_dense_one():
    context = tiny_context()
    plan = Plan({"encoder.0.neurons": tuple(range(12)), "encoder.1.heads": (0, 2), "encoder.2.neurons": tuple(range(4, 20))})
    weights = fisher.repaired(context, plan, tokens=10_000, ridge=1e-4)
    raw = gap(context.model, shrink(context.model, context.anatomy, plan), context)
    mended = gap(context.model, shrink(context.model, context.anatomy, Decision(plan, weights=weights)), context)
    assert mended < 0.5 * raw


def test_redundant_units_are_repaired_exactly():
    # neuron 1 is a copy of neuron 0: cutting it and doubling the other's column must give the same function
    model = tiny("bert", num_hidden_layers=1)
    with torch.no_grad():
        into = model.get_submodule("bert.encoder.layer.0.intermediate.dense")
        into.weight[1], into.bias[1] = into.weight[0], into.bias[0]
    context = with_model(tiny_context(), model, anatomy_of(model))
    plan = Plan({"encoder.0.neurons": (0, *range(2, 24))})
    weights = fisher.repaired(context, plan, tokens=10_000, ridge=1e-9)
    small = shrink(model, context.anatomy, Decision(plan, weights=weights))
    assert gap(model, small, context) < 1e-6


@dataclass(frozen=True)
class Sublayer:
    """What one of the only layer's sublayers computes at real tokens: its residual, its output matrix's inputs and outputs."""

    residual: torch.Tensor
    inputs: torch.Tensor
    outputs: torch.Tensor

    @staticmethod
    def of(model, module, residual, context):
        flowing, read, given = [], [], []
        handles = [
            model.get_submodule(residual).register_forward_pre_hook(lambda _, args: flowing.append(args[0][mask])),
            model.get_submodule(module).register_forward_pre_hook(lambda _, args: read.append(args[0][mask])),
            model.get_submodule(module).register_forward_hook(lambda _, __, output: given.append(output[mask])),
        ]
        with torch.no_grad():
            for inputs in context.batches(32):
                mask = inputs["attention_mask"].bool()
                model(**{name: value for name, value in inputs.items() if name != "labels"})
        for handle in handles:
            handle.remove()
        return Sublayer(*(torch.cat(values).double() for values in (flowing, read, given)))


def test_the_repair_is_the_weighted_ridge_solution():
    """By its definition: rows weighed by the loss's slope, a ridge towards the old weights, a bias, a residual that has moved.

    In a classifier's last layer the loss feels the first token alone: of n tokens it weighs n, and each other one nothing, but for
    the floor of 2 per cent.
    """
    model = tiny("bert", num_hidden_layers=1)
    context = with_model(tiny_context(), model, anatomy_of(model))
    plan, ridge = Plan({"encoder.0.heads": (0, 2), "encoder.0.neurons": tuple(range(3, 21))}), 0.05
    found = fisher.repaired(context, plan, tokens=10_000, ridge=ridge)
    tokens = [int(count) for inputs in context.batches(32) for count in inputs["attention_mask"].sum(1)]
    weights = torch.cat([torch.tensor([0.98 * count + 0.02] + [0.02] * (count - 1)) for count in tokens]).double()
    now, layer = copy.deepcopy(model), "bert.encoder.layer.0"
    for module, residual, columns in (
        (f"{layer}.attention.output.dense", f"{layer}.attention", [*range(8), *range(16, 24)]),
        (f"{layer}.output.dense", f"{layer}.intermediate.dense", list(range(3, 21))),
    ):
        dense, cut = (Sublayer.of(each, module, residual, context) for each in (model, now))
        linear = now.get_submodule(module)
        old = torch.cat([linear.weight[:, columns], linear.bias[:, None]], 1).detach().double()
        x = torch.cat([cut.inputs[:, columns], torch.ones(len(weights), 1, dtype=torch.float64)], 1)
        y = dense.outputs + dense.residual - cut.residual
        size, root = x.shape[1], weights.sqrt()[:, None]
        pull = (ridge * (root * x).square().sum() / size).sqrt()
        rows = torch.cat([root * x, pull * torch.eye(size, dtype=torch.float64)])
        solution = torch.linalg.lstsq(rows, torch.cat([root * y, pull * old.T])).solution.T.float()
        weight, bias = found[f"{module}.weight"], found[f"{module}.bias"]
        torch.testing.assert_close(weight[:, columns], solution[:, :-1], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(bias, solution[:, -1], atol=1e-4, rtol=1e-3)
        assert int((weight != 0).any(0).sum()) == len(columns)
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
    assert len(found) == 4


def test_worth_is_the_measured_damage_and_rises_to_nothing_lost(monkeypatch):
    for module in (fisher, _gradients):
        monkeypatch.setattr(module, "quick_autocast", lambda _: nullcontext())
    context = tiny_context()
    importance = fisher.information(context, 32)
    worth = fisher.worths(context, importance, 32)
    for name, curve in worth.items():
        assert len(curve) == context.anatomy.sites[name].size + 1
        assert curve[-1] == 0
        assert (np.diff(curve) >= 0).all()
    for sublayer, site in (("encoder.0.attention", "encoder.0.heads"), ("encoder.1.ffn", "encoder.1.neurons")):
        lost = rows = 0.0
        small = shrink(context.model, context.anatomy, Plan({sublayer: ()}))
        with torch.no_grad():
            for inputs in context.batches(32):
                given = {name: value for name, value in inputs.items() if name != "labels"}
                lost += 4 * float(context.task.divergence(small(**given), context.model(**given), given, 1.0))
                rows += 4
        np.testing.assert_allclose(worth[site][0], -lost / rows, rtol=1e-4)


@pytest.mark.parametrize("name", ["encoder.1.neurons", "encoder.2.heads"])
def test_worth_at_each_size_is_what_the_best_units_alone_lose(monkeypatch, name):
    """Measured at a few sizes with a cut model; between them it falls as the information that is cut."""
    for module in (fisher, _gradients):
        monkeypatch.setattr(module, "quick_autocast", lambda _: nullcontext())
    context = tiny_context()
    units = fisher.information(context, 16)[name]
    size, ranking = len(units), np.argsort(-units)
    sizes = {"encoder.1.neurons": [0, 1, 3, 6, 12, 18, 24], "encoder.2.heads": [0, 1, 2, 3, 4]}[name]  # 0, 5, 12.5, 25, ... %
    lost = {size: 0.0}
    for count in sizes[:-1]:
        kept = tuple(sorted(int(unit) for unit in ranking[:count]))
        small = shrink(
            context.model, context.anatomy, Plan({name: kept} if kept else {context.anatomy.sites[name].sublayer: ()})
        )
        gaps = []
        with torch.no_grad():
            for inputs in context.batches(16):
                given = {key: value for key, value in inputs.items() if key != "labels"}
                gaps.append(float(context.task.divergence(small(**given), context.model(**given), given, 1.0)))
        lost[count] = np.mean(gaps)
    cut = [units[ranking[count:]].sum() for count in range(size + 1)]
    expected = []
    for count in range(size + 1):
        below, above = max(step for step in sizes if step <= count), min(step for step in sizes if step >= count)
        share = (cut[count] - cut[above]) / (cut[below] - cut[above]) if below < above else 1.0
        expected.append(lost[above] + share * (lost[below] - lost[above]))
    never_more = [max(expected[count:]) for count in range(size + 1)]
    found = fisher.worths(context, {name: units}, 16)[name]
    np.testing.assert_allclose(found, -np.array(never_more), rtol=1e-3, atol=1e-6)


def test_a_sublayer_that_does_much_is_kept_even_if_its_units_seem_idle():
    context = tiny_context()
    worth = {site.id: np.zeros(site.size + 1) for site in context.anatomy.units}
    worth["encoder.1.heads"][0] = -5.0
    weighed = fisher.Weighed({name: np.zeros(len(curve) - 1) for name, curve in worth.items()}, worth)
    plan = Fisher(keep=0.3, neuron_multiple=1).plan(context, weighed)
    assert plan.keep.get("encoder.1.attention") != ()


def test_nothing_cut_nothing_repaired():
    assert fisher.repaired(tiny_context(), Plan(), tokens=1000, ridge=1e-3) == {}


def test_later_sublayers_absorb_a_dropped_one():
    context = tiny_context()
    plan = Plan({"encoder.1.attention": ()})
    weights = fisher.repaired(context, plan, tokens=10_000, ridge=1e-4)
    assert "bert.encoder.layer.1.output.dense.weight" in weights
    assert not any(".layer.0." in name or ".layer.1.attention" in name for name in weights)
    raw = gap(context.model, shrink(context.model, context.anatomy, plan), context)
    mended = gap(context.model, shrink(context.model, context.anatomy, Decision(plan, weights=weights)), context)
    assert mended < raw


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep": 1.2}, {"ridge": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Fisher(**options)


def test_a_budget_out_of_reach_is_told_before_anything_is_measured():
    around = tiny_context()
    with pytest.raises(TargetError, match="cannot be reached"):
        Fisher(keep=0.01, sublayers=False).check(around.anatomy, around.cost)
    Fisher(keep=0.5).check(around.anatomy, around.cost)
    Fisher(keep=0.01, sublayers=False).check(around.anatomy, None)  # a cost that is still to be measured


def test_the_given_model_is_left_as_it_was():
    context = tiny_context()
    before = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    Fisher(keep=0.5, neuron_multiple=1).decide(State(), context)
    assert all(torch.equal(tensor, before[name]) for name, tensor in context.model.state_dict().items())


def test_a_run_weighs_the_same_weights_once() -> None:
    context = tiny_context()
    method = Fisher(examples=8, damage_examples=8)
    first = method.weigh(context)
    assert set(first.worth) == set(first.importance) == {site.id for site in context.anatomy.units}
    assert replace(method, damage_examples=0).weigh(context).worth is None
    assert replace(method, keep=0.3).weigh(context) is first  # the budget changes nothing
    assert replace(method, examples=4).weigh(context) is not first
    with torch.no_grad():
        next(context.model.parameters()).add_(0.1)
    assert method.weigh(context) is not first
    assert tiny_context().memo == {}  # another run knows nothing of it


# -- One at a time ----------------------------------------------------------------------------------------------------------------


def matrix_and_inputs(units, width, *, bias=True):
    """A matrix (5, n) whose inputs depend on each other, and the ridged sum of their products (n, n)."""
    torch.manual_seed(3)
    inputs = torch.randn(60, units * width, dtype=torch.float64) @ torch.randn(
        units * width, units * width, dtype=torch.float64
    )
    if bias:
        inputs = torch.cat([inputs, torch.ones(60, 1, dtype=torch.float64)], 1)
    gram = inputs.T @ inputs
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    return torch.randn(5, inputs.shape[1], dtype=torch.float64), gram


def best_without(weight, gram, gone):
    """The least squared error without some columns, and the matrix that has it."""
    stay = [column for column in range(weight.shape[1]) if column not in gone]
    solved = weight @ gram[:, stay] @ torch.linalg.inv(gram[stay][:, stay])
    whole = torch.zeros_like(weight)
    whole[:, stay] = solved
    error = weight - whole
    return float(((error @ gram) * error).sum()), whole


@pytest.mark.parametrize(("units", "width"), [(9, 1), (5, 3)])
def test_each_removal_is_the_one_that_the_others_make_up_for_best(monkeypatch, units, width):
    monkeypatch.setattr(_surgeon, "LAZY", 2)  # the whole inverse is brought up to date in between
    weight, gram = matrix_and_inputs(units, width)
    found = _surgeon.removal(weight, gram, units, width, counts=(0, 2, units))
    gone, before = [], 0.0
    for step, (unit, damage) in enumerate(zip(found.order, found.damage, strict=True)):
        tried = {}
        for other in set(range(units)) - set(found.order[:step]):
            tried[other], _ = best_without(weight, gram, gone + [other * width + row for row in range(width)])
        assert unit == min(tried, key=tried.__getitem__)
        assert damage == pytest.approx(tried[unit] - before, rel=1e-6)
        gone += [unit * width + row for row in range(width)]
        before = tried[unit]
        if units - step - 1 in found.refits:
            torch.testing.assert_close(
                found.refits[units - step - 1], best_without(weight, gram, gone)[1], rtol=1e-6, atol=1e-8
            )
    torch.testing.assert_close(found.refits[units], weight)
    assert set(found.refits) == {0, 2, units}


def test_of_two_units_that_do_the_same_work_one_goes_for_nothing_and_the_other_stays_long():
    context = tiny_context()
    dense = context.model.get_submodule("bert.encoder.layer.1.intermediate.dense")
    output = context.model.get_submodule("bert.encoder.layer.1.output.dense")
    with torch.no_grad():
        for part in (dense.weight, dense.bias):
            part[7] = part[3]  # each of the two seems to be worth little
        output.weight[:, 3] *= 4
        output.weight[:, 7] = output.weight[:, 3]
    ways = fisher.removals(context, tokens=10_000, ridge=1e-6)
    way = ways["encoder.1.neurons"]
    first, second = sorted((way.order.index(3), way.order.index(7)))
    assert way.damage[first] < 1e-4 * way.damage[second]
    importance = fisher.ranks_of(way)
    assert list(np.argsort(importance, kind="stable")) == list(way.order)
    assert set(ways) == {site.id for site in context.anatomy.units}


def test_damage_is_measured_with_the_weights_that_make_up_for_what_goes():
    context = tiny_context()
    before = {name: value.clone() for name, value in context.model.state_dict().items()}
    ways = fisher.removals(context, tokens=10_000, ridge=1e-4)
    importance = {name: fisher.ranks_of(way) for name, way in ways.items()}
    alone = fisher.worths(context, importance, 32)
    mended = fisher.worths(context, importance, 32, {name: way.refits for name, way in ways.items()})
    assert all(torch.equal(value, before[name]) for name, value in context.model.state_dict().items())
    halves = {name: len(value) // 2 for name, value in alone.items() if name.endswith("neurons")}
    assert sum(mended[name][half] for name, half in halves.items()) > 0.8 * sum(
        alone[name][half] for name, half in halves.items()
    )


def test_the_order_is_an_option_and_what_it_counts_on_is_asked_for():
    context = tiny_context()
    cut = [Fisher(keep=0.6, examples=16, damage_examples=16, order=order) for order in ("gradients", "removal")]
    first, second = (method.decide(State(), context) for method in cut)
    assert first.plan != second.plan
    for decision in (first, second):
        assert context.cost.of(decision.plan, context.anatomy) <= 0.6 * context.cost.dense
    with pytest.raises(ValueError, match="leave repair on"):
        Fisher(order="removal", repair=False)
