"""Int8 files: integers equal the fake-quantized model, calibration picks what it says, matrices may stay in float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from tiny import WEIGHT_BITS, batch, factored_context, tiny

from slimformer.core.ranges import Range, Ranges
from slimformer.core.shrink import shrink
from slimformer.errors import ExportError
from slimformer.exporters._onnx import calibrate, int8
from slimformer.exporters._onnx.mixed import products_at
from slimformer.exporters.base import Variant
from slimformer.exporters.onnx import Onnx, OnnxDraft, quantized_matrices
from slimformer.families.base import anatomy_of, family_of
from slimformer.hooks.points import quantized_inputs
from slimformer.measuring import machine
from slimformer.methods.quantization import Quantization
from slimformer.runtimes.onnxruntime import OnnxRuntime
from slimformer.testing.checks import tiny_context

SHAPES = ((3, 7), (1, 5), (6, 12), (40, 16))
UNSEEN = ((4, 9), (1, 3), (2, 31), (64, 8))
STATIC = (Variant.INT8_FUSED, Variant.INT8_STATIC)
# Sums are exact in integers and rounded in float32: now and then a value lands on the other side of a rounding, one step of one
# activation away, and later layers carry that on. Nearly all outputs agree to 1e-5; the worst, to 2 % of the largest.
CLOSE, WORST = 1e-5, 0.02


def arrays(model: Any, shapes: Any = SHAPES, seed: int = 0) -> list[dict[str, np.ndarray]]:
    made = []
    for index, (rows, seq) in enumerate(shapes):
        item = {name: value.numpy() for name, value in batch(model, rows, seq, seed + index).items()}
        if "token_type_ids" in family_of(model.config.model_type).inputs(model):
            item["token_type_ids"] = np.zeros_like(item["input_ids"])
        made.append(item)
    return made


def logits(model: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.numpy()


def trained(model_type: str, bits: int) -> tuple[Any, Ranges]:
    """A model that went through fake quantization, and its ranges."""
    kind = model_type.removeprefix("factored ")
    around = tiny_context(kind) if kind == model_type else factored_context(kind)
    state = Quantization(weights=bits, activations=bits, embeddings=bits).attach(around)
    for inputs in arrays(around.model):
        logits(around.model, inputs)
    decision = Quantization(weights=bits, activations=bits, embeddings=bits).decide(state, around)
    state.close()
    assert decision.ranges is not None
    return shrink(around.model, around.anatomy, decision), decision.ranges


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "bits"), [("bert", 8), ("distilbert", 6), ("roberta", 4), ("factored bert", 6)])
def test_integers_equal_the_model_with_fake_quantization(model_type: str, bits: int, tmp_path: Path) -> None:
    if bits == 8 and machine.saturates(machine.environment().flags):
        pytest.skip("int8 sums saturate on this processor")
    model, ranges = trained(model_type, bits)
    made = Onnx().export_all(model, arrays(model), {variant: tmp_path / f"{variant}.onnx" for variant in STATIC}, ranges=ranges)
    for variant, artifact in made.items():
        run = OnnxRuntime().load(artifact.path, threads=1)
        gaps, top, plain = [], 0.0, 0.0
        for inputs in arrays(model, UNSEEN, seed=50):
            got = run(inputs)["logits"]
            with quantized_inputs(model, anatomy_of(model), ranges):
                expected = logits(model, inputs)
            gaps.append(np.abs(got - expected).max(axis=1))
            top = max(top, float(np.abs(expected).max()))
            plain = max(plain, float(np.abs(logits(model, inputs) - expected).max()))
            np.testing.assert_array_equal(got.argmax(1), expected.argmax(1))
        rows = np.concatenate(gaps)
        assert (rows < CLOSE * top).mean() > 0.9, variant
        assert rows.max() < WORST * top, variant
        assert plain > 2 * WORST * top  # the ranges do matter
        assert artifact.max_difference < 1.5 * WORST * top  # of other rows
        assert any("differs from the model with fake quantization by" in note for note in artifact.notes)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "again"), [(8, True), (6, False)])
def test_weights_that_are_rounded_a_second_time_are_told(bits: int, again: bool, tmp_path: Path) -> None:
    model, ranges = trained("bert", bits)
    draft = Onnx(weight_bits=7, agreement=0.0).draft(model, arrays(model), ranges=ranges)
    for variant in (Variant.INT8_STATIC, Variant.INT8_DYNAMIC):
        notes = draft.write(tmp_path / "model.onnx", variant).notes
        told = "weights that were trained on 8 bits are rounded again, to 7: the file is not the model that was trained"
        assert (told in notes) == again
        assert any("rounded again" in note for note in notes) == again


@pytest.mark.slow
def test_an_input_that_never_moves_is_told_and_computed(tmp_path: Path) -> None:
    """Neurons that are all off: what their second matrix reads is 0 on any data."""
    model = tiny("bert")
    with torch.no_grad():
        for tensor in model.get_submodule("bert.encoder.layer.1.intermediate.dense").parameters():
            tensor.zero_()
    note = "1 inputs are constant on the calibration data, their ranges a guess"
    for variant in (Variant.INT8_STATIC, Variant.INT8_FUSED, Variant.INT8_DYNAMIC):
        exporter = Onnx(WEIGHT_BITS, agreement=0.0)
        artifact = exporter.export(model, arrays(model), tmp_path / f"{variant}.onnx", variant)
        assert note in artifact.notes
        got = OnnxRuntime().load(artifact.path, threads=1)(arrays(model)[0])["logits"]
        np.testing.assert_allclose(got, logits(model, arrays(model)[0]), atol=0.3)
    model.get_submodule("bert.encoder.layer.1.intermediate.dense").bias.data.fill_(1.0)
    assert note in Onnx(agreement=0.0).export(model, arrays(model), tmp_path / "one.onnx", Variant.INT8_STATIC).notes
    assert not any(
        "constant" in note
        for note in Onnx(agreement=0.0).export(tiny("bert"), arrays(model), tmp_path / "any.onnx", Variant.INT8_STATIC).notes
    )


@pytest.mark.slow
def test_a_factored_matrix_may_stay_in_float(tmp_path: Path) -> None:
    draft = Onnx(agreement=0.0).draft(model := factored_context("bert").model, arrays(model))
    counts = []
    for floats in ((), ("encoder.0.key.factor.input",), ("encoder.0.attention.input", "encoder.2.ffn_out.factor.input")):
        draft.write(tmp_path / "model.onnx", Variant.INT8_STATIC, floats)
        counts.append(quantized_matrices(tmp_path / "model.onnx"))
    assert [counts[0] - count for count in counts] == [0, 2, 1 + 3]  # a product for each term of the sum
    found = {}
    for name in ("query", "key", "ffn_in"):
        module = model.get_submodule(draft.subject.anatomy.points[f"encoder.0.{name}.factor.input"].modules[0])
        seen: list[int] = []
        hook = module.register_forward_pre_hook(lambda _, inputs, into=seen: into.append(inputs[0].shape[-2]))
        logits(model, arrays(model)[0])
        hook.remove()
        found[name] = products_at(model, draft.subject.anatomy.points[f"encoder.0.{name}.factor.input"].modules)
        assert seen == [shape.rows for shape in found[name]]
    assert found == {"query": ((2, 16, 16),), "key": ((2, 16, 2),) * 2, "ffn_in": ((2, 16, 3),) * 2}


@pytest.mark.slow
def test_matrices_on_one_grid_are_stored_on_it(tmp_path: Path) -> None:
    """A bucket for a whole matrix: rows have the same scale, and few of them reach its ends."""
    around = tiny_context()
    state = Quantization(weights=4, embeddings=4, buckets="tensor").attach(around)
    for inputs in arrays(around.model):
        logits(around.model, inputs)
    decision = Quantization(weights=4, embeddings=4, buckets="tensor").decide(state, around)
    state.close()
    assert decision.ranges is not None
    assert Ranges.from_json(decision.ranges.to_json()) == decision.ranges
    model = shrink(around.model, around.anatomy, decision)
    file = Onnx(agreement=0.0).export(
        model, arrays(model), tmp_path / "model.onnx", Variant.INT8_STATIC, ranges=decision.ranges
    )
    constants = {name: value.const_value for name, value in onnx_ir.load(file.path).graph.initializers.items()}
    own = {name.removeprefix("model."): name for name in constants}
    true = {name: value.detach().numpy() for name, value in model.named_parameters()}
    compared = 0
    for name in own:
        weight = name.removesuffix(".int8")
        if name.endswith(".int8") and weight in true:
            stored = constants[own[name]].numpy().astype(np.float32)
            scales = constants[own[f"{weight}.scale"]].numpy()
            again = stored * scales if "embeddings" in name else (stored * scales).T
            np.testing.assert_allclose(again, true[weight], rtol=1e-6, atol=1e-9)
            compared += 1
    assert compared == 19 + 2


@pytest.mark.slow
@pytest.mark.parametrize("variant", [Variant.INT8_FUSED, Variant.INT8_STATIC])
def test_products_are_told_apart_where_biases_are_equal(variant: Variant, tmp_path: Path) -> None:
    model = tiny("bert")
    biases = [module.bias for module in model.modules() if isinstance(module, torch.nn.Linear)]
    with torch.no_grad():
        for bias in biases:
            bias.zero_()
    draft = Onnx(agreement=0.0).draft(model, arrays(model))
    draft.write(tmp_path / "float.onnx", Variant.FLOAT)  # proven to 1e-4
    assert all(float(bias.detach().abs().max()) == 0 for bias in biases)
    draft.write(tmp_path / "model.onnx", variant, ("encoder.1.attention.input",))
    assert quantized_matrices(tmp_path / "model.onnx") == 19 - 3


@pytest.mark.slow
def test_padding_is_left_out_of_square_batches() -> None:
    """As many rows as tokens: both orders of the axes fit."""
    model = tiny("bert")
    inputs = {name: value[:, :6] for name, value in arrays(model)[0].items()}
    inputs = {name: np.concatenate([value] * 6)[:6] for name, value in inputs.items()}
    inputs["attention_mask"] = np.tril(np.ones((6, 6), dtype=np.int64))
    draft = Onnx(agreement=0.0).draft(model, [inputs])
    twice = {name: np.concatenate([value] * 2) for name, value in inputs.items()}
    oblong = Onnx(agreement=0.0).draft(model, [twice])
    for variant in (Variant.INT8_FUSED, Variant.INT8_STATIC):
        mine, theirs = (each._float_graph(variant, ()).samples for each in (draft, oblong))
        for name, sample in theirs.items():
            np.testing.assert_array_equal(mine[name].low, sample.low)
            np.testing.assert_array_equal(mine[name].high, sample.high)
            assert len(mine[name].rows) in (1 + 2 + 3 + 4 + 5 + 6, 6)  # of all tokens, of first ones


@pytest.mark.slow
def test_calibration_batches_need_no_mask() -> None:
    model = tiny("bert")
    inputs = {name: value for name, value in arrays(model)[0].items() if name != "attention_mask"}
    whole = inputs | {"attention_mask": np.ones_like(inputs["input_ids"])}
    plain, masked = (
        Onnx(agreement=0.0).draft(model, [batch])._float_graph(Variant.INT8_STATIC, ()).samples for batch in (inputs, whole)
    )
    assert plain
    for name, sample in masked.items():
        np.testing.assert_array_equal(plain[name].rows, sample.rows)


@pytest.fixture(scope="module")
def bert() -> Any:
    return tiny("bert")


@pytest.fixture(scope="module")
def drafts(bert: Any) -> Any:
    """Drafts with any options from one trace."""
    first = Onnx().draft(bert, arrays(bert))

    def made(options: Onnx, ranges: Ranges | None = None) -> OnnxDraft:
        other = object.__new__(OnnxDraft)
        vars(other).update(vars(first) | {"options": options, "ranges": ranges, "_float_graphs": {}})
        return other

    return made


def quantizers(path: Path) -> dict[str, tuple[float, int]]:
    """Scale and zero point of each activation that a file quantizes, by its name."""
    found = {}
    for node in onnx_ir.load(path).graph:
        if node.op_type == "QuantizeLinear":
            scale, zero = (value.const_value.numpy() for value in node.inputs[1:3])
            found[str(node.inputs[0].name)] = (float(scale), int(zero))
    return found


@pytest.mark.slow
def test_learned_ranges_are_the_ones_in_the_file_and_the_rest_is_calibrated(drafts: Any, tmp_path: Path) -> None:
    span = Range(-1.0, 3.0)
    learned = Ranges({"encoder.1.ffn_out.input": span, "encoder.0.attention.input": span}, weight_bits=6)
    draft = drafts(Onnx(agreement=0.0), learned)
    draft.write(tmp_path / "model.onnx", Variant.INT8_STATIC)
    step, zero = span.grid(8)
    found = list(quantizers(tmp_path / "model.onnx").values())
    assert found.count((float(step), zero)) == 2  # query, key and value share one
    assert len(found) == 3 * 4 + 1 + 1  # the pooler's, and the last query's: it reads the first token alone
    largest = [
        int(np.abs(value.const_value.numpy()).max())
        for name, value in onnx_ir.load(tmp_path / "model.onnx").graph.initializers.items()
        if name.endswith(".weight.int8") and "embeddings" not in name
    ]
    assert largest == [31] * 19


@pytest.mark.slow
@pytest.mark.parametrize("calibration", ["min_max", "percentile", "entropy"])
def test_a_calibration_picks_its_ranges(drafts: Any, calibration: Any, tmp_path: Path) -> None:
    draft = drafts(Onnx(calibration=calibration, percentile=99.0))
    artifact = draft.write(tmp_path / "model.onnx", Variant.INT8_STATIC)
    assert quantized_matrices(artifact.path) == 19
    found = quantizers(artifact.path)
    ready = draft._float_graph(Variant.INT8_STATIC, ())
    for source, sample in ready.samples.items():
        if source not in found:
            continue  # smoothed: another input took its place
        low, high = min(0.0, sample.low.min()), max(0.0, sample.high.max())
        widest = (high - low) / 255
        scale = found[source][0]
        if calibration == "min_max":
            assert scale == pytest.approx(widest, rel=1e-5)
        elif calibration == "percentile":
            tails = np.percentile(sample.rows, [1, 99])
            assert scale == pytest.approx((max(tails[1], 0) - min(tails[0], 0)) / 255, rel=0.05)
        else:
            assert scale <= widest * 1.00001


@pytest.mark.slow
def test_matrices_stay_in_float_where_asked(drafts: Any, tmp_path: Path) -> None:
    draft = drafts(Onnx())
    floats = ("encoder.0.attention.input", "encoder.2.ffn_out.input")
    for variant in (Variant.INT8_FUSED, Variant.INT8_STATIC, Variant.INT8_DYNAMIC):
        artifact = draft.write(tmp_path / f"{variant}.onnx", variant, floats)
        assert quantized_matrices(artifact.path) == 19 - 4
        assert f"in float: {', '.join(floats)}" in artifact.notes
        assert "int8: 15 of 20 matrices, 2 embedding tables; the classifier stays in fp32" in artifact.notes
    every = [point.id for point in draft.points]
    assert draft.error(Variant.INT8_STATIC, every) < draft.error(Variant.INT8_STATIC, floats)
    assert draft.error(Variant.INT8_STATIC, every) < 1e-4  # only tables are int8
    with pytest.raises(ExportError, match=r"no matrix 'encoder.0.ffn' to leave in float[\s\S]*did you mean"):
        draft.write(tmp_path / "model.onnx", Variant.INT8_STATIC, ("encoder.0.ffn",))


def test_few_bits_are_clamped_before_they_are_stored(drafts: Any, tmp_path: Path) -> None:
    learned = Ranges({"encoder.1.ffn_out.input": Range(-0.2, 0.25)}, activation_bits=4)
    draft = drafts(Onnx(agreement=0.0), learned)
    draft.write(tmp_path / "model.onnx", Variant.INT8_FUSED)
    clips = [node for node in onnx_ir.load(tmp_path / "model.onnx").graph if node.op_type == "Clip"]
    assert len(clips) == 1
    low, high = (float(value.const_value.numpy()) for value in clips[0].inputs[1:])
    assert (low, high) == pytest.approx((-0.21, 0.24))  # 0.45 / 15 a step; 0 is on the grid


def test_calibration_data_without_a_token_is_told(drafts: Any, tmp_path: Path) -> None:
    draft = drafts(Onnx())
    draft.batches = [{name: np.zeros_like(value) for name, value in item.items()} for item in draft.batches]
    with pytest.raises(ExportError, match="the calibration data is empty: no batch holds a real token"):
        draft.write(tmp_path / "model.onnx", Variant.INT8_STATIC)
    assert list(tmp_path.iterdir()) == []


def test_an_input_that_never_moves_is_told() -> None:
    still = int8.Sample(np.zeros((4, 2)), np.zeros(2), np.zeros(2))
    for calibration in ("least_squares", "min_max", "percentile", "entropy"):
        assert calibrate.range_of(still, calibration, 99.99) == Range(0.0, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 1}, "weight_bits must be from 2 to 8, got 1"),
        ({"weight_bits": 40}, "weight_bits must be from 2 to 8, got 40"),
        ({"calibration": "mean"}, "calibration: there is no 'mean'; known: entropy, least_squares, min_max, percentile"),
        ({"percentile": 10}, "percentile must be above 50 and at most 100, got 10"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Onnx(**options)
