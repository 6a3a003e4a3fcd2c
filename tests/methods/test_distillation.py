"""Distillation: its terms by hand, padding left out, each head learning from the one it descends from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tiny
from toy_task import with_model

from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.families.base import anatomy_of, subject_of
from slimformer.hooks.capture import Capture, Captured
from slimformer.methods.base import Progress, Step
from slimformer.methods.distillation import Distillation
from slimformer.testing.checks import tiny_context


def step(context, student, teacher, mask):
    return Step(context.model, {"attention_mask": mask}, student, teacher, Progress(0, 1), context.task)


def test_hidden_term_by_hand_and_blind_to_padding():
    context = tiny_context()
    method = Distillation(logits=0, hidden=2.0)
    state = method.attach(context)
    mask = torch.tensor([[1, 1, 0]])
    goal = torch.full((1, 3, 32), 2.0)
    own = goal.clone()
    own[0, 1] = 3.0  # one of two real tokens is off by 1 everywhere: mean square 0.5, over the teacher's 4
    own[0, 2] = 99.0  # padding
    zero = torch.zeros_like(goal)
    student = Captured({}, hidden=(zero, own, own, own))
    teacher = Captured({}, hidden=(zero, goal, goal, goal))
    assert method.penalty(state, step(context, student, teacher, mask)).item() == pytest.approx(2.0 * 0.5 / 4.0)


def test_the_embedding_has_a_term_of_its_own_and_errors_may_be_plain():
    context = tiny_context()
    mask = torch.ones(1, 2, dtype=torch.long)
    goal = torch.full((1, 2, 32), 2.0)
    student = Captured({}, hidden=(goal + 3, goal + 1, goal, goal))  # squared gaps 9 | 1, 0, 0, over the teacher's 4
    teacher = Captured({}, hidden=(goal, goal, goal, goal))

    def of(**options):
        method = Distillation(logits=0, **options)
        return method.penalty(method.attach(context), step(context, student, teacher, mask)).item()

    assert of(hidden=0, embedding=2) == pytest.approx(2 * 9 / 4)
    assert of(hidden=3, embedding=1) == pytest.approx(1 / 4 + 9 / 4)
    assert of(hidden=3, embedding=1, relative=False) == pytest.approx(1 + 9)  # sums of mean squared errors, as published
    assert Distillation(hidden=0, embedding=1).effects().needs == {Capture.LOGITS, Capture.HIDDEN}


def test_scores_ignore_a_shift_of_a_row_and_padding():
    context = tiny_context()
    method = Distillation(logits=0, hidden=0, scores=1.0)
    state = method.attach(context)
    mask = torch.tensor([[1, 1, 0]])
    scores = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    shifted = scores + torch.arange(3.0)[None, None, :, None]
    shifted[..., 2] = 50.0
    student, teacher = Captured({}, scores=(shifted,) * 3), Captured({}, scores=(scores,) * 3)
    assert method.penalty(state, step(context, student, teacher, mask)).item() == pytest.approx(0.0, abs=1e-10)
    changed = scores.clone()
    changed[0, 0, 0, 0] += 2.0  # centred over two real keys: +1 and -1, squared 2, over 4 real pairs and 4 heads
    student = Captured({}, scores=(changed, scores, scores))
    found = method.penalty(state, step(context, student, teacher, mask)).item()
    assert found == pytest.approx(2.0 / (4 * 4) / 3, rel=1e-5)


def test_a_student_head_learns_from_the_head_it_descends_from():
    context = tiny_context()
    plan = Plan({"encoder.0.heads": (1, 3), "encoder.1.attention": ()})
    small = shrink(context.model, context.anatomy, plan)
    state = Distillation(scores=1.0).attach(replace(with_model(context, small, anatomy_of(small)), plan=plan))
    assert state.heads == {0: (0, [1, 3]), 2: (2, [0, 1, 2, 3])}


def test_a_narrower_student_gets_a_projection_and_a_shallower_one_even_partners():
    teacher = tiny("bert", num_hidden_layers=4)
    student = tiny("bert", num_hidden_layers=2, hidden_size=16, num_attention_heads=2)
    context = replace(
        tiny_context(),
        subject=subject_of(student),
        teacher=subject_of(teacher),
    )
    state = Distillation().attach(context)
    assert state.hidden == [(0, 0), (1, 2), (2, 4)]
    assert state.project.weight.shape == (32, 16)
    assert state.groups()[0]["params"] == [state.project.weight]


def test_a_layer_learns_what_the_layers_that_are_gone_after_it_gave():
    context = tiny_context()
    gone = Plan({f"encoder.{layer}.{part}": () for layer in (1, 2) for part in ("attention", "ffn")})
    teacher = tiny("bert", num_hidden_layers=4)
    student = shrink(teacher, anatomy_of(teacher), gone)
    context = replace(context, subject=subject_of(student), teacher=subject_of(teacher), plan=gone)
    assert Distillation().attach(context).hidden == [(0, 0), (3, 3), (4, 4)]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"hidden": -1}, {"logits": 0, "hidden": 0}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="must"):
        Distillation(**options)
