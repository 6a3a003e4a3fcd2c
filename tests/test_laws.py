"""The laws on random plans, drawn by hypothesis, for every model type; `test_contracts.py` runs fixed ones for plug-ins too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import MODEL_TYPES, batch, tiny

from slimformer.core import cost
from slimformer.core.anatomy import Kind, Role
from slimformer.core.plan import Decision, Plan
from slimformer.core.shrink import shrink
from slimformer.errors import PlanError
from slimformer.families.base import anatomy_of
from slimformer.forms.kronecker import Kronecker
from slimformer.hooks.gating import gated
from slimformer.saving import checkpoint
from slimformer.testing.checks import FEW_HIDDEN, assert_equal, assert_same

MODELS = {name: tiny(name) for name in MODEL_TYPES}
ANATOMIES = {name: anatomy_of(model) for name, model in MODELS.items()}


@st.composite
def plans(draw, anatomy, forms=False):
    keep = {}
    for site in anatomy.sites.values():
        if anatomy.factored(site):
            continue
        if site.kind is Kind.SUBLAYER:
            if draw(st.integers(0, 3)) == 0:
                keep[site.id] = ()
        elif draw(st.booleans()):
            least = FEW_HIDDEN if site.kind is Kind.HIDDEN else 1
            keep[site.id] = tuple(sorted(draw(st.sets(st.integers(0, site.size - 1), min_size=min(least, site.size)))))
    if not forms:
        return Plan(keep)
    cut = [anatomy.cut(matrix, Plan(keep)) for matrix in anatomy.matrices.values() if matrix.dense and matrix.tied is None]
    return Plan(keep, {matrix.id: draw(factors(matrix)) for matrix in cut if draw(st.integers(0, 2)) == 0})


@st.composite
def factors(draw, matrix):
    rows, columns = (draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0])) for size in matrix.shape)
    if matrix.role is Role.EMBEDDING:
        rows = matrix.shape[0]
    most = min(rows * columns, matrix.shape[0] * matrix.shape[1] // (rows * columns))
    return Kronecker((rows, columns), draw(st.integers(1, min(3, most))))


def mask(size, kept):
    gate = torch.zeros(size)
    gate[list(kept)] = 1.0
    return gate


@pytest.mark.parametrize("name", MODEL_TYPES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_gate_is_cut(name, data):
    model, anatomy = MODELS[name], ANATOMIES[name]
    plan = data.draw(plans(anatomy))
    gates = {site: mask(anatomy.sites[site].size, kept) for site, kept in plan.keep.items()}
    assert_same(model, anatomy, gates, shrink(model, anatomy, plan))


@pytest.mark.parametrize("name", MODEL_TYPES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
@pytest.mark.slow
def test_plans_compose_and_anatomy_follows(name, data):
    model, anatomy = MODELS[name], ANATOMIES[name]
    first = data.draw(plans(anatomy, forms=True))
    small = shrink(model, anatomy, first)
    assert anatomy_of(small) == anatomy.after(first)
    second = data.draw(plans(anatomy.after(first), forms=True))
    assert_equal(shrink(small, anatomy.after(first), second), shrink(model, anatomy, first.then(second)))
    third = data.draw(plans(anatomy.after(first).after(second), forms=True))
    assert first.then(second).then(third) == first.then(second.then(third))


@pytest.mark.parametrize("name", MODEL_TYPES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
@pytest.mark.slow
def test_predicted_is_counted_and_saved_is_loaded(name, data, tmp_path_factory):
    model, anatomy = MODELS[name], ANATOMIES[name]
    plan = data.draw(plans(anatomy, forms=True))
    small = shrink(model, anatomy, plan)
    assert cost.parameters(model, anatomy).of(plan, anatomy) == small.num_parameters()
    folder = tmp_path_factory.mktemp("saved")
    checkpoint.save(small, plan, folder / "model", tokenizer_from=folder)
    assert_equal(small, checkpoint.load(folder / "model"))


def test_the_input_is_left_untouched():
    model, anatomy = MODELS["bert"], ANATOMIES["bert"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scales = {"encoder.1.neurons": torch.full((24,), 2.0)}
    weights = {"classifier.bias": torch.zeros(3)}
    shrink(model, anatomy, Decision(Plan({"encoder.0.heads": (1,)}), scales=scales, weights=weights))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert anatomy_of(model) == anatomy


def test_a_layer_with_nothing_left_is_an_identity():
    model, anatomy = MODELS["distilbert"], ANATOMIES["distilbert"]
    small = shrink(model, anatomy, Plan({"encoder.1.attention": (), "encoder.1.ffn": ()}))
    hidden = torch.randn(2, 5, 32)
    layer = small.base_model.transformer.layer[1]
    assert torch.equal(layer(hidden), hidden)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 0


def test_gates_per_example_equal_separate_runs():
    model, anatomy = MODELS["bert"], ANATOMIES["bert"]
    inputs = batch(model, rows=2)
    gates = torch.tensor([[1.0, 0.0, 1.0, 0.5], [0.0, 1.0, 1.0, 1.0]])
    with torch.no_grad():
        with gated(model, anatomy, {"encoder.0.heads": gates}):
            together = model(**inputs).logits
        for row in range(2):
            with gated(model, anatomy, {"encoder.0.heads": gates[row]}):
                alone = model(**{name: value[row : row + 1] for name, value in inputs.items()}).logits
            torch.testing.assert_close(together[row : row + 1], alone)


def test_gates_leave_no_hooks_even_after_an_error():
    model, anatomy = MODELS["bert"], ANATOMIES["bert"]
    with pytest.raises(PlanError, match="no site 'encoder.0.head'"), gated(model, anatomy, {"encoder.0.head": torch.ones(4)}):
        pass
    with pytest.raises(RuntimeError), gated(model, anatomy, {"encoder.0.heads": torch.ones(4)}):
        raise RuntimeError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
