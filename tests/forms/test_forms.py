"""Forms: the nearest Kronecker product by brute force, steps and counts by hand, and models whose matrices are factored."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ENCODERS, SEPARATE, WEIGHT_BITS, batch, tiny
from torch import nn

from slimformer.core import cost
from slimformer.core.anatomy import Anatomy
from slimformer.core.plan import Decision, Plan
from slimformer.core.shrink import shrink, unshrink
from slimformer.errors import PlanError, TargetError
from slimformer.exporters import onnx as exporter
from slimformer.exporters.base import Variant
from slimformer.exporters.onnx import Onnx, fused_attentions, quantized_matrices
from slimformer.families.base import anatomy_of, family_of
from slimformer.forms.base import DENSE
from slimformer.forms.kronecker import Kronecker, KroneckerEmbedding, KroneckerLinear, rearranged, squares
from slimformer.hooks.gating import gated
from slimformer.runtimes.onnxruntime import OnnxRuntime
from slimformer.saving import checkpoint
from slimformer.testing.checks import assert_equal, assert_same

# What dynamic int8 may be off, as a share of the largest output: a bit less doubles the steps of the weights.
DYNAMIC = 0.05 * 2 ** (8 - WEIGHT_BITS)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(rows: int, columns: int, form: Kronecker, seed: int = 0) -> tuple[nn.Linear, KroneckerLinear]:
    """A Linear and the same in a form."""
    dense = nn.Linear(columns, rows)
    formed = form.module(dense)
    assert isinstance(formed, KroneckerLinear)
    with torch.no_grad():
        dense.weight.copy_(noise(rows, columns, seed=seed))
        for name, value in form.weights(dense.weight).items():
            formed.get_parameter(name).copy_(value)
    return dense, formed


# -- The nearest product -------------------------------------------------------------------------------------------------------


def divisors(size: int) -> list[int]:
    return [n for n in range(1, size + 1) if size % n == 0]


def test_a_product_is_found_again() -> None:
    a, b = torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 1.0]]), torch.tensor([[2.0, 1.0], [0.0, -1.0]])
    _, formed = linear(6, 4, Kronecker((3, 2)))
    for name, value in Kronecker((3, 2)).weights(torch.kron(a, b)).items():
        formed.get_parameter(name).data.copy_(value)
    torch.testing.assert_close(formed.matrix(), torch.kron(a, b))
    torch.testing.assert_close(formed.a.norm(), formed.b.norm())  # neither factor is the large one
    assert torch.equal(rearranged(torch.kron(a, b), (3, 2))[4], a[2, 0] * b.flatten())


@pytest.mark.slow
@pytest.mark.parametrize("a", [(2, 2), (1, 3), (4, 1), (2, 6), (4, 6), (1, 1)])
@pytest.mark.parametrize("terms", [1, 2])
def test_the_nearest_product_equals_alternating_least_squares(a: tuple[int, int], terms: int) -> None:
    """Brute force that knows no SVD: from many starts, A for the best B, then B for the best A, on the entries of the matrix."""
    weight = noise(4, 6).double()
    form = Kronecker(a, terms)
    terms = min(terms, math.prod(a), math.prod(form.b((4, 6))))
    form = replace(form, terms=terms)
    _, formed = linear(4, 6, form)
    found = form.weights(weight)
    formed.a.data, formed.b.data = found["a"], found["b"]
    error = float((weight - formed.matrix().detach()).square().sum())
    best = min(alternating(weight, a, form.b((4, 6)), terms, seed) for seed in range(12))
    assert error == pytest.approx(best, rel=1e-6, abs=1e-9)
    np.testing.assert_allclose(error, float(squares(weight, a)[terms:].sum()), atol=1e-9)


def alternating(weight: torch.Tensor, a: tuple[int, int], b: tuple[int, int], terms: int, seed: int) -> float:
    """Squared error of a sum of products that was fitted entry by entry."""
    right = noise(terms, *b, seed=seed).double()
    left = torch.zeros(terms, *a, dtype=torch.float64)
    for _ in range(150):
        left = solved(weight, a, b, terms, lambda unit, k, right=right: torch.kron(unit, right[k]), a)
        right = solved(weight, a, b, terms, lambda unit, k, left=left: torch.kron(left[k], unit), b)
    whole = sum(torch.kron(left[k], right[k]) for k in range(terms))
    return float((weight - whole).square().sum())


def solved(
    weight: torch.Tensor, a: tuple[int, int], b: tuple[int, int], terms: int, column: Any, shape: tuple[int, int]
) -> torch.Tensor:
    """Least squares for one side of all terms: one column of the system for each of its entries."""
    columns = []
    for k, row, place in itertools.product(range(terms), range(shape[0]), range(shape[1])):
        unit = torch.zeros(shape, dtype=torch.float64)
        unit[row, place] = 1.0
        columns.append(column(unit, k).flatten())
    solution = np.linalg.lstsq(torch.stack(columns, 1).numpy(), weight.flatten().numpy(), rcond=None)[0]
    return torch.from_numpy(solution).reshape(terms, *shape)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_enough_terms_give_the_matrix_back_and_each_term_helps(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.sampled_from([4, 6, 8]), st.sampled_from([4, 6, 9])))
    a = (data.draw(st.sampled_from(divisors(shape[0]))), data.draw(st.sampled_from(divisors(shape[1]))))
    most = min(math.prod(a), shape[0] * shape[1] // math.prod(a))
    errors = []
    for terms in range(1, most + 1):
        dense, formed = linear(*shape, Kronecker(a, terms))
        errors.append(float((dense.weight - formed.matrix()).detach().norm()))
    assert errors[-1] < 1e-5
    assert errors == sorted(errors, reverse=True)


def test_a_matrix_of_zeros_can_still_learn() -> None:
    form = Kronecker((2, 2))
    _, formed = linear(4, 4, form)
    for name, value in form.weights(torch.zeros(4, 4)).items():
        formed.get_parameter(name).data.copy_(value)
    assert not formed.matrix().any()
    formed(torch.ones(4)).sum().backward()
    assert float(formed.b.grad.abs().max()) > 0  # type: ignore[union-attr]


# -- One module ----------------------------------------------------------------------------------------------------------------


def brute_macs(shape: tuple[int, int], form: Kronecker) -> int:
    """Multiplications of the two products, in the order that needs fewer."""
    (m1, n1), (m2, n2) = form.a, form.b(shape)
    return form.terms * min(m1 * n1 * n2 + m1 * m2 * n2, n1 * n2 * m2 + m1 * m2 * n1)


@pytest.mark.parametrize(
    ("shape", "form", "steps", "right"),
    [
        ((768, 768), Kronecker((384, 384)), ("turn", "b", "a", "turn"), "a"),  # the 7.7x model: attention
        ((3072, 768), Kronecker((8, 2)), ("b", "a"), "b"),  # its first FFN matrix
        ((768, 3072), Kronecker((2, 8)), ("a", "b"), "b"),  # its second
        ((768, 768), Kronecker((384, 48)), ("turn", "b", "a", "turn"), "a"),  # the 21x model: attention
    ],
)
def test_the_cheaper_factor_comes_first_and_the_larger_multiplies_all_tokens(
    shape: tuple[int, int], form: Kronecker, steps: tuple[str, ...], right: str
) -> None:
    assert form.steps(shape) == steps
    assert ("b" if form.b_is_large(shape) else "a") == right
    assert form.macs(shape) == brute_macs(shape, form)
    order = [step for step in steps if step != "turn"]
    (m1, n1), (m2, n2) = form.a, form.b(shape)
    first = {"a": m1 * n1 * n2 + m1 * m2 * n2, "b": n1 * n2 * m2 + m1 * m2 * n1}
    assert first[order[0]] <= first[order[1]]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape_multiplies_as_its_matrix(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.sampled_from([1, 4, 6, 12]), st.sampled_from([2, 8, 9])))
    a = (data.draw(st.sampled_from(divisors(shape[0]))), data.draw(st.sampled_from(divisors(shape[1]))))
    most = min(math.prod(a), shape[0] * shape[1] // math.prod(a))
    _, formed = linear(*shape, Kronecker(a, data.draw(st.integers(1, most))))
    value = noise(*data.draw(st.lists(st.integers(1, 3), max_size=3)), shape[1], seed=1)
    with torch.no_grad():
        torch.testing.assert_close(
            formed(value), nn.functional.linear(value, formed.matrix(), formed.bias), atol=1e-4, rtol=1e-4
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert formed(value).shape == (*value.shape[:-1], shape[0])


def test_gradients_are_those_of_the_matrix() -> None:
    _, formed = linear(6, 8, Kronecker((3, 2), 2))
    value = noise(5, 8, seed=3)
    formed(value).square().sum().backward()
    found = formed.a.grad
    formed.a.grad = None
    nn.functional.linear(value, formed.matrix(), formed.bias).square().sum().backward()
    torch.testing.assert_close(found, formed.a.grad, atol=1e-4, rtol=1e-4)


def test_a_table_keeps_a_row_per_word_and_its_padding_never_learns() -> None:
    dense = nn.Embedding(7, 6, padding_idx=1)
    form = Kronecker((7, 2), 2)
    table = form.module(dense)
    assert isinstance(table, KroneckerEmbedding)
    with torch.no_grad():
        for name, value in form.weights(dense.weight, table=True).items():
            table.get_parameter(name).copy_(value)
    assert table.a.shape == (1, 7, 4)  # a word's numbers side by side
    assert table.b.shape == (2, 1, 3)
    by_term = table.a.detach()[0].unflatten(-1, (2, 2))  # (words, terms, n1)
    whole = sum(torch.kron(by_term[:, term], table.b.detach()[term]) for term in range(2))
    torch.testing.assert_close(table.matrix(), whole)
    ids = torch.tensor([[0, 1], [6, 1]])
    torch.testing.assert_close(table(ids), table.matrix()[ids])
    table(ids).square().sum().backward()
    touched = table.a.grad.abs().sum((0, 2)) > 0  # type: ignore[union-attr]
    assert touched.tolist() == [True, False, False, False, False, False, True]


@pytest.mark.parametrize("terms", [1, 3, 6])
def test_a_sum_of_products_with_one_column_is_the_nearest_table_of_that_rank(terms: int) -> None:
    dense = nn.Embedding(9, 6)
    table = Kronecker((9, 1), terms).module(dense)
    with torch.no_grad():
        for name, value in Kronecker((9, 1), terms).weights(dense.weight, table=True).items():
            table.get_parameter(name).copy_(value)
    assert isinstance(table, KroneckerEmbedding)
    u, s, v = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
    torch.testing.assert_close(table.matrix(), u[:, :terms] * s[:terms] @ v[:terms], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("form", "shape", "table", "message"),
    [
        (Kronecker((5, 2)), (6, 4), False, "5 x 2 does not divide its 6 x 4"),
        (Kronecker((3, 3)), (6, 4), False, "3 x 3 does not divide its 6 x 4"),
        (Kronecker((3, 2), 5), (6, 4), False, "4 terms of 3 x 2 are exact already"),
        (Kronecker((3, 2)), (6, 4), True, "each of its 6 words keeps a row of its own"),
        (Kronecker((3, 2), 4), (6, 4), False, None),
        (Kronecker((6, 2)), (6, 4), True, None),
    ],
)
def test_what_cannot_be_factored_is_said(form: Kronecker, shape: tuple[int, int], table: bool, message: str | None) -> None:
    problem = form.problem(shape, table=table)
    assert problem is None if message is None else message in str(problem)


@pytest.mark.parametrize("a", [(0, 1), (1,), (1, 2, 3), 4, (1.0, 2), (True, 1), "ab"])
def test_a_first_factor_has_two_whole_sizes(a: Any) -> None:
    with pytest.raises(ValueError, match="a must be two whole numbers from 1"):
        Kronecker(a)


@pytest.mark.parametrize("terms", [0, 1.5, True])
def test_terms_are_whole(terms: Any) -> None:
    with pytest.raises(ValueError, match="terms must be a whole number from 1"):
        Kronecker((1, 1), terms)


# -- Whole models --------------------------------------------------------------------------------------------------------------

MIXED = {  # the four ways to order and turn, sums, a table
    "embeddings.word": Kronecker((99, 8)),
    "encoder.0.query": Kronecker((16, 16)),
    "encoder.0.key": Kronecker((16, 2), 2),
    "encoder.0.attention_out": Kronecker((2, 2)),
    "encoder.0.ffn_in": Kronecker((8, 2), 2),
    "encoder.2.value": Kronecker((2, 16)),
    "encoder.2.ffn_in": Kronecker((12, 8)),
    "encoder.2.ffn_out": Kronecker((2, 6), 3),
}


def mixed(model_type: str, **changes: Any) -> tuple[Any, Anatomy, Plan]:
    """A tiny model, cut and factored in part, with the anatomy and the plan that led there."""
    model = tiny(model_type, **changes)
    anatomy = anatomy_of(model)
    forms = dict(MIXED)
    if model_type == "electra":
        forms["embeddings.word"] = Kronecker((99, 4), 2)
    plan = Plan({"encoder.1.attention": (), "encoder.1.neurons": (0, 5, 6, 7), "encoder.2.heads": (0, 2)}, forms)
    return shrink(model, anatomy, plan), anatomy, plan


def dense_twin(model: Any) -> Any:
    """The same model with every factored matrix multiplied out."""
    import copy

    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, KroneckerLinear):
            plain: nn.Module = nn.Linear(module.shape[1], module.shape[0])
            plain.weight.data, plain.bias.data = module.matrix().detach(), module.bias.detach()  # type: ignore[assignment, union-attr]
            twin.set_submodule(name, plain)
        elif isinstance(module, KroneckerEmbedding):
            twin.set_submodule(name, nn.Embedding.from_pretrained(module.matrix().detach(), padding_idx=module.padding_idx))
    return twin.eval()


@pytest.mark.parametrize("model_type", SEPARATE)
def test_a_factored_model_computes_its_matrices_and_can_be_gated(model_type: str) -> None:
    model, anatomy, plan = mixed(model_type)
    assert anatomy_of(model) == anatomy.after(plan)
    twin, inputs = dense_twin(model), batch(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, twin(**inputs).logits, atol=2e-5, rtol=2e-5)
    gates = {"encoder.0.heads": torch.tensor([1.0, 0.0, 0.5, 1.0]), "encoder.0.neurons": torch.linspace(0, 1, 24)}
    with torch.no_grad(), gated(twin, anatomy_of(twin), gates):
        expected = twin(**inputs).logits
    with torch.no_grad(), gated(model, anatomy_of(model), gates):
        torch.testing.assert_close(model(**inputs).logits, expected, atol=2e-5, rtol=2e-5)


def test_factors_of_a_decision_are_taken_as_they_are_and_the_bias_stays() -> None:
    model = tiny("bert")
    anatomy = anatomy_of(model)
    path = "bert.encoder.layer.0.attention.self.query"
    plan = Plan(forms={"encoder.0.query": Kronecker((16, 16))})
    weights = {f"{path}.a": noise(1, 16, 16), f"{path}.bias": torch.ones(32)}
    small = shrink(model, anatomy, Decision(plan, weights=weights))
    formed = small.get_submodule(path)
    assert torch.equal(formed.a, weights[f"{path}.a"])
    assert torch.equal(formed.bias, torch.ones(32))
    nearest = shrink(model, anatomy, plan).get_submodule(path)
    assert torch.equal(formed.b, nearest.b)
    assert not torch.equal(formed.a, nearest.a)
    assert isinstance(model.get_submodule(path), nn.Linear)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("a", (2, 16, 16), r"shape \(2, 16, 16\); .* has \(1, 16, 16\)"), ("c", (1,), "has no such parameter")],
)
def test_factors_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    model = tiny("bert")
    path = "bert.encoder.layer.0.attention.self.query"
    decision = Decision(Plan(forms={"encoder.0.query": Kronecker((16, 16))}), weights={f"{path}.{name}": torch.zeros(shape)})
    with pytest.raises(PlanError, match=message):
        shrink(model, anatomy_of(model), decision)


def test_a_factored_model_can_lose_sublayers_and_nothing_else() -> None:
    model, anatomy, first = mixed("bert")
    after = anatomy_of(model)
    second = Plan({"encoder.0.attention": (), "encoder.0.ffn": (), "encoder.1.neurons": (1, 3)})
    small = shrink(model, after, second)
    assert_equal(small, shrink(tiny("bert"), anatomy, first.then(second)))
    assert_same(model, after, {"encoder.0.attention": torch.zeros(1)}, shrink(model, after, Plan({"encoder.0.attention": ()})))
    with pytest.raises(
        PlanError,
        match=r"'encoder.0.heads' cannot be cut: its query matrix 'encoder.0.query' is stored as Kron.*\n.*\n.*cut first",
    ):
        shrink(model, after, Plan({"encoder.0.heads": (0, 1)}))
    assert_equal(model, shrink(model, after, Plan({"encoder.0.heads": (0, 1, 2, 3)})))
    with pytest.raises(PlanError, match="'encoder.0.heads' cannot be scaled: .* is stored as Kronecker.*\n.*scale first"):
        shrink(model, after, Decision(scales={"encoder.0.heads": torch.ones(4)}))


@pytest.mark.parametrize("form", [Kronecker((99, 8)), Kronecker((99, 8), 3)])
@pytest.mark.parametrize("model_type", ENCODERS)
def test_a_language_model_decodes_with_its_table_in_the_new_form(model_type: str, form: Kronecker, tmp_path: Path) -> None:
    model = tiny(
        model_type,
        auto_class="AutoModelForMaskedLM",
        **({"embedding_size": 32} if model_type in ("electra", "mobilebert") else {}),
    )
    anatomy, plan = anatomy_of(model), Plan(forms={"embeddings.word": form})
    matrix = anatomy.matrices["embeddings.word"]
    assert matrix.tied is None
    assert matrix.decoder is not None
    small = shrink(model, anatomy, plan)
    assert anatomy_of(small) == anatomy.after(plan)
    assert small.num_parameters() == cost.parameters(model, anatomy).of(plan, anatomy)
    dense = copy.deepcopy(model)
    table: Any = small.get_submodule(matrix.module)
    with torch.no_grad():
        dense.get_input_embeddings().weight.copy_(table.matrix())  # the last Linear reads it too
        inputs = batch(model)
        torch.testing.assert_close(small(**inputs).logits, dense(**inputs).logits, rtol=1e-4, atol=1e-5)
        wide = unshrink(small, copy.deepcopy(model), anatomy, plan)
        torch.testing.assert_close(wide(**inputs).logits, dense(**inputs).logits, rtol=1e-4, atol=1e-5)
    decoder: Any = small.get_output_embeddings()
    states = torch.randn(2, 5, 32)
    torch.testing.assert_close(decoder(states), states @ table.matrix().T + decoder.bias)
    assert isinstance(copy.deepcopy(small).get_output_embeddings()._table[0], type(table))
    checkpoint.save(small, plan, tmp_path / "model", tokenizer_from=tmp_path)
    loaded = checkpoint.load(tmp_path / "model")
    loaded.save_pretrained(tmp_path / "again")
    for other in (loaded, checkpoint.load(tmp_path / "again"), copy.deepcopy(loaded)):
        assert_equal(small, other)
        with torch.no_grad():
            assert torch.equal(small(**inputs).logits, other(**inputs).logits)


def test_a_table_learns_from_what_it_decodes() -> None:
    model = tiny("bert", auto_class="AutoModelForMaskedLM")
    small = shrink(model, anatomy_of(model), Plan(forms={"embeddings.word": Kronecker((99, 8), 2)}))
    table: Any = small.get_input_embeddings()
    small.get_output_embeddings()(torch.randn(3, 32)).square().sum().backward()
    assert bool((table.a.grad[0].abs().sum(1) > 0).all())  # each word, though no id was read
    assert float(table.b.grad.abs().min()) > 0


def test_a_table_that_is_tied_to_another_is_refused_and_the_tie_named() -> None:
    anatomy = anatomy_of(tiny("bert"))
    words = replace(anatomy.matrices["embeddings.word"], tied="decoder.words.weight")
    tied = replace(anatomy, matrices={**anatomy.matrices, words.id: words})
    with pytest.raises(PlanError, match=r"'embeddings.word' cannot be stored as .*: it is tied to 'decoder.words.weight'"):
        Plan(forms={"embeddings.word": Kronecker((99, 8))}).check(tied)


def test_a_cut_and_a_form_in_one_plan_meet_in_the_shapes_after_the_cut() -> None:
    model = tiny("bert")
    anatomy = anatomy_of(model)
    form = Kronecker((3, 2))
    with pytest.raises(
        PlanError, match="'encoder.0.ffn_in' cannot be stored as .*: a first factor of 3 x 2 does not divide its 22"
    ):
        shrink(model, anatomy, Plan({"encoder.0.neurons": tuple(range(22))}, {"encoder.0.ffn_in": form}))
    cut = Plan({"encoder.0.neurons": tuple(range(21))})
    both = shrink(model, anatomy, Plan(cut.keep, {"encoder.0.ffn_in": form}))
    once = shrink(model, anatomy, cut)
    assert_equal(both, shrink(once, anatomy_of(once), Plan(forms={"encoder.0.ffn_in": form})))


def test_costs_know_forms_but_no_milliseconds() -> None:
    model, anatomy, plan = mixed("bert")
    dense = tiny("bert")
    assert cost.parameters(dense, anatomy).of(plan, anatomy) == model.num_parameters()
    assert cost.parameters(model, anatomy_of(model)).dense == model.num_parameters()
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) == 4 * model.num_parameters()
    lengths = np.array([5])
    formed, bare = cost.macs(anatomy, lengths).of(plan, anatomy), cost.macs(anatomy, lengths).of(Plan(plan.keep), anatomy)
    cut = anatomy.after(Plan(plan.keep)).matrices
    saved = sum(math.prod(cut[name].shape) - form.macs(cut[name].shape) for name, form in MIXED.items() if "word" not in name)
    assert bare - formed == pytest.approx(5 * saved)
    assert cost.macs(anatomy_of(model), lengths).dense == pytest.approx(formed)
    table = {site.kind: {site.size: 1.0} for site in anatomy.sites.values()}
    with pytest.raises(TargetError, match="the cost of a form in ms is not known before it is measured"):
        cost.latency(anatomy, 0.0, table).of(plan, anatomy)


@pytest.mark.parametrize("model_type", ["roberta", "electra", "distilbert"])
def test_saved_is_loaded_bit_for_bit(model_type: str, tmp_path: Path) -> None:
    model, _, plan = mixed(model_type)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)  # trained on: not what the plan alone would give
    checkpoint.save(model, plan, tmp_path / "model", tokenizer_from=tmp_path)
    loaded = checkpoint.load(tmp_path / "model")
    assert_equal(model, loaded)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert anatomy_of(loaded) == anatomy_of(model)
    inputs = batch(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)


def test_dense_is_no_form_of_a_plan() -> None:
    assert Plan(forms={"encoder.0.query": DENSE}) == Plan()
    model = tiny("bert")
    anatomy = anatomy_of(model)
    after = anatomy.after(Plan(forms={"encoder.0.query": Kronecker((16, 16))}))
    with pytest.raises(PlanError, match="'encoder.0.query' is stored as Kronecker.* already"):
        Plan(forms={"encoder.0.query": Kronecker((4, 4))}).check(after)
    with pytest.raises(
        PlanError, match=r"the matrix 'encoder.0.querry', which this model does not have.\n.*did you mean 'encoder.0.query'"
    ):
        Plan(forms={"encoder.0.querry": Kronecker((4, 4))}).check(anatomy)


# -- Files ---------------------------------------------------------------------------------------------------------------------


def arrays(model: Any, shapes: Any) -> list[dict[str, np.ndarray]]:
    made = []
    for seed, (rows, seq) in enumerate(shapes):
        item = {name: value.numpy() for name, value in batch(model, rows, seq, seed).items()}
        if "token_type_ids" in family_of(model.config.model_type).inputs(model):
            item["token_type_ids"] = np.random.default_rng(seed).integers(0, 2, item["input_ids"].shape)
        made.append(item)
    return made


def answers(model: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.numpy()


def check_files(model: Any, folder: Path) -> None:
    """Exports every variant and compares with the model on shapes that the export did not see."""
    attentions = len(anatomy_of(model).attentions)
    products = sum(
        1 if isinstance(module, nn.Linear) else module.form.terms
        for module in model.modules()
        if isinstance(module, (nn.Linear, KroneckerLinear))
    )
    forwards = [
        module.forward.__func__ for module in model.modules() if isinstance(module, (KroneckerLinear, KroneckerEmbedding))
    ]
    paths = {variant: folder / f"{variant}.onnx" for variant in Variant}
    made = Onnx(weight_bits=WEIGHT_BITS).export_all(model, arrays(model, ((3, 7), (1, 5), (6, 12), (2, 2), (40, 16))), paths)
    unseen = arrays(model, ((4, 9), (1, 3), (2, 31)))
    top = max(float(np.abs(answers(model, item)).max()) for item in unseen)
    for variant, artifact in made.items():
        small = variant in exporter.INT8
        assert fused_attentions(artifact.path) == (attentions if variant in exporter.FUSED else 0)
        assert quantized_matrices(artifact.path) == (products - 1 if small else 0)
        assert any("factored tables" in note for note in artifact.notes)
        run = OnnxRuntime().load(artifact.path, threads=1)
        for inputs in unseen:
            difference = np.abs(run(inputs)["logits"] - answers(model, inputs)).max()
            bound = (DYNAMIC if variant is Variant.INT8_DYNAMIC else 0.25) * top if small else 1e-5 * max(1.0, top)
            assert difference <= bound, (variant, inputs["input_ids"].shape)
    again = [module.forward.__func__ for module in model.modules() if isinstance(module, (KroneckerLinear, KroneckerEmbedding))]
    assert again == forwards


@pytest.mark.slow
def test_files_of_a_factored_model_equal_it(tmp_path: Path) -> None:
    check_files(mixed("bert")[0], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", [Kronecker((99, 1)), Kronecker((99, 1), 12), Kronecker((99, 4), 2)])
def test_files_of_a_table_with_few_numbers_a_word_equal_the_model(form: Kronecker, tmp_path: Path) -> None:
    model = tiny("bert")
    check_files(shrink(model, anatomy_of(model), Plan(forms={"embeddings.word": form})), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["roberta", "electra", "distilbert"])
def test_files_of_every_family_equal_the_factored_model(model_type: str, tmp_path: Path) -> None:
    check_files(mixed(model_type)[0], tmp_path)


@pytest.mark.parametrize("a", [(2, 2), (4, 3), (12, 1), (1, 6), (6, 12), (24, 4), (3, 12)])
def test_rows_of_a_token_at_the_larger_factor(a: tuple[int, int]) -> None:
    form = Kronecker(a)
    module = form.module(nn.Linear(12, 24))
    seen: list[tuple[int, ...]] = []
    module.large.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))  # type: ignore[union-attr]
    with torch.no_grad():
        module(torch.zeros(5, 12))
    assert [math.prod(shape[:-1]) for shape in seen] == [5 * form.rows((24, 12))]
