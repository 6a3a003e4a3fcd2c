"""Module replacing: groups, the coin, what trains, and that the model cut is the successors alone."""

from __future__ import annotations

import pytest
import torch
from tiny import batch, tiny
from toy_task import without_dropout

from slimformer.core import cost
from slimformer.core.shrink import shrink
from slimformer.errors import TargetError
from slimformer.families.base import anatomy_of
from slimformer.hooks.capture import Captured
from slimformer.methods.base import Progress, Step
from slimformer.methods.theseus import Theseus, dropping, grouped
from slimformer.testing.checks import tiny_context


@pytest.mark.parametrize(
    ("keep", "groups"),
    [
        (1.0, [[0], [1], [2], [3], [4], [5]]),
        (0.5, [[0, 1], [2, 3], [4, 5]]),
        (0.4, [[0, 1, 2], [3, 4, 5]]),
        (0.67, [[0, 1], [2, 3], [4], [5]]),
    ],
)
def test_groups_are_neighbours_of_one_size(keep, groups):
    model = tiny("bert", num_hidden_layers=6)
    anatomy = anatomy_of(model)
    assert grouped(anatomy, cost.parameters(model, anatomy), 1.0) == [[layer] for layer in range(6)]
    assert grouped(anatomy, tiny_macs(anatomy), keep) == groups


def tiny_macs(anatomy):
    return cost.macs(anatomy, torch.tensor([7]).numpy())


def test_each_stack_keeps_its_share():
    anatomy = anatomy_of(tiny("bart"))
    assert grouped(anatomy, tiny_macs(anatomy), 0.67) == [[0, 1], [2], [3, 4], [5]]


def test_less_than_one_layer_is_refused_with_the_least():
    around = tiny_context()
    with pytest.raises(TargetError, match="one layer costs 33%"):
        Theseus(keep=0.1).check(around.anatomy, around.cost)


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_the_coin_decides_who_computes(model_type):
    around = tiny_context(model_type)
    model, inputs = without_dropout(around.model), batch(around.model)
    method = Theseus(keep=0.4, start=0.0, ramp=1.0)
    with torch.no_grad():
        whole = model.eval()(**inputs).logits
        state = method.attach(around)
        for successor in state.successors:
            successor.mul_(1.5)
        alone = model(**inputs).logits
        model.train()
        before = model(**inputs).logits
        method.advance(state, Progress(10, 10))
        after = model(**inputs).logits
        decision = method.decide(state, around)
        state.close()
        small = shrink(model.eval(), around.anatomy, decision)
        torch.testing.assert_close(model(**inputs).logits, whole)
        torch.testing.assert_close(small(**inputs).logits, alone)
    torch.testing.assert_close(before, whole)
    torch.testing.assert_close(after, alone)
    assert not torch.allclose(whole, alone, atol=1e-3)


def test_the_coin_falls_as_often_as_the_rate_says():
    around = tiny_context()
    state = Theseus(keep=0.67, start=0.3, ramp=0.0).attach(around)
    around.model.train()
    draws = []
    torch.manual_seed(0)
    for _ in range(1000):
        state._draw(True)
        draws.append(list(state.replaced))
    state.close()
    assert torch.tensor(draws).float().mean(0).tolist() == pytest.approx([0.3, 0.3], abs=0.05)


def test_only_the_successors_train_and_all_flags_come_back():
    around = tiny_context()
    frozen = next(around.model.parameters()).requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in around.model.named_parameters()}
    state = Theseus(keep=0.67, start=1.0).attach(around)
    rows = next(iter(around.batches(4)))
    around.task.loss(around.model(**around.subject.feed(rows)), rows).backward()
    assert all(parameter.grad is None for parameter in around.model.parameters())
    assert all(parameter.grad is not None for parameter in state.successors)
    assert sum(parameter.numel() for parameter in state.parameters()) == sum(
        parameter.numel() for parameter in around.model.bert.encoder.layer[:2].parameters()
    )
    state.close()
    frozen_after = {name: parameter.requires_grad for name, parameter in around.model.named_parameters()}
    assert frozen_after == flags
    assert not frozen.requires_grad


def test_the_rate_rises_in_a_line():
    around = tiny_context()
    method = Theseus(start=0.3, ramp=0.5)
    state = method.attach(around)
    seen = []
    for step in (0, 25, 50, 100):
        method.advance(state, Progress(step, 100))
        seen.append(method.report(state)["replaced"])
    state.close()
    assert seen == pytest.approx([0.3, 0.65, 1.0, 1.0])
    assert dropping(around.anatomy, [[0, 1], [2]]).keep == {"encoder.1.attention": (), "encoder.1.ffn": ()}


def test_a_step_in_which_no_coin_falls_changes_nothing_and_is_no_error():
    around = tiny_context()
    model = around.model
    method = Theseus(keep=0.67, start=0.0, ramp=0.0)
    state = method.attach(around)
    model.train()
    some = next(iter(around.batches(4)))
    state._draw(True)
    loss = around.task.loss(model(**around.subject.feed(some)), some)
    step = Step(model, some, Captured({}), None, Progress(0, 1), around.task)
    (loss + method.penalty(state, step)).backward()
    assert all(float(successor.grad.abs().sum()) == 0 for successor in state.successors)
    state.replaced = [True, False]
    assert method.penalty(state, step) is None
    state.close()
