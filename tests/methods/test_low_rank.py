"""Low rank: the nearest factors as moments weigh, moments by hand, ranks against trying everything, refusals."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import batch, tiny
from tiny_folder import write_data, write_model
from toy_task import with_model

from slimformer.core import cost
from slimformer.core.anatomy import Matrix
from slimformer.core.plan import Decision, Plan
from slimformer.core.shrink import shrink
from slimformer.data.batching import collate
from slimformer.data.material import prepare
from slimformer.errors import PlanError, RecipeError, TargetError
from slimformer.families.base import anatomy_of, subject_of
from slimformer.forms.base import DENSE
from slimformer.forms.kronecker import Kronecker
from slimformer.forms.low_rank import LowRank
from slimformer.log import Log
from slimformer.methods.base import Context, State
from slimformer.methods.distillation import Distillation
from slimformer.methods.low_rank import LEAST_WEIGHT, LowRankFactors, Moments, losses, seen, spectrum, weighed_factors
from slimformer.running.bundle import Bundle, Run
from slimformer.running.reader import parse_recipe
from slimformer.running.stages import run_stage
from slimformer.saving import checkpoint
from slimformer.tasks.base import Split
from slimformer.tasks.classification import Classification
from slimformer.testing.checks import tiny_context
from slimformer.training.stage import Calibrate, Train

NO_RIDGE = 1e-12


def around(model: Any, unit: str = "macs") -> Context:
    anatomy = anatomy_of(model)
    counted = cost.parameters(model, anatomy) if unit == "parameters" else cost.macs(anatomy, np.array([7]))
    return replace(with_model(tiny_context(), model, anatomy), cost=counted)


def decided(context: Context, **options: Any) -> Decision:
    method = LowRankFactors(**options)
    return method.decide(State(), context)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size: int, seed: int) -> torch.Tensor:
    root = noise(size, size, seed=seed)
    return root @ root.T


# -- The nearest factors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", ["both", "inputs", "outputs"])
@pytest.mark.parametrize("rank", [1, 3])
def test_no_other_factors_are_nearer_as_the_moments_weigh(sides: str, rank: int) -> None:
    """Brute force: each factor in turn is the best for the other, from many starts, by normal equations of its own."""
    weight = noise(6, 5)
    inputs = moment(5, 1) if sides != "outputs" else None
    outputs = moment(6, 2) if sides != "inputs" else None
    a = torch.eye(5, dtype=torch.float64) if inputs is None else inputs
    g = torch.eye(6, dtype=torch.float64) if outputs is None else outputs

    def harm(wide: torch.Tensor, thin: torch.Tensor) -> float:
        lost = weight - wide @ thin
        return float(torch.trace(g @ lost @ a @ lost.T))

    moments = Moments(inputs, None, outputs)
    found = harm(*weighed_factors(weight, rank, moments, NO_RIDGE))
    best = np.inf
    for seed in range(8):
        thin = noise(rank, 5, seed=10 + seed)
        for _ in range(400):
            wide = weight @ a @ thin.T @ torch.linalg.inv(thin @ a @ thin.T)
            thin = torch.linalg.inv(wide.T @ g @ wide) @ wide.T @ g @ weight
        best = min(best, harm(wide, thin))
    assert found == pytest.approx(best, rel=1e-6)
    energies = spectrum(weight, moments, NO_RIDGE)
    assert energies[rank:].sum() == pytest.approx(found, rel=1e-6)
    assert losses(energies, [DENSE, LowRank(rank)]) == pytest.approx([0.0, found], rel=1e-6)


def test_a_diagonal_of_inputs_is_a_matrix_of_inputs() -> None:
    weight, counts = noise(4, 7), torch.linspace(0.5, 3.0, 7, dtype=torch.float64)
    wide, thin = weighed_factors(weight, 2, Moments(counts), NO_RIDGE)
    other, narrow = weighed_factors(weight, 2, Moments(torch.diag(counts)), NO_RIDGE)
    torch.testing.assert_close(wide @ thin, other @ narrow)


def test_what_never_moves_is_cut_in_the_plain_norm() -> None:
    weight = noise(4, 7)
    wide, thin = weighed_factors(weight, 2, Moments(torch.zeros(7, 7), None, torch.zeros(4, 4)), 1e-3)
    plain, narrow = weighed_factors(weight, 2, Moments(), 1e-3)
    torch.testing.assert_close(wide @ thin, plain @ narrow)


# -- Moments -------------------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_each_example_alone() -> None:
    """By hand: one example after the other, its own gradient, its own tokens."""
    context = around(tiny("bert"))
    name = "encoder.1.ffn_in"
    module = context.model.get_submodule(context.anatomy.matrices[name].module)
    found = seen(context, LowRankFactors(examples=32))[name]
    inputs, outputs, mean, total, examples = torch.zeros(32, 32), torch.zeros(24, 24), torch.zeros(32), 0.0, 0
    for rows in context.batches(32):
        for index in range(len(rows["input_ids"])):
            one = {key: value[index : index + 1] for key, value in rows.items()}
            held: dict[str, Any] = {}
            hook = module.register_forward_hook(lambda _, args, out, held=held: held.update(x=args[0], y=out))
            loss = context.task.loss(context.model(**context.subject.feed(one)), one)
            hook.remove()
            (slope,) = torch.autograd.grad(loss, held["y"])
            real = one["attention_mask"][0].bool()
            x, g = held["x"][0, real].detach(), slope[0, real]
            felt = g.square().sum(-1)
            weight = felt / felt.sum() * len(x) * (1 - LEAST_WEIGHT) + LEAST_WEIGHT
            inputs += (x * weight[:, None]).T @ x
            mean += weight @ x
            total += float(weight.sum())
            outputs += g.T @ g
            examples += 1
    mean /= total
    torch.testing.assert_close(found.mean, mean.double(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.inputs, (inputs / total - torch.outer(mean, mean)).double(), atol=1e-5, rtol=1e-4)
    assert found.outputs is not None
    torch.testing.assert_close(found.outputs.double(), (outputs / examples).double(), atol=1e-6, rtol=1e-3)


def test_words_count_as_often_as_they_were_read_and_once_more() -> None:
    context = around(tiny("bert"), "parameters")
    found = seen(context, LowRankFactors(embedding=4, weighted="inputs", examples=8))["embeddings.word"].inputs
    counts = torch.ones(99)
    for rows in context.batches(8):
        counts += torch.bincount(rows["input_ids"][rows["attention_mask"].bool()], minlength=99)
    assert found is not None
    torch.testing.assert_close(found, counts / counts.sum())


@pytest.mark.parametrize("biases", [True, False])
def test_what_is_lost_is_what_the_outputs_lose(biases: bool) -> None:
    """Of every matrix, on the very examples that were looked at; and the plain singular values lose more there."""
    context = around(tiny("bert"))
    anatomy, model = context.anatomy, context.model
    options: dict[str, Any] = {"rank": 6, "weighted": "inputs", "ridge": 1e-7, "biases": biases}
    small, plain = (shrink(model, anatomy, decided(context, **options | more)) for more in ({}, {"weighted": "none"}))
    moments = seen(context, LowRankFactors(**options))

    def error(matrix: Matrix, other: Any) -> float:
        theirs, total, tokens = other.get_submodule(matrix.module), 0.0, 0
        ours = model.get_submodule(matrix.module)
        for rows in context.batches(2048):
            held: dict[str, Any] = {}
            hook = ours.register_forward_hook(lambda _, args, out, held=held: held.update(x=args[0], y=out))
            with torch.no_grad():
                model(**context.subject.feed(rows))
                hook.remove()
                real = rows["attention_mask"].bool()
                total += float((theirs(held["x"][real]) - held["y"][real]).double().square().sum())
                tokens += int(real.sum())
        return total / tokens

    for matrix in anatomy.encoder_matrices():
        energies = spectrum(model.get_submodule(matrix.module).weight.detach(), moments[matrix.id], 1e-7)
        found = error(matrix, small)
        assert found == pytest.approx(energies[6:].sum(), rel=2e-3, abs=1e-7)
        assert found < error(matrix, plain)


# -- The search ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.5, 0.8])
@pytest.mark.parametrize("weighted", ["loss", "none"])
def test_the_search_finds_what_trying_everything_finds(keep: float, weighted: str) -> None:
    model = tiny("bert", num_hidden_layers=1)
    context = around(model)
    method = LowRankFactors(keep=keep, weighted=weighted, multiple=5)  # type: ignore[arg-type]
    moments = seen(context, method) if weighted == "loss" else {}
    options, fixed = [], context.cost.dense
    for matrix in context.anatomy.encoder_matrices():
        weight = model.get_submodule(matrix.module).weight.detach()
        worth = spectrum(weight, moments.get(matrix.id, Moments()), method.ridge)
        if weighted == "none":
            worth /= worth.sum()
        forms = (DENSE, LowRank(1), LowRank(5), LowRank(10), *([LowRank(15)] if matrix.shape == (32, 32) else []))
        rows, columns = matrix.shape
        prices = [7 * rows * columns, *(7 * form.rank * (rows + columns) for form in forms[1:])]  # type: ignore[attr-defined]
        fixed -= prices[0]
        options.append([(matrix.id, form, *item) for form, *item in zip(forms, prices, losses(worth, forms), strict=True)])
    room = keep * context.cost.dense - fixed
    best = min(
        sum(item[3] for item in choice)
        for choice in itertools.product(*options)
        if sum(item[2] for item in choice) <= room * (1 - 6 / 4096)  # costs are rounded up to 1/4096 of the room
    )
    plan = method.decide(State(), context).plan
    lost = {(name, form): harm for choices in options for name, form, _, harm in choices}
    found = sum(lost[matrix.id, plan.forms.get(matrix.id, DENSE)] for matrix in context.anatomy.encoder_matrices())
    assert found <= best + 1e-9
    assert context.cost.of(plan, context.anatomy) <= keep * context.cost.dense


@pytest.mark.parametrize("unit", ["macs", "parameters"])
@pytest.mark.parametrize("model_type", ["roberta", "t5"])
def test_a_budget_is_met(unit: Any, model_type: str) -> None:
    context = tiny_context(model_type, unit)
    decision = decided(context, keep=0.75, cost=unit)
    small = shrink(context.model, context.anatomy, decision)
    assert decision.plan.forms
    assert context.cost.of(decision.plan, context.anatomy) <= 0.75 * context.cost.dense
    if unit == "parameters":
        assert small.num_parameters() <= 0.75 * context.model.num_parameters()
    assert any("two thin ones now" in note for note in decision.notes)


def test_two_thin_matrices_stand_only_where_the_latency_table_says_that_they_pay() -> None:
    """A call that costs as much as 512 numbers: of 32 x 32 only ranks below 8 are faster, of 24 x 32 those up to 4."""
    context = around(tiny("bert"))
    table = {"heads": {4: 1.0, 1: 0.5}, "neurons": {8: 0.3, 24: 0.5}}
    context = replace(context, cost=cost.latency(context.anatomy, 0.0, table))
    decision = decided(context, keep=0.97, cost="latency", multiple=1)
    matrices = context.anatomy.matrices
    assert decision.plan.forms
    for name, form in decision.plan.forms.items():
        assert form.rank < (8 if matrices[name].shape == (32, 32) else 5)  # type: ignore[attr-defined]
    assert context.cost.of(decision.plan, context.anatomy) <= 0.97 * context.cost.dense
    assert "stay plain: a rank that would be faster by the latency table loses more" in decision.notes[1]
    slow = replace(context, cost=cost.latency(context.anatomy, 0.0, table | {"neurons": {8: 9.9, 24: 10.0}}))
    with pytest.raises(TargetError, match="of the ms cannot be reached: no form of a matrix costs less"):
        decided(slow, keep=0.97, cost="latency")


def test_latency_that_tells_no_products_is_refused() -> None:
    context = around(tiny("bert"))
    context = replace(context, cost=cost.latency(context.anatomy, 0.0, {"heads": {4: 1.0}, "neurons": {24: 0.5}}))
    with pytest.raises(TargetError, match="does not tell what a product takes"):
        LowRankFactors(keep=0.9, cost="latency").check(context.anatomy, context.cost)
    with pytest.raises(TargetError, match="latency of a model with a decoder"):
        LowRankFactors(keep=0.9, cost="latency").check(anatomy_of(tiny("bart")), None)


def test_a_whole_budget_leaves_the_model_and_may_still_factor_the_table() -> None:
    context = around(tiny("bert"), "parameters")
    assert not decided(context, keep=1.0, cost="parameters").plan.forms
    alone = decided(context, keep=1.0, cost="parameters", embedding=12)
    assert alone.plan.forms == {"embeddings.word": LowRank(12)}
    assert set(alone.weights) == {f"bert.embeddings.word_embeddings.{name}" for name in ("first", "second")}
    assert not LowRankFactors(keep=1.0, embedding=12).effects().refills
    assert LowRankFactors(keep=0.9).effects().refills


def test_one_rank_for_all_leaves_plain_what_it_would_not_make_smaller() -> None:
    context = around(tiny("bert", intermediate_size=4))
    decision = decided(context, rank=4)
    assert {name.rpartition(".")[2] for name in decision.plan.forms} == {"query", "key", "value", "attention_out"}
    assert "6 stay plain: " in decision.notes[1]


def test_a_pruned_model_can_be_factored_and_a_factored_one_further() -> None:
    model = tiny("distilbert")
    cut = Plan({"encoder.0.heads": (1, 2), "encoder.1.attention": (), "encoder.2.neurons": tuple(range(15))})
    some = Plan({}, {"encoder.0.ffn_in": Kronecker((2, 2))})
    small = shrink(model, anatomy_of(model), cut.then(some))
    context = around(small)
    decision = decided(context, keep=0.6)
    assert "encoder.0.ffn_in" not in decision.plan.forms
    smaller = shrink(small, context.anatomy, decision)
    again = shrink(model, anatomy_of(model), cut.then(some).then(decision.plan))
    assert again.num_parameters() == smaller.num_parameters()
    with torch.no_grad():
        assert bool(torch.isfinite(smaller(**batch(small)).logits).all())


# -- Refusals ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"keep": 0}, {"rank": 0}, {"embedding": 0}, {"weighted": "all"}, {"ridge": 0.0}, {"multiple": 0}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LowRankFactors(**options)


@pytest.mark.parametrize("more", [{"keep": 0.5}, {"cost": "parameters"}])
def test_a_budget_beside_a_rank_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(
            {"model": "x", "task": "intents", "stages": [{"calibrate": {"method": {"use": "low_rank", "rank": 4, **more}}}]}
        )
    assert caught.value.facts == (
        "stages[0].calibrate.method: rank 4 leaves nothing to search: leave out keep and cost, or rank",
    )


def check(context: Context, **options: Any) -> None:
    LowRankFactors(**options).check(context.anatomy, context.cost)


def test_what_cannot_be_is_refused_before_anything_is_looked_at() -> None:
    context = around(tiny("bert"))
    with pytest.raises(PlanError, match=r"rank 16 pays for no matrix.*\n.*largest rank that pays for any is 15"):
        check(context, rank=16)
    with pytest.raises(PlanError, match=r"'embeddings.word' cannot be stored .* of which only ranks up to 24 pay"):
        check(context, embedding=25)
    with pytest.raises(TargetError, match=r"1.0% of the MACs cannot be reached: [\d.]+% remain with the smallest factors"):
        check(context, keep=0.01)
    check(context, keep=0.4, embedding=24)
    once = around(shrink(context.model, context.anatomy, decided(context, rank=3, embedding=6)))
    with pytest.raises(PlanError, match="embedding is 4, but there is no word table to factor"):
        check(once, keep=1.0, embedding=4)
    with pytest.raises(PlanError, match="no matrix can be made of low rank: none is plain any more"):
        check(once, keep=0.5)


# -- With training -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_distillation_wins_back_what_was_lost(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    model = checkpoint.load(source)
    task = Classification(data=str(write_data(tmp_path / "data"))).bind(model.config)
    start = Bundle(subject_of(model), Plan(), prepare(task, source), subject_of(model))
    run = Run(tmp_path / "work", tmp_path / "work", Log(None, quiet=True), threads=1)
    columns = {name: torch.from_numpy(value) for name, value in collate(start.material.features[Split.DEV], range(60)).items()}
    inputs = {name: columns[name] for name in ("input_ids", "attention_mask", "token_type_ids")}

    def gap(bundle: Bundle) -> float:
        with torch.no_grad():
            return float((bundle.subject.model(**inputs).logits - model(**inputs).logits).square().mean())

    thin = run_stage(Calibrate(LowRankFactors(keep=0.3, multiple=1, embedding=4)), start, run.under("1"))
    taught = run_stage(
        Train((Distillation(),), epochs=4, task_weight=0.1, lr=5e-4, batch_size=16, dropout=False, precision="fp32"),
        thin,
        run.under("2"),
    )
    assert gap(taught) < 0.5 * gap(thin)
    assert taught.plan == thin.plan
    checkpoint.save(taught.subject.model, taught.plan, tmp_path / "small", tokenizer_from=source)
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "small")(**inputs).logits, taught.subject.model(**inputs).logits)
