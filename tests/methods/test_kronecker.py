"""Kronecker: the published models by their counts, the search against brute force, two stages of distillation that win it back."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import init_empty_weights
from tiny import tiny
from tiny_folder import write_data, write_model
from toy_task import with_model
from transformers import BertConfig, BertForSequenceClassification, BertModel

from slimformer.core import cost
from slimformer.core.anatomy import Matrix, Role
from slimformer.core.plan import Decision, Plan
from slimformer.core.shrink import shrink
from slimformer.data.batching import collate
from slimformer.data.material import prepare
from slimformer.errors import PlanError, RecipeError, TargetError
from slimformer.families.base import anatomy_of, subject_of
from slimformer.forms.base import DENSE
from slimformer.forms.kronecker import Kronecker as Product
from slimformer.log import Log
from slimformer.methods.base import Context, State
from slimformer.methods.distillation import Distillation
from slimformer.methods.kronecker import NAMED, KroneckerFactors, candidates, relative_errors
from slimformer.running.bundle import Bundle, Run
from slimformer.running.reader import parse_recipe
from slimformer.running.recipe import Recipe
from slimformer.running.stages import run_stage
from slimformer.saving import checkpoint
from slimformer.tasks.base import Split
from slimformer.tasks.classification import Classification
from slimformer.tasks.intents import Intents
from slimformer.testing.checks import tiny_context
from slimformer.training.stage import Calibrate, Train


def matrix(role: Role, rows: int, columns: int) -> Matrix:
    return Matrix(str(role), str(role), (rows, columns), role)


def around(model: Any, unit: str = "parameters") -> Context:
    anatomy = anatomy_of(model)
    counted = cost.parameters(model, anatomy) if unit == "parameters" else cost.macs(anatomy, np.array([7]))
    return replace(with_model(tiny_context(), model, anatomy), cost=counted)


def decided(context: Context, **options: Any) -> Decision:
    return KroneckerFactors(**options).decide(State(), context)


# -- Shapes by name ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "attention", "first", "second", "table"),
    [
        ("5.5x", (384, 48), (384, 384), (384, 384), (30522, 64)),
        ("7.7x", (384, 384), (8, 2), (2, 8), (30522, 96)),
        ("21x", (384, 48), (16, 2), (2, 16), (30522, 48)),
    ],
)
def test_named_shapes_are_the_published_ones(name: str, attention: Any, first: Any, second: Any, table: Any) -> None:
    shapes = NAMED[name]
    for role in (Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUT):
        assert shapes.form(matrix(role, 768, 768), 1) == Product(attention)
    assert shapes.form(matrix(Role.FFN_IN, 3072, 768), 2) == Product(first, 2)
    assert shapes.form(matrix(Role.FFN_OUT, 768, 3072), 1) == Product(second)
    assert shapes.form(matrix(Role.EMBEDDING, 30522, 768), 3) == Product(table, 3)


@pytest.mark.parametrize(("name", "millions", "ratio"), [("5.5x", 20.76, 5.27), ("7.7x", 14.65, 7.47), ("21x", 5.23, 20.9)])
def test_named_models_have_the_published_size(name: str, millions: float, ratio: float) -> None:
    """BERT-base, pooler included: 5.2 M and 20.9 times in the paper; 14.3 M, which counts the pooler by half; 20 M and 5.5 times."""
    with init_empty_weights(include_buffers=False):
        model = BertModel(BertConfig()).eval()
    anatomy = anatomy_of(model)
    forms = KroneckerFactors(shapes=name)._given(anatomy)  # type: ignore[arg-type]
    small = shrink(model, anatomy, Plan(forms=forms))
    assert small.num_parameters() / 1e6 == pytest.approx(millions, abs=0.01)
    assert model.num_parameters() / small.num_parameters() == pytest.approx(ratio, abs=0.05)
    assert cost.parameters(model, anatomy).of(Plan(forms=forms), anatomy) == small.num_parameters()


@pytest.mark.parametrize(("name", "ratio"), [("5.5x", 6.4), ("7.7x", 7.2), ("21x", 15.7)])
def test_on_a_narrow_encoder_the_names_are_not_its_ratio(name: str, ratio: float) -> None:
    """What the docs say of six layers of width 384."""
    with init_empty_weights(include_buffers=False):
        shape = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
        model = BertForSequenceClassification(BertConfig(**shape)).eval()
    anatomy = anatomy_of(model)
    counted = cost.parameters(model, anatomy)
    forms = KroneckerFactors(shapes=name)._given(anatomy)  # type: ignore[arg-type]
    assert counted.dense / counted.of(Plan(forms=forms), anatomy) == pytest.approx(ratio, abs=0.05)


@pytest.mark.parametrize("more", [{"keep": 0.1}, {"keep": 0.25}, {"cost": "macs"}])
def test_a_share_beside_named_shapes_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="shapes 7.7x leave nothing to search: leave out keep and cost, or shapes"):
        KroneckerFactors(shapes="7.7x", **more)
    method = {"use": "kronecker", "shapes": "7.7x", **more}
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"model": "x", "task": "intents", "stages": [{"calibrate": {"method": method}}]})
    assert caught.value.facts == (
        "stages[0].calibrate.method: shapes 7.7x leave nothing to search: leave out keep and cost, or shapes",
    )


@pytest.mark.parametrize(
    "method",
    [KroneckerFactors(), KroneckerFactors(keep=0.25), KroneckerFactors(shapes="21x"), KroneckerFactors(keep=0.1, cost="macs")],
)
def test_recipes_bring_the_method_back(method: KroneckerFactors) -> None:
    recipe = Recipe("x", Intents(), (Calibrate(method),))
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())).stages == recipe.stages
    assert method.share == (method.keep or 0.25)


def test_at_other_widths_the_small_factors_stay_and_the_large_ones_scale() -> None:
    assert NAMED["21x"].form(matrix(Role.QUERY, 384, 384), 1) == Product((192, 24))
    assert NAMED["21x"].form(matrix(Role.QUERY, 128, 384), 1) == Product((64, 24))  # four of twelve heads left
    assert NAMED["21x"].form(matrix(Role.ATTENTION_OUT, 384, 128), 1) == Product((192, 8))
    assert NAMED["7.7x"].form(matrix(Role.FFN_IN, 400, 384), 1).b((400, 384)) == (50, 192)
    with pytest.raises(
        PlanError, match=r"matrix 'ffn_in' is 24 x 32, which a factor of 16 x 2 does not divide.\n.*give `keep`"
    ):
        NAMED["21x"].form(matrix(Role.FFN_IN, 24, 32), 1)


def test_a_named_model_factors_all_and_carries_the_nearest_factors() -> None:
    context = around(tiny("bert"))
    decision = decided(context, shapes="7.7x", terms=4)
    assert set(decision.plan.forms) == set(context.anatomy.matrices)
    assert not decision.plan.keep
    small = shrink(context.model, context.anatomy, decision)
    nearest = shrink(context.model, context.anatomy, decision.plan)
    for name, value in small.state_dict().items():
        assert torch.equal(value, nearest.state_dict()[name])
    parts = {name.rpartition(".")[2] for name in decision.weights}
    assert parts == {"a", "b"}
    path = "bert.encoder.layer.1.attention.self.value"
    whole = small.get_submodule(path).matrix()  # 2 x 2 times four terms is exact
    torch.testing.assert_close(whole, context.model.get_submodule(path).weight, atol=1e-5, rtol=1e-5)


# -- The search ----------------------------------------------------------------------------------------------------------------


def test_relative_errors_are_those_of_the_nearest_products() -> None:
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    forms = [DENSE, *candidates(matrix(Role.QUERY, 12, 8), 2)]
    assert len(forms) > 5
    found = relative_errors(weight, forms)
    assert found[0] == 0
    for form, error in zip(forms[1:], found[1:], strict=True):
        parts = form.weights(weight)
        whole = sum(torch.kron(a, b) for a, b in zip(parts["a"], parts["b"], strict=True))
        assert error == pytest.approx(float((weight - whole).square().sum() / weight.square().sum()), abs=1e-5)
    assert relative_errors(torch.zeros(12, 8), forms).tolist() == [0.0] * len(forms)


def test_candidates_save_numbers_and_multiplications() -> None:
    whole = matrix(Role.FFN_IN, 24, 32)
    found = list(candidates(whole, 1))
    assert Product((12, 16)) in found
    assert Product((2, 2)) in found
    assert Product((24, 32)) not in found
    assert Product((1, 1)) not in found
    for form in found:
        assert form.parameters((24, 32)) < 24 * 32
        assert form.macs((24, 32)) < 24 * 32
    table = matrix(Role.EMBEDDING, 99, 32)
    assert [form.a for form in candidates(table, 1)] == [(99, 1), (99, 2), (99, 4), (99, 8), (99, 16)]
    assert [(form.a, form.terms) for form in candidates(table, 3)] == [((99, n1), 3) for n1 in (1, 2, 4, 8)]


@pytest.mark.parametrize("keep", [0.35, 0.5, 0.7])
def test_the_search_finds_what_trying_everything_finds(keep: float) -> None:
    model = tiny("bert", num_hidden_layers=1)
    context = around(model)
    anatomy, count = context.anatomy, context.cost.matrix
    assert count is not None
    decision = decided(context, keep=keep)
    roles = {"attention": [], "ffn_in": [], "ffn_out": [], "embedding": []}  # type: dict[str, list[Matrix]]
    for item in anatomy.matrices.values():
        roles[str(item.role) if item.role in (Role.FFN_IN, Role.FFN_OUT, Role.EMBEDDING) else "attention"].append(item)
    options = []
    for group in roles.values():
        forms = [DENSE, *candidates(group[0], 1)]
        lost = sum(relative_errors(model.get_submodule(item.module).weight, forms) for item in group)
        costs = [sum(count(replace(item, form=form)) for item in group) for form in forms]
        front: list[tuple[float, float]] = []  # of all shapes, those that no cheaper one beats
        for price, error in sorted(zip(costs, lost, strict=True)):
            if not front or error < front[-1][1]:
                front.append((price, float(error)))
        options.append(front)
    fixed = context.cost.dense - sum(front[-1][0] for front in options)
    budget = keep * context.cost.dense - fixed
    best = min(
        sum(error for _, error in choice)
        for choice in itertools.product(*options)
        if sum(price for price, _ in choice) <= budget * (1 - 4 / 4096)  # costs are rounded up to 1/4096 of the budget
    )
    found = 0.0
    for item in anatomy.matrices.values():
        form = decision.plan.forms.get(item.id, DENSE)
        found += float(relative_errors(model.get_submodule(item.module).weight, [form])[0])
    assert found <= best + 1e-5
    small = shrink(model, anatomy, decision)
    assert small.num_parameters() <= keep * model.num_parameters()


def test_matrices_that_are_alike_get_one_shape() -> None:
    forms = decided(around(tiny("roberta")), keep=0.3).plan.forms
    for role in ("query", "ffn_in", "ffn_out"):
        assert len({forms.get(f"encoder.{layer}.{role}") for layer in range(3)}) == 1
    assert len({forms.get(f"encoder.0.{role}") for role in ("query", "key", "value", "attention_out")}) == 1


def test_a_pruned_model_can_be_factored() -> None:
    model = tiny("distilbert")
    cut = Plan({"encoder.0.heads": (1, 2), "encoder.1.attention": (), "encoder.2.neurons": tuple(range(15))})
    small = shrink(model, anatomy_of(model), cut)
    context = around(small)
    decision = decided(context, keep=0.5)
    smaller = shrink(small, context.anatomy, decision)
    assert smaller.num_parameters() <= 0.5 * small.num_parameters()
    assert shrink(model, anatomy_of(model), cut.then(decision.plan)).num_parameters() == smaller.num_parameters()


def test_the_table_is_left_alone_or_factored_as_told() -> None:
    context = around(tiny("bert"))
    assert "embeddings.word" not in decided(context, keep=0.5, embedding=0).plan.forms
    assert decided(context, keep=0.5, embedding=4).plan.forms["embeddings.word"] == Product((99, 8))
    assert decided(context, shapes="7.7x", embedding=16).plan.forms["embeddings.word"] == Product((99, 2))
    assert decided(context, shapes="7.7x", embedding_terms=3).plan.forms["embeddings.word"] == Product((99, 4), 3)
    alone = decided(context, keep=1.0, embedding=32, embedding_terms=12)
    assert alone.plan.forms == {"embeddings.word": Product((99, 1), 12)}
    assert alone.weights["bert.embeddings.word_embeddings.a"].shape == (1, 99, 12)
    with pytest.raises(PlanError, match="32 terms of 99 x 1 are exact already"):
        decided(context, embedding=32, embedding_terms=33)
    with pytest.raises(PlanError, match="'embeddings.word' is 99 x 32, which a factor of 1 x 5"):
        decided(context, embedding=5)
    decodes = around(tiny("bert", auto_class="AutoModelForMaskedLM"))
    assert decided(decodes, shapes="7.7x").plan.forms["embeddings.word"] == Product((99, 4))
    plan = decided(decodes, keep=0.5).plan
    small = shrink(decodes.model, decodes.anatomy, plan)
    assert small.num_parameters() == decodes.cost.of(plan, decodes.anatomy) <= 0.5 * decodes.model.num_parameters()


def test_multiplications_know_no_table() -> None:
    context = around(tiny("bert"), "macs")
    plan = decided(context, cost="macs", keep=0.5).plan
    assert "embeddings.word" not in plan.forms  # it would lose something and save nothing
    assert context.cost.of(plan, context.anatomy) <= 0.5 * context.cost.dense


def test_what_cannot_be_reached_names_the_least() -> None:
    with pytest.raises(
        TargetError, match=r"1.0% of the parameters cannot be reached: [\d.]+% remain with the smallest factors"
    ):
        decided(around(tiny("bert")), keep=0.01)


@pytest.mark.parametrize(
    "options", [{"shapes": "8x"}, {"keep": 0}, {"keep": 1.1}, {"terms": 0}, {"embedding": -1}, {"embedding_terms": 0}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        KroneckerFactors(**options)


def test_terms_of_a_table_that_stays_dense_are_refused() -> None:
    with pytest.raises(ValueError, match="embedding 0 leaves it dense"):
        KroneckerFactors(embedding=0, embedding_terms=2)
    once = around(tiny("bert"))
    again = around(shrink(once.model, once.anatomy, decided(once, keep=1.0, embedding=8).plan))
    with pytest.raises(PlanError, match="embedding_terms is 2, but there is no word table to factor"):
        decided(again, keep=0.6, embedding_terms=2)


# -- With training -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_stages_of_distillation_win_back_what_the_start_lost(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    model = checkpoint.load(source)
    task = Classification(data=str(write_data(tmp_path / "data"))).bind(model.config)
    start = Bundle(subject_of(model), Plan(), prepare(task, source), subject_of(model))
    run = Run(tmp_path / "work", tmp_path / "work", Log(None, quiet=True), threads=1)
    text = tmp_path / "text.txt"
    rows = [example.texts[0] for example in start.material.examples[Split.TRAIN]]
    text.write_text("\n".join(rows), encoding="utf-8")
    batch = {name: torch.from_numpy(value) for name, value in collate(start.material.features[Split.DEV], range(60)).items()}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}

    def gaps(bundle: Bundle) -> tuple[float, float]:
        """Mean squares between the model and its teacher on dev: last hidden state, logits."""
        with torch.no_grad():
            mine, goal = bundle.subject.model(**inputs, output_hidden_states=True), model(**inputs, output_hidden_states=True)
        real = inputs["attention_mask"].bool()
        hidden = (mine.hidden_states[-1] - goal.hidden_states[-1])[real].square().mean()
        return float(hidden), float((mine.logits - goal.logits).square().mean())

    options: dict[str, Any] = {"lr": 5e-3, "batch_size": 16, "dropout": False, "precision": "fp32"}
    factored = run_stage(Calibrate(KroneckerFactors(keep=0.35)), start, run.under("1"))
    lesson = Distillation(logits=0, hidden=1, scores=1)
    first = run_stage(Train((lesson,), epochs=12, text=str(text), **options), factored, run.under("2"))
    second = run_stage(Train((Distillation(),), epochs=4, task_weight=0.1, **options), first, run.under("3"))
    before, between, after = gaps(factored), gaps(first), gaps(second)
    assert between[0] < 0.2 * before[0]
    assert max(between[1], after[1]) < 0.2 * before[1]
    assert second.plan == factored.plan
    assert second.plan.forms
    checkpoint.save(second.subject.model, second.plan, tmp_path / "small", tokenizer_from=source)
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "small")(**inputs).logits, second.subject.model(**inputs).logits)
