"""The sparse file: bit for bit whatever the values are, small, in the documented layout, and nothing false is believed."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file, save_file
from tiny import tiny

import slimformer
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.errors import ModelError
from slimformer.families.base import anatomy_of
from slimformer.forms.kronecker import Kronecker
from slimformer.methods.quantization import Quantization
from slimformer.quantizing.grids import fake
from slimformer.saving import checkpoint, sparse
from slimformer.saving.sparse import (
    BLOCKS,
    KEY,
    LEAST_VALUES,
    Layout,
    _Wrong,
    pack,
    pack_matrix,
    read_tensors,
    rounding,
    size_bytes,
    unpack_matrix,
)
from slimformer.saving.tensors import model_digest

NAME = "encoder.weight"
LAYOUTS = ("float32", "float16", "int8")


def bits(matrix: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(matrix).view(np.uint32)


def pruned(rows: int, columns: int, density: float, block: tuple[int, int] = (1, 1), seed: int = 0) -> np.ndarray:
    """Normal values in a share of the blocks, exactly 0 elsewhere."""
    generator = np.random.default_rng(seed)
    grid = rows // block[0], columns // block[1]
    kept = np.zeros(grid[0] * grid[1], dtype=bool)
    kept[generator.choice(len(kept), round(density * len(kept)), replace=False)] = True
    mask = kept.reshape(grid).repeat(block[0], 0).repeat(block[1], 1)
    return np.where(mask, generator.normal(size=(rows, columns)), 0).astype(np.float32)


@st.composite
def matrices(draw: st.DrawFn, finite: bool = False) -> np.ndarray:
    """Any shape and any bits, with zeros in single weights or in whole blocks, or without zeros."""
    block = draw(st.sampled_from([(1, 1), (1, 4), (4, 4), (2, 3)]))
    shape = tuple(draw(st.integers(0, 6)) * size for size in block)
    if finite:
        matrix = draw(arrays.arrays(np.float32, shape, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
    else:
        matrix = draw(arrays.arrays(np.uint32, shape)).view(np.float32)
    grid = tuple(length // size for length, size in zip(shape, block, strict=True))
    kept = draw(st.just(np.ones(grid, dtype=bool)) | arrays.arrays(np.bool_, grid, elements=st.booleans()))
    return np.where(kept.repeat(block[0], 0).repeat(block[1], 1), matrix, np.float32(0))


# -- Round trips ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=300)
@given(matrices())
def test_float32_comes_back_bit_for_bit(matrix: np.ndarray) -> None:
    layout, parts = pack_matrix(matrix, "float32")
    assert {part: (str(array.dtype), array.shape) for part, array in parts.items()} == told(layout, len(parts["values"]))
    assert np.array_equal(bits(unpack_matrix(layout, parts)), bits(matrix))


def told(layout: Layout, count: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The documented parts, in numpy's words."""
    names = {"U8": "uint8", "U16": "uint16", "I32": "int32", "F32": "float32", "F16": "float16", "I8": "int8"}
    return {part: (names[dtype], shape) for part, (dtype, shape) in layout.parts(count).items()}


@pytest.mark.slow
@settings(max_examples=300)
@given(matrices(finite=True), st.sampled_from(["int8", "float16"]))
def test_rounded_values_come_back_as_they_were_rounded(matrix: np.ndarray, values: Any) -> None:
    try:
        layout, parts = pack_matrix(matrix, values)
    except ModelError:
        assert values == "float16"
        assert np.abs(matrix).max() > 65504
        return
    once = unpack_matrix(layout, parts)
    again_layout, again = pack_matrix(once, values)
    assert again_layout == layout
    assert all(np.array_equal(part, again[name]) for name, part in parts.items())
    assert np.array_equal(bits(unpack_matrix(again_layout, again)), bits(once))
    if values == "float16":
        assert np.array_equal(once, matrix.astype(np.float16).astype(np.float32))
    elif matrix.size:
        largest = np.abs(matrix).max(1, keepdims=True)
        assert (np.abs(once - matrix) <= largest / 127 * 0.502 + 1e-26).all()


@pytest.mark.parametrize("weights", [8, 6, 4])
@pytest.mark.parametrize("buckets", ["row", "tensor"])
def test_int8_is_exact_for_weights_that_fake_quantization_left_on_a_grid(weights: Any, buckets: Any) -> None:
    draw = torch.Generator().manual_seed(weights)
    weight = torch.randn(96, 160, generator=draw) * torch.rand(96, 1, generator=draw)
    weight[torch.rand(96, 160, generator=draw) < 0.6] = 0.0
    weight[5] = 0.0
    method = Quantization(weights=weights, buckets=buckets)
    on_grid = fake(weight, method.weight_grid(weight)) + 0.0
    layout, parts = pack_matrix(on_grid.numpy(), "int8")
    assert np.array_equal(unpack_matrix(layout, parts), on_grid.numpy())
    assert np.abs(parts["values"]).max() <= 127
    assert rounding({"weight": on_grid}, "int8") == 0
    assert 0 < rounding({"weight": weight}, "int8") < 0.005  # half a step of 127, and a little
    assert rounding({"weight": weight}, "float32") == 0
    again = pack_matrix(unpack_matrix(layout, parts), "int8")
    assert again[0] == layout
    assert all(np.array_equal(part, again[1][name]) for name, part in parts.items())


@pytest.mark.parametrize("weights", [8, 6, 4])
@pytest.mark.parametrize("buckets", ["row", "tensor"])
def test_dense_matrices_are_stored_without_an_index_and_exactly_where_they_are_on_a_grid(weights: Any, buckets: Any) -> None:
    draw = torch.Generator().manual_seed(weights)
    weight = torch.randn(5000, 40, generator=draw) * torch.rand(5000, 1, generator=draw)  # more rows than are rounded at a time
    weight[weight.abs() < 1e-3] = 0.5
    grid = Quantization(weights=weights, buckets=buckets).weight_grid(weight)
    on_grid = torch.where(weight > 0, 1, -1) * fake(weight, grid).abs().clamp_min(grid.step)  # no code is 0
    layout, parts = pack_matrix(on_grid.numpy(), "int8")
    assert layout == Layout((5000, 40), (1, 40), "none", "int8")
    assert {part: (str(array.dtype), array.shape) for part, array in parts.items()} == told(layout, 0)
    assert np.array_equal(bits(unpack_matrix(layout, parts)), bits(on_grid.numpy()))
    assert rounding({"weight": on_grid}, "int8") == 0


def test_the_rounding_that_the_docs_state():
    """Of a dense matrix that is on no grid, as int8 and as float16."""
    matrix = np.random.default_rng(3).normal(size=(300, 96)).astype(np.float32) * 10.0 ** -np.arange(300)[:, None].clip(max=6)
    matrix = matrix.astype(np.float32)
    back = {values: unpack_matrix(*pack_matrix(matrix, values)) for values in ("int8", "float16")}
    gap = {values: np.abs(found.astype(np.float64) - matrix) for values, found in back.items()}
    assert (gap["int8"] <= np.abs(matrix).max(1, keepdims=True) / 253).all()
    assert (gap["float16"] <= np.maximum(np.abs(matrix) * 2.0**-11, 2.0**-25)).all()
    told = rounding({"weight": torch.from_numpy(matrix)}, "int8")
    assert 0 < told <= 1 / 253


def test_int8_by_hand():
    row = [0.0, 127.0, -63.6, 0.4, 0.0, 0.0, 0.0, 0.6]
    layout, parts = pack_matrix(np.array([row, [0.0] * 8], dtype=np.float32), "int8")
    assert parts["scales"].tolist() == [1, 0]
    assert unpack_matrix(layout, parts).tolist() == [[0, 127, -64, 0, 0, 0, 0, 1], [0] * 8]
    with pytest.raises(ModelError, match="not finite, which int8"):
        pack_matrix(np.array([[np.inf, 0]], dtype=np.float32), "int8")


# -- The layout ----------------------------------------------------------------------------------------------------------------


def test_quads_lie_as_a_kernel_wants_them():
    """The product by the loop that the docs show, from the parts alone."""
    matrix = pruned(16, 64, 0.1, (1, 4))
    layout, parts = pack_matrix(matrix, "int8")
    assert (layout.block, layout.index) == ((1, 4), "columns")
    x = np.random.default_rng(1).integers(-128, 128, 64)
    starts, columns, values, scales = (parts[part] for part in ("starts", "columns", "values", "scales"))
    assert (starts.dtype, columns.dtype, values.dtype, values.shape) == (np.int32, np.uint16, np.int8, (26, 4))
    for output in range(16):
        total = 0
        for k in range(starts[output], starts[output + 1]):
            first = 4 * int(columns[k])
            total += int(values[k].astype(np.int64) @ x[first : first + 4])
        assert total * scales[output] == pytest.approx(float(unpack_matrix(layout, parts)[output] @ x), rel=1e-5, abs=1e-4)


def test_bits_and_columns_by_hand():
    matrix = np.zeros((2, 5), dtype=np.float32)
    matrix[0, 1], matrix[0, 4], matrix[1, 4] = 1, 2, -0.0
    layout, parts = pack_matrix(matrix, "float32")
    assert layout == Layout((2, 5), (1, 1), "bits", "float32")
    assert parts["bits"].tolist() == [0b00010010, 0b10]  # weights 1 and 4, then 9; -0.0 is kept
    assert parts["values"].tolist() == [[1], [2], [-0.0]]
    wide = np.zeros((2, 400), dtype=np.float32)
    wide[1, [3, 399]] = 1, 2
    layout, parts = pack_matrix(wide, "float32")
    assert (layout.block, layout.index) == ((1, 1), "columns")
    assert (parts["starts"].tolist(), parts["columns"].tolist()) == ([0, 0, 2], [3, 399])
    assert parts["values"].tolist() == [[1], [2]]


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_are_found(block: tuple[int, int]) -> None:
    layout, parts = pack_matrix(pruned(128, 256, 0.1, block), "float32")
    assert (layout.block, layout.index) == (block, "columns")
    assert len(parts["values"]) == round(0.1 * 128 * 256 / (block[0] * block[1]))


@pytest.mark.parametrize(
    ("density", "block", "values", "least", "most"),
    [
        (0.05, (1, 1), "float32", 6.0, 6.1),
        (0.05, (1, 1), "int8", 3.0, 3.2),
        (0.1, (1, 1), "float32", 5.2, 5.3),
        (0.1, (1, 4), "float32", 4.5, 4.6),
        (0.1, (1, 4), "float16", 2.5, 2.6),
        (0.1, (1, 4), "int8", 1.5, 1.6),
        (0.5, (1, 1), "int8", 1.25, 1.3),
    ],
)
def test_the_bytes_of_the_docs(density: float, block: tuple[int, int], values: Any, least: float, most: float) -> None:
    matrix = pruned(384, 1536, density, block)
    if values == "int8":  # no value that would round to 0
        matrix = np.where(matrix != 0, np.sign(matrix) * np.maximum(np.abs(matrix), 0.1), 0).astype(np.float32)
    stored = size_bytes({NAME: torch.from_numpy(matrix)}, values)
    assert least <= stored / np.count_nonzero(matrix) <= most


def test_dense_tensors_are_left_as_they_are():
    tensors = {
        "few zeros": torch.from_numpy(pruned(20, 20, 0.8)),
        "a vector": torch.zeros(9),
        "whole numbers": torch.zeros(4, 4, dtype=torch.int64),
        "half": torch.zeros(4, 4, dtype=torch.float16),
        "nothing": torch.zeros(0, 4),
    }
    packed, metadata = pack(tensors)
    assert metadata == {}
    assert all(packed[name] is tensor for name, tensor in tensors.items())
    small = {"few values": torch.ones(LEAST_VALUES // 64, 63), "the last Linear": torch.ones(LEAST_VALUES, 2)}
    packed, metadata = pack(small, "int8", exact=["the last Linear"])
    assert metadata == {}
    assert all(packed[name] is tensor for name, tensor in small.items())


@pytest.mark.parametrize(("values", "size"), [("float16", 2), ("int8", 1)])
def test_a_large_matrix_takes_the_bytes_of_its_values(values: Any, size: int) -> None:
    weight = torch.from_numpy(pruned(384, 1536, 1.0)).abs() + 0.1
    assert size_bytes({NAME: weight}, values) == 384 * 1536 * size + (384 * 4 if values == "int8" else 0)
    sparse_too = torch.from_numpy(pruned(384, 1536, 0.2, (1, 4))) * 100
    assert "sparse.columns" in str(list(pack({NAME: sparse_too}, values)[0]))  # what a kernel reads stays as it was


# -- Files ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> Any:
    """A tiny BERT with a head and neurons cut, and nine tenths of its matrices' weights at 0, one -0.0 and one of 1 x 4 blocks."""
    dense = tiny("bert")
    cut = shrink(dense, anatomy_of(dense), PLAN)
    with torch.no_grad():
        for number, matrix in enumerate(anatomy_of(cut).matrices.values()):
            weight = cut.get_submodule(matrix.module).weight
            zeros = pruned(*weight.shape, 0.1, (1, 4) if number == 3 else (1, 1), seed=number) == 0
            weight[torch.from_numpy(zeros)] = 0
        weight[0, 0] = -0.0
    return cut


PLAN = Plan({"encoder.0.heads": (0, 2, 3), "encoder.2.neurons": tuple(range(16))})


def test_a_saved_model_is_loaded_bit_for_bit_and_its_file_is_small(model: Any, tmp_path: Path) -> None:
    slimformer.save(model, PLAN, tmp_path / "sparse", tokenizer_from=tmp_path)
    slimformer.save(model, PLAN, tmp_path / "dense", tokenizer_from=tmp_path, sparse=False)
    assert model_digest(slimformer.load(tmp_path / "sparse")) == model_digest(model)
    assert model_digest(slimformer.load(tmp_path / "dense")) == model_digest(model)
    stored, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("sparse", "dense"))
    assert set(whole) == set(model.state_dict())
    assert sum(tensor.nbytes for tensor in stored.values()) == size_bytes(checkpoint.unshared(model))
    assert size_bytes(checkpoint.unshared(model)) < 0.4 * sum(tensor.nbytes for tensor in whole.values())


@pytest.mark.parametrize("values", ["float16", "int8"])
def test_saved_again_it_is_the_same_file(model: Any, tmp_path: Path, values: Any) -> None:
    files = []
    for name in ("first", "second"):
        slimformer.save(model, PLAN, tmp_path / name, tokenizer_from=tmp_path, values=values)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
        model = slimformer.load(tmp_path / name)
    assert files[0] == files[1]
    assert model_digest(model) == model_digest(slimformer.load(tmp_path / "first"))
    before = tiny("bert").state_dict()["bert.embeddings.position_embeddings.weight"]
    assert torch.equal(
        model.state_dict()["bert.embeddings.position_embeddings.weight"], before
    )  # small and dense, so not rounded


@pytest.mark.parametrize("values", ["float16", "int8"])
def test_large_matrices_and_tables_are_stored_smaller_and_the_last_linear_is_not(tmp_path: Path, values: Any) -> None:
    """Also a factored table, whose factor has three dimensions."""
    dense = tiny("bert", hidden_size=64, intermediate_size=128, vocab_size=300, num_labels=70)
    plan = Plan(forms={"embeddings.word": Kronecker((300, 32)), "encoder.0.query": Kronecker((2, 2), 2)})
    model = shrink(dense, anatomy_of(dense), plan)
    slimformer.save(model, plan, tmp_path / "model", tokenizer_from=tmp_path, values=values)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    whole = {name for name, tensor in model.state_dict().items() if tensor.numel() >= LEAST_VALUES and name not in stored}
    assert whole == {
        "bert.embeddings.word_embeddings.a",
        *(
            f"bert.encoder.layer.{n}.attention.{part}.weight"
            for n in range(3)
            for part in ("self.key", "self.value", "output.dense")
        ),
        *(f"bert.encoder.layer.{n}.attention.self.query.weight" for n in (1, 2)),
        *(f"bert.encoder.layer.{n}.{part}.dense.weight" for n in range(3) for part in ("intermediate", "output")),
        "bert.embeddings.position_embeddings.weight",
        "bert.pooler.dense.weight",
    }
    loaded = slimformer.load(tmp_path / "model")
    before = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert tensor.shape == before[name].shape
        if name not in whole:
            assert torch.equal(tensor, before[name])
        else:
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=float(before[name].abs().max()) / 253)
    slimformer.save(loaded, plan, tmp_path / "again", tokenizer_from=tmp_path, values=values)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "again")]
    assert files[0] == files[1]


def test_files_of_version_1_are_still_read(model: Any, tmp_path: Path) -> None:
    """Version 2 added an index and changed nothing."""
    slimformer.save(model, PLAN, tmp_path / "model", tokenizer_from=tmp_path, values="float32")
    file = tmp_path / "model" / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    old = data[8 : 8 + length].replace(rb"\"version\": 2", rb"\"version\": 1")
    assert old != data[8 : 8 + length]
    file.write_bytes(data[:8] + old + data[8 + length :])
    assert model_digest(slimformer.load(tmp_path / "model")) == model_digest(model)


# -- What is false -------------------------------------------------------------------------------------------------------------


def parts_of(index: str = "columns", values: Any = "int8") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and metadata of one matrix: a sparse one of 8 x 64, or a dense one of 64 x 64."""
    if index == "none":
        matrix = pruned(64, 64, 1.0)
        matrix += np.where(matrix < 0, np.float32(-0.1), np.float32(0.1))  # no code is 0
    else:
        matrix = pruned(8, 64, 0.25, (1, 4) if index == "columns" else (1, 1))
    tensors, metadata = pack({NAME: torch.from_numpy(matrix)}, values)
    assert json.loads(metadata[KEY])["matrices"][NAME]["index"] == index
    return tensors, json.loads(metadata[KEY])


def write(folder: Path, tensors: dict[str, torch.Tensor], told: Any) -> Path:
    file = folder / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt", KEY: told if isinstance(told, str) else json.dumps(told)})
    return file


def changed(tensor: torch.Tensor, place: int, value: int) -> torch.Tensor:
    array = tensor.numpy().copy()
    array.reshape(-1)[place] = value
    return torch.from_numpy(array)


FALSE = {
    "columns beyond the matrix": ("columns", {"columns": lambda t: changed(t, 0, 16)}, r"has the block column 16 of 16"),
    "columns that fall": ("columns", {"columns": lambda t: torch.from_numpy(t.numpy()[::-1].copy())}, "do not rise within a row"),
    "a column twice": ("columns", {"columns": lambda t: changed(t, 1, int(t.numpy()[0]))}, "do not rise within a row"),
    "fewer columns": ("columns", {"columns": lambda t: t[:-1].clone()}, r"needs '.*columns' as U16 of \(32,\), it is U16 of \(31,\)"),
    "more values": ("columns", {"values": lambda t: torch.cat([t, t])}, r"needs '.*columns' as U16 of \(64,\)"),
    "starts that end early": ("columns", {"starts": lambda t: changed(t, -1, 31)}, "row starts that do not lead from 0 to its 32"),
    "starts that fall": ("columns", {"starts": lambda t: changed(t, 2, -5)}, "row starts that do not lead"),
    "starts far outside": ("columns", {"starts": lambda t: changed(t, 3, 2**31 - 1)}, "row starts that do not lead"),
    "scales that are missing": ("columns", {"scales": None}, r"has no part '.*scales'"),
    "scales below 0": ("columns", {"scales": lambda t: -t}, "scales below 0"),
    "scales beyond float32": ("columns", {"scales": lambda t: t + 1e38}, "beyond float32"),
    "codes below -127": ("columns", {"values": lambda t: changed(t, 0, -128)}, "codes below -127"),
    "values of another dtype": ("columns", {"values": lambda t: t.float()}, r"needs '.*values' as I8 .* it is F32"),
    "a part too many": ("columns", {"bits": torch.zeros(64, dtype=torch.uint8)}, r"has a part too many, '.*bits'"),
    "values without a shape": ("columns", {"values": torch.tensor(1, dtype=torch.int8)}, "needs '.*columns'|values"),
    "a bit too many": ("bits", {"bits": lambda t: changed(t, 0, 255)}, r"bits set and 128 values"),
    "fewer rows": ("none", {"values": lambda t: t[:-1].clone()}, r"needs '.*values' as I8 of \(64, 64\), it is I8 of \(63, 64\)"),
    "more rows": ("none", {"values": lambda t: torch.cat([t, t])}, r"needs '.*values' as I8 of \(64, 64\), it is I8 of \(128, 64\)"),
    "rows without scales": ("none", {"scales": None}, r"has no part '.*scales'"),
    "rows with an index": ("none", {"columns": torch.zeros(64, dtype=torch.uint16)}, r"has a part too many, '.*columns'"),
    "rows with scales below 0": ("none", {"scales": lambda t: -t}, "scales below 0"),
    "rows with codes below -127": ("none", {"values": lambda t: changed(t, 0, -128)}, "codes below -127"),
    "fewer bits": ("bits", {"bits": lambda t: t[:-1].clone()}, r"needs '.*bits' as U8 of \(64,\), it is U8 of \(63,\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", FALSE)
def test_parts_that_do_not_agree_are_refused(tmp_path: Path, case: str) -> None:
    index, changes, message = FALSE[case]
    tensors, told = parts_of(index)
    for part, change in changes.items():
        full = f"{NAME}.sparse.{part}"
        if change is None:
            del tensors[full]
        else:
            tensors[full] = change(tensors[full]) if callable(change) else change
    file = write(tmp_path, tensors, told)
    with pytest.raises(ModelError, match=message) as caught:
        read_tensors(file, {NAME: (64 if index == "none" else 8, 64)})
    assert caught.value.what.startswith(f"{file}: the sparse matrix '{NAME}' ")
    assert "\n" not in caught.value.what


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"shape": [1 << 40, 1 << 40]}, r"expected \(8, 64\)"),
        ({"shape": [8.0, 64]}, "not two whole numbers"),
        ({"shape": [True, 64]}, "not two whole numbers"),
        ({"block": [0, 4]}, "do not divide"),
        ({"block": [1, 5]}, "do not divide"),
        ({"block": [1, 2]}, r"needs '.*values' as I8 of \(32, 2\)"),
        ({"index": "bits"}, "has bits for blocks"),
        ({"index": "none"}, "has blocks that are no rows, and no index"),
        ({"index": "none", "block": [8, 64]}, "has blocks that are no rows, and no index"),
        ({"index": "none", "block": [1, 64]}, "has a part too many, '.*columns'"),
        ({"index": ["none"]}, "which nothing writes"),
        ({"index": "tree"}, "which nothing writes"),
        ({"values": "int4"}, "which nothing writes"),
        ({"values": ["int8"]}, "which nothing writes"),
        ({"surplus": 1}, "is not told as"),
    ],
)
def test_facts_that_are_false_are_refused(tmp_path: Path, facts: dict[str, Any], message: str) -> None:
    tensors, told = parts_of()
    told["matrices"][NAME] |= facts
    with pytest.raises(ModelError, match=message):
        read_tensors(write(tmp_path, tensors, told), {NAME: (8, 64)})


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("{", "do not tell how"),
        ("[" * 100_000, "do not tell how"),
        ("[]", "do not tell how"),
        ('{"version": 3, "matrices": {}}', r"have the layout 3, this slimformer reads 1 and 2\."),
        ('{"version": true, "matrices": {}}', "have the layout True"),
        ('{"version": 1, "matrices": []}', "do not tell how"),
        ('{"version": 1, "matrices": {"encoder.weight": 3}}', "is not told as"),
        ('{"version": 1, "matrices": {"other": {"shape": [8, 64], "block": [1, 4], "index": "columns", "values": "int8"}}}',
         "'other' is none of the model's"),
    ],
)  # fmt: skip
def test_metadata_that_are_false_are_refused(tmp_path: Path, told: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_tensors(write(tmp_path, parts_of()[0], told), {NAME: (8, 64)})


def test_a_matrix_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    tensors, told = parts_of()
    tensors[NAME] = torch.zeros(8, 64)
    with pytest.raises(ModelError, match="has a part too many, 'encoder.weight'"):
        read_tensors(write(tmp_path, tensors, told), {NAME: (8, 64)})


def test_a_spare_bit_is_refused():
    layout, parts = pack_matrix(np.array([[1, 0, 0, 0, 0]], dtype=np.float32), "float32")
    with pytest.raises(_Wrong, match="has a bit beyond its 5 weights"):
        unpack_matrix(layout, parts | {"bits": parts["bits"] | np.uint8(0x20)})


def test_a_model_folder_with_a_false_index_is_refused(model: Any, tmp_path: Path) -> None:
    """Through the front door; and a truncated file, wherever it ends."""
    slimformer.save(model, PLAN, tmp_path / "model", tokenizer_from=tmp_path)
    file = tmp_path / "model" / "model.safetensors"
    data = file.read_bytes()
    for end in (0, 7, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:end])
        with pytest.raises(ModelError):
            slimformer.load(tmp_path / "model")
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name.endswith("sparse.columns"))
    begin = 8 + length + header[name]["data_offsets"][0]
    file.write_bytes(data[:begin] + b"\xff\xff" + data[begin + 2 :])
    with pytest.raises(ModelError, match=r"the sparse matrix '.*' has the block column 65535 of"):
        slimformer.load(tmp_path / "model")


@pytest.mark.slow
@settings(max_examples=300)
@given(st.sampled_from(LAYOUTS), st.sampled_from([(1, 1), (1, 4), None]), st.data())
def test_any_bytes_give_a_matrix_or_a_sentence(values: Any, block: tuple[int, int] | None, data: st.DataObject) -> None:
    layout, parts = pack_matrix(pruned(6, 16, 0.4, block) if block else np.abs(pruned(6, 16, 1.0)) + 1, values)
    assert (layout.index == "none") == (block is None)
    part = data.draw(st.sampled_from(sorted(parts)))
    spoiled = parts[part].copy()
    flat = spoiled.reshape(-1).view(np.uint8)
    for place in data.draw(st.lists(st.integers(0, len(flat) - 1), min_size=1, max_size=4)):
        flat[place] = data.draw(st.integers(0, 255))
    try:
        found = unpack_matrix(layout, parts | {part: spoiled})
    except _Wrong:
        return
    assert found.shape == (6, 16)
    assert found.dtype == np.float32
    with np.errstate(all="ignore"):
        if part not in ("values", "scales"):
            assert np.count_nonzero(found) == np.count_nonzero(unpack_matrix(layout, parts))


def test_layouts_of_a_hostile_size_are_not_made():
    """The index decides before anything of the matrix's size is there: a square of 2^40 would not fit."""
    layout, parts = pack_matrix(pruned(8, 64, 0.25, (1, 4)), "float32")
    huge = replace(layout, shape=(8, 1 << 44))
    with pytest.raises(_Wrong, match="has the block column 65535"):
        unpack_matrix(replace(huge, shape=(8, 4)), parts | {"columns": np.full_like(parts["columns"], 65535)})
    for block, index in ([1, 4], "columns"), ([1, 1 << 44], "none"):
        with pytest.raises(ModelError, match="expected"), sparse._naming(Path("x"), NAME):
            sparse._layout({"shape": [8, 1 << 44], "block": block, "index": index, "values": "float32"}, (8, 64))


@settings(max_examples=200)
@given(st.data())
def test_any_facts_in_the_metadata_give_the_matrix_or_a_sentence(data: st.DataObject) -> None:
    """Whatever the metadata say of the parts that are there: nothing of another size is made."""
    number = st.integers(-1, 1 << 62) | st.sampled_from([0, 1, 4, 8, 64])
    pair = st.lists(number, min_size=1, max_size=3)
    facts = {"shape": [8, 64], "block": [1, 4], "index": "columns", "values": "int8"} | data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "shape": pair,
                "block": pair,
                "index": st.sampled_from(["bits", "columns", "none", "", None, 3]),
                "values": st.sampled_from(["float32", "float16", "int8", "", None, 3]),
            },
        )
    )
    tensors, _ = parts_of()
    header = {
        name: ({"int8": "I8", "uint16": "U16", "int32": "I32", "float32": "F32"}[str(tensor.dtype)[6:]], tuple(tensor.shape))
        for name, tensor in tensors.items()
    }
    try:
        layout = sparse._layout(facts, (8, 64))
        sparse._checked_parts(NAME, layout, header)
    except _Wrong:
        return
    assert layout == Layout((8, 64), (1, 4), "columns", "int8")
