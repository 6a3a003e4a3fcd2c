"""Low rank: the nearest two thin matrices, what pays by trying, files of every family, and both products in integers."""

from __future__ import annotations

import copy
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from tiny import ENCODERS, MODEL_TYPES, SEPARATE, WEIGHT_BITS, batch, tiny
from torch import nn

from slimformer.core import cost
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink, unshrink
from slimformer.errors import PlanError
from slimformer.exporters.base import FILES, PAIRS, Variant
from slimformer.exporters.onnx import Onnx, quantized_matrices
from slimformer.families.base import anatomy_of, family_of
from slimformer.forms.base import weight_of
from slimformer.forms.kronecker import Kronecker
from slimformer.forms.low_rank import LowRank, LowRankLinear, LowRankTable, most_rank
from slimformer.runtimes.onnxruntime import OnnxRuntime
from slimformer.saving import checkpoint
from slimformer.testing.checks import assert_equal

DYNAMIC = 0.05 * 2 ** (8 - WEIGHT_BITS)  # what dynamic int8 may be off, as a share of the largest output
SPEAKING = tuple(kind for kind in MODEL_TYPES if kind not in ENCODERS)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(form: LowRank, dense: Any) -> Any:
    module: Any = form.module(dense)
    with torch.no_grad():
        for name, value in form.weights(dense.weight, table=isinstance(dense, nn.Embedding)).items():
            module.get_parameter(name).copy_(value)
    return module


# -- One matrix ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6)])
@pytest.mark.parametrize("rank", [1, 2])
def test_no_other_of_that_rank_comes_nearer(shape: tuple[int, int], rank: int) -> None:
    """Brute force that knows no singular values: from many starts, each thin matrix in turn by least squares for the other."""
    dense = nn.Linear(shape[1], shape[0])
    dense.weight.data = noise(*shape)
    weight = dense.weight.detach().double().numpy()
    error = float(np.square(weight - filled(LowRank(rank), dense).matrix().detach().numpy()).sum())
    best = np.inf
    for seed in range(6):
        first = np.random.default_rng(seed).normal(size=(rank, shape[1]))
        for _ in range(200):
            second = np.linalg.lstsq(first.T, weight.T, rcond=None)[0].T
            first = np.linalg.lstsq(second, weight, rcond=None)[0]
        best = min(best, float(np.square(weight - second @ first).sum()))
    assert error == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 9), (2, 2), (3, 8), (12, 12), (24, 32), (30522, 768)])
def test_the_largest_rank_that_pays_is_the_last_of_fewer_numbers(shape: tuple[int, int]) -> None:
    most = most_rank(shape)
    ranks = [rank for rank in range(1, min(shape) + 1) if rank * shape[0] + rank * shape[1] < shape[0] * shape[1]]
    assert most == max(ranks, default=0)
    for rank in (most, most + 1):
        problem = LowRank(rank).problem(shape) if rank else None
        assert (problem is None) == (rank <= most)
        if problem is not None:
            assert (f"only ranks up to {most} pay" if most else "no rank pays") in problem


@pytest.mark.parametrize("rank", [0, -1, 1.0, True, "4"])
def test_a_rank_is_a_whole_number(rank: Any) -> None:
    with pytest.raises(ValueError, match="rank must be a whole number from 1"):
        LowRank(rank)


def test_a_rank_that_does_not_pay_is_refused_with_the_largest_that_does() -> None:
    anatomy = anatomy_of(tiny("bert"))
    with pytest.raises(
        PlanError,
        match=r"'encoder.0.query' cannot be stored as LowRank\(rank=16\): rank 16 is no fewer numbers than its 32 x 32, of which only "
        r"ranks up to 15 pay\.",
    ):
        Plan(forms={"encoder.0.query": LowRank(16)}).check(anatomy)
    Plan(forms={"encoder.0.query": LowRank(15)}).check(anatomy)


def test_a_product_and_its_gradients_are_those_of_the_matrix() -> None:
    dense = nn.Linear(8, 6)
    module = filled(LowRank(3), dense)
    assert isinstance(module, LowRankLinear)
    value = noise(5, 8, seed=3)
    torch.testing.assert_close(module(value), nn.functional.linear(value, module.matrix(), dense.bias))
    module(value).square().sum().backward()
    found, module.first.grad = module.first.grad, None
    nn.functional.linear(value, module.matrix(), module.bias).square().sum().backward()
    torch.testing.assert_close(found, module.first.grad, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(value).shape == (5, 6)


def test_words_keep_numbers_of_their_own_and_padding_never_learns() -> None:
    dense = nn.Embedding(20, 6, padding_idx=1)
    table = filled(LowRank(3), dense)
    assert isinstance(table, LowRankTable)
    ids = torch.tensor([[0, 1], [6, 1]])
    torch.testing.assert_close(table(ids), table.matrix()[ids])
    table(ids).square().sum().backward()
    assert (table.second.grad.abs().sum(1) > 0).nonzero().flatten().tolist() == [0, 6]
    states = noise(2, 3, 6)
    torch.testing.assert_close(table.decode(states), states @ table.matrix().T)


# -- Whole models --------------------------------------------------------------------------------------------------------------

MIXED = {
    "embeddings.word": LowRank(6),
    "encoder.0.query": LowRank(5),
    "encoder.0.key": LowRank(7),
    "encoder.0.attention_out": LowRank(3),
    "encoder.0.ffn_in": LowRank(13),
    "encoder.2.value": LowRank(4),
    "encoder.2.ffn_out": Kronecker((2, 6), 3),
    "encoder.2.ffn_in": LowRank(9),
}


def mixed(model_type: str) -> tuple[Any, Any, Plan]:
    model = tiny(model_type)
    anatomy = anatomy_of(model)
    plan = Plan({"encoder.1.attention": (), "encoder.1.neurons": (0, 5, 6, 7), "encoder.2.heads": (0, 2)}, MIXED)
    return shrink(model, anatomy, plan), anatomy, plan


@pytest.mark.parametrize("model_type", SEPARATE)
@pytest.mark.slow
def test_a_model_computes_its_matrices_and_comes_back(model_type: str, tmp_path: Path) -> None:
    model, anatomy, plan = mixed(model_type)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)  # trained on: not what the plan alone would give
    assert anatomy_of(model) == anatomy.after(plan)
    assert model.num_parameters() == cost.parameters(tiny(model_type), anatomy).of(plan, anatomy)
    inputs = batch(model)
    checkpoint.save(model, plan, tmp_path / "model", tokenizer_from=tmp_path)
    loaded = checkpoint.load(tmp_path / "model")
    assert_equal(model, loaded)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)
        wide = unshrink(model, tiny(model_type), anatomy, plan)
        torch.testing.assert_close(wide(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_each_product_is_read_at_a_point_of_its_own() -> None:
    model, _, _ = mixed("bert")
    points = anatomy_of(model).points
    path = "bert.encoder.layer.0.attention.self"
    assert points["encoder.0.query.narrow.input"].modules == (f"{path}.query.narrow",)
    assert points["encoder.0.query.widen.input"].modules == (f"{path}.query.widen",)
    assert points["encoder.0.attention.input"].modules == (f"{path}.value",)
    assert weight_of(model, f"{path}.query.narrow") == f"{path}.query.first"
    assert weight_of(model, f"{path}.query.widen") == f"{path}.query.second"


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


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["bert", "distilbert", "deberta-v2", "mpnet"])  # the others are traced like bert
def test_files_multiply_by_two_thin_matrices(model_type: str, tmp_path: Path) -> None:
    model, _, _ = mixed(model_type)
    paths = {variant: tmp_path / f"{variant}.onnx" for variant in FILES}
    made = Onnx(weight_bits=WEIGHT_BITS).export_all(model, arrays(model, ((3, 7), (1, 5), (6, 12), (2, 2), (40, 16))), paths)
    unseen = arrays(model, ((4, 9), (1, 3), (2, 31)))
    top = max(float(np.abs(answers(model, item)).max()) for item in unseen)
    linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    thin = 2 * sum(isinstance(module, LowRankLinear) for module in model.modules())
    for variant, artifact in made.items():
        small = "int8" in variant
        assert quantized_matrices(artifact.path) == (
            linears + thin + 3 - 1 if small else 0
        )  # three terms; the classifier is float
        shapes = {tuple(value.shape or ()) for value in onnx_ir.load(artifact.path).graph.initializers.values()}
        assert {(32, 5), (5, 32), (32, 13), (13, 24)} <= shapes
        run = OnnxRuntime().load(artifact.path, threads=1)
        for inputs in unseen:
            difference = np.abs(run(inputs)["logits"] - answers(model, inputs)).max()
            bound = (DYNAMIC if variant is Variant.INT8_DYNAMIC else 0.25) * top if small else 1e-5 * max(1.0, top)
            assert difference <= bound, (variant, inputs["input_ids"].shape)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), [*zip(SPEAKING, cycle([LowRank(6), Kronecker((2, 2), 2)]), strict=False)])
def test_files_of_models_that_write_hold_the_factors_too(kind: str, form: Any, tmp_path: Path) -> None:
    """What reads the sentence has its rows, what reads the text its own, and both branches of the decoder read alike."""
    model = tiny(kind)
    anatomy = anatomy_of(model)
    chosen = [item.id for item in anatomy.encoder_matrices() if ".1." not in item.id and item.tied is None]
    small = shrink(model, anatomy, Plan(forms=dict.fromkeys(chosen, form)))
    paths = {variant: tmp_path / PAIRS[variant].name for variant in PAIRS}
    made = Onnx(agreement=0.8, weight_bits=WEIGHT_BITS).export_all(small, arrays(small, ((3, 7), (1, 5), (40, 12))), paths)
    products = len(anatomy.encoder_matrices()) + len(chosen) + 1
    for variant, artifact in made.items():
        if "int8" in variant:
            assert any(f"int8: {products} of {products} matrices" in note for note in artifact.notes), artifact.notes


def test_a_copy_is_a_model_of_its_own() -> None:
    model, _, _ = mixed("bert")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.bert.encoder.layer[0].attention.self.query.first.zero_()
    assert bool(model.bert.encoder.layer[0].attention.self.query.first.any())
