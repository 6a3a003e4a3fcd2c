"""MobileBERT: layers that compute between bottlenecks, with several feed-forward blocks and, at will, nothing that is a norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import batch, tiny
from tiny_folder import write_data, write_model

from slimformer import registry
from slimformer.core import cost
from slimformer.core.anatomy import Kind
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.errors import ExportError, ModelError, RecipeError, SlimformerError, TargetError
from slimformer.exporters._kernels.packing import pack_encoder
from slimformer.exporters.base import Variant
from slimformer.exporters.onnx import Onnx
from slimformer.families.base import anatomy_of
from slimformer.families.mobilebert import MobileBert
from slimformer.reporting.ledger import read_records
from slimformer.running.given import given_models
from slimformer.running.reader import parse_recipe
from slimformer.running.runner import run, train_stages
from slimformer.running.shapes import shapes_of
from slimformer.running.students import reduced
from slimformer.runtimes.onnxruntime import OnnxRuntime
from slimformer.saving import checkpoint
from slimformer.testing import checks

SCALED = {"normalization_type": "no_norm", "num_feedforward_networks": 3}  # as in google/mobilebert-uncased
TOGETHER = {"use_bottleneck_attention": True, "key_query_shared_bottleneck": False, "trigram_input": False}
HEADS, NEURONS, STACKED = (1, 3), (0, 5, 6, 23), (2, 3)
CUT = Plan(
    {
        "encoder.0.heads": HEADS,
        "encoder.0.neurons": NEURONS,
        "encoder.0.stacked0.neurons": STACKED,
        "encoder.0.stacked1.ffn": (),
        "encoder.1.attention": (),
        "encoder.1.ffn": (),
    }
)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("mobilebert", **SCALED)


def by_hand(model: Any, ids: list[int]) -> np.ndarray:
    """Section 3 of the paper on the whole model's tensors, for a text without padding; of layers 0 and 1 what CUT leaves."""
    state = {name.removeprefix("mobilebert."): value.double().numpy() for name, value in model.state_dict().items()}

    def linear(name: str, values: np.ndarray) -> np.ndarray:
        return values @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def scaled(name: str, values: np.ndarray) -> np.ndarray:
        return values * state[f"{name}.weight"] + state[f"{name}.bias"]

    def fed(into: str, out: str, values: np.ndarray, kept: tuple[int, ...]) -> np.ndarray:
        inner = np.zeros((len(values), 24))
        inner[:, kept] = np.maximum(linear(f"{into}.dense", values), 0)[:, kept]
        return scaled(f"{out}.LayerNorm", linear(f"{out}.dense", inner) + values)

    words = state["embeddings.word_embeddings.weight"][ids]  # (seq, 16)
    none = np.zeros((1, 16))
    three = np.concatenate([np.concatenate([words[1:], none]), words, np.concatenate([none, words[:-1]])], 1)
    places = state["embeddings.position_embeddings.weight"][: len(ids)] + state["embeddings.token_type_embeddings.weight"][0]
    hidden = scaled("embeddings.LayerNorm", linear("embeddings.embedding_transformation", three) + places)  # (seq, 48)
    for place in range(3):
        layer = f"encoder.layer.{place}"
        narrow, asking = (
            scaled(f"{layer}.bottleneck.{name}.LayerNorm", linear(f"{layer}.bottleneck.{name}.dense", hidden))
            for name in ("input", "attention")
        )  # (seq, 32)
        if place != 1:
            mixed = np.zeros((len(ids), 32))
            parts = [linear(f"{layer}.attention.self.{name}", asking) for name in ("query", "key")]
            parts.append(linear(f"{layer}.attention.self.value", hidden))
            for head in HEADS if place == 0 else range(4):
                query, key, value = (part[:, 8 * head : 8 * head + 8] for part in parts)
                shares = np.exp(query @ key.T / 8**0.5)
                mixed[:, 8 * head : 8 * head + 8] = shares / shares.sum(1, keepdims=True) @ value
            narrow = scaled(f"{layer}.attention.output.LayerNorm", linear(f"{layer}.attention.output.dense", mixed) + narrow)
        every = tuple(range(24))
        narrow = fed(f"{layer}.ffn.0.intermediate", f"{layer}.ffn.0.output", narrow, STACKED if place == 0 else every)
        if place != 0:
            narrow = fed(f"{layer}.ffn.1.intermediate", f"{layer}.ffn.1.output", narrow, every)
        if place != 1:
            narrow = fed(f"{layer}.intermediate", f"{layer}.output", narrow, NEURONS if place == 0 else every)
        hidden = scaled(f"{layer}.output.bottleneck.LayerNorm", linear(f"{layer}.output.bottleneck.dense", narrow) + hidden)
    return linear("classifier", np.tanh(linear("pooler.dense", hidden[:1])))[0]


def test_a_cut_model_computes_what_the_paper_says(model: Any) -> None:
    small, ids = shrink(model, anatomy_of(model), CUT), [7, 30, 8, 8, 51]
    with torch.no_grad():
        found = small(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, 5, dtype=torch.long)).logits[0].numpy()
    np.testing.assert_allclose(found, by_hand(model, ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("changes", [SCALED, TOGETHER], ids=["scaled", "together"])
def test_the_laws_hold_for_the_other_shapes_too(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    """`test_contracts.py` checks norms and a bottleneck for queries and keys; here scales in their place, and one bottleneck for all."""
    monkeypatch.setattr(checks, "tiny", lambda model_type: tiny(model_type, **changes))
    for holds in (checks.anatomy_follows, checks.saved_is_loaded, checks.predicted_is_counted, checks.slices_fit):
        holds(MobileBert)
    checks.points_are_reached(MobileBert)
    monkeypatch.setattr(checks, "TOLERANCE", 5e-4)  # without norms numbers grow from layer to layer
    monkeypatch.setattr(checks, "UNDONE", 5e-4)
    checks.gate_is_cut(MobileBert)
    checks.unshrunk_is_the_same(MobileBert)


def test_the_price_of_a_layer_is_that_of_its_matrices(model: Any) -> None:
    """Of one token alone. An attention that is gone takes its bottleneck with it; those at both ends of the layer stay."""
    anatomy = anatomy_of(model)
    priced, ends, block = cost.macs(anatomy, np.array([1])), 2 * 32 * 48, 2 * 24 * 32
    attention = 32 * 48 + 2 * 32 * 32 + 32 * 48 + 32 * 32 + 2 * 32  # its bottleneck; queries and keys; values; output; scores
    assert priced.dense == 3 * (ends + attention + 3 * block)
    gone = Plan({"encoder.1.attention": (), "encoder.1.stacked1.ffn": ()})
    assert priced.of(gone, anatomy) == priced.dense - attention - block
    assert {site.id for site in anatomy.of_kind(Kind.NEURONS) if site.layer == 2} == {
        "encoder.2.stacked0.neurons",
        "encoder.2.stacked1.neurons",
        "encoder.2.neurons",
    }


@pytest.mark.parametrize("changes", [SCALED, pytest.param(TOGETHER, marks=pytest.mark.slow)], ids=["scaled", "together"])
@pytest.mark.slow
def test_files_compute_what_the_model_does(changes: dict[str, Any], tmp_path: Path) -> None:
    whole = tiny("mobilebert", **changes)
    plan = Plan({name: kept for name, kept in CUT.keep.items() if name in anatomy_of(whole).sites})
    small = shrink(whole, anatomy_of(whole), plan)
    seen = [{name: value.numpy() for name, value in batch(small, rows, seq).items()} for rows, seq in ((3, 7), (2, 20))]
    draft = Onnx().draft(small, seen, ("logits",))
    for variant in (Variant.FLOAT, Variant.FUSED):
        run = OnnxRuntime().load(draft.write(tmp_path / f"{variant}.onnx", variant).path, threads=1)
        for rows, seq in ((1, 2), (2, 62)):
            inputs = batch(small, rows, seq, seed=3)
            with torch.no_grad():
                expected = small(**inputs).logits.numpy()
            found = run({name: value.numpy() for name, value in inputs.items()})["logits"]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


# -- What is refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["adaptive_span", "decomposed_attention", "fixed_attention", "hidden_width", "word_elimination"]
)
def test_methods_that_know_no_bottlenecks_refuse_in_one_line(name: str) -> None:
    context = checks.tiny_context("mobilebert")
    method = registry.find("methods", name)()
    with pytest.raises(TargetError, match=r"bottlenecks[^\n]*\.\n.*help"):
        method.check(context.anatomy, context.cost)


def test_what_looks_at_one_width_refuses_too(model: Any) -> None:
    with pytest.raises(ExportError, match="the kernels compute post-norm encoders; mobilebert is none"):
        pack_encoder(model, first_only=True)
    with pytest.raises(RecipeError, match="a mobilebert has no depth and width that students could have less of"):
        shapes_of(model.config)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_bottleneck": False}, "it has no bottlenecks"),
        ({"use_bottleneck_attention": True}, "one of use_bottleneck_attention and key_query_shared_bottleneck"),
        ({"key_query_shared_bottleneck": False}, "one of use_bottleneck_attention and key_query_shared_bottleneck"),
        ({"num_attention_heads": 5}, "5 heads do not share 32 units evenly"),
        ({"num_feedforward_networks": 0}, "one feed-forward block or more"),
    ],
)
def test_configs_of_no_such_model_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        anatomy_of(tiny("mobilebert", **changes))


# -- A student -----------------------------------------------------------------------------------------------------------------

SIZES = {
    "hidden_size": 24,
    "intra_bottleneck_size": 16,
    "embedding_size": 20,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_feedforward_networks": 2,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    write_model(place / "teacher")
    write_data(place / "data")
    return place


def asked(home: Path, stages: list[Any], **sizes: Any) -> Any:
    return parse_recipe(
        {
            "model": {"use": "mobilebert", "config": {**SIZES, **sizes}},
            "teacher": str(home / "teacher"),
            "task": {"use": "classification", "data": str(home / "data"), "text": "sentence", "label": "label"},
            "stages": stages,
        }
    )


def test_a_student_begins_with_its_teachers_words_and_padding_is_nothing(home: Path, tmp_path: Path) -> None:
    recipe = asked(home, [{"train": {"epochs": 1}}])
    with given_models(recipe, None, tmp_path / "out") as given:
        student = checkpoint.load_folder(Path(str(given.model)))
    words = checkpoint.load(home / "teacher").get_input_embeddings().weight.detach()
    own = student.get_input_embeddings().weight.detach()
    apart = [torch.cdist(part[1:], part[1:]) for part in (own, reduced(words, 20))]
    assert torch.allclose(apart[0] / apart[0].max(), apart[1] / apart[1].max(), atol=1e-3)
    assert student.config.max_position_embeddings == 64  # of its teacher
    text = torch.tensor([[2, 9, 11, 3, 0, 0]])
    with torch.no_grad():
        alone, beside = (student(text[:, :size], attention_mask=(text[:, :size] > 0).long())[1] for size in (4, 6))
    torch.testing.assert_close(alone, beside, atol=1e-5, rtol=1e-5)  # what a last word sees behind it is nothing


@pytest.mark.slow
def test_a_student_of_a_bert_learns_from_its_logits_and_is_delivered(home: Path, tmp_path: Path) -> None:
    teach = {"train": {"epochs": 6, "lr": 5e-3, "batch_size": 32, "methods": [{"use": "distillation", "hidden": 0}]}}
    recipe = asked(home, [teach, {"bench": {"seconds": 0.2, "rivals": []}}], normalization_type="layer_norm")
    result = run(recipe, tmp_path / "out", wait_seconds=0)
    records = read_records([tmp_path / "out" / "ledger.jsonl"])
    assert next(record for record in records if record.chosen).scores["accuracy"] > 0.85
    assert result.best.is_file()
    student = checkpoint.load(tmp_path / "out")
    assert type(student).__name__ == "MobileBertForSequenceClassification"
    assert not bool(student.get_input_embeddings().weight[0].any())  # padding is still nothing


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"num_attention_heads": 3}, "3 heads do not share 16 units evenly"),
        ({"use_bottleneck": False}, "it has no bottlenecks"),
    ],
)
def test_sizes_that_make_no_student_are_refused(home: Path, tmp_path: Path, sizes: dict[str, Any], said: str) -> None:
    with (
        pytest.raises((ModelError, RecipeError), match=said),
        given_models(asked(home, [{"train": {"epochs": 1}}], **sizes), None, tmp_path / "out"),
    ):
        pass


def test_matrices_of_a_teacher_of_another_shape_are_refused(home: Path, tmp_path: Path) -> None:
    for name in ("weight_squeezing", "shared_projections"):
        recipe = asked(home, [{"train": {"epochs": 1, "methods": [{"use": name}]}}])
        with pytest.raises(SlimformerError, match=name):
            train_stages(recipe, tmp_path / name, wait_seconds=0)
        assert not list((tmp_path / name).glob("work/*/made"))
