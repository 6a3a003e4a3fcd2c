"""Weight squeezing: it begins as the cut, maps the teacher's whole matrix, and ends in plain weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import batch, tiny

from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.errors import TargetError
from slimformer.families.base import subject_of
from slimformer.methods.weight_squeezing import WeightSqueezing, mapped, selection
from slimformer.testing.checks import tiny_context

PLAN = Plan({"encoder.0.heads": (1, 3), "encoder.1.neurons": (0, 5, 9), "encoder.2.ffn": (), "hidden": tuple(range(0, 32, 2))})


def around_a_cut(plan=PLAN, model_type="bert"):
    around = tiny_context(model_type)
    small = shrink(around.model, around.anatomy, plan)
    return replace(around, subject=subject_of(small), plan=plan, teacher=around.subject)


def test_a_selection_takes_rows():
    matrix = torch.arange(12.0).reshape(4, 3)
    assert torch.equal(selection(torch.tensor([2, 0]), 4) @ matrix, matrix[[2, 0]])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("model_type", ["bert", "marian"])
def test_it_begins_as_the_cut_model(model_type, gated):
    around = around_a_cut(model_type=model_type)
    inputs = batch(around.model)
    with torch.no_grad():
        if gated:  # as if a method had repaired the matrices that it cut
            for parameter in around.model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        before = around.model(**inputs).logits
        state = WeightSqueezing(gated=gated).attach(around)
        begun = around.model(**inputs).logits
        decision = WeightSqueezing(gated=gated).decide(state, around)
        state.close()
    torch.testing.assert_close(begun, before, atol=1e-5, rtol=1e-5)
    own = dict(around.model.named_parameters())
    for name, value in decision.weights.items():
        torch.testing.assert_close(value, own[name].detach())


def test_every_matrix_that_was_cut_is_mapped_and_ends_as_it_was_trained():
    around = around_a_cut()
    assert len(mapped(around)) == 4 + 4 + 2 + 2 + 4  # of the last layer the attention alone
    state = WeightSqueezing().attach(around)
    inputs = batch(around.model)
    with torch.no_grad():
        for parameter in state.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        trained = around.model(**inputs).logits
    decision = WeightSqueezing().decide(state, around)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    each = state.each()[state.names.index(name)]
    teacher = dict(around.teacher.model.named_parameters())[name]
    torch.testing.assert_close(decision.weights[name], (each.left @ teacher @ each.right).detach())
    state.close()
    with torch.no_grad():
        torch.testing.assert_close(shrink(around.model, around.anatomy, decision)(**inputs).logits, trained)


def test_gradients_reach_the_maps_and_not_the_matrices():
    for gated in (False, True):
        around = around_a_cut()
        state = WeightSqueezing(gated=gated).attach(around)
        rows = next(iter(around.batches(4)))
        around.task.loss(around.model(**around.subject.feed(rows)), rows).backward()
        own = dict(around.model.named_parameters())
        assert all(parameter.grad is not None for each in state.each() for parameter in (each.left, each.right))
        assert {own[name].grad is not None for name in state.names} == {gated}
        assert all(parameter.grad is None for parameter in around.teacher.model.parameters())
        state.close()
        assert all(own[name].requires_grad for name in state.names)


def test_another_teacher_is_refused_and_no_cut_is_told(caplog):
    around = around_a_cut()
    with caplog.at_level("INFO"):
        WeightSqueezing().attach(replace(around, plan=Plan(), subject=around.teacher)).close()
    assert "none is mapped" in caplog.text
    with pytest.raises(TargetError, match="the plan takes"):
        WeightSqueezing().attach(replace(around, teacher=subject_of(tiny("bert", hidden_size=64))))
    lacking = Plan({"encoder.0.heads": (0, 1)})
    teacher = subject_of(shrink(around.teacher.model, around.teacher.anatomy, lacking))
    with pytest.raises(TargetError, match="lacks unit 3 of 'encoder.0.heads'"):
        WeightSqueezing().attach(replace(around, teacher=teacher, teacher_plan=lacking))
