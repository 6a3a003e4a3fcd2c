"""Files of encoder-decoders write what the model writes, token by token, whatever was cut from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from tiny import ENCODERS, MODEL_TYPES, WEIGHT_BITS, batch, tiny

from slimformer.core.anatomy import PointRole
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.decoding import Halves, Settings, search
from slimformer.errors import ExportError, ModelError
from slimformer.exporters._onnx.int8 import int8_embeddings
from slimformer.exporters._onnx.pair import Writing
from slimformer.exporters.base import PAIRS, Variant, files_of, variant_of
from slimformer.exporters.onnx import Onnx
from slimformer.families.base import anatomy_of, subject_of
from slimformer.hooks.points import quantized_inputs
from slimformer.methods.quantization import Quantization
from slimformer.testing.checks import tiny_context

SPEAKING = tuple(kind for kind in MODEL_TYPES if kind not in ENCODERS)
# Heads, neurons and whole blocks of either side; the first attention of the decoder, which counts the tokens, is gone.
CUT = Plan(
    {
        "encoder.0.heads": (1, 3),
        "encoder.1.attention": (),
        "encoder.1.ffn": (),
        "encoder.2.neurons": tuple(range(7)),
        "decoder.0.attention": (),
        "decoder.0.cross_heads": (2,),
        "decoder.1.heads": (1, 2),
        "decoder.1.cross_attention": (),
        "decoder.1.ffn": (),
        "decoder.2.heads": (3,),
        "decoder.2.cross_heads": (0, 1, 3),
        "decoder.2.neurons": tuple(range(5, 24)),
    }
)
EMPTY = Plan(
    {f"{side}.{layer}.{part}": () for side in ("encoder", "decoder") for layer in range(3) for part in ("attention", "ffn")}
)
SEARCHES = (
    {"max_new_tokens": 12},
    {"max_new_tokens": 12, "num_beams": 4},
    {"num_beams": 3, "max_length": 15, "length_penalty": 2.0, "early_stopping": True, "eos_token_id": [2, 9, 17, 30]},
    {"num_beams": 3, "max_length": 15, "length_penalty": 0.3, "early_stopping": "never", "forced_bos_token_id": 7},
    {
        "num_beams": 4, "max_length": 20, "min_length": 6, "no_repeat_ngram_size": 2, "bad_words_ids": [[1], [5, 6], [2]],
        "renormalize_logits": True, "forced_eos_token_id": 2,
    },
    {"num_beams": 2, "repetition_penalty": 1.7, "max_new_tokens": 20, "min_new_tokens": 4, "length_penalty": -1.0},
    {"eos_token_id": [2, 9, 17, 30, 31], "max_new_tokens": 20, "suppress_tokens": [40, 41], "begin_suppress_tokens": [9, 17]},
)  # fmt: skip


def arrays(model: Any, shapes: Any = ((3, 7), (1, 5), (40, 12))) -> list[dict[str, np.ndarray]]:
    return [
        {name: value.numpy() for name, value in batch(model, rows, seq, seed).items()}
        for seed, (rows, seq) in enumerate(shapes)
    ]


def model_of(kind: str, plan: Plan | None) -> Any:
    model = tiny(kind)
    return model if plan is None else shrink(model, anatomy_of(model), plan)


def texts_of(model: Any, inputs: Any, options: Any) -> list[list[int]]:
    """What transformers writes, without the padding behind each text."""
    with torch.no_grad():
        rows = model.generate(**inputs, **options).tolist()
    ends = np.atleast_1d(options.get("eos_token_id", model.generation_config.eos_token_id)).tolist()
    stops = [next((place for place, token in enumerate(row) if place and token in ends), len(row) - 1) for row in rows]
    return [row[: stop + 1] for row, stop in zip(rows, stops, strict=True)]


def written(model: Any, encoder: Path, inputs: Any, options: Any) -> list[list[int]]:
    settings = Settings.of({**json.loads(model.generation_config.to_json_string()), **options}, 64)
    ids, mask = (inputs[name].numpy() for name in ("input_ids", "attention_mask"))
    return [row.tolist() for row in search(Halves(encoder, 1).read(ids, mask), len(ids), settings)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using the model-agnostic")
@pytest.mark.parametrize(
    ("kind", "plan"), [*((kind, plan) for kind in SPEAKING for plan in (None, CUT)), ("marian", EMPTY), ("t5", EMPTY)]
)
def test_files_write_what_the_model_writes(kind: str, plan: Plan | None, tmp_path: Path) -> None:
    model = model_of(kind, plan)
    if "final_logits_bias" in dict(model.named_buffers()):
        model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(0))
    variants = (Variant.FLOAT, Variant.FUSED)
    artifacts = Onnx().export_all(model, arrays(model), {item: tmp_path / PAIRS[item].name for item in variants})
    inputs = {name: value for name, value in batch(model, 6, 9, 5).items() if not name.startswith("decoder_")}
    for options in SEARCHES:
        wanted = texts_of(model, inputs, options)
        for variant in variants if options is SEARCHES[1] else (Variant.FUSED,):
            assert written(model, artifacts[variant].path, inputs, options) == wanted, options


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPEAKING)
def test_int8_files_hold_integers_for_every_matrix_and_table_once(kind: str, tmp_path: Path) -> None:
    model = model_of(kind, CUT)
    variants = (Variant.INT8_DYNAMIC, Variant.INT8_FUSED, Variant.INT8_STATIC)
    paths = {item: tmp_path / PAIRS[item].name for item in variants}
    artifacts = Onnx(agreement=0.6).export_all(model, arrays(model), paths)
    for variant, artifact in artifacts.items():
        assert variant_of(artifact.path.name) == variant
        assert [file.name for file in artifact.files] == [
            artifact.path.name,
            artifact.path.name.replace("encoder_model", "decoder_model_merged"),
        ]
        decoder = onnx_ir.load(artifact.files[1]).graph
        wide = {
            name: value.const_value.numpy() for name, value in decoder.initializers.items() if value.const_value.size >= 500
        }
        tables = [name for name, array in wide.items() if 99 in array.shape]
        assert tables == ["model.lm_head.table.int8"]
        assert all(array.dtype == np.int8 for array in wide.values())


def test_biases_of_distances_are_no_table_of_words() -> None:
    model = tiny("t5", relative_attention_max_distance=128)  # as people have it: the file has a row for each of 257 distances
    graph = Writing(subject_of(model), fused=False).graph("encoder").graph
    assert int8_embeddings(graph) == 1


def test_the_decoder_has_the_names_that_others_look_for(tmp_path: Path) -> None:
    model = model_of("marian", CUT)
    path = Onnx().export(model, arrays(model), tmp_path / "encoder_model.onnx", Variant.FLOAT).path
    encoder, decoder = (onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]) for file in files_of(path))
    assert {item.name for item in encoder.get_inputs()} == {"input_ids", "attention_mask"}
    assert [item.name for item in encoder.get_outputs()] == ["last_hidden_state"]
    kinds = [f"{layer}.{side}.{what}" for layer in range(3) for side in ("decoder", "encoder") for what in ("key", "value")]
    past = {f"past_key_values.{kind}" for kind in kinds}
    inputs = {item.name: item for item in decoder.get_inputs()}
    assert set(inputs) == past | {"encoder_attention_mask", "input_ids", "encoder_hidden_states", "use_cache_branch"}
    assert (inputs["use_cache_branch"].type, inputs["use_cache_branch"].shape) == ("tensor(bool)", [1])
    assert decoder.get_outputs()[0].name == "logits"
    assert {item.name for item in decoder.get_outputs()} == {"logits"} | {f"present.{kind}" for kind in kinds}
    # Whoever reads the number of heads from the config, as transformers.js does, may start with empty arrays of that shape.
    feeds = {name: np.zeros((2, 4, 0, 8), np.float32) for name in past}
    hidden = encoder.run(None, {"input_ids": np.full((2, 5), 7), "attention_mask": np.ones((2, 5), np.int64)})[0]
    feeds |= {"encoder_hidden_states": hidden, "encoder_attention_mask": np.ones((2, 5), np.int64)}
    start = {"input_ids": np.full((2, 1), 1), "use_cache_branch": np.asarray([False])}
    got = dict(zip([item.name for item in decoder.get_outputs()], decoder.run(None, feeds | start), strict=True))
    assert got["logits"].shape == (2, 1, 99)
    assert got["present.0.decoder.key"].shape == (2, 1, 1, 1)  # a zero for each token that was said
    assert got["present.2.encoder.key"].shape == (2, 3, 5, 8)
    feeds |= {name: got[name.replace("past_key_values", "present")] for name in past}
    again = {"input_ids": np.full((2, 1), 9), "use_cache_branch": np.asarray([True])}
    later = dict(zip(got, decoder.run(None, feeds | again), strict=True))
    assert later["present.2.encoder.key"].shape[0] == 0  # what was handed in stays as it was


@pytest.mark.slow
def test_weights_of_large_files_lie_beside_both(tmp_path: Path) -> None:
    model = tiny("marian")
    path = tmp_path / "encoder_model.onnx"
    artifact = Onnx(one_file_bytes=1000).export(model, arrays(model), path, Variant.FUSED)
    names = ("encoder_model.onnx", "encoder_model.onnx_data", "decoder_model_merged.onnx", "decoder_model_merged.onnx_data")
    assert tuple(file.name for file in artifact.files) == names
    assert artifact.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    inputs = {name: value for name, value in batch(model, 3, 6).items() if not name.startswith("decoder_")}
    assert written(model, path, inputs, SEARCHES[1]) == texts_of(model, inputs, SEARCHES[1])


def test_bad_input_is_refused_before_a_file_is_left(tmp_path: Path) -> None:
    model = tiny("marian")
    batches = arrays(model, ((2, 5),))
    path = tmp_path / "encoder_model.onnx"
    with pytest.raises(ExportError, match="holds no decoder_input_ids"):
        Onnx().export(model, [{"input_ids": batches[0]["input_ids"]}], path, Variant.FLOAT)
    with pytest.raises(ExportError, match=r"model\.onnx is no name for an encoder"):
        Onnx().export(model, batches, tmp_path / "model.onnx", Variant.FLOAT)
    with pytest.raises(ExportError, match="there is no matrix 'decoder.0.ffn_in.inputs'"):
        Onnx(floats=("decoder.0.ffn_in.inputs",)).export(model, batches, path, Variant.INT8_FUSED)
    with pytest.raises(ExportError, match="differs from the model"):
        Onnx(tolerance=1e-12).export(model, batches, path, Variant.FLOAT)
    model.config.activation_function = "softsign"
    with pytest.raises(ExportError, match="activation 'softsign' of MarianMTModel is not known"):
        Onnx().export(model, batches, path, Variant.FLOAT)
    broken = tiny("marian")
    with torch.no_grad():
        broken.model.shared.weight[7:] = float("nan")
    with pytest.raises(ModelError, match="gives no finite"):
        Onnx().export(broken, batches, path, Variant.FLOAT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "bits", "options"),
    [
        ("marian", 8, {"roles": ("matrix", "head")}),
        ("marian", 6, {"roles": ("matrix", "head"), "embeddings": None}),
        ("bart", 4, {"roles": ("matrix", "head"), "embeddings": 8}),
        ("mbart", 8, {"roles": ("matrix",)}),
        ("t5", 6, {"roles": "all", "embeddings": 6}),
    ],
)
def test_a_file_from_learned_ranges_is_the_model_that_was_trained(
    kind: str, bits: int, options: dict[str, Any], tmp_path: Path
) -> None:
    """The same words; most scores differ by rounding alone, and none by more than a few steps of one activation."""
    around = tiny_context(kind)
    method = Quantization(weights=bits, activations=min(bits, WEIGHT_BITS), **options)
    state = method.attach(around)
    state.train()
    (columns,) = around.batches(4)
    with torch.no_grad():
        around.model(**around.subject.feed(columns))
        decision = method.decide(state, around)
        state.close()
    small = shrink(around.model, around.anatomy, decision)
    assert decision.ranges is not None
    spans = {name: span for name, span in decision.ranges.activations.items() if name.endswith(".memory")}
    assert len(spans) == 3
    batches = arrays(small, ((3, 7), (12, 9)))
    artifact = Onnx(agreement=0.9).export(
        small, batches, tmp_path / PAIRS[Variant.INT8_FUSED].name, Variant.INT8_FUSED, ranges=decision.ranges
    )
    assert any("differs from the model with fake quantization by" in note for note in artifact.notes)
    encoder, decoder = (onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]) for file in artifact.files)
    roles = (PointRole.MATRIX, PointRole.HEAD)
    with torch.no_grad(), quantized_inputs(small, anatomy_of(small), decision.ranges, roles=roles):
        output = small(**{name: torch.as_tensor(value) for name, value in batches[1].items()})
    hidden = encoder.run(None, {name: batches[1][name] for name in ("input_ids", "attention_mask")})[0]
    feeds = {"input_ids": batches[1]["decoder_input_ids"], "encoder_attention_mask": batches[1]["attention_mask"]}
    feeds |= {"encoder_hidden_states": hidden, "use_cache_branch": np.asarray([False])}
    for item in decoder.get_inputs():
        if item.name not in feeds:
            feeds[item.name] = np.zeros([size if isinstance(size, int) else 1 for size in item.shape], np.float32)
    scores = decoder.run(["logits"], feeds)[0][batches[1]["decoder_attention_mask"] == 1]
    wanted = output.logits.numpy()[batches[1]["decoder_attention_mask"] == 1]
    error = np.abs(scores - wanted).max(axis=1) / np.abs(wanted).max()
    if "head" in str(options) or options["roles"] == "all":
        assert (error < 1e-5).mean() > 0.6
        assert error.max() < 0.03
    else:  # the last matrix was trained in float
        assert error.max() < 0.05
