"""Codebooks: centres by hand and against trying all, codes that come back from files, and exported files that are smaller."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import safetensors.torch
import torch
from tiny import batch, tiny
from torch import nn

from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.errors import ModelError, PlanError
from slimformer.exporters.base import Variant
from slimformer.exporters.onnx import Onnx
from slimformer.families.base import anatomy_of
from slimformer.forms.codebook import Codebook, CodebookLinear, CodebookTable, clustered, nearest_entries
from slimformer.saving import checkpoint
from slimformer.testing.checks import assert_equal

FORMS = {"embeddings.word": Codebook(8, 16), "encoder.0.ffn_in": Codebook(4, 5), "encoder.1.key": Codebook(16, 4)}


def filled(form: Codebook, dense: Any) -> Any:
    module: Any = form.module(dense)
    with torch.no_grad():
        for name, value in form.weights(dense.weight, table=isinstance(dense, nn.Embedding)).items():
            module.get_parameter(name).copy_(value)
    return module


def test_clusters_that_are_apart_are_found() -> None:
    values = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.2, 0.0], [10.0, 0.2], [0.0, 7.0]])
    centres, codes = clustered(values, 3)
    assert codes[0] == codes[2]
    assert codes[1] == codes[3]
    torch.testing.assert_close(centres[codes], torch.tensor([[0.1, 0], [10, 0.1], [0.1, 0], [10, 0.1], [0, 7.0]]))


def test_no_division_into_two_has_a_smaller_error() -> None:
    """Every way to divide nine numbers: k-means on a line may end in a worse one, and does not here."""
    values = torch.randn(9, 1, generator=torch.Generator().manual_seed(3))
    counts = torch.arange(1.0, 10.0)

    def error(codes: Any) -> float:
        total = 0.0
        for entry in (0, 1):
            inside = torch.tensor([code == entry for code in codes])
            own, weight = values[inside], counts[inside][:, None]
            if len(own):
                total += float((weight * (own - (own * weight).sum(0) / weight.sum()).square()).sum())
        return total

    _, codes = clustered(values, 2, counts)
    assert error(codes.tolist()) == pytest.approx(min(error(item) for item in itertools.product((0, 1), repeat=9)), rel=1e-5)


def test_each_piece_has_the_entry_that_is_nearest_and_entries_are_means() -> None:
    values = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    centres, codes = clustered(values, 7)
    far = torch.cdist(values, centres)
    assert torch.equal(codes, far.argmin(1))
    assert torch.equal(nearest_entries(values, centres), codes)
    for entry in range(7):
        torch.testing.assert_close(centres[entry], values[codes == entry].mean(0))


def test_fewer_different_rows_than_entries_are_exact() -> None:
    values = torch.tensor([[1.0], [2.0]]).repeat(5, 1)
    centres, codes = clustered(values, 8)
    assert torch.equal(centres[codes], values)
    assert bool(centres.isfinite().all())


def test_a_table_looks_pieces_up_and_padding_never_teaches() -> None:
    dense = nn.Embedding(40, 6, padding_idx=1)
    table = filled(Codebook(3, 4), dense)
    assert isinstance(table, CodebookTable)
    assert (table.book.shape, table.codes.shape, table.codes.dtype) == ((12, 2), (40, 3), torch.uint8)
    row = torch.cat([table.book[part * 4 + int(table.codes[5, part])] for part in range(3)])
    torch.testing.assert_close(table.matrix()[5], row)
    ids = torch.tensor([[5, 1]])
    torch.testing.assert_close(table(ids), table.matrix()[ids])
    table(torch.tensor([[1, 1]])).sum().backward()
    assert not table.book.grad.any()
    table(ids).sum().backward()
    assert float(table.book.grad.sum()) == 6


def test_a_linear_learns_its_entries() -> None:
    module = filled(Codebook(2, 3), nn.Linear(6, 8))
    assert isinstance(module, CodebookLinear)
    value = torch.randn(5, 6)
    torch.testing.assert_close(module(value), nn.functional.linear(value, module.matrix(), module.bias))
    module(value).square().sum().backward()
    assert module.book.grad is not None
    assert module.codes.grad is None


@pytest.mark.parametrize(
    ("form", "shape", "message"),
    [
        (Codebook(5, 4), (60, 8), "5 parts do not divide its 8 columns"),
        (Codebook(2, 64), (60, 8), "codes and 64 entries would hold no fewer numbers than 60 x 8"),
        (Codebook(2, 16), (60, 8), None),
    ],
)
def test_what_cannot_be_coded_is_said(form: Codebook, shape: tuple[int, int], message: str | None) -> None:
    problem = form.problem(shape, table=True)
    assert problem is None if message is None else message in str(problem)


@pytest.mark.parametrize(("parts", "entries"), [(0, 4), (1.0, 4), (True, 4), (2, 1), (2, 257), (2, "4")])
def test_codes_are_bytes(parts: Any, entries: Any) -> None:
    with pytest.raises(ValueError, match="must be a whole number from"):
        Codebook(parts, entries)


def test_codes_come_back_as_bytes_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    model = tiny("bert")
    plan = Plan(forms=FORMS)
    small = shrink(model, anatomy_of(model), plan)
    folder = tmp_path / "model"
    checkpoint.save(small, plan, folder, tokenizer_from=tmp_path)
    loaded = checkpoint.load(folder)
    assert_equal(small, loaded)
    assert loaded.bert.embeddings.word_embeddings.codes.dtype == torch.uint8
    inputs = batch(model)
    with torch.no_grad():
        assert torch.equal(small(**inputs).logits, loaded(**inputs).logits)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state["bert.embeddings.word_embeddings.codes"][3, 2] = 16
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"word_embeddings' holds codes that are wrong: code 16 names none of 16 entries"):
        checkpoint.load(folder)
    state["bert.embeddings.word_embeddings.codes"] = state["bert.embeddings.word_embeddings.codes"].to(torch.int32)
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="is stored as int32, and weights are"):
        checkpoint.load(folder)


@pytest.mark.slow
def test_files_hold_codes_and_give_the_same(tmp_path: Path) -> None:
    model = tiny("bert")
    small = shrink(model, anatomy_of(model), Plan(forms=FORMS))
    seen = [{name: value.numpy() for name, value in batch(model, rows, 7, rows).items()} for rows in (3, 6)]
    variants = (Variant.FLOAT, Variant.FUSED, Variant.INT8_STATIC, Variant.INT8_FUSED)
    made = Onnx(agreement=0.5).export_all(small, seen, {variant: tmp_path / f"{variant}.onnx" for variant in variants})
    for variant, artifact in made.items():
        held = [value.const_value for value in onnx_ir.load(artifact.path).graph.initializers.values()]
        shapes = {(tuple(item.shape), str(item.dtype)) for item in held if item is not None}
        assert {((99, 8), "UINT8"), ((24, 4), "UINT8"), ((32, 16), "UINT8")} <= shapes
        assert ((99, 32), "FLOAT") not in shapes
        assert artifact.max_difference < 1e-4 or "int8" in variant


def test_a_runtime_puts_a_linear_together_once(tmp_path: Path) -> None:
    """ONNX Runtime folds what is constant when it loads a file: no code is left to look up but those of words."""
    model = tiny("bert")
    small = shrink(model, anatomy_of(model), Plan(forms=FORMS))
    seen = [{name: value.numpy() for name, value in batch(model, 3, 7, 1).items()}]
    path = Onnx().export(small, seen, tmp_path / "model.onnx", Variant.FLOAT).path
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    written, loaded = (onnx_ir.load(file).graph for file in (path, tmp_path / "loaded.onnx"))

    def lookups(graph: Any) -> int:
        return sum(node.op_type == "Gather" and "codes" in str(node.inputs[0].name) for node in graph)

    bytes_of = [sum(value.const_value.nbytes for value in graph.initializers.values()) for graph in (written, loaded)]
    assert lookups(written) == lookups(loaded) == 1
    assert bytes_of[0] < bytes_of[1]


def test_a_table_with_a_form_is_refused() -> None:
    model = tiny("bert")
    small = shrink(model, anatomy_of(model), Plan(forms={"embeddings.word": Codebook(8, 16)}))
    with pytest.raises(PlanError, match="stored as Codebook"):
        Plan(forms={"embeddings.word": Codebook(4, 16)}).check(anatomy_of(small))


def test_dtype_of_the_parameters_is_kept_by_copies() -> None:
    model = tiny("bert")
    small = shrink(model, anatomy_of(model), Plan(forms=FORMS))
    half = small.half()
    assert half.bert.embeddings.word_embeddings.codes.dtype == torch.uint8
    assert np.dtype("uint8") == half.bert.embeddings.word_embeddings.codes.numpy().dtype
