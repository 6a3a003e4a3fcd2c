"""The compiled kernels, called through ctypes, against numpy. `make kernels-check` runs 10,000 more cases under sanitizers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slimformer import Plan, anatomy_of, shrink
from slimformer.core.anatomy import Kind
from slimformer.core.junction import Exit
from slimformer.errors import ExportError, ExtraError, ModelError
from slimformer.exporters._kernels.model_file import save_model_file
from slimformer.exporters._kernels.packing import best_block_rows, pack_encoder
from slimformer.exporters._onnx.parity import fill_inputs
from slimformer.families.base import subject_of
from slimformer.forms.codebook import Codebook
from slimformer.kernels import library, session
from slimformer.testing.tiny import batch, tiny

PATHS = ("scalar", "avx2", "avxvnni", "avx512vnni256", "avx512vnni", "neon")

built = pytest.mark.skipif(not library.installed(), reason="slimformer-kernels is not installed: `make kernels` builds it")


@pytest.fixture
def paths() -> Iterator[list[str]]:
    """The processor paths that run here; the one in use comes back afterwards."""
    before = library.processor_path()
    yield [name for name in PATHS if library.set_processor_path(name)]
    library.set_processor_path(before)


def sparse_weights(rng: np.random.Generator, outputs: int, inputs: int, block_rows: int, zeros: float) -> np.ndarray:
    """int8 weights with that share of empty blocks."""
    height = max(1, block_rows)
    grid = rng.random((-(-outputs // height), -(-inputs // 4))) >= zeros
    mask = np.kron(grid, np.ones((height, 4)))[:outputs, :inputs]
    return (rng.integers(-128, 128, (outputs, inputs)) * mask).astype(np.int8)


def test_a_missing_package_is_told_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "installed", lambda: False)
    with pytest.raises(ExtraError, match=r"kernels are not installed") as caught:
        library.library_path()
    assert "slimformer[kernels]" in str(caught.value)


@built
def test_sums_are_those_of_numpy_on_every_path(paths: list[str]) -> None:
    rng = np.random.default_rng(0)
    for number in range(60):
        outputs, inputs, rows = int(rng.integers(1, 70)), int(rng.integers(1, 130)), int(rng.integers(1, 100))
        block_rows = library.BLOCK_ROWS[number % 5]
        weights = sparse_weights(rng, outputs, inputs, block_rows, float(rng.choice([0.0, 0.5, 0.9, 1.0])))
        packed = library.pack_weights(weights, rng.random(outputs), block_rows=block_rows)
        linear = library.Linear(packed)
        codes = rng.integers(0, 256, (rows, inputs)).astype(np.uint8)
        zero = rng.integers(0, 256, rows).astype(np.uint8)
        expected = (codes.astype(np.int32) - zero[:, None]) @ weights.astype(np.int32).T
        for path in paths:
            library.set_processor_path(path)
            out = np.empty((rows, outputs), np.int32)
            assert np.array_equal(linear(codes, np.ones(rows), zero, out=out), expected), (path, block_rows, weights.shape)


@built
def test_rows_get_their_own_grid_so_that_no_answer_depends_on_its_neighbours(paths: list[str]) -> None:
    rng = np.random.default_rng(1)
    weights = sparse_weights(rng, 50, 90, 1, 0.7)
    linear = library.Linear(library.pack_weights(weights, np.full(50, 0.01), rng.normal(size=50), block_rows=1))
    x = rng.normal(size=(130, 90)).astype(np.float32)
    x[77] *= 1000  # an odd neighbour
    for path in paths:
        library.set_processor_path(path)
        together = linear(x, activation="gelu")
        alone = np.concatenate([linear(x[i : i + 1], activation="gelu") for i in range(len(x))])
        assert np.array_equal(together, alone)
        order = rng.permutation(len(x))
        assert np.array_equal(linear(x[order], activation="gelu"), together[order])


@built
def test_a_product_is_close_to_the_float_one() -> None:
    rng = np.random.default_rng(2)
    weights = rng.integers(-127, 128, (40, 64)).astype(np.int8)
    scales = rng.uniform(0.001, 0.01, 40).astype(np.float32)
    bias, gain, shift = (rng.normal(size=40).astype(np.float32) for _ in range(3))
    x = rng.normal(size=(33, 64)).astype(np.float32)
    residual = rng.normal(size=(33, 40)).astype(np.float32)
    linear = library.Linear(library.pack_weights(weights, scales, bias))
    exact = x @ (weights * scales[:, None]).T + bias
    step = (x.max(axis=1) - x.min(axis=1)) / 255  # each input is off by half a step at most
    allowed = step[:, None] / 2 * np.abs(weights * scales[:, None]).sum(axis=1) + 1e-4
    assert (np.abs(linear(x) - exact) <= allowed).all()
    assert (np.abs(linear(x, activation="relu") - np.maximum(exact, 0)) <= allowed).all()
    summed = linear(x) + residual
    norm = (summed - summed.mean(axis=1, keepdims=True)) / np.sqrt(summed.var(axis=1, keepdims=True) + 1e-5) * gain + shift
    np.testing.assert_allclose(linear(x, residual=residual, norm=(gain, shift, 1e-5)), norm, atol=2e-5)
    codes = linear(x, out=np.empty((33, 40), np.uint8), out_scale=0.1, out_zero=100)
    assert np.array_equal(codes, np.clip(np.rint(linear(x) / np.float32(0.1) + 100), 0, 255))


@built
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_is_within_its_stated_error(activation: library.Activation) -> None:
    from scipy.special import erfc

    points = np.linspace(-9, 9, 40_001).astype(np.float32)
    linear = library.Linear(library.pack_weights(np.zeros((len(points), 4), np.int8), np.ones(len(points)), points))
    got = linear(np.zeros((1, 4), np.float32), activation=activation)[0]
    x = points.astype(np.float64)
    tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    exact = 0.5 * x * erfc(-x / np.sqrt(2)) if activation == "gelu" else tanh
    assert np.abs(got - exact).max() < 5e-5


@built
def test_only_blocks_that_hold_weights_are_stored() -> None:
    weights = np.zeros((8, 16), np.int8)
    weights[0, 0] = weights[3, 5] = weights[3, 6] = weights[4, 15] = 1
    counts = {rows: library.Linear(library.pack_weights(weights, np.ones(8), block_rows=rows)).blocks for rows in (1, 2, 4, 16)}
    # 1x4: one block each at (0, 0), (3, 1), (4, 3); rows 0 and 3 share a block of four only where their columns agree
    assert counts == {1: 3, 2: 3, 4: 3, 16: 3}
    weights[1, 2] = 1
    counts = {rows: library.Linear(library.pack_weights(weights, np.ones(8), block_rows=rows)).blocks for rows in (1, 2, 4, 16)}
    assert counts == {1: 4, 2: 3, 4: 3, 16: 3}


@built
def test_damaged_bytes_end_in_one_line() -> None:
    rng = np.random.default_rng(3)
    packed = library.pack_weights(sparse_weights(rng, 20, 24, 1, 0.5), np.ones(20), block_rows=1)
    for cut in (0, 10, 64, len(packed) - 64, len(packed) - 1):
        with pytest.raises(ModelError, match=r"bytes|has"):
            library.Linear(packed[:cut])
    for at in (9, 12, 20, 30, 64, 500, len(packed) - 64):
        changed = packed.copy()
        changed[at] ^= 0x55
        with pytest.raises(ModelError):
            library.Linear(changed)
    newer = packed.copy()
    newer[8] = 2
    with pytest.raises(ModelError, match="newer slimformer-kernels"):
        library.Linear(newer)


@built
def test_what_cannot_be_packed_or_multiplied_is_refused() -> None:
    weights = np.ones((4, 8), np.int8)
    with pytest.raises(ModelError, match="blocks have"):
        library.pack_weights(weights, np.ones(4), block_rows=3)
    with pytest.raises(ModelError, match="finite"):
        library.pack_weights(weights, np.array([1, np.nan, 1, 1]))
    linear = library.Linear(library.pack_weights(weights, np.ones(4)))
    with pytest.raises(ModelError, match="8 values a row"):
        linear(np.ones((2, 7), np.float32))
    with pytest.raises(ModelError, match="one scale"):
        linear(np.ones((2, 8), np.float32), np.ones(3), np.zeros(3, np.uint8))
    with pytest.raises(ModelError, match="go together"):
        linear(np.ones((2, 8), np.float32), np.ones(1))


# -- Whole encoders ------------------------------------------------------------------------------------------------------------

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert")
HEADS = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering", "AutoModel")


def packed_encoder(model: Any, **options: Any) -> library.Encoder:
    return library.Encoder(pack_encoder(model, **({"first_only": False} | options)))


def random_plan(model: Any, rng: np.random.Generator) -> Plan:
    """Some heads, neurons and sublayers gone."""
    keep: dict[str, tuple[int, ...]] = {}
    for site in anatomy_of(model).sites.values():
        if site.kind is Kind.SUBLAYER:
            if rng.random() < 0.25:
                keep[site.id] = ()
        elif site.sublayer not in keep:
            count = int(rng.integers(1, site.size + 1))
            keep[site.id] = tuple(sorted(rng.choice(site.size, count, replace=False).tolist()))
    return Plan(keep)


@built
@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_encoder_is_that_of_pytorch_whatever_was_cut(model_type: str) -> None:
    rng = np.random.default_rng(FAMILIES.index(model_type))
    dense = tiny(model_type)
    for plan in (Plan(), random_plan(dense, rng), random_plan(dense, rng)):
        model = shrink(dense, anatomy_of(dense), plan)
        inputs = batch(model, rows=4, seq=19)
        inputs["attention_mask"][0, 2] = inputs["attention_mask"][1, :2] = 0  # words that are there and not read
        ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy()
        with torch.no_grad():
            exact = model.base_model(**inputs).last_hidden_state.numpy()
        got = packed_encoder(model)(ids, mask)
        assert (got[mask == 0] == 0).all()
        assert np.sqrt(((got - exact)[mask > 0] ** 2).mean()) < 0.03  # hidden states are of size 1: int8 is all that differs
        assert np.array_equal(packed_encoder(model, first_only=True)(ids, mask), got[:, 0])
        assert np.array_equal(packed_encoder(model, block_rows=1)(ids, mask), got)


@built
@pytest.mark.slow
def test_an_encoder_gives_the_same_bits_on_every_path_at_every_batch_size_order_and_padding(paths: list[str]) -> None:
    rng = np.random.default_rng(5)
    model = tiny("bert", max_position_embeddings=256)
    encoder = packed_encoder(model)
    lengths = rng.integers(1, 200, 12)
    texts = [rng.integers(5, 99, length) for length in lengths]

    def run(chosen: Sequence[int], columns: int) -> list[np.ndarray]:
        ids, mask = np.zeros((len(chosen), columns), np.int64), np.zeros((len(chosen), columns), np.int64)
        for row, index in enumerate(chosen):
            ids[row, : lengths[index]], mask[row, : lengths[index]] = texts[index], 1
        return [hidden[: lengths[index]] for index, hidden in zip(chosen, encoder(ids, mask), strict=True)]

    library.set_processor_path("scalar")
    alone = [run([index], int(lengths[index]))[0] for index in range(12)]
    for path in paths:
        library.set_processor_path(path)
        for columns in (int(lengths.max()), 220):
            order = rng.permutation(12).tolist()
            for index, hidden in zip(order, run(order, columns), strict=True):
                assert np.array_equal(hidden, alone[index]), (path, columns, index)


def coded(model: Any) -> tuple[Any, Any]:
    """The model with its word table as codes, and the same with the words that these name put together."""
    small, whole = (copy.deepcopy(model) for _ in range(2))
    anatomy = anatomy_of(small)
    form = Codebook(4, 11)
    table = anatomy.matrices["embeddings.word"]
    numbers = form.weights(model.get_submodule(table.module).weight, table=True)
    small = shrink(small, anatomy, Plan(forms={"embeddings.word": form}))
    module = small.get_submodule(table.module)
    with torch.no_grad():
        for name, value in numbers.items():
            getattr(module, name).copy_(value)
        whole.get_submodule(table.module).weight.copy_(module(torch.arange(table.shape[0])))
    return small, whole


@built
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_word_table_of_codes_is_looked_up_piece_by_piece(model_type: str, paths: list[str]) -> None:
    model, whole = coded(tiny(model_type))
    inputs = batch(model, rows=4, seq=19)
    ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy()
    packed = pack_encoder(model, first_only=False)
    assert len(packed) < len(pack_encoder(whole, first_only=False))
    library.set_processor_path("scalar")
    expected = library.Encoder(packed)(ids, mask)
    with torch.no_grad():
        exact = whole.base_model(**inputs).last_hidden_state.numpy()
    assert np.sqrt(((expected - exact)[mask > 0] ** 2).mean()) < 0.03
    for path in paths:
        library.set_processor_path(path)
        assert np.array_equal(library.Encoder(packed)(ids, mask), expected), path


@built
def test_codes_are_checked_before_they_are_followed() -> None:
    packed = pack_encoder(coded(tiny("bert"))[0], first_only=True)
    assert packed[8:10].view("<u2") == 2  # libraries that know no codes refuse the file by its version
    at = int(packed[64:72].view("<u8")[0])

    def refused(place: int, value: int) -> str:
        changed = library.aligned(len(packed))
        changed[:] = packed
        changed[place] = value
        changed[56:64] = np.array([library.encoder_digest(changed)], np.uint64).view(np.uint8)
        with pytest.raises(ModelError) as error:
            library.Encoder(changed)
        return str(error.value)

    assert "contradict each other" in refused(at + 5, 11)  # there are entries 0 to 10
    assert "makes no sense" in refused(8, 1)  # a file of the first version has no codes
    assert "newer slimformer-kernels" in refused(8, 3)


@built
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert"])
def test_a_file_runs_in_onnxruntime_with_its_threads(model_type: str, head: str, tmp_path: Path) -> None:
    model = tiny(model_type, auto_class=head, **({"num_labels": 2} if head.endswith("Answering") else {}))
    save_model_file(model, tmp_path / "model.onnx")
    inputs = batch(model, rows=6, seq=40)
    if "token_type_ids" in subject_of(model).inputs:
        inputs["token_type_ids"] = torch.randint(0, 2, inputs["input_ids"].shape)
    with torch.no_grad():
        output = model(**inputs)
    results = []
    for threads in (1, 3):
        opened = session(tmp_path / "model.onnx", threads)
        names = [item.name for item in opened.get_outputs()]
        results.append(opened.run(names, {name: value.numpy() for name, value in inputs.items()}))
        for name, got in zip(names, results[-1], strict=True):
            exact = output[name].numpy()
            real = slice(None) if got.ndim == 2 and got.shape[1] != 40 else inputs["attention_mask"].numpy() > 0
            assert np.abs(got - exact)[real].max() < 0.08 * max(1.0, float(np.abs(exact).max()))
    assert all(np.array_equal(one, three) for one, three in zip(*results, strict=True))


@built
def test_a_single_operator_serves_graphs_of_ones_own(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    rng = np.random.default_rng(6)
    weights = sparse_weights(rng, 48, 64, 4, 0.8)
    packed = library.pack_weights(weights, np.full(48, 0.01), rng.normal(size=48), 4)
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    gain, shift = (rng.normal(size=48).astype(np.float32) for _ in range(2))
    constants = [numpy_helper.from_array(array, name) for name, array in (("w", packed), ("g", gain), ("s", shift))]
    node = helper.make_node("Linear", ["x", "w", "r", "g", "s"], ["y"], domain="slimformer", activation=2, epsilon=1e-5)
    floats = [helper.make_tensor_value_info(name, 1, ["a", "b", size]) for name, size in (("x", 64), ("r", 48), ("y", 48))]
    graph = helper.make_graph([node], "one", floats[:2], floats[2:], constants)
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("slimformer", 1)]
    onnx.save(helper.make_model(graph, opset_imports=versions, ir_version=8), tmp_path / "one.onnx")
    x, residual = rng.normal(size=(2, 150, 64)).astype(np.float32), rng.normal(size=(2, 150, 48)).astype(np.float32)
    got = session(tmp_path / "one.onnx", 2).run(None, {"x": x, "r": residual})[0]
    linear = library.Linear(packed)
    for row in range(2):
        assert np.array_equal(got[row], linear(x[row], activation="gelu", residual=residual[row], norm=(gain, shift, 1e-5)))


@built
def test_bad_ids_and_damaged_files_end_in_one_line(tmp_path: Path) -> None:
    model = tiny("bert")
    save_model_file(model, tmp_path / "model.onnx")
    opened = session(tmp_path / "model.onnx", 1)
    ids = np.full((1, 3), 99)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    with pytest.raises(Exception, match="token id 99 lies outside of the vocabulary of 99"):
        opened.run(None, feeds)
    with pytest.raises(Exception, match="token type 2"):
        opened.run(None, feeds | {"input_ids": ids - 1, "token_type_ids": np.full_like(ids, 2)})
    long = {name: np.zeros((1, 65), np.int64) for name in feeds} | {"attention_mask": np.ones((1, 65), np.int64)}
    with pytest.raises(Exception, match="longer than the 64 positions"):
        opened.run(None, long)
    content = bytearray((tmp_path / "model.onnx").read_bytes())
    content[content.index(b"SLIMENCO") + 5000] ^= 1
    (tmp_path / "damaged.onnx").write_bytes(content)
    with pytest.raises(ModelError, match="cannot open") as caught:
        session(tmp_path / "damaged.onnx")
    assert "damaged" in str(caught.value)
    with pytest.raises(ModelError, match="no file"):
        session(tmp_path / "missing.onnx")


@built
def test_hostile_encoders_end_in_an_error() -> None:
    sound = pack_encoder(tiny("bert"), first_only=False)
    ids = np.full((2, 5), 7)
    refused = 0
    rng = np.random.default_rng(7)
    for _ in range(300):
        packed = library.aligned(len(sound))
        packed[:] = sound
        # the header's numbers and the directory, above all; the digest agrees with the change
        at = int(rng.integers(8, 56)) if rng.random() < 0.4 else int(rng.integers(64, 64 + 16 * 26))
        packed[at] = rng.integers(0, 256)
        packed[56:64] = np.array([library.encoder_digest(packed)], np.uint64).view(np.uint8)
        try:
            library.Encoder(packed)(ids)
        except ModelError:
            refused += 1
    assert refused > 200


@built
def test_kinds_that_the_kernels_do_not_compute_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="do not project"):
        pack_encoder(tiny("electra"), first_only=True)
    with pytest.raises(ExportError, match="post-norm"):
        pack_encoder(tiny("marian"), first_only=True)
    with pytest.raises(ExportError, match="no head of BertForMaskedLM"):
        save_model_file(tiny("bert", auto_class="AutoModelForMaskedLM"), tmp_path / "model.onnx")


def test_blocks_are_taken_where_they_are_expected_to_be_faster() -> None:
    rng = np.random.default_rng(8)
    for block, zeros, expected in ((1, 0.0, 0), (1, 0.1, 0), (1, 0.8, 1), (4, 0.8, 4), (2, 0.5, 2)):
        assert best_block_rows(sparse_weights(rng, 64, 128, block, zeros)) == expected


@built
def test_a_model_with_exits_is_refused(tmp_path: Path) -> None:
    model = tiny("bert")
    anatomy = anatomy_of(model)
    small = shrink(model, anatomy, Plan(junctions={"encoder.0": Exit(3, "maximum", 0.7)}))
    with pytest.raises(ExportError, match="this model has exits"):
        save_model_file(small, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@built
def test_a_thousand_runs_of_one_session_at_a_time_give_what_one_by_one_gives(tmp_path: Path) -> None:
    model = tiny("bert")
    save_model_file(model, tmp_path / "model.onnx")
    opened = session(tmp_path / "model.onnx", threads=2)
    names = [item.name for item in opened.get_inputs()]
    rows = [{name: part.numpy() for name, part in batch(model, 1 + seed % 5, 3 + seed, seed).items()} for seed in range(10)]
    batches = [fill_inputs(names, given) for given in rows]
    expected = [opened.run(None, given)[0].tobytes() for given in batches]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: opened.run(None, batches[number % 10])[0].tobytes(), range(1000)))
    assert all(got == expected[number % 10] for number, got in enumerate(found))
