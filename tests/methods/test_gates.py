"""Gates: the hard concrete's formulae by hand, the expected cost against its definition, the Lagrangian reaching its target."""

from __future__ import annotations

import math

import pytest
import torch

from slimformer.checks import tiny_context
from slimformer.methods import gates
from slimformer.methods.base import Captured, Progress, Step
from slimformer.methods.gates import Gates


def test_hard_concrete_by_hand():
    zero = torch.zeros(1)
    assert gates.settled(zero).item() == pytest.approx(0.5)  # sigmoid(0) * 1.2 - 0.1
    assert gates.sampled(zero, torch.tensor([0.5])).item() == pytest.approx(0.5)
    assert gates.opening(zero).item() == pytest.approx(1 / (1 + math.exp(2 / 3 * math.log(0.1 / 1.1))))
    assert gates.settled(torch.tensor([9.0, -9.0])).tolist() == [1.0, 0.0]


def test_opening_is_the_share_of_samples_above_zero():
    log_alpha = torch.full((200_000,), -0.7)
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    share = (gates.sampled(log_alpha, uniform) > 0).float().mean().item()
    assert share == pytest.approx(gates.opening(log_alpha[:1]).item(), abs=0.005)


def test_expected_cost_with_open_gates_is_nearly_dense():
    context = tiny_context()
    state = Gates(start=12.0).attach(context)
    assert state.expected().item() == pytest.approx(1.0, abs=1e-3)
    state.close()


def test_multipliers_climb_and_the_cost_reaches_its_target():
    context = tiny_context()
    method = Gates(target=0.5, lr=0.1, multiplier_lr=0.2, ramp=0.3)
    state = method.attach(context)
    optimizer = torch.optim.AdamW(state.groups())
    nothing = Captured(output={})
    for number in range(400):
        progress = Progress(number, 400)
        step = Step(context.model, {}, nothing, None, progress, context.task)
        optimizer.zero_grad()
        method.penalty(state, step).backward()
        optimizer.step()
        method.advance(state, Progress(number + 1, 400))
    assert method.report(state)["target"] == pytest.approx(0.5)
    assert method.report(state)["cost"] == pytest.approx(0.5, abs=0.02)  # within 2 % of the dense cost
    decision = method.decide(state, context)
    state.close()
    assert context.cost.of(decision.plan, context.anatomy) <= 0.5 * context.cost.dense


def test_noise_in_training_none_in_evaluation():
    context = tiny_context()
    state = Gates(start=0.5).attach(context)
    inputs = next(context.batches(4))
    given = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(context.model(**given).logits, context.model(**given).logits)
        context.model.train()
        for module in context.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        assert not torch.equal(context.model(**given).logits, context.model(**given).logits)
    state.close()


@pytest.mark.parametrize("options", [{"target": 0}, {"target": 2}, {"ramp": -0.1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Gates(**options)
