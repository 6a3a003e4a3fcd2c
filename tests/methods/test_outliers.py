"""Outliers apart: which matrices become codes, what is said of them, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import batch, tiny
from toy_task import with_model

from slimformer.core.plan import Decision
from slimformer.core.shrink import shrink
from slimformer.errors import PlanError
from slimformer.families.base import anatomy_of
from slimformer.forms.dictionary import Dictionary, unlikely
from slimformer.methods.base import Context, State
from slimformer.methods.outliers import Outliers
from slimformer.testing.checks import tiny_context


def around(model: Any) -> Context:
    return with_model(tiny_context(), model, anatomy_of(model))


def decided(context: Context, **options: Any) -> Decision:
    return Outliers(**options).decide(State(), context)


def test_every_matrix_but_the_last_becomes_codes() -> None:
    context = around(tiny("bert"))
    decision = decided(context, threshold=-6.0)
    matrices = [*context.anatomy.encoder_matrices(), context.anatomy.matrices["embeddings.word"]]
    assert set(decision.plan.forms) == {matrix.id for matrix in matrices}
    for matrix in matrices:
        weight = context.model.get_submodule(matrix.module).weight
        assert decision.plan.forms[matrix.id] == Dictionary(16 if matrix.table else 8, unlikely(weight, -6.0))
    small = shrink(context.model, context.anatomy, decision)
    with torch.no_grad():
        gap = (small(**batch(small)).logits - context.model(**batch(small)).logits).abs().max()
    assert 0 < float(gap) < 1
    assert "matrices are outliers, and kept apart" in decision.notes[0]
    assert "embeddings.word" not in decided(context, embedding=None).plan.forms


def test_more_entries_are_nearer() -> None:
    context = around(tiny("bert"))
    errors = []
    for entries in (8, 16):
        small = shrink(context.model, context.anatomy, decided(context, entries=entries))
        name = "bert.encoder.layer.1.intermediate.dense"
        lost = small.get_submodule(name).matrix() - context.model.get_submodule(name).weight
        errors.append(float(lost.detach().square().sum()))
    assert errors[1] < 0.5 * errors[0]


def test_a_matrix_with_too_many_outliers_stays_plain_and_is_told() -> None:
    model = tiny("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.weight.normal_(std=60.0)  # a density below exp(-4) everywhere
    decision = decided(around(model))
    assert "encoder.0.query" not in decision.plan.forms
    assert decision.notes[1] == "1 stay plain, with too many outliers for their size: encoder.0.query."


@pytest.mark.parametrize("options", [{"entries": 4}, {"embedding": 32}, {"threshold": 0.0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Outliers(**options)


def test_a_model_without_plain_matrices_is_refused() -> None:
    once = around(tiny("bert"))
    again = around(shrink(once.model, once.anatomy, decided(once, threshold=-100.0)))
    with pytest.raises(PlanError, match="no matrix can become codes: each has another form already"):
        Outliers().check(again.anatomy, None)
