"""ONNX files compute what the model computes, whatever was cut from it; say what they hold; and fail without leaving a trace."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from tiny import ENCODERS, VOCABULARY, WEIGHT_BITS, batch, tiny, tiny_config

from slimformer.core.anatomy import Kind
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.errors import ExportError, ModelError
from slimformer.exporters._onnx import int8, parity, rewrite, storing
from slimformer.exporters._onnx import trace as tracing
from slimformer.exporters._onnx.calibrate import best_range
from slimformer.exporters._onnx.graph import Unexpected, classifiers, lower_versions, products
from slimformer.exporters.base import Variant
from slimformer.exporters.onnx import Onnx, fused_attentions, needed_runtime, quantized_matrices
from slimformer.families.base import anatomy_of, family_of, subject_of
from slimformer.measuring.scoring import shipped_bytes
from slimformer.runtimes.onnxruntime import OnnxRuntime
from slimformer.runtimes.openvino import OpenVINO

SHAPES = ((3, 7), (1, 5), (6, 12), (2, 2), (40, 16))  # the last so that int8 sees most of the vocabulary
# What dynamic int8 may be off, as a share of the largest output: a bit less doubles the steps of the weights.
DYNAMIC = 0.05 * 2 ** (8 - WEIGHT_BITS)
FAMILIES = ("bert", "roberta", "electra", "distilbert")


def uneven(model_type: str) -> Any:
    """A tiny model whose layers differ: heads 1 and 3, widths 5 and 24, one attention and one feed-forward gone."""
    model = tiny(model_type)
    anatomy = anatomy_of(model)
    keep = {
        "encoder.0.heads": (2,),
        "encoder.0.neurons": (0, 3, 7, 8, 20),
        "encoder.1.attention": (),
        "encoder.1.ffn": (),
        "encoder.2.heads": (0, 1, 3),
    }
    assert set(keep) <= set(anatomy.sites)
    return shrink(model, anatomy, Plan(keep))


@pytest.fixture(scope="module")
def bert() -> Any:
    return uneven("bert")


@pytest.fixture(scope="module")
def trace(bert: Any) -> Any:
    """What the tracer makes of `bert`: it takes seconds, so tests of what follows it share one."""
    return tracing.trace_model(subject_of(bert), ("logits",))


@pytest.fixture
def traced(bert: Any, trace: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`bert`, whose exports start from the shared trace."""
    monkeypatch.setattr(tracing, "trace_model", lambda *_: trace.clone())
    return bert


@pytest.mark.slow
def test_a_model_in_half_precision_is_exported_in_float32(tmp_path: Path) -> None:
    half = tiny("bert").bfloat16()
    artifact = Onnx().export(half, arrays(half), tmp_path / "model.onnx", Variant.FLOAT)
    assert artifact.max_difference < 1e-4
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@pytest.mark.slow
def test_a_stack_without_norms_keeps_its_matrices_out_of_the_head() -> None:
    scaled = tiny("mobilebert", auto_class="AutoModel", normalization_type="no_norm")
    graph = tracing.trace_model(subject_of(scaled), ("last_hidden_state",)).graph
    assert len(products(graph)) > 20
    assert len(classifiers(graph)) <= 1


def arrays(model: Any, shapes: Any = SHAPES) -> list[dict[str, np.ndarray]]:
    made = []
    for seed, (rows, seq) in enumerate(shapes):
        item = {name: value.numpy() for name, value in batch(model, rows, seq, seed).items()}
        if "token_type_ids" in family_of(model.config.model_type).inputs(model):
            item["token_type_ids"] = np.random.default_rng(seed).integers(0, 2, item["input_ids"].shape)
        made.append(item)
    return made


def answers(model: Any, inputs: dict[str, np.ndarray], names: tuple[str, ...] = ("logits",)) -> dict[str, np.ndarray]:
    with torch.no_grad():
        output = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}, return_dict=True)
    return {name: output[name].numpy() for name in names}


def spread(model: Any, batches: list[dict[str, np.ndarray]]) -> float:
    return max(float(np.abs(answers(model, item)["logits"]).max()) for item in batches)


def check_all(model: Any, folder: Path) -> None:
    """Exports every variant, and compares the files with the model on shapes that the export did not see."""
    batches = arrays(model)
    anatomy = anatomy_of(model)
    attentions = len(anatomy.attentions)
    linears = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    made = Onnx(weight_bits=WEIGHT_BITS).export_all(
        model, batches, {variant: folder / f"{variant}.onnx" for variant in Variant}
    )
    unseen = arrays(model, ((4, 9), (1, 3), (2, 31)))
    top = spread(model, unseen)
    for variant, artifact in made.items():
        fused = variant in {Variant.FUSED, Variant.INT8_DYNAMIC, Variant.INT8_FUSED}
        small = variant in {Variant.INT8_DYNAMIC, Variant.INT8_FUSED, Variant.INT8_STATIC}
        assert artifact.size_bytes == artifact.path.stat().st_size
        assert fused_attentions(artifact.path) == (attentions if fused else 0)
        assert quantized_matrices(artifact.path) == (linears - 1 if small else 0)
        assert OpenVINO().accepts(artifact.path) is not fused
        run = OnnxRuntime().load(artifact.path, threads=1)
        for inputs in unseen:
            difference = np.abs(run(inputs)["logits"] - answers(model, inputs)["logits"]).max()
            bound = 1e-5 * max(1.0, top)
            if small:  # 52 rows of a random model are few to take ranges from
                bound = (DYNAMIC if variant is Variant.INT8_DYNAMIC else 0.25) * top
            assert difference <= bound, (variant, inputs["input_ids"].shape)
    assert made[Variant.INT8_DYNAMIC].max_difference > made[Variant.FUSED].max_difference
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{variant}.onnx" for variant in Variant)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_files_of_models_whose_layers_differ_equal_the_model(model_type: str, tmp_path: Path) -> None:
    check_all(uneven(model_type), tmp_path)


@pytest.mark.slow
def test_a_fused_file_equals_its_model_and_leaves_the_model_alone(tmp_path: Path) -> None:
    model = uneven("bert").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    implementation = model.config._attn_implementation
    level = logging.getLogger("torch.onnx").level
    artifact = Onnx().export(model, arrays(model), tmp_path / "model.onnx", Variant.FUSED)
    assert "2 of 2 attentions fused" in artifact.notes
    assert "the last layer computes the first token only" in artifact.notes
    assert_untouched(model, before, implementation)
    assert logging.getLogger("torch.onnx").level == level
    model.eval()
    inputs = arrays(model, ((5, 8),))[0]
    got = OnnxRuntime().load(artifact.path, threads=1)(inputs)["logits"]
    np.testing.assert_allclose(got, answers(model, inputs)["logits"], atol=1e-5)
    assert b"site-packages" not in artifact.path.read_bytes()  # the tracer notes where each node comes from


def assert_untouched(model: Any, before: dict[str, torch.Tensor], implementation: str) -> None:
    after = model.state_dict()
    assert model.training
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == implementation
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    hooks = [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    assert hooks == []


def test_a_model_that_cannot_be_traced_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = uneven("distilbert").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    implementation = model.config._attn_implementation

    def refuse(*_: Any, **__: Any) -> None:
        assert model.config._attn_implementation != implementation
        raise ValueError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(ExportError, match=r"could not trace DistilBertForSequenceClassification\.\n  no such operator"):
        Onnx().export(model, arrays(model), tmp_path / "model.onnx", Variant.FLOAT)
    assert list(tmp_path.iterdir()) == []
    assert_untouched(model, before, implementation)


@pytest.mark.slow
def test_nothing_is_left_of_a_file_that_disagrees(traced: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"what was there before")
    lower = rewrite.lower_attentions

    def wrong(graph: Any, *options: Any) -> int:
        for node in rewrite.markers(graph):
            node.attributes["scale"] = onnx_ir.AttrFloat32("scale", 1.0)
        return lower(graph, *options)

    monkeypatch.setattr(rewrite, "lower_attentions", wrong)
    with pytest.raises(ExportError, match="the fused file differs from the model by .* on a batch of"):
        Onnx().export(traced, arrays(traced), path, Variant.FUSED)
    monkeypatch.setattr(rewrite, "lower_attentions", lambda graph, *options: lower(graph, *options) - 1)
    with pytest.raises(ExportError, match="the graph has 1 attentions, the model has 2"):
        Onnx().export(traced, arrays(traced), path, Variant.FUSED)
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"what was there before"


@pytest.mark.slow
def test_a_graph_that_is_not_as_expected_is_refused(traced: Any, trace: Any, tmp_path: Path) -> None:
    torn = trace.clone()
    rewrite.flatten_attentions(torn.graph)
    with pytest.raises(Unexpected, match="not joined again"):
        rewrite.flatten_attentions(torn.graph)
    short = shrink(traced, anatomy_of(traced), Plan({"encoder.2.ffn": ()}))
    with pytest.raises(ExportError, match="the graph has 14 matrices, the model has 12"):
        Onnx().export(short, arrays(short), tmp_path / "model.onnx", Variant.FLOAT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_int8_that_changes_answers_is_refused(traced: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_weight = int8.quantize_weight

    def broken(weight: np.ndarray, axis: int, coding: int8.WeightCoding) -> tuple[np.ndarray, np.ndarray]:
        values, scales = quantize_weight(weight, axis, coding)
        return np.roll(values, 1, axis=0), scales

    monkeypatch.setattr(int8, "quantize_weight", broken)
    with pytest.raises(ExportError, match=r"answers as the model does on .*% of 52 rows only.*(.|\n)*weight_bits=7"):
        Onnx().export(traced, arrays(traced), tmp_path / "model.onnx", Variant.INT8_DYNAMIC)
    assert list(tmp_path.iterdir()) == []


def test_no_batches_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no batches"):
        Onnx().export(tiny("bert"), [], tmp_path / "model.onnx", Variant.FLOAT)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [float("nan"), 3e38])
def test_a_model_whose_own_outputs_are_not_finite_is_blamed_itself(factor: float, tmp_path: Path) -> None:
    model = tiny("bert")
    with torch.no_grad():
        model.classifier.weight *= factor
    ids = np.arange(5, 17).reshape(3, 4)
    with pytest.raises(ModelError, match="the model itself gives no finite 'logits'"):
        Onnx().export(model, [{"input_ids": ids, "attention_mask": np.ones_like(ids)}], tmp_path / "a.onnx", Variant.FLOAT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_question_answering_model_keeps_every_token(tmp_path: Path) -> None:
    from transformers import AutoModelForQuestionAnswering

    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForQuestionAnswering.from_config(tiny_config("bert", num_labels=2)).eval()
    names = ("start_logits", "end_logits")
    paths = {variant: tmp_path / f"{variant}.onnx" for variant in Variant}
    made = Onnx().export_all(model, arrays(model), paths, outputs=names)
    assert not any("first token" in note for artifact in made.values() for note in artifact.notes)
    inputs = arrays(model, ((3, 10),))[0]
    expected = answers(model, inputs, names)
    for variant in (Variant.FLOAT, Variant.FUSED):
        got = OnnxRuntime().load(made[variant].path, threads=1)(inputs)
        for name in names:
            np.testing.assert_allclose(got[name], expected[name], atol=1e-5)
    assert quantized_matrices(made[Variant.INT8_STATIC].path) == 3 * 6  # all but the head


@pytest.mark.slow
def test_a_model_without_any_layer_left_still_exports(tmp_path: Path) -> None:
    model = tiny("bert")
    anatomy = anatomy_of(model)
    bare = shrink(model, anatomy, Plan({site.id: () for site in anatomy.of_kind(Kind.SUBLAYER)}))
    made = Onnx().export_all(bare, arrays(bare), {variant: tmp_path / f"{variant}.onnx" for variant in Variant})
    assert fused_attentions(made[Variant.FUSED].path) == 0
    inputs = arrays(bare, ((3, 10),))[0]
    got = OnnxRuntime().load(made[Variant.FUSED].path, threads=1)(inputs)["logits"]
    np.testing.assert_allclose(got, answers(bare, inputs)["logits"], atol=1e-5)


@pytest.mark.slow
def test_equal_matrices_are_stored_once(tmp_path: Path) -> None:
    """Layers that share weights take the bytes of one, in float and in int8."""
    apart, shared = tiny("bert", intermediate_size=512), tiny("bert", intermediate_size=512)
    with torch.no_grad():
        first = dict(shared.bert.encoder.layer[0].named_parameters())
        for layer in shared.bert.encoder.layer[1:]:
            for name, parameter in layer.named_parameters():
                parameter.copy_(first[name])
    sizes = {}
    for name, model in (("apart", apart), ("shared", shared)):
        inputs = [{key: value.numpy() for key, value in batch(model, rows=4, seed=seed).items()} for seed in range(2)]
        paths = {variant: tmp_path / f"{name}-{variant}.onnx" for variant in (Variant.FUSED, Variant.INT8_DYNAMIC)}
        Onnx(agreement=0.0).export_all(model, inputs, paths)
        sizes[name] = {variant: path.stat().st_size for variant, path in paths.items()}
    layer = sum(parameter.numel() for parameter in shared.bert.encoder.layer[0].parameters())
    assert sizes["apart"][Variant.FUSED] - sizes["shared"][Variant.FUSED] > 0.95 * 2 * 4 * layer
    assert sizes["apart"][Variant.INT8_DYNAMIC] - sizes["shared"][Variant.INT8_DYNAMIC] > 0.8 * 2 * layer


@pytest.mark.slow
@pytest.mark.parametrize("variant", Variant)
def test_weights_of_a_large_model_lie_beside_the_file(variant: Variant, traced: Any, tmp_path: Path) -> None:
    options, batches = Onnx(weight_bits=WEIGHT_BITS, one_file_bytes=1000), arrays(traced)
    large = options.export(traced, batches, tmp_path / "model.onnx", variant)
    assert [file.name for file in large.files] == ["model.onnx", "model.onnx_data"]
    assert large.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir()) == shipped_bytes(large.path)
    assert any("model.onnx_data" in note for note in large.notes)
    (tmp_path / "moved").mkdir()
    for file in large.files:
        file.replace(tmp_path / "moved" / file.name)
    got = OnnxRuntime().load(tmp_path / "moved" / "model.onnx", threads=1)(batches[0])["logits"]
    small = replace(options, one_file_bytes=10**9).export(traced, batches, tmp_path / "moved" / "model.onnx", variant)
    assert small.files == (small.path,)
    assert [file.name for file in (tmp_path / "moved").iterdir()] == ["model.onnx"]
    np.testing.assert_array_equal(OnnxRuntime().load(small.path, threads=1)(batches[0])["logits"], got)


@pytest.mark.slow
@pytest.mark.parametrize("variant", Variant)
def test_runtimes_of_2022_read_the_files(variant: Variant, traced: Any, tmp_path: Path) -> None:
    artifact = Onnx(weight_bits=WEIGHT_BITS).export(traced, arrays(traced), tmp_path / "model.onnx", variant)
    model = onnx.load(artifact.path)
    assert {item.domain: item.version for item in model.opset_import if not item.domain} == {"": 17}
    assert model.ir_version == 8
    assert not any(node.op_type == "Gelu" and not node.domain for node in model.graph.node)
    assert "opset 17, IR version 8: needs ONNX Runtime 1.12 or newer" in artifact.notes
    assert needed_runtime(artifact.path) in artifact.notes
    if variant in (Variant.FLOAT, Variant.INT8_STATIC):
        onnx.checker.check_model(artifact.path, full_check=True)


@pytest.mark.parametrize(("approximate", "opset"), [("none", 17), ("tanh", 20)])
def test_the_lowest_version_that_the_operators_need_is_written(approximate: str, opset: int) -> None:
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", 4]) for name in ("x", "y")]
    nodes = [
        onnx.helper.make_node("Cast", ["x"], ["z"], to=onnx.TensorProto.FLOAT, saturate=1),
        onnx.helper.make_node("Gelu", ["z"], ["y"], approximate=approximate),
    ]
    graph = onnx.helper.make_graph(nodes, "gelu", ends[:1], ends[1:])
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    values = np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4)
    expected = storing.open_model(made.SerializeToString()).run(None, {"x": values})[0]
    program = onnx_ir.from_proto(made)
    assert rewrite.lower_gelus(program.graph, fused=False) == (approximate == "none")
    program.graph.sort()
    lower_versions(program)
    assert (program.graph.opset_imports[""], program.ir_version) == (opset, 8 if opset == 17 else 9)
    np.testing.assert_allclose(storing.open_graph(program, 10**9).run(None, {"x": values})[0], expected, atol=1e-6)


@pytest.mark.slow
def test_answers_of_the_int8_file_do_not_depend_on_the_batch(traced: Any, tmp_path: Path) -> None:
    artifact = Onnx().export(traced, arrays(traced), tmp_path / "model.onnx", Variant.INT8_FUSED)
    run = OnnxRuntime().load(artifact.path, threads=1)
    whole = arrays(traced, ((6, 12),))[0]
    together = run(whole)["logits"]
    for row in range(6):
        length = int(whole["attention_mask"][row].sum())
        alone = run({name: value[row : row + 1, :length] for name, value in whole.items()})["logits"]
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5)


def test_every_family_names_inputs_that_its_model_takes() -> None:
    for model_type in ENCODERS:
        model = tiny(model_type)
        names = family_of(model_type).inputs(model)
        inputs = {name: value for name, value in arrays(model, ((2, 6),))[0].items() if name in names}
        assert set(inputs) == set(names)
        assert answers(model, inputs)["logits"].shape == (2, 3)


def test_longest_leaves_out_the_positions_that_roberta_keeps() -> None:
    assert family_of("bert").positions(tiny("bert").config.to_dict()) == 64
    model = tiny("roberta")
    longest = family_of("roberta").positions(model.config.to_dict())
    ids = np.full((1, longest), VOCABULARY - 1)
    assert answers(model, {"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"].shape == (1, 3)
    with pytest.raises((IndexError, RuntimeError)):
        answers(model, {"input_ids": np.full((1, longest + 1), 9), "attention_mask": np.ones((1, longest + 1), dtype=int)})


# Pieces that can be worked by hand.


def test_quantized_weights_have_a_scale_per_channel_and_keep_seven_bits_where_asked() -> None:
    weight = np.array([[1.0, -0.5, 0.0], [0.3, 0.5, 0.0]], dtype=np.float32)  # (in, out)
    values, scales = int8.quantize_weight(weight, 1, int8.WeightCoding(8))
    np.testing.assert_array_equal(values, [[127, -127, 0], [38, 127, 0]])
    np.testing.assert_allclose(scales, [1 / 127, 0.5 / 127, 1.0])
    weight[0, 1] = -0.49
    values, scales = int8.quantize_weight(weight, 0, int8.WeightCoding(7))
    np.testing.assert_array_equal(values, [[63, -31, 0], [38, 63, 0]])
    np.testing.assert_allclose(scales, [1 / 63, 0.5 / 63])


def test_best_range_is_the_brute_force_best_and_drops_a_lone_outlier() -> None:
    rng = np.random.default_rng(0)
    values = np.append(rng.normal(size=20_000), 40.0)
    low, high = float(values.min()), float(values.max())
    bottom, top = best_range(int8.Sample(values[:, None], np.array([low]), np.array([high])), steps=15)
    assert top < 10
    assert bottom < -2

    def error(ends: tuple[float, float]) -> float:
        step = (ends[1] - ends[0]) / 15
        stored = np.clip(np.rint((np.clip(values, *ends) - ends[0]) / step), 0, 15) * step + ends[0]
        return float(((values - stored) ** 2).mean())

    tried = [(low * a, high * b) for a in np.linspace(1, 0.1, 19) for b in np.linspace(1, 0.1, 19)]
    assert error((bottom, top)) <= 1.1 * min(error(item) for item in tried)
    nothing = int8.Sample(np.zeros((4, 2)), np.zeros(2), np.zeros(2))
    assert best_range(nothing) == (0.0, 1.0)


def test_smoothing_takes_an_outlier_channel_and_leaves_even_channels_alone() -> None:
    rng = np.random.default_rng(1)
    rows = rng.choice([-1.0, 1.0], size=(64, 8)).astype(np.float32)
    weight = rng.choice([-1.0, 1.0], size=(8, 16)).astype(np.float32)

    def seen(values: np.ndarray) -> int8.Sample:
        return int8.Sample(values, values.min(axis=0), values.max(axis=0))

    assert int8._best_factor(seen(rows), [weight], 8) is None
    rows = rng.normal(size=(64, 8)).astype(np.float32)
    weight = rng.normal(size=(8, 16)).astype(np.float32)
    rows[:, 2] *= 100
    factor = int8._best_factor(seen(rows), [weight], 8)
    assert factor is not None
    assert factor.argmax() == 2
    np.testing.assert_allclose((rows / factor) @ (weight * factor[:, None]), rows @ weight, rtol=1e-3, atol=1e-3)


def test_near_ties_count_as_the_same_answer() -> None:
    expected = np.array([[2.0, 1.95], [2.0, -2.0], [0.0, 1.0]])
    got = np.array([[1.0, 1.1], [-1.0, 1.0], [0.0, 3.0]])
    np.testing.assert_array_equal(parity.agree(got, expected, top=2.0), [True, False, True])
    np.testing.assert_array_equal(parity.agree(np.array([[1.0], [3.0]]), np.array([[1.1], [1.0]]), top=2.0), [True, False])


def test_options_are_frozen_and_can_be_replaced() -> None:
    assert replace(Onnx(), weight_bits=7) == Onnx(weight_bits=7)
    assert (*Onnx.files, Variant.INT8_KERNELS) == tuple(Variant)


@pytest.mark.slow
def test_many_zeros_are_told_to_give_no_speed(tmp_path):
    notes = []
    for share, name in ((0.2, "some"), (0.9, "many")):
        model = tiny("bert", num_hidden_layers=1)
        with torch.no_grad():
            for number, module in enumerate(item for item in model.modules() if isinstance(item, torch.nn.Linear)):
                drawn = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(number))
                module.weight[drawn < share] = 0
        notes.append(Onnx().export(model, arrays(model), tmp_path / f"{name}.onnx", Variant.FLOAT).notes)
    assert not any("zeros" in note for note in notes[0])
    assert "90% of the matrices' weights are 0: zeros are stored and give no speed here" in notes[1]
