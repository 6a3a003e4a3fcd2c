"""Elastic width and depth: the order of units, what each example passes through, and the models that are taken out afterwards."""

from __future__ import annotations

import pytest
import torch
from tiny import batch
from toy_task import without_dropout

from slimformer.core.pattern import Fixed
from slimformer.core.plan import Decision, Plan
from slimformer.core.shrink import shrink
from slimformer.errors import TargetError
from slimformer.methods._nested import even_layers, leading_count, nested_plan
from slimformer.methods.elastic import Elastic, equal_shares
from slimformer.methods.importance import gain
from slimformer.methods.leading import Leading, differences
from slimformer.testing.checks import tiny_context

WIDTHS = {"widths": (1.0, 0.5), "neuron_multiple": 4}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta"])
def test_the_order_is_that_of_the_gain_and_changes_no_output(model_type):
    around = tiny_context(model_type)
    worth = gain(around, list(around.anatomy.units), 64)
    state = Elastic(examples=64).attach(around)
    orders = state.orders()
    state.close()
    for name, order in orders.items():
        values = worth[name][order.tolist()]
        assert list(values) == sorted(values, reverse=True)
        assert sorted(order.tolist()) == list(range(len(values)))
    decision = Elastic(examples=64).decide(state, around)
    whole, inputs = around.model.eval(), batch(around.model)
    ordered = shrink(whole, around.anatomy, decision)
    torch.testing.assert_close(logits(ordered, inputs), logits(whole, inputs), atol=1e-5, rtol=1e-5)
    best = {name: (int(order[0]),) for name, order in orders.items()}
    first = shrink(ordered, around.anatomy, Plan(dict.fromkeys(best, (0,))))
    chosen = shrink(whole, around.anatomy, Plan(best))
    torch.testing.assert_close(logits(first, inputs), logits(chosen, inputs), atol=1e-5, rtol=1e-5)


def test_each_example_passes_through_the_model_that_leading_takes_out_later():
    around = tiny_context()
    method = Elastic(**WIDTHS, depths=(1.0, 0.5), examples=64)
    model = without_dropout(around.model)
    inputs = {name: value.repeat(4, 1) for name, value in batch(model).items()}
    state = method.attach(around)
    with torch.no_grad():
        mixed = model.train()(**inputs).logits
    widths, depths = state._drawn
    assert len({*zip(widths.tolist(), depths.tolist(), strict=True)}) == 4
    state.close()
    ordered = shrink(model.eval(), around.anatomy, method.decide(state, around))
    sites = list(around.anatomy.units)
    for row, (width, depth) in enumerate(zip(widths.tolist(), depths.tolist(), strict=True)):
        plan = nested_plan(around.anatomy, sites, method.widths[width], method.depths[depth], 4)
        alone = logits(shrink(ordered, around.anatomy, plan), inputs)
        torch.testing.assert_close(mixed[row], alone[row], atol=1e-5, rtol=1e-5)


def test_in_evaluation_and_without_the_state_the_model_is_whole():
    around = tiny_context()
    model, inputs = without_dropout(around.model), batch(around.model)
    whole = logits(model.eval(), inputs)
    state = Elastic(**WIDTHS, examples=64).attach(around)
    assert not torch.allclose(logits(model.train(), inputs), whole)
    torch.testing.assert_close(logits(model.eval(), inputs), whole)
    state.close()
    torch.testing.assert_close(logits(model.train(), inputs), whole)


def test_without_sorting_the_order_is_as_it_stands_and_nothing_is_rewritten():
    around = tiny_context()
    method = Elastic(sort=False)
    state = method.attach(around)
    state.close()
    assert all(order.tolist() == list(range(len(order))) for order in state.orders().values())
    assert method.decide(state, around) == Decision()


@pytest.mark.parametrize(("examples", "models", "counts"), [(8, 4, [2, 2, 2, 2]), (3, 4, [0, 1, 1, 1]), (6, 4, [1, 1, 2, 2])])
def test_models_have_equal_shares_of_a_batch(examples, models, counts):
    seen = [equal_shares(examples, models) for _ in range(20)]
    assert all(sorted(drawn.bincount(minlength=models).tolist()) == counts for drawn in seen)
    assert len({tuple(drawn.tolist()) for drawn in seen}) > 1


def test_counts_and_layers_by_hand():
    anatomy = tiny_context().anatomy  # three layers of 4 heads and 24 neurons
    heads, neurons = anatomy.sites["encoder.0.heads"], anatomy.sites["encoder.0.neurons"]
    assert [leading_count(heads, width, 16) for width in (1.0, 0.75, 0.5, 0.25, 0.01)] == [4, 3, 2, 1, 1]
    assert [leading_count(neurons, width, 8) for width in (1.0, 0.75, 0.5, 0.25, 0.01)] == [24, 16, 16, 8, 8]
    assert leading_count(neurons, 1.0, 16) == 24
    assert [even_layers(anatomy, depth) for depth in (1.0, 0.6, 0.1)] == [[0, 1, 2], [0, 2], [2]]
    plan = nested_plan(anatomy, [heads], 0.5, 0.6, 16)
    assert dict(plan.keep) == {"encoder.0.heads": (0, 1), "encoder.1.attention": (), "encoder.1.ffn": ()}


def test_leading_takes_the_pair_within_the_budget_that_differs_least():
    around = tiny_context()
    method = Leading(keep=0.6, widths=(1.0, 0.5, 0.25), depths=(1.0, 0.6, 0.3), neuron_multiple=4)
    plans = method.fitting(around.anatomy, around.cost)
    costs = [around.cost.of(plan, around.anatomy) / around.cost.dense for plan in plans]
    assert len(plans) > 1
    assert costs == sorted(costs, reverse=True)
    assert costs[0] <= 0.6
    differ = differences(around, plans, 64)
    chosen = method.decide(method.attach(around), around).plan
    small = shrink(around.model, around.anatomy, plans[0])
    inputs = next(around.batches(64))
    with torch.no_grad():
        answers = [model.eval()(**around.subject.feed(inputs)) for model in (small, around.model)]
    expected = around.task.divergence(*answers, inputs, 1.0)
    assert differences(around, plans[:1], len(inputs["input_ids"]))[0] == pytest.approx(float(expected), abs=1e-5)
    assert chosen == plans[differ.index(min(differ))]


def test_leading_keeps_all_if_all_may_stay_and_refuses_what_is_out_of_reach():
    around = tiny_context()
    assert Leading(keep=1.0).fitting(around.anatomy, around.cost)[0] == Plan()
    with pytest.raises(TargetError, match="even the smallest of the models costs"):
        Leading(keep=0.01).check(around.anatomy, around.cost)


def test_heads_with_patterns_are_not_put_in_another_order():
    around = tiny_context()
    fixed = Plan(patterns={"encoder.0.heads": (None, Fixed("next"), None, None)})
    with pytest.raises(TargetError, match="attend by patterns"):
        Elastic().check(around.anatomy.after(fixed), None)
