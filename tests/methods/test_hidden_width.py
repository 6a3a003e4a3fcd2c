"""Narrower hidden states: which units stay, how they fade, and that the model cut is the model that was trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import batch, tiny

from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.errors import PlanError, TargetError
from slimformer.families.base import anatomy_of, subject_of
from slimformer.hooks.gating import gated
from slimformer.methods.base import Progress
from slimformer.methods.distillation import same_units
from slimformer.methods.hidden_width import HiddenWidth, hidden_information, kept_units
from slimformer.testing.checks import tiny_context


@pytest.mark.parametrize(
    ("size", "share", "multiple", "kept"),
    [
        (384, 0.67, 16, 256),
        (384, 0.67, 64, 256),
        (384, 0.01, 16, 16),
        (384, 1.0, 16, 384),
        (32, 0.67, 1, 21),
        (20, 0.99, 16, 16),
    ],
)
def test_widths_are_multiples(size, share, multiple, kept):
    assert kept_units(size, share, multiple) == kept


def test_gates_fall_over_the_ramp_and_the_model_cut_is_the_model_trained():
    around = tiny_context()
    method = HiddenWidth(keep_hidden=0.5, multiple=1, examples=8)
    state = method.attach(around)
    inputs = batch(around.model)
    seen = {}
    for step in (0, 25, 50, 75):
        method.advance(state, Progress(step, 100))
        gate = state.gate.tolist()
        seen[step] = sorted(set(gate))
        assert gate.count(1.0) >= 16
    assert seen == {0: [1.0], 25: [0.5, 1.0], 50: [0.0, 1.0], 75: [0.0, 1.0]}
    assert method.report(state) == {"hidden_units": 16.0}
    with torch.no_grad():
        trained = around.model(**inputs).logits
    plan = method.decide(state, around).plan
    state.close()
    assert {site: len(units) for site, units in plan.keep.items()} == {"hidden": 16}
    with torch.no_grad():
        torch.testing.assert_close(shrink(around.model, around.anatomy, plan)(**inputs).logits, trained, atol=2e-5, rtol=1e-4)


def test_the_units_that_the_loss_needs_least_go():
    around = tiny_context()
    site = around.anatomy.sites["hidden"]
    score = hidden_information(around, site, 8)
    state = HiddenWidth(keep_hidden=0.25, multiple=1, examples=8).attach(around)
    stays = state.stays.nonzero().flatten().tolist()
    state.close()
    assert sorted(stays) == sorted(np.argsort(-score)[:8].tolist())
    for plan, gone in ((Plan({"hidden": (0,)}), 1), (Plan({"hidden": tuple(range(32))}), 0)):
        assert (shrink(around.model, around.anatomy, plan).num_parameters() < around.model.num_parameters()) == gone


def test_the_information_is_the_mean_squared_gradient_of_each_example():
    around = tiny_context()
    site, rows = around.anatomy.sites["hidden"], next(iter(around.batches(4)))
    by_hand = np.zeros(site.size)
    for row in range(len(rows["input_ids"])):
        one = {name: value[row : row + 1] for name, value in rows.items()}
        step, base = 1e-3, []
        for sign in (1, -1):  # a slope by differences of the first unit's gate alone
            gate = torch.ones(site.size)
            gate[0] += sign * step
            with torch.no_grad(), gated(around.model, around.anatomy, {site.id: gate}), around.subject.evaluating():
                base.append(float(around.task.loss(around.model(**around.subject.feed(one)), one)))
        by_hand[0] += ((base[0] - base[1]) / (2 * step)) ** 2
    assert hidden_information(around, site, 4)[0] == pytest.approx(by_hand[0] / len(rows["input_ids"]), rel=0.05)


def test_a_student_that_lost_units_learns_the_teachers_units_of_the_same_origin():
    around = tiny_context()
    small = shrink(around.model, around.anatomy, Plan({"hidden": (1, 4, 6, 30)}))
    narrow = replace(around, subject=subject_of(small), plan=Plan({"hidden": (1, 4, 6, 30)}), teacher=around.subject)
    assert same_units(narrow) == (1, 4, 6, 30)
    half = shrink(around.model, around.anatomy, Plan({"hidden": (1, 2, 4, 6, 30)}))
    cut_too = replace(narrow, teacher=subject_of(half), teacher_plan=Plan({"hidden": (1, 2, 4, 6, 30)}))
    assert same_units(cut_too) == (0, 2, 3, 4)
    lacks = replace(narrow, teacher=subject_of(half), teacher_plan=Plan({"hidden": (0, 1, 2, 4, 6)}))
    assert same_units(lacks) is None
    assert same_units(replace(narrow, plan=Plan(), subject=around.subject)) is None
    assert same_units(replace(narrow, teacher=subject_of(tiny("bert", hidden_size=64)))) is None


def test_what_cannot_be_is_refused_with_the_reason():
    model = tiny("bert")
    anatomy = anatomy_of(model)
    with pytest.raises(PlanError, match="no model would be left"):
        Plan({"hidden": ()}).check(anatomy)
    with pytest.raises(TargetError, match="not all that reads them is known"):
        HiddenWidth().check(replace(anatomy, sites={}), None)
