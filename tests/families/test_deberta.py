"""DeBERTa v2 and v3: scores with terms for distances, which follow from the weights alone and go with their heads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import batch, tiny

from slimformer import registry
from slimformer.core import cost
from slimformer.core.anatomy import Kind
from slimformer.core.asking import distance_rows, positions_unheard
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.errors import ExportError, ModelError, TargetError
from slimformer.exporters._kernels.packing import pack_encoder
from slimformer.exporters.base import Variant
from slimformer.exporters.onnx import Onnx
from slimformer.families.base import anatomy_of
from slimformer.families.deberta import Deberta
from slimformer.forms.low_rank import LowRank
from slimformer.hooks.attention import quick_attention
from slimformer.hooks.capture import Capture, capturing
from slimformer.runtimes.onnxruntime import OnnxRuntime
from slimformer.saving import checkpoint
from slimformer.saving.uniform import uniform
from slimformer.testing import checks

APART: dict[str, Any] = {  # matrices for distances alone, a row for each up to 12, positions, segments, and a narrow word table
    "share_att_key": False,
    "position_buckets": -1,
    "max_relative_positions": 12,
    "norm_rel_ebd": "none",
    "position_biased_input": True,
    "type_vocab_size": 2,
    "embedding_size": 16,
}
SHAPES: dict[str, dict[str, Any]] = {
    "shared": {},
    "apart": APART,
    "keys": {"pos_att_type": "c2p"},
    "queries": {**APART, "pos_att_type": "p2c"},
}
HEADS = (1, 3)
CUT = Plan(
    {"encoder.0.heads": HEADS, "encoder.1.attention": (), "encoder.2.heads": (0, 1, 2), "encoder.2.neurons": (0, 5, 6, 23)}
)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("deberta-v2")


def logits(model: Any, inputs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return model(**inputs).logits


def row_of(distance: int, config: Any) -> int:
    """The bucket of a distance, as section 3.1 of v3's code rounds it, from the middle of the table on."""
    buckets = config.position_buckets
    span, sign, far = (buckets, -1 if distance < 0 else 1, abs(distance)) if buckets > 0 else (12, 1, 0)
    if buckets > 0 and far > buckets // 2:
        middle = buckets // 2
        step = math.log(far / middle) / math.log((config.max_position_embeddings - 1) / middle) * (middle - 1)
        distance = sign * (math.ceil(step - 1e-6) + middle)
    return min(max(distance + span, 0), 2 * span - 1)


def scores_by_hand(model: Any, state: np.ndarray, heads: tuple[int, ...]) -> np.ndarray:
    """Equation 4 of the paper, pair by pair, for heads of the whole first layer: (heads, seq, seq)."""
    config = model.config
    tensors = {name.removeprefix("deberta.encoder."): value.double().numpy() for name, value in model.state_dict().items()}

    def linear(name: str, values: np.ndarray) -> np.ndarray:
        path = f"layer.0.attention.self.{name}"
        return values @ tensors[f"{path}.weight"].T + tensors[f"{path}.bias"]

    table = tensors["rel_embeddings.weight"]
    if config.norm_rel_ebd == "layer_norm":
        table = (table - table.mean(1, keepdims=True)) / np.sqrt(table.var(1, keepdims=True) + config.layer_norm_eps)
        table = table * tensors["LayerNorm.weight"] + tensors["LayerNorm.bias"]
    own = "" if config.share_att_key else "pos_"
    query, key = linear("query_proj", state), linear("key_proj", state)
    scores = np.zeros((len(heads), len(state), len(state)))
    for place, head in enumerate(heads):
        part = slice(8 * head, 8 * head + 8)
        for i in range(len(state)):
            for j in range(len(state)):
                vector = table[row_of(i - j, config)][None]
                scores[place, i, j] = query[i, part] @ key[j, part]
                if "c2p" in config.pos_att_type:
                    scores[place, i, j] += query[i, part] @ linear(f"{own}key_proj", vector)[0, part]
                if "p2c" in config.pos_att_type:
                    scores[place, i, j] += key[j, part] @ linear(f"{own}query_proj", vector)[0, part]
    return scores / math.sqrt(8 * (1 + len(config.pos_att_type)))


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_of_the_heads_that_are_left_are_those_of_the_paper(shape: str) -> None:
    """Seen in a cut model; the model computes by itself, in training, and with its hooks kept from distances, the same answers."""
    whole = tiny("deberta-v2", **SHAPES[shape])
    small, inputs = shrink(whole, anatomy_of(whole), CUT), batch(whole, 2, 20)
    expected = logits(small, inputs)
    with torch.no_grad(), capturing(small, anatomy_of(small), {Capture.SCORES, Capture.HIDDEN}) as recorder:
        seen = recorder.take({"logits": small(**inputs).logits})
    by_hand = scores_by_hand(whole, seen.hidden[0][0].double().numpy(), HEADS)
    np.testing.assert_allclose(seen.scores["encoder.0.heads"][0].numpy(), by_hand, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen.output["logits"], expected, atol=1e-5, rtol=1e-5)
    with quick_attention(small):
        trained = small(**inputs).logits.detach()
    torch.testing.assert_close(trained, expected, atol=1e-5, rtol=1e-5)
    with positions_unheard(small):
        torch.testing.assert_close(logits(small, inputs), expected, atol=1e-5, rtol=1e-5)


def test_rows_of_distances_end_where_nothing_changes_any_more() -> None:
    for changes in ({}, APART):
        whole = tiny("deberta-v2", **changes)
        rows = distance_rows(whole.deberta.encoder.layer[0].attention.self).tolist()
        reach = len(rows) // 2
        assert rows == [row_of(distance, whole.config) for distance in range(-reach, reach + 1)]
        assert (rows[0], rows[-1]) == (0, 2 * (8 if not changes else 12) - 1)


def test_hooks_hear_of_words_alone_and_nothing_is_left(model: Any) -> None:
    """Also those in a matrix of another form. Contexts may lie in each other in either order."""
    small = shrink(model, anatomy_of(model), Plan(forms={"encoder.2.query": LowRank(5)}))
    inputs, classes = batch(small, 2, 9), [type(module) for module in small.modules()]
    attention = small.deberta.encoder.layer[2].attention.self
    with torch.no_grad(), capturing(small, anatomy_of(small), {Capture.RELATIONS, Capture.HIDDEN, Capture.SCORES}) as recorder:
        seen = recorder.take({"logits": small(**inputs).logits})
        state = seen.hidden[2]
        for found, linear in zip(seen.relations, (attention.query_proj, attention.key_proj, attention.value_proj), strict=True):
            torch.testing.assert_close(found, linear(state), atol=1e-5, rtol=1e-5)
    expected = logits(small, inputs)
    for first, second in ((quick_attention, positions_unheard), (positions_unheard, quick_attention)):
        with first(small):
            with second(small):
                assert type(attention) not in classes
                torch.testing.assert_close(logits(small, inputs), expected, atol=1e-5, rtol=1e-5)
            assert type(attention) not in classes
    assert [type(module) for module in small.modules()] == classes
    assert not any("asked" in vars(module) for module in small.modules())
    assert torch.equal(logits(small, inputs), expected)


@pytest.mark.parametrize("shape", ["apart"])
@pytest.mark.slow
def test_the_laws_hold_for_the_other_shape_too(monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    """`test_contracts.py` checks shared matrices and a normed table."""
    monkeypatch.setattr(checks, "tiny", lambda model_type: tiny(model_type, **SHAPES[shape]))
    for holds in checks.checks_of("families"):
        holds(Deberta)


def test_heads_take_their_part_of_the_matrices_of_distances_along() -> None:
    whole = tiny("deberta-v2", **APART)
    small = shrink(whole, anatomy_of(whole), CUT)
    own, other = (item.deberta.encoder.layer[0].attention.self for item in (small, whole))
    rows = [8 * head + row for head in HEADS for row in range(8)]
    for name in ("pos_key_proj", "pos_query_proj"):
        assert torch.equal(getattr(own, name).weight, getattr(other, name).weight[rows])
        assert torch.equal(getattr(own, name).bias, getattr(other, name).bias[rows])
    torch.testing.assert_close(logits(uniform(small), batch(small)), logits(small, batch(small)), atol=1e-5, rtol=1e-5)


def test_the_price_of_an_attention_counts_its_distances(model: Any) -> None:
    """Of 7 words: four matrices, and for each pair scores, values, and two terms with two distances for each word."""
    curve = cost.macs(anatomy_of(model), np.array([7])).curves["encoder.1.heads"]
    assert curve[-1] == 7 * 4 * 32 * 32 + (2 + 2 * 2) * 32 * 49
    assert curve[1] == curve[-1] / 4


@pytest.mark.slow
def test_files_hold_what_is_known_of_distances_and_no_logarithm(tmp_path: Path) -> None:
    """At any length, also of one word and beyond the table's end; of matrices for distances alone nothing is in the file."""
    whole = tiny("deberta-v2", auto_class="AutoModelForTokenClassification", num_hidden_layers=2, **APART)
    small = shrink(whole, anatomy_of(whole), Plan({"encoder.0.heads": HEADS}, {"encoder.1.key": LowRank(5)}))
    seen = [{name: value.numpy() for name, value in batch(small, rows, seq).items()} for rows, seq in ((3, 7), (2, 20))]
    draft = Onnx(agreement=0.5).draft(small, seen, ("logits",))
    for variant in (Variant.FLOAT, Variant.FUSED, Variant.INT8_DYNAMIC):
        path = draft.write(tmp_path / f"{variant}.onnx", variant).path
        graph = onnx.load(path).graph
        held = {item.name: tuple(item.dims) for item in graph.initializer if "distance_" in item.name}
        start = "model.deberta.encoder.layer"
        assert held == {
            f"{start}.{layer}.attention.self.distance_{kind}": (heads, 8, 24)
            for layer, heads in ((0, 2), (1, 4))
            for kind in ("keys", "queries")
        }
        assert not any("pos_key_proj" in item.name or "rel_embeddings" in item.name for item in graph.initializer)
        assert not {"Log", "Ceil", "GatherElements"} & {node.op_type for node in graph.node}
        run = OnnxRuntime().load(path, threads=1)
        for rows, seq in ((1, 2), (2, 62), (5, 13)) if variant is not Variant.INT8_DYNAMIC else ():
            inputs = batch(small, rows, seq, seed=3)
            words, expected = inputs["attention_mask"].numpy() == 1, logits(small, inputs).numpy()
            found = run({name: value.numpy() for name, value in inputs.items()})["logits"]
            np.testing.assert_allclose(found[words], expected[words], rtol=1e-4, atol=1e-5)
    one = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.tensor([[1]])}
    run = OnnxRuntime().load(tmp_path / f"{Variant.FUSED}.onnx", threads=1)
    found = run({name: value.numpy() for name, value in one.items()})["logits"]
    np.testing.assert_allclose(found, logits(small, one).numpy(), rtol=1e-4, atol=1e-5)
    assert not any("distance" in name for name, _ in small.named_buffers())
    assert "forward" not in vars(small.deberta.encoder.layer[0].attention.self)


def test_folders_are_read_as_people_have_them(tmp_path: Path) -> None:
    """With positions that nothing reads, and more of them than any table has rows; and with positions that are read."""
    for name, changes in (("without", {}), ("with", APART)):
        whole = tiny("deberta-v2", **changes, **({} if changes else {"max_position_embeddings": 512}))
        whole.save_pretrained(tmp_path / name)
        path = tmp_path / name / "model.safetensors"
        if not changes:
            stray = {"deberta.embeddings.position_embeddings.weight": torch.ones(512, 32)}
            save_file(load_file(path) | stray, path, metadata={"format": "pt"})
        again = checkpoint.load_folder(tmp_path / name)
        assert torch.equal(logits(again, batch(whole)), logits(whole, batch(whole)))
        assert again.state_dict().keys() == whole.state_dict().keys()


# -- What is refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adaptive_span", "terms for positions"),
        ("decomposed_attention", "terms for positions"),
        ("fixed_attention", "terms for positions"),
        ("word_elimination", "terms for positions"),
        ("hidden_width", "vectors of distances"),
    ],
)
def test_methods_that_know_no_distances_refuse_in_one_line(name: str, said: str) -> None:
    context = checks.tiny_context("deberta-v2")
    method = registry.find("methods", name)()
    with pytest.raises(TargetError, match=rf"{said}[^\n]*\.\n.*help"):
        method.check(context.anatomy, context.cost)


def test_kernels_refuse_it(model: Any) -> None:
    with pytest.raises(ExportError, match="the kernels compute post-norm encoders; deberta-v2 is none"):
        pack_encoder(model, first_only=True)
    assert not anatomy_of(model).of_kind(Kind.HIDDEN)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"relative_attention": False}, "it knows no relative positions"),
        ({"conv_kernel_size": 3}, "it has a convolution behind its first layer"),
        ({"pos_att_type": None}, "its scores have terms c2p, p2c or both"),
        ({"pos_att_type": "c2p|p2p"}, "its scores have terms c2p, p2c or both"),
        ({"position_buckets": 200}, "200 position_buckets are too many for distances of 64"),
    ],
)
def test_configs_of_no_such_model_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        anatomy_of(tiny("deberta-v2", **changes))
