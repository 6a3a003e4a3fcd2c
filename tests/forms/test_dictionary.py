"""Dictionaries: packing by hand, values against trying all bins, outliers apart, files of 4 and 3.2 bits that ONNX Runtime opens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnx_ir
import onnxruntime
import pytest
import safetensors.torch
import torch
from tiny import batch, tiny
from torch import nn

from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.errors import ModelError
from slimformer.exporters.base import Variant
from slimformer.exporters.onnx import Onnx
from slimformer.families.base import anatomy_of
from slimformer.forms.dictionary import Dictionary, centroids, nearest_values, unlikely
from slimformer.saving import checkpoint
from slimformer.testing.checks import assert_equal

FORMS = {
    "embeddings.word": Dictionary(16, 3),
    "encoder.0.ffn_in": Dictionary(8, 5),
    "encoder.1.key": Dictionary(16),
    "encoder.2.value": Dictionary(4, 1, 4),
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_codes_are_digits_of_a_number() -> None:
    codes = torch.tensor([3, 15, 0, 7, 1])
    assert Dictionary(16).packed(codes).tolist() == [3 + 16 * 15, 0 + 16 * 7, 1]
    assert Dictionary(8).packed(torch.tensor([7, 7, 7, 7, 7, 1])).tolist() == [8**5 - 1, 1]
    assert Dictionary(8).packed(codes.clamp_max(7)).dtype == torch.int16


@pytest.mark.parametrize("entries", [4, 8, 16, 256])
@pytest.mark.parametrize("count", [1, 2, 5, 9, 320])
def test_what_is_packed_comes_back(entries: Any, count: int) -> None:
    codes = torch.randint(entries, (count,), generator=torch.Generator().manual_seed(count))
    form = Dictionary(entries)
    packed = form.packed(codes)
    assert len(packed) == math.ceil(count / form.per_number)
    assert torch.equal(form.unpacked(packed, count), codes)


def test_values_are_means_of_what_is_nearest_and_no_round_is_missing() -> None:
    """The rounds as the paper has them, written out; it ends at the least sum of distances of all rounds."""
    values = noise(400).double()
    found = centroids(values, 8)
    current = torch.stack([part.mean() for part in values.sort().values.chunk(8)])
    sums, seen = [], []
    for _ in range(60):
        codes = (values[:, None] - current).abs().argmin(1)
        sums.append(float((values - current[codes]).abs().sum()))
        seen.append(current)
        current = torch.stack([values[codes == entry].mean() for entry in range(8)])
    last = next((index for index in range(1, 60) if sums[index] >= sums[index - 1]), 60) - 1
    torch.testing.assert_close(found, seen[last])
    assert last > 3
    codes = nearest_values(values, found)
    assert torch.equal(codes, (values[:, None] - found).abs().argmin(1))


def test_a_number_that_is_none_ends_it_too() -> None:
    assert centroids(torch.tensor([1.0, float("nan"), 2.0, 3.0]), 2).shape == (2,)


def test_few_different_numbers_are_exact() -> None:
    values = torch.tensor([1.0, 2.0, 5.0]).repeat(40)
    found = centroids(values, 8)
    torch.testing.assert_close(found[nearest_values(values, found)], values)
    assert bool(found.isfinite().all())


def test_outliers_are_those_of_little_density() -> None:
    """By hand, number by number."""
    values = torch.cat([0.05 * noise(1000), torch.tensor([0.9, -0.8])])
    mean, spread = float(values.double().mean()), float(values.double().std(unbiased=False))
    few = [
        x
        for x in values.tolist()
        if math.log(math.exp(-(((x - mean) / spread) ** 2) / 2) / (spread * math.sqrt(2 * math.pi))) < -4
    ]
    assert unlikely(values) == len(few)
    assert 2 <= len(few) < 20
    assert unlikely(values, -60.0) == 2
    assert unlikely(torch.ones(5)) == 0


def test_groups_of_rows_have_values_of_their_own() -> None:
    weight = torch.cat([noise(4, 10), 50 + noise(4, 10, seed=1)])
    dense = nn.Linear(10, 8)
    dense.weight.data = weight
    form = Dictionary(4, 0, 2)
    module: Any = form.module(dense)
    with torch.no_grad():
        for name, value in form.weights(weight).items():
            module.get_parameter(name).copy_(value)
    halves = [Dictionary(4).weights(half)["values"] for half in weight.chunk(2)]
    torch.testing.assert_close(module.values.detach(), torch.cat(halves))
    expected = [own[(half[..., None] - own).abs().argmin(-1)] for own, half in zip(halves, weight.chunk(2), strict=True)]
    torch.testing.assert_close(module.matrix().detach(), torch.cat(expected))
    assert "3 groups do not divide its 8 rows" in str(Dictionary(4, 0, 3).problem((8, 10)))


def test_bits_are_those_of_the_packed_codes() -> None:
    assert [Dictionary(entries).bits for entries in (4, 8, 16, 256)] == [2, 3.2, 4, 8]


@pytest.mark.parametrize("outliers", [0, 3])
def test_a_matrix_is_its_values_and_its_outliers(outliers: int) -> None:
    dense = nn.Linear(9, 7)
    dense.weight.data = noise(7, 9)
    form = Dictionary(8, outliers)
    module: Any = form.module(dense)
    with torch.no_grad():
        for name, value in form.weights(dense.weight).items():
            module.get_parameter(name).copy_(value)
    matrix, weight = module.matrix().detach(), dense.weight.detach()
    far = (weight - weight.mean()).abs().flatten().sort(descending=True).indices[:outliers]
    assert torch.equal(matrix.flatten()[far], weight.flatten()[far])
    assert len(matrix.flatten().unique()) <= 8 + outliers
    expected = module.values[(weight[..., None] - module.values).abs().argmin(-1)].detach().flatten()
    expected[far] = weight.flatten()[far]
    torch.testing.assert_close(matrix.flatten(), expected)
    module(noise(2, 9)).square().sum().backward()
    assert module.values.grad is not None
    assert module.codes.grad is None


@pytest.mark.parametrize(("entries", "outliers"), [(5, 0), (8.0, 0), (True, 0), (16, -1), (16, 1.5)])
def test_options_are_whole(entries: Any, outliers: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        Dictionary(entries, outliers)


def test_too_many_outliers_are_no_form() -> None:
    assert Dictionary(16, 7).problem((8, 8)) is None  # 32 bytes, 16 values, and two numbers for each: 62 of 64
    assert Dictionary(16, 8).problem((8, 8)) == "with 8 outliers it would hold no fewer numbers than its 8 x 8"


def test_codes_come_back_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    model = tiny("bert")
    plan = Plan(forms=FORMS)
    small = shrink(model, anatomy_of(model), plan)
    folder = tmp_path / "model"
    checkpoint.save(small, plan, folder, tokenizer_from=tmp_path)
    loaded = checkpoint.load(folder)
    assert_equal(small, loaded)
    inputs = batch(model)
    with torch.no_grad():
        assert torch.equal(small(**inputs).logits, loaded(**inputs).logits)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    name = "bert.encoder.layer.0.intermediate.dense"
    for part, message in (("codes", "a packed code is negative"), ("places", "an outlier lies outside of its 24 x 32")):
        broken = {key: value.clone() for key, value in state.items()}
        broken[f"{name}.{part}"][0] = -1
        safetensors.torch.save_file(broken, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=message):
            checkpoint.load(folder)


@pytest.mark.slow
def test_files_hold_packed_codes_and_run(tmp_path: Path) -> None:
    model = tiny("bert")
    small = shrink(model, anatomy_of(model), Plan(forms=FORMS))
    seen = [{name: value.numpy() for name, value in batch(model, rows, 7, rows).items()} for rows in (3, 6)]
    variants = (Variant.FLOAT, Variant.FUSED, Variant.INT8_STATIC)
    made = Onnx(agreement=0.5).export_all(small, seen, {variant: tmp_path / f"{variant}.onnx" for variant in variants})
    for variant, artifact in made.items():
        held = [value.const_value for value in onnx_ir.load(artifact.path).graph.initializers.values()]
        shapes = {(tuple(item.shape), str(item.dtype)) for item in held if item is not None}
        assert {((99 * 16,), "UINT8"), ((math.ceil(24 * 32 / 5),), "INT16"), ((16 * 32,), "UINT8")} <= shapes
        assert not {((99, 32), "FLOAT"), ((99, 32), "INT8")} & shapes
        assert artifact.max_difference < 1e-4 or variant == Variant.INT8_STATIC
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(made[Variant.FLOAT].path, options, providers=["CPUExecutionProvider"])
    loaded = onnx_ir.load(tmp_path / "loaded.onnx").graph
    assert not any(node.op_type in ("ScatterElements", "Mod") for node in loaded)  # put together once, when the file is opened
