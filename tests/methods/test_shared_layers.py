"""Shared layers: groups, one set of weights in every step and at the end, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import batch, tiny

from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.errors import TargetError
from slimformer.families.base import anatomy_of, subject_of
from slimformer.methods.adaptive_span import AdaptiveSpan
from slimformer.methods.base import Progress
from slimformer.methods.distillation import Distillation
from slimformer.methods.fisher import Fisher
from slimformer.methods.gates import Gates
from slimformer.methods.keep_zeros import KeepZeros
from slimformer.methods.knowledge_sparse import KnowledgeSparse
from slimformer.methods.layers import Layers
from slimformer.methods.shared_layers import SharedLayers, grouped_layers
from slimformer.running.order import conflicts
from slimformer.testing.checks import tiny_context
from slimformer.training.stage import Calibrate, Train


@pytest.mark.parametrize(
    ("distinct", "order", "groups"),
    [
        (1, "block", [[0, 1, 2, 3, 4]]),
        (2, "block", [[0, 1, 2], [3, 4]]),
        (2, "cycle", [[0, 2, 4], [1, 3]]),
        (9, "cycle", [[0], [1], [2], [3], [4]]),
    ],
)
def test_groups(distinct, order, groups):
    assert grouped_layers(range(5), distinct, order) == groups


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_a_group_computes_with_its_first_layers_weights_and_ends_with_them(model_type):
    around = tiny_context(model_type)
    method = SharedLayers(distinct=1)
    inputs = batch(around.model)
    state = method.attach(around)
    with torch.no_grad():
        trained = around.model(**inputs).logits
    decision = method.decide(state, around)
    state.close()
    small = shrink(around.model, around.anatomy, decision)
    with torch.no_grad():
        torch.testing.assert_close(small(**inputs).logits, trained)
    own = dict(small.named_parameters())
    first, last = around.anatomy.layers[0], around.anatomy.layers[2]  # of the encoder
    shared = [name for name in own if name.startswith(f"{last}.")]
    assert shared
    for name in shared:
        assert torch.equal(own[name], own[name.replace(last, first)])


def test_every_use_adds_to_the_gradient_of_the_first():
    around = tiny_context()
    state = SharedLayers(distinct=1).attach(around)
    rows = next(iter(around.batches(4)))

    def gradients(model):
        model.zero_grad()
        around.task.loss(model(**around.subject.feed(rows)), rows).backward()
        return {name: value.grad for name, value in model.named_parameters()}

    together = gradients(around.model)
    decision = SharedLayers(distinct=1).decide(state, around)
    state.close()
    apart = gradients(shrink(around.model, around.anatomy, decision))
    name = "bert.encoder.layer.{}.intermediate.dense.weight"
    torch.testing.assert_close(together[name.format(0)], sum(apart[name.format(layer)] for layer in range(3)))
    assert together[name.format(1)] is None
    assert all(parameter.requires_grad for parameter in around.model.parameters())


def test_the_same_weights_are_closed_in_all_layers_beside_it():
    around = tiny_context()
    sharing, sparse = SharedLayers(distinct=1), KnowledgeSparse(keep=0.5, updates=2)
    states = [sharing.attach(around), sparse.attach(around)]
    rows = next(iter(around.batches(4)))
    optimizer = torch.optim.SGD([item for item in around.model.parameters() if item.requires_grad], lr=0.1)
    for number in range(4):
        optimizer.zero_grad()
        around.task.loss(around.model(**around.subject.feed(rows)), rows).backward()
        optimizer.step()
        for method, state in zip((sharing, sparse), states, strict=True):
            method.advance(state, Progress(number + 1, 4))
    inputs = batch(around.model)
    with torch.no_grad():
        trained = around.model(**inputs).logits
    decision = sparse.decide(states[1], around)
    for state in reversed(states):
        state.close()
    small = shrink(around.model, around.anatomy, decision)
    own = dict(small.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(small(**inputs).logits, trained)
    for name in (name for name in own if ".layer.2." in name):
        assert torch.equal(own[name], own[name.replace(".layer.2.", ".layer.0.")]), name
    weight = own["bert.encoder.layer.1.output.dense.weight"]
    assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_layers_that_were_cut_differently_are_refused_by_name():
    model = tiny("bert")
    anatomy = anatomy_of(model)
    subject = subject_of(shrink(model, anatomy, Plan({"encoder.1.heads": (0, 1)})))
    around = replace(tiny_context(), subject=subject)
    with pytest.raises(TargetError, match="layers 0 and 1 cannot share weights"):
        SharedLayers().attach(around)
    SharedLayers(distinct=2, order="cycle").attach(around).close()
    with pytest.raises(TargetError, match="nothing to share: 3 sets of weights are asked for, and the model has 3 layers"):
        SharedLayers(distinct=3).attach(around)
    gone = replace(around, subject=subject_of(shrink(model, anatomy, Plan({"encoder.2.ffn": ()}))))
    with pytest.raises(TargetError, match="gone"):
        SharedLayers().attach(gone)
    gone = replace(around, subject=subject_of(shrink(model, anatomy, Plan({"encoder.1.ffn": (), "encoder.1.attention": ()}))))
    assert SharedLayers().groups_of(gone.anatomy) == [[0, 2]]


def test_stages_that_would_part_the_layers_are_refused():
    share = Train(methods=(SharedLayers(),))
    assert "part the layers" in next(conflicts(Train(methods=(Distillation(),)), [share]))
    assert "leave out one of the two" in next(conflicts(Calibrate(Fisher()), [share]))
    assert "cut first, share after" in next(conflicts(Calibrate(Layers()), [share]))
    assert not list(conflicts(Train(methods=(SharedLayers(), Distillation())), [share]))
    for methods, fact in (
        ((SharedLayers(), Gates()), "gates would make layers differ"),
        ((SharedLayers(), KnowledgeSparse(scope="model")), "would make layers differ"),
        ((KnowledgeSparse(), SharedLayers()), "put shared_layers first"),
        ((KeepZeros(), SharedLayers()), "put shared_layers first"),
    ):
        assert any(fact in found for found in conflicts(Train(methods=methods), [])), methods
    sparse = Train(methods=(SharedLayers(), KnowledgeSparse(keep=0.5)))
    spans = Train(methods=(SharedLayers(), AdaptiveSpan(alike=True), KeepZeros()))
    assert not list(conflicts(sparse, [share]))
    assert not list(conflicts(spans, [share, sparse]))
    assert not list(conflicts(share, [Calibrate(Layers())]))
    assert "each in its own way" in next(conflicts(share, [Calibrate(Fisher())]))
