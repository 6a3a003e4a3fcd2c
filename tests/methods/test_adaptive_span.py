"""Spans of heads: the mask of the paper, that what was trained is what is delivered, which heads go, what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import batch, tiny
from tiny_folder import write_data, write_model

from slimformer.core.anatomy import Kind
from slimformer.core.junction import Sieve
from slimformer.core.pattern import Fixed, HeadSpan
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.errors import TargetError
from slimformer.families.base import anatomy_of, subject_of
from slimformer.hooks.capture import Capture
from slimformer.log import Log
from slimformer.methods.adaptive_span import AdaptiveSpan, plan_for, span_weights
from slimformer.methods.base import Progress, Step
from slimformer.methods.distillation import Distillation
from slimformer.methods.early_exit import EarlyExit
from slimformer.methods.fisher import Fisher
from slimformer.methods.fixed_attention import FixedAttention
from slimformer.methods.keep_zeros import KeepZeros
from slimformer.methods.knowledge_sparse import KnowledgeSparse
from slimformer.methods.low_rank import LowRankFactors
from slimformer.methods.shared_layers import SharedLayers
from slimformer.running.bundle import Run
from slimformer.running.order import conflicts
from slimformer.running.preflight import preflight
from slimformer.running.prepare import prepare_bundle
from slimformer.running.recipe import Recipe
from slimformer.running.stages import advance
from slimformer.tasks.classification import Classification
from slimformer.testing.checks import _seen, tiny_context
from slimformer.training.stage import Calibrate, Train

SPANS = [[3.0, 0.0, 1.0, 6.0], [0.0, 2.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]]  # of three layers, in words


def with_spans(context, method, spans=SPANS):
    """The state of a method whose heads have learned these spans."""
    state = method.attach(context)
    with torch.no_grad():
        state.shares.copy_(torch.tensor(spans[: len(state.shares)]) / (state.longest - 1))
    return state


def test_the_mask_is_that_of_the_paper():
    for span in (0.0, 1.5, 4.0):
        for width in (1.0, 3.0):
            found = span_weights(torch.tensor([span]), width, torch.arange(9))[0]
            expected = [min(max((width + span - distance) / width, 0.0), 1.0) for distance in range(9)]
            np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_soft_spans_multiply_attention_whose_weights_then_sum_to_1(implementation):
    context = tiny_context()
    context.model.set_attn_implementation(implementation)
    state = with_spans(context, AdaptiveSpan(ramp=3, zero="keep"))
    inputs = batch(context.model)
    attention = context.model.bert.encoder.layer[0].attention.self
    hidden = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
    real = inputs["attention_mask"][:, None, None, :].bool()
    with torch.no_grad():
        got = attention(hidden, attention_mask=real if implementation == "sdpa" else torch.where(real, 0.0, -1e30))[0]
        query, key, value = (
            module(hidden).view(3, 7, 4, 8).transpose(1, 2) for module in (attention.query, attention.key, attention.value)
        )
        weights = (query @ key.transpose(2, 3) / 8**0.5).masked_fill(~real, -torch.inf).softmax(-1)
        far = (torch.arange(7)[:, None] - torch.arange(7)).abs()
        weights = weights * span_weights(torch.tensor(SPANS[0]), 3.0, far)
        weights = weights / weights.sum(-1, keepdim=True)
        words = inputs["attention_mask"].bool()
        expected = (weights @ value).transpose(1, 2).reshape(3, 7, 32)
    torch.testing.assert_close(got[words], expected[words], atol=1e-5, rtol=1e-4)
    state.close()


def test_spans_get_a_gradient_and_come_back_into_their_range():
    context = tiny_context()
    method = AdaptiveSpan(weight=0.5, ramp=4)
    state = with_spans(context, method)
    assert {id(item) for group in state.groups() for item in group["params"]} == {id(state.shares)}
    step = Step(context.model, {}, None, None, Progress(0, 10), context.task)
    loss = method.penalty(state, step)
    assert float(loss.detach()) == pytest.approx(0.5 * sum(map(sum, SPANS)) / 12 / (state.longest - 1))
    (context.model(**batch(context.model)).logits.square().sum()).backward()
    assert bool((state.shares.grad[:2].abs().sum(1) > 0).all())
    with torch.no_grad():
        state.shares += 3.0
    method.advance(state, Progress(4, 10))
    assert float(state.shares.detach().max()) == 1.0
    assert float(state.width) == pytest.approx(2.5)  # half of the way from 4 to 1, at half of the time until spans settle
    assert method.report(state)["heads_at_0"] == 0
    method.advance(state, Progress(8, 10))
    assert float(state.width) == 1.0
    assert method.penalty(state, step) is None
    state.close()


@pytest.mark.parametrize("zero", ["cut", "current", "keep"])
def test_what_was_trained_is_what_is_delivered(zero):
    context, inputs = tiny_context(), batch(tiny("bert"))
    untouched = context.model(**inputs).logits
    method = AdaptiveSpan(zero=zero)
    state = with_spans(context, method)
    method.advance(state, Progress(9, 10))
    assert state.longest == 7
    with torch.no_grad():
        trained = context.model(**inputs).logits
    decision = method.decide(state, context)
    state.close()
    assert torch.equal(context.model(**inputs).logits, untouched)
    small = shrink(context.model, context.anatomy, decision)
    with torch.no_grad():
        torch.testing.assert_close(small(**inputs).logits, trained, atol=1e-5, rtol=1e-4)
    assert "12 heads, in words: 1.2 on average, 6 at 0" in decision.notes[0]
    first, last = decision.plan.patterns["encoder.0.heads"], decision.plan.patterns.get("encoder.2.heads")
    if zero == "cut":
        assert decision.plan.keep == {"encoder.0.heads": (0, 2, 3), "encoder.1.heads": (1, 2, 3), "encoder.2.attention": ()}
        assert first == (HeadSpan(3), HeadSpan(1), None)
    else:
        here = Fixed("current") if zero == "current" else HeadSpan(0)
        assert not decision.plan.keep
        assert first == (HeadSpan(3), here, HeadSpan(1), None)
        assert last == (HeadSpan(0), *(here,) * 3)


def test_heads_of_one_number_may_have_one_span():
    context = tiny_context()
    method = AdaptiveSpan(alike=True)
    state = with_spans(context, method)
    method.advance(state, Progress(10, 10))
    decision = method.decide(state, context)
    state.close()
    assert set(decision.plan.keep) == {f"encoder.{layer}.heads" for layer in range(3)}
    assert set(decision.plan.keep.values()) == {(0, 2, 3)}
    small = subject_of(shrink(context.model, context.anatomy, decision))
    SharedLayers().check(small.anatomy, None)
    uneven = subject_of(shrink(context.model, context.anatomy, Plan({"encoder.0.heads": (0, 2)})))
    with pytest.raises(TargetError, match="one span in all layers"):
        method.check(uneven.anatomy, None)
    own = AdaptiveSpan(ramp=1).attach(replace(context, subject=uneven))
    assert [len(own.of(place)) for place in range(3)] == [2, 4, 4]
    own.close()


def test_a_penalty_shortens_spans_while_the_model_learns():
    context = tiny_context()
    method = AdaptiveSpan(weight=1.0, lr=0.05)
    state = method.attach(context)
    optimizer = torch.optim.AdamW(state.groups())
    for number in range(20):
        inputs = next(iter(context.batches(8)))
        seen = _seen(context.subject, inputs, {Capture.LOGITS})
        loss = context.task.loss(seen.output, inputs)
        penalty = method.penalty(state, Step(context.model, inputs, seen, None, Progress(number, 20), context.task))
        optimizer.zero_grad()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        method.advance(state, Progress(number + 1, 20))
    assert method.report(state)["span"] < 0.8 * (state.longest - 1)
    assert torch.equal(state.spans(), state.spans().round())
    state.close()


def test_spans_that_reach_over_the_longest_text_are_none():
    anatomy = anatomy_of(tiny("bert"))
    reaches = {"encoder.0.heads": [9, 12, 9, 10]}
    assert plan_for(anatomy, reaches, 10, "cut") == Plan()
    assert plan_for(anatomy, {"encoder.0.heads": [8, 12, 9, 10]}, 10, "cut").patterns == {
        "encoder.0.heads": (HeadSpan(8), None, None, None)
    }


def test_models_and_outcomes_that_cannot_be_are_refused():
    dense, context = anatomy_of(tiny("bert")), tiny_context()
    given = dense.after(Plan(patterns={"encoder.0.heads": (HeadSpan(2), None, None, None)}))
    factored = dense.after(Plan(forms=LowRankFactors(keep=0.4).decide(LowRankFactors().attach(context), context).plan.forms))
    for anatomy, says in (
        (anatomy_of(tiny("bart")), "writes texts"),
        (anatomy_of(tiny("cnn")), "no attention"),
        (dense.after(Plan(junctions={"encoder.0": Sieve(0.5)})), "words leave"),
        (given, "by patterns already"),
        (factored, "stored as"),
    ):
        with pytest.raises(TargetError, match=says):
            AdaptiveSpan().check(anatomy, None)
    AdaptiveSpan(zero="keep").check(factored, None)
    state = with_spans(context, AdaptiveSpan(), [[0.0] * 4] * 3)
    with pytest.raises(TargetError, match="came down to 0"):
        AdaptiveSpan().decide(state, context)
    state.close()


LEARNED, ALIKE = Train((AdaptiveSpan(),)), Train((AdaptiveSpan(alike=True),), freeze="everything")


def test_stages_that_undo_it_are_refused():
    for before, stage, fact in (
        (LEARNED, Calibrate(Fisher()), "first fisher, then adaptive_span"),
        (Calibrate(FixedAttention()), LEARNED, "first adaptive_span, then fixed_attention"),
        (Train((SharedLayers(),)), LEARNED, "cut layers differently"),
        (Calibrate(LowRankFactors()), LEARNED, "cut first, factor after"),
    ):
        assert any(fact in found for found in conflicts(stage, [before])), fact
    for before, stage in (
        (Calibrate(Fisher()), LEARNED),
        (LEARNED, Calibrate(FixedAttention())),
        (LEARNED, Train((Distillation(),))),
        (LEARNED, Train((EarlyExit(),))),
        (ALIKE, Train((SharedLayers(),))),
        (Train((SharedLayers(),)), ALIKE),
    ):
        assert not list(conflicts(stage, [before]))


@pytest.mark.slow
def test_edgeberts_parts_make_one_model(tmp_path):
    source, data = write_model(tmp_path / "model"), write_data(tmp_path / "data", train=120, dev=40)
    learns = {"lr": 1e-3, "precision": "fp32", "epochs": 1}
    stages = (
        Train((SharedLayers(), KnowledgeSparse(keep=0.5, updates=2), Distillation()), **learns),
        Train((SharedLayers(), AdaptiveSpan(alike=True, weight=3.0, lr=0.3), KeepZeros(), Distillation()), **learns),
        Train((EarlyExit(max_loss=5.0, lr=5e-3),), freeze="everything", epochs=0.5, precision="fp32"),
    )
    recipe = Recipe(str(source), Classification(data=str(data), text="sentence"), stages)
    run = Run(tmp_path / "work", tmp_path / "work", Log(None, quiet=True), threads=1)
    bundle, _ = prepare_bundle(preflight(recipe), run)
    made = advance(recipe.stages, bundle, run).bundle
    own, anatomy = dict(made.subject.model.named_parameters()), made.subject.anatomy
    first = {name: value for name, value in own.items() if ".layer.0." in name and "exit" not in name}
    for name, value in first.items():
        assert torch.equal(value, own[name.replace(".layer.0.", ".layer.1.")]), name
    weights = [value for value in first.values() if value.ndim == 2]
    assert sum(int((value == 0).sum()) for value in weights) / sum(map(torch.numel, weights)) == pytest.approx(0.5, abs=0.02)
    assert len(set(anatomy.patterns.values())) == 1
    assert len({site.size for site in anatomy.of_kind(Kind.HEADS)}) == 1
    assert anatomy.exits
