"""Distillation: its terms by hand, padding left out, each head learning from the one it descends from."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from tiny import batch, tiny
from tiny_folder import write_data
from toy_task import with_model

from slimformer.core.anatomy import Kind
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.errors import TargetError
from slimformer.families.base import anatomy_of, subject_of
from slimformer.hooks.capture import Capture, Captured, capturing, related_width
from slimformer.methods.base import Progress, Step
from slimformer.methods.distillation import (
    Distillation,
    Heads,
    Pair,
    cheap_first,
    patient_distance,
    relation_distance,
    score_distance,
    transport,
)
from slimformer.tasks.classification import Classification
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
    sites = [f"encoder.{layer}.heads" for layer in range(3)]
    student, teacher = Captured({}, scores=dict.fromkeys(sites, shifted)), Captured({}, scores=dict.fromkeys(sites, scores))
    assert method.penalty(state, step(context, student, teacher, mask)).item() == pytest.approx(0.0, abs=1e-10)
    changed = scores.clone()
    changed[0, 0, 0, 0] += 2.0  # centred over two real keys: +1 and -1, squared 2, over 4 real pairs and 4 heads
    student = Captured({}, scores=dict(zip(sites, (changed, scores, scores), strict=True)))
    found = method.penalty(state, step(context, student, teacher, mask)).item()
    assert found == pytest.approx(2.0 / (4 * 4) / 3, rel=1e-5)


def test_a_student_head_learns_from_the_head_it_descends_from():
    context = tiny_context()
    plan = Plan({"encoder.0.heads": (1, 3), "encoder.1.attention": ()})
    small = shrink(context.model, context.anatomy, plan)
    state = Distillation(scores=1.0).attach(replace(with_model(context, small, anatomy_of(small)), plan=plan))
    assert state.heads == {
        "encoder.0.heads": Heads("encoder.0.heads", (0, 1), (1, 3)),
        "encoder.2.heads": Heads("encoder.2.heads", (0, 1, 2, 3), (0, 1, 2, 3)),
    }


SUBSETS = [heads for size in range(1, 5) for heads in combinations(range(4), size)]


@pytest.mark.slow
def test_a_student_of_a_cut_teacher_learns_from_the_same_original_heads():
    """Every teacher with heads of four, and every student cut further from it: scores of the same heads are the same numbers."""
    dense, inputs = tiny_context(), batch(tiny("bert"))
    mask, method = inputs["attention_mask"], Distillation(logits=0, hidden=0, scores=1.0)

    def seen(model):
        with torch.no_grad(), capturing(model, anatomy_of(model), {Capture.SCORES}) as recorder:
            return recorder.take({"logits": model(**inputs).logits})

    for kept in SUBSETS:
        first = Plan({"encoder.0.heads": kept, "encoder.1.attention": ()})
        teacher = shrink(dense.model, dense.anatomy, first)
        lesson = seen(teacher)
        for again in (heads for heads in SUBSETS if max(heads) < len(kept)):
            plan = first.then(Plan({"encoder.0.heads": again}))
            student = shrink(teacher, anatomy_of(teacher), Plan({"encoder.0.heads": again}))
            subjects = {"subject": subject_of(student), "teacher": subject_of(teacher)}
            state = method.attach(replace(dense, plan=plan, teacher_plan=first, **subjects))
            assert state.heads == {
                "encoder.0.heads": Heads("encoder.0.heads", tuple(range(len(again))), again),
                "encoder.2.heads": Heads("encoder.2.heads", (0, 1, 2, 3), (0, 1, 2, 3)),
            }
            only = state.heads["encoder.0.heads"]
            assert float(score_distance(seen(student), lesson, mask, {"encoder.0.heads": only})) < 1e-10


def test_a_head_whose_origin_the_teacher_lacks_learns_nothing_and_it_is_said(caplog):
    """A named teacher may be cut otherwise than the student; the other heads of the layer still learn."""
    dense = tiny_context()
    cut = Plan({"encoder.0.heads": (1, 3), "encoder.2.attention": ()})
    teacher = subject_of(shrink(dense.model, dense.anatomy, cut))
    own = Plan({"encoder.0.heads": (0, 2, 3)})
    student = subject_of(shrink(dense.model, dense.anatomy, own))
    context = replace(dense, subject=student, plan=own, teacher=teacher, teacher_plan=cut)
    with caplog.at_level("INFO", logger="slimformer"):
        state = Distillation(scores=1.0).attach(context)
        Distillation().attach(context)  # asks for no scores, and says nothing of them
        Distillation(scores=1.0).attach(dense)  # each of its heads has a counterpart
    assert state.heads == {
        "encoder.0.heads": Heads("encoder.0.heads", (2,), (1,)),
        "encoder.1.heads": Heads("encoder.1.heads", (0, 1, 2, 3), (0, 1, 2, 3)),
    }
    assert [record.message for record in caplog.records] == [
        "distillation: 6 heads have no counterpart in the teacher; they learn no attention scores."
    ]
    random = torch.Generator().manual_seed(0)
    scores = [torch.randn(1, heads, 2, 2, generator=random) for heads in (3, 4, 2, 4)]
    gap = scores[0][:, [2]] - scores[2][:, [1]], scores[1] - scores[3]
    expected = sum(float((one - one.mean(-1, keepdim=True)).square().mean()) for one in gap) / 2
    found = score_distance(
        *(Captured({}, scores=dict(zip(state.heads, part, strict=True))) for part in (scores[:2], scores[2:])),
        torch.ones(1, 2),
        state.heads,
    )
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_a_layer_that_the_teacher_lacks_too_is_no_lesson_of_its_own():
    """What is cut of both: the hidden states that are compared are those of the same layers."""
    dense = tiny_context()
    gone = Plan({f"encoder.1.{part}": () for part in ("attention", "ffn")})
    teacher = shrink(dense.model, dense.anatomy, gone)
    plan = gone.then(Plan({"encoder.0.heads": (0, 2)}))
    student = shrink(dense.model, dense.anatomy, plan)
    subjects = {"subject": subject_of(student), "teacher": subject_of(teacher)}
    state = Distillation(scores=1.0).attach(replace(dense, plan=plan, teacher_plan=gone, **subjects))
    assert (state.embedding, state.hidden) == ([Pair(0, 0)], [Pair(2, 2), Pair(3, 3)])
    assert state.heads == {
        "encoder.0.heads": Heads("encoder.0.heads", (0, 1), (0, 2)),
        "encoder.2.heads": Heads("encoder.2.heads", (0, 1, 2, 3), (0, 1, 2, 3)),
    }


def test_a_narrower_student_gets_a_projection_and_a_shallower_one_even_partners():
    teacher = tiny("bert", num_hidden_layers=4)
    student = tiny("bert", num_hidden_layers=2, hidden_size=16, num_attention_heads=2)
    context = replace(
        tiny_context(),
        subject=subject_of(student),
        teacher=subject_of(teacher),
    )
    state = Distillation().attach(context)
    assert (state.embedding, state.hidden) == ([Pair(0, 0)], [Pair(1, 2), Pair(2, 4)])
    assert state.project.weight.shape == (32, 16)
    assert state.groups()[0]["params"] == [state.project.weight]


def test_a_layer_learns_what_the_layers_that_are_gone_after_it_gave():
    context = tiny_context()
    gone = Plan({f"encoder.{layer}.{part}": () for layer in (1, 2) for part in ("attention", "ffn")})
    teacher = tiny("bert", num_hidden_layers=4)
    student = shrink(teacher, anatomy_of(teacher), gone)
    context = replace(context, subject=subject_of(student), teacher=subject_of(teacher), plan=gone)
    assert Distillation().attach(context).hidden == [Pair(3, 3), Pair(4, 4)]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"hidden": -1}, {"logits": 0, "hidden": 0}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="must"):
        Distillation(**options)


def test_the_logit_term_by_hand(tmp_path):
    """KL(teacher || student) of softened outputs, times the square of the temperature, the mean over rows, times the weight."""
    context = tiny_context()
    given = {"student": [[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]], "teacher": [[0.5, 1.5, -2.0], [3.0, 0.0, 0.0]]}
    student, teacher = (Captured({"logits": torch.tensor(rows)}) for rows in given.values())
    mask = torch.ones(2, 2, dtype=torch.long)
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    task = Classification(data=str(write_data(tmp_path, train=4, dev=2))).bind(labels)

    def found(ours, theirs, **options):
        method = Distillation(hidden=0, **options)
        at = replace(step(context, ours, theirs, mask), task=task)
        return method.penalty(method.attach(context), at).item()

    def expected(ours, theirs, temperature):
        total = 0.0
        for mine, goal in zip(ours, theirs, strict=True):
            q, p = (np.exp(np.array(row) / temperature) for row in (mine, goal))
            q, p = q / q.sum(), p / p.sum()
            total += float((p * np.log(p / q)).sum())
        return temperature**2 * total / len(ours)

    ours, theirs = given.values()
    for temperature, weight in ((1.0, 1.0), (4.0, 1.0), (2.0, 3.0)):
        right = weight * expected(ours, theirs, temperature)
        assert found(student, teacher, temperature=temperature, logits=weight) == pytest.approx(right, rel=1e-5)
        assert right != pytest.approx(weight * expected(theirs, ours, temperature), rel=0.01)  # the direction matters
    assert found(student, teacher) == pytest.approx(expected(ours, theirs, Distillation().temperature), rel=1e-5)
    assert found(teacher, teacher) == pytest.approx(0.0, abs=1e-6)


def test_relations_by_hand_with_heads_cut_and_padding_left_out():
    context = tiny_context()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    generator = torch.Generator().manual_seed(0)
    own = tuple(torch.randn(2, 4, 8, generator=generator) for _ in range(3))  # two heads of four dimensions left
    goal = tuple(torch.randn(2, 4, 32, generator=generator) for _ in range(3))
    by_hand, count = 0.0, 0
    for mine, theirs in zip(own, goal, strict=True):
        for row, length in ((0, 3), (1, 2)):
            for head in range(4):
                p, q = (
                    torch.softmax(part @ part.T / part.shape[1] ** 0.5, dim=1)
                    for part in (
                        theirs[row, :length, head * 8 : head * 8 + 8],
                        mine[row, :length, head * 2 : head * 2 + 2],
                    )
                )
                by_hand += float((p * (p / q).log()).sum())
                count += length
    loss = relation_distance(Captured({}, relations=own), Captured({}, relations=goal), mask, 4)
    assert loss.item() == pytest.approx(by_hand / count, rel=1e-5)
    assert relation_distance(Captured({}, relations=goal), Captured({}, relations=goal), mask, 4).item() == pytest.approx(
        0, abs=1e-6
    )
    assert Distillation(logits=0, hidden=0, relations=1).effects().needs == {Capture.RELATIONS}
    with pytest.raises(TargetError, match="does not divide the student's last attention, which is 32 wide"):
        Distillation(relations=1, relation_heads=5).attach(context)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "bart", "t5"])
def test_relations_are_those_of_the_encoders_last_attention(model_type):
    model = tiny(model_type)
    anatomy, inputs = anatomy_of(model), batch(model)
    last = next(site for site in reversed(anatomy.of_kind(Kind.HEADS)) if site.id.startswith("encoder"))
    plan = Plan({last.sublayer: (), "encoder.1.heads": (0, 3)})
    for each, width in ((model, 32), (shrink(model, anatomy, plan), 16)):
        now = anatomy_of(each)
        with torch.no_grad(), capturing(each, now, {Capture.RELATIONS}) as recorder:
            each(**inputs)
            seen = recorder.take({}).relations
        assert [tuple(item.shape) for item in seen] == [(*inputs["input_ids"].shape, width)] * 3
        assert related_width(now) == width


def test_the_patient_term_by_hand():
    zero, unit = torch.zeros(1, 2, 32), torch.eye(32)[None, :2]  # first tokens (1, 0, ...), second ones (0, 1, ...)
    turned = unit.flip(1) * 5  # the first token points elsewhere; lengths do not count
    pairs = [Pair(1, 1), Pair(2, 2), Pair(3, 3)]
    student = Captured({}, hidden=(zero, turned, unit * 3, turned))
    teacher = Captured({}, hidden=(zero, unit, unit, unit))
    assert patient_distance(student, teacher, pairs, None, None).item() == pytest.approx(
        (2 + 0) / 2
    )  # the last layer is left out


@pytest.mark.parametrize("seed", range(3))
def test_the_flow_is_the_cheapest_of_all(seed):
    random = np.random.default_rng(seed)
    costs = random.random((3, 3))
    flow = transport(costs, np.full(3, 1 / 3), np.full(3, 1 / 3))
    np.testing.assert_allclose(flow.sum(0), 1 / 3)
    np.testing.assert_allclose(flow.sum(1), 1 / 3)
    best = min(sum(costs[i, j] for i, j in enumerate(order)) / 3 for order in permutations(range(3)))
    assert (flow * costs).sum() == pytest.approx(best)  # with equal weights a permutation is best (Birkhoff)


def test_each_layer_learns_from_many_and_cheap_layers_count_more():
    context = tiny_context()
    method = Distillation(logits=0, hidden=1.0, layers="many", relative=False)
    state = method.attach(context)
    mask = torch.ones(1, 2, dtype=torch.long)
    layers = [torch.full((1, 2, 32), value) for value in (0.0, 1.0, 2.0, 4.0)]
    student = Captured({}, hidden=(layers[0], layers[3], layers[1], layers[2]))  # the teacher's, in another order
    teacher = Captured({}, hidden=tuple(layers))
    assert method.penalty(state, step(context, student, teacher, mask)).item() == pytest.approx(0, abs=1e-6)
    student = Captured({}, hidden=(layers[0], layers[1], layers[2], layers[3] + 3))
    assert method.penalty(state, step(context, student, teacher, mask)).item() == pytest.approx(9 / 3)
    method.advance(state, Progress(1, 2))
    assert state.own_0.sum().item() == pytest.approx(1)
    assert state.own_0[0] > state.own_0[2]
    assert torch.isfinite(cheap_first(torch.zeros(3))).all()
    assert cheap_first(torch.tensor([1.0, 1.0])).tolist() == [0.5, 0.5]
