"""Hessian bits: eigenvalues against the whole Hessian, bits against trying everything, groups of rows, refusals."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import batch, tiny
from toy_task import with_model

from slimformer.core.plan import Decision
from slimformer.core.shrink import shrink
from slimformer.errors import PlanError, TargetError
from slimformer.families.base import anatomy_of
from slimformer.forms.dictionary import PACKING, Dictionary
from slimformer.methods.base import Context, State
from slimformer.methods.hessian_bits import HessianBits, curvature_of, top_eigenvalue
from slimformer.testing.checks import tiny_context


def around(model: Any) -> Context:
    return with_model(tiny_context(), model, anatomy_of(model))


def decided(context: Context, **options: Any) -> Decision:
    return HessianBits(**{"batches": 2, "examples": 4, "iterations": 3, **options}).decide(State(), context)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_eigenvalue_is_that_of_the_matrix(sign: float) -> None:
    root = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    form = root + root.T + sign * 9 * torch.eye(12)
    weight = torch.randn(3, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(0.5 * weight.flatten() @ form @ weight.flatten(), weight, create_graph=True)
    values = torch.linalg.eigvalsh(form)
    found = top_eigenvalue(slope, weight, 400, torch.Generator().manual_seed(1))
    assert found == pytest.approx(float(values[values.abs().argmax()]), rel=1e-3)


def test_a_loss_that_does_not_curve_has_none() -> None:
    weight = torch.ones(2, 2, requires_grad=True)
    (slope,) = torch.autograd.grad((weight * 3).sum() + 0 * weight.square().sum(), weight, create_graph=True)
    assert top_eigenvalue(slope, weight, 5, torch.Generator()) == 0.0


def test_curvature_is_that_of_the_whole_hessian_of_each_batch() -> None:
    """By hand: every second derivative in one small matrix, one batch after the other."""
    context = around(tiny("bert", num_hidden_layers=1, intermediate_size=3))
    matrix = context.anatomy.matrices["encoder.0.ffn_in"]
    weight = context.model.get_submodule(matrix.module).weight
    (whole,) = list(context.batches(4))[:1]
    tops = []
    for rows in ({name: value[:2] for name, value in whole.items()}, {name: value[2:4] for name, value in whole.items()}):
        loss = context.task.loss(context.model(**context.subject.feed(rows)), rows)
        (slope,) = torch.autograd.grad(loss, weight, create_graph=True)
        lines = [torch.autograd.grad(item, weight, retain_graph=True)[0].flatten() for item in slope.flatten()]
        values = torch.linalg.eigvalsh(torch.stack(lines))
        tops.append(float(values[values.abs().argmax()]))
    found = curvature_of(context, [matrix], batches=2, examples=2, iterations=200)[matrix.id]
    assert found == pytest.approx(abs(np.mean(tops)) + np.std(tops), rel=1e-2)
    assert not any(parameter.grad is not None for parameter in context.model.parameters())


@pytest.mark.parametrize("bits", [2.8, 4.0])
def test_the_search_finds_what_trying_everything_finds(bits: float) -> None:
    context = around(tiny("bert", num_hidden_layers=1))
    method = HessianBits(bits=bits, groups=2, batches=1, examples=4, iterations=3)
    matrices = context.anatomy.encoder_matrices()
    felt = curvature_of(replace(context, generator=torch.Generator().manual_seed(0)), matrices, 1, 4, 3)
    options = []
    for matrix in matrices:
        weight = context.model.get_submodule(matrix.module).weight.detach()
        rows = []
        for entries in PACKING:
            form = Dictionary(entries, 0, 2)
            if form.problem(matrix.shape) is not None:
                continue
            dense = torch.nn.Linear(matrix.shape[1], matrix.shape[0])
            module: Any = form.module(dense)
            with torch.no_grad():
                for name, value in form.weights(weight).items():
                    module.get_parameter(name).copy_(value)
            lost = felt[matrix.id] * float((module.matrix().detach() - weight).square().sum())
            rows.append((matrix.id, form, form.bits * weight.numel() + 32 * 2 * entries, lost))
        options.append(rows)
    room = bits * sum(math.prod(matrix.shape) for matrix in matrices)
    best = min(
        sum(item[3] for item in choice)
        for choice in itertools.product(*options)
        if sum(item[2] for item in choice) <= room * (1 - 6 / 4096)  # costs are rounded up to 1/4096 of the room
    )
    plan = method.decide(State(), replace(context, generator=torch.Generator().manual_seed(0))).plan
    table = {(name, form): (cost, lost) for rows in options for name, form, cost, lost in rows}
    chosen = [table[matrix.id, plan.forms[matrix.id]] for matrix in matrices]  # type: ignore[index]
    assert sum(cost for cost, _ in chosen) <= room
    assert sum(lost for _, lost in chosen) <= best * (1 + 1e-4) + 1e-12


@pytest.mark.slow
def test_words_have_more_bits_and_groups_values_of_their_own() -> None:
    context = around(tiny("bert"))
    decision = decided(context, groups=4, embedding=16)
    assert decision.plan.forms["embeddings.word"] == Dictionary(16, 0, 1)  # 99 words are no four groups
    assert decision.plan.forms["encoder.0.ffn_in"].groups == 4  # type: ignore[attr-defined]
    assert "embeddings.word" not in decided(context, embedding=None).plan.forms
    small = shrink(context.model, context.anatomy, decision)
    with torch.no_grad():
        assert bool(torch.isfinite(small(**batch(small)).logits).all())
    assert decision.notes[0].startswith("bits of the matrices: ")


@pytest.mark.slow
def test_more_bits_lose_less() -> None:
    context = around(tiny("bert"))
    gaps = []
    for bits in (2.6, 4.5):
        small = shrink(context.model, context.anatomy, decided(context, bits=bits, groups=1))
        with torch.no_grad():
            gaps.append(float((small(**batch(small)).logits - context.model(**batch(small)).logits).square().mean()))
    assert gaps[1] < 0.5 * gaps[0]


@pytest.mark.parametrize(
    "options", [{"bits": 1.5}, {"bits": 9}, {"embedding": 32}, {"groups": 0}, {"batches": 0}, {"iterations": 0}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        HessianBits(**options)


def test_what_cannot_be_is_refused_before_anything_is_looked_at() -> None:
    context = around(tiny("bert"))
    with pytest.raises(
        TargetError, match=r"2 bits a number cannot be reached: 2\.\d+ are the fewest, with the values of each group"
    ):
        HessianBits(bits=2).check(context.anatomy, None)
    once = around(shrink(context.model, context.anatomy, decided(context)))
    with pytest.raises(PlanError, match="no matrix of the layers can become codes: each has another form already"):
        HessianBits().check(once.anatomy, None)
