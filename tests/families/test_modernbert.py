"""ModernBERT: rows of fused matrices by hand, turned queries and windows in files, folders of transformers 4, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny import batch, tiny

from slimformer import registry
from slimformer.core.anatomy import Role
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.errors import TargetError
from slimformer.exporters.base import Variant
from slimformer.exporters.onnx import Onnx
from slimformer.families.base import anatomy_of
from slimformer.hooks.capture import Capture, capturing
from slimformer.hooks.weights import liveliness
from slimformer.runtimes.onnxruntime import OnnxRuntime
from slimformer.saving import checkpoint
from slimformer.saving.uniform import uniform
from slimformer.testing.checks import tiny_context

EVERYWHERE = Plan(
    {
        "encoder.0.heads": (1, 3),
        "encoder.0.neurons": (0, 3, 4),
        "encoder.1.heads": (0,),
        "encoder.2.ffn": (),
        "hidden": tuple(range(3, 27)),
    }
)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("modernbert")


def logits(model: Any, inputs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return model(**{name: torch.as_tensor(value) for name, value in inputs.items()}).logits


def arrays(model: Any, *shapes: tuple[int, int]) -> list[dict[str, np.ndarray]]:
    return [
        {name: value.numpy() for name, value in batch(model, rows, seq, seed).items()}
        for seed, (rows, seq) in enumerate(shapes)
    ]


# -- The anatomy -----------------------------------------------------------------------------------------------------------------


def test_heads_and_neurons_take_their_rows_of_each_part(model: Any) -> None:
    """Heads of 8 rows in a matrix of 3 x 32, neurons in one of 2 x 24."""
    small = shrink(model, anatomy_of(model), Plan({"encoder.1.heads": (1, 3), "encoder.1.neurons": (0, 5)}))
    before, after = model.model.layers[1], small.model.layers[1]
    rows = [part * 32 + head * 8 + row for part in range(3) for head in (1, 3) for row in range(8)]
    assert torch.equal(after.attn.Wqkv.weight, before.attn.Wqkv.weight[rows])
    assert torch.equal(after.attn.Wo.weight, before.attn.Wo.weight[:, rows[:16]])
    assert torch.equal(after.mlp.Wi.weight, before.mlp.Wi.weight[[0, 5, 24, 29]])
    assert torch.equal(after.mlp.Wo.weight, before.mlp.Wo.weight[:, [0, 5]])


def test_the_first_attention_has_no_norm_and_the_others_have(model: Any) -> None:
    anatomy = anatomy_of(model)
    norms = {point.modules[0] for point in anatomy.points.values() if point.role == "norm"}
    assert "model.layers.0.attn_norm" not in norms
    assert {"model.layers.1.attn_norm", "model.layers.0.mlp_norm", "model.final_norm"} <= norms
    assert anatomy.stacks[0].norm == "model.final_norm"
    assert [matrix.id for matrix in anatomy.matrices.values() if matrix.sublayer == "encoder.0.attention"] == [
        "encoder.0.query_key_value",
        "encoder.0.attention_out",
    ]


def test_biases_are_cut_with_their_rows() -> None:
    model = tiny("modernbert", attention_bias=True, mlp_bias=True, norm_bias=True)
    anatomy = anatomy_of(model)
    small = shrink(model, anatomy, EVERYWHERE)
    assert anatomy_of(small) == anatomy.after(EVERYWHERE)
    assert small.model.layers[0].attn.Wqkv.bias.shape == (48,)
    assert small.model.layers[0].mlp.Wi.bias.shape == (6,)
    assert small.model.final_norm.bias.shape == (24,)


def test_a_head_without_values_may_go_and_one_without_queries_may_not(model: Any) -> None:
    anatomy = anatomy_of(model)
    name = "model.layers.0.attn.Wqkv.weight"
    for part, free in ((0, False), (2, True)):
        weight = model.get_parameter(name).detach().clone()
        weight[part * 32 + 8 : part * 32 + 16] = 0.0
        bars = liveliness(anatomy, {name: weight.abs()})["encoder.0.heads"]
        assert (bars == 0).tolist() == [False, free, False, False]


def test_scores_explain_the_probabilities_within_windows(model: Any) -> None:
    """Scores are those of turned queries and keys; a layer with a window then sees words up to two places away."""
    other = tiny("modernbert")
    other.set_attn_implementation("eager")
    inputs = batch(model, 2, 9)
    inputs["attention_mask"][:] = 1
    with torch.no_grad(), capturing(model, anatomy_of(model), {Capture.SCORES}) as recorder:
        seen = recorder.take({"logits": model(**inputs).logits})
        theirs = other(**inputs, output_attentions=True).attentions
    places = torch.arange(9)
    far = (places[:, None] - places[None, :]).abs() > 2
    for layer, expected in enumerate(theirs):
        scores = seen.scores[f"encoder.{layer}.heads"]
        windowed = scores.masked_fill(far, -torch.inf) if layer == 1 else scores
        torch.testing.assert_close(windowed.softmax(-1), expected, atol=1e-5, rtol=1e-4)


def test_queries_keys_and_values_are_seen_apart(model: Any) -> None:
    inputs, given = batch(model), []
    hook = model.model.layers[2].attn.Wqkv.register_forward_hook(lambda _, __, output: given.append(output))
    with torch.no_grad(), capturing(model, anatomy_of(model), {Capture.RELATIONS}) as recorder:
        seen = recorder.take({"logits": model(**inputs).logits})
    hook.remove()
    assert torch.equal(torch.cat(seen.relations, -1), given[0])
    assert [tuple(item.shape) for item in seen.relations] == [(3, 7, 32)] * 3


@pytest.mark.parametrize(
    "name", ["adaptive_span", "decomposed_attention", "fixed_attention", "shared_projections", "word_elimination"]
)
def test_methods_that_need_queries_apart_refuse_in_one_line(name: str) -> None:
    context = tiny_context("modernbert")
    method = registry.find("methods", name)()
    with pytest.raises(TargetError, match=r"queries, keys and values are one matrix[^\n]*\.\n.*help"):
        method.check(context.anatomy, context.cost)
        method.attach(context)


# -- Files -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_files_turn_queries_and_keep_windows(tmp_path: Path) -> None:
    """The last layer, of which the first word alone is computed, has a window."""
    whole = tiny("modernbert", num_hidden_layers=2)
    plan = {name: keep for name, keep in EVERYWHERE.keep.items() if not name.startswith("encoder.2.")}
    small = shrink(whole, anatomy_of(whole), Plan(plan | {"encoder.0.ffn": ()}))
    paths = {variant: tmp_path / f"{variant}.onnx" for variant in (Variant.FLOAT, Variant.FUSED, Variant.INT8_FUSED)}
    exporter = Onnx(floats=("encoder.1.ffn_in.input",))
    seen = arrays(small, (3, 7), (1, 5), (4, 30))
    draft = exporter.draft(small, seen)
    made = {variant: draft.write(path, variant, exporter.floats) for variant, path in paths.items()}
    assert any("2 of 2 attentions fused" in note for note in made[Variant.FUSED].notes)
    assert any("first token only" in note for note in made[Variant.FUSED].notes)
    for variant in (Variant.FLOAT, Variant.FUSED):
        run = OnnxRuntime().load(paths[variant], threads=1)
        for inputs in arrays(small, (2, 3), (1, 41), (5, 12)):
            np.testing.assert_allclose(run(inputs)["logits"], logits(small, inputs), atol=2e-5)
    weights = {item.name for item in onnx.load(paths[Variant.INT8_FUSED]).graph.initializer}
    assert "model.model.layers.1.mlp.Wi.weight" in weights  # asked to stay in float: products without biases have their names
    assert {"model.model.layers.0.attn.Wqkv.weight.int8", "model.model.layers.1.attn.Wqkv.weight.int8"} <= weights


@pytest.mark.slow
def test_a_file_gives_the_answers_for_each_word_and_says_nothing_of_padding(tmp_path: Path) -> None:
    """Far behind a short text all words of a window are padding; what a model computes there is read by no one, and differs."""
    tagger = tiny("modernbert", auto_class="AutoModelForTokenClassification")
    seen = arrays(tagger, (3, 20))
    seen[0]["attention_mask"][1, 2:] = 0
    artifact = Onnx().export(tagger, seen, tmp_path / "model.onnx", Variant.FUSED)
    got, expected = OnnxRuntime().load(artifact.path, threads=1)(seen[0])["logits"], logits(tagger, seen[0]).numpy()
    real = seen[0]["attention_mask"] == 1
    np.testing.assert_allclose(got[real], expected[real], atol=2e-5)
    assert float(np.abs(got - expected).max()) > 0.01


# -- Folders ---------------------------------------------------------------------------------------------------------------------


def as_transformers_4_wrote(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name in ("layer_types", "rope_parameters", "dtype"):
        config.pop(name)
    config |= {"reference_compile": True, "position_embedding_type": "absolute", "torch_dtype": "float32"} | fields
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "4.48.0"}))


def test_a_folder_of_transformers_4_loads_with_its_turns_and_windows(tmp_path: Path) -> None:
    turns = {
        "full_attention": {"rope_type": "default", "rope_theta": 50.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 7.0},
    }
    model = tiny("modernbert", rope_parameters=turns)
    model.save_pretrained(tmp_path)
    as_transformers_4_wrote(tmp_path, global_rope_theta=50.0, local_rope_theta=7.0)
    loaded = checkpoint.load(tmp_path)
    inputs = batch(model)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert not torch.allclose(logits(tiny("modernbert"), inputs), logits(model, inputs), atol=1e-3)
    small = shrink(loaded, anatomy_of(loaded), EVERYWHERE)
    checkpoint.save(small, EVERYWHERE, tmp_path / "cut", tokenizer_from=tmp_path)
    assert torch.equal(logits(checkpoint.load(tmp_path / "cut"), inputs), logits(small, inputs))


def test_a_classifier_begins_with_the_head_that_words_were_told_by(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = tiny("modernbert", auto_class="AutoModelForMaskedLM")
    words.save_pretrained(tmp_path)
    as_transformers_4_wrote(tmp_path)
    assert type(checkpoint.load(tmp_path)) is type(words)
    begun = checkpoint.load_dense(tmp_path, "AutoModelForSequenceClassification", {"num_labels": 3})
    assert torch.equal(begun.head.dense.weight, words.head.dense.weight)
    assert torch.equal(begun.head.norm.weight, words.head.norm.weight)
    assert begun.classifier.weight.shape == (3, 32)
    assert "its encoder and what the heads share are taken" in caplog.text


def test_layers_that_are_gone_are_left_out_of_a_plain_config_but_the_first(model: Any) -> None:
    """The first attention of a plain class has no norm in front of it, so no other layer takes its place."""
    gone = {layer: {f"encoder.{layer}.attention": (), f"encoder.{layer}.ffn": ()} for layer in range(3)}
    for layer, kinds in ((1, ["full_attention"] * 2), (0, ["full_attention", "sliding_attention", "full_attention"])):
        small = shrink(model, anatomy_of(model), Plan(gone[layer]))
        plain = uniform(small)
        assert plain.config.layer_types == kinds
        assert plain.config.num_hidden_layers == len(kinds)
        torch.testing.assert_close(logits(plain, batch(model)), logits(small, batch(model)), atol=1e-5, rtol=1e-5)


def test_the_cost_of_a_fused_matrix_is_that_of_its_three_parts(model: Any) -> None:
    """Layer 1 reads 7 words: 3 x 32 x 32 and 32 x 32 for the matrices of the attention, 2 x 32 for each of 49 pairs."""
    from slimformer.core import cost

    anatomy = anatomy_of(model)
    curve = cost.macs(anatomy, np.array([7])).curves["encoder.1.heads"]
    assert curve[-1] == 7 * 4 * 32 * 32 + 2 * 32 * 49
    assert curve[1] == curve[-1] / 4
    assert anatomy.matrices["encoder.1.query_key_value"].role is Role.QUERY_KEY_VALUE
    assert anatomy.fused
