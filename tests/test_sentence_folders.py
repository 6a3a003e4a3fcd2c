"""Folders of sentence-transformers, old and new: read as that package computes them, written as it loads them, refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_folder import sentences, write_tokenizer

from slimformer.core.plan import Plan
from slimformer.core.pooling import EMBEDDER, POOLINGS, SENTENCE_VECTOR, TOKEN_VECTORS, DenseLayer, VectorHead
from slimformer.core.relevance import score_activation
from slimformer.core.shrink import shrink
from slimformer.data.tokenizer import load_tokenizer
from slimformer.errors import ExportError, ModelError, PlanError
from slimformer.exporters.base import Variant
from slimformer.exporters.onnx import Onnx
from slimformer.families._embedder import AutoModelForSentenceEmbedding, pooled
from slimformer.families.base import anatomy_of
from slimformer.runtimes.onnxruntime import OnnxRuntime
from slimformer.saving import checkpoint
from slimformer.saving.resaving import write_base_config
from slimformer.saving.sentence_folder import read_sentence_folder, write_dense_state, write_steps
from slimformer.saving.sentence_told import told_folder
from slimformer.saving.sentence_writing import deliver_vectors, write_sentence_folder
from slimformer.saving.uniform import uniform
from slimformer.tasks._vectors import cosines
from slimformer.tasks.embedding import Embedding
from slimformer.testing.tiny import batch, tiny, tiny_config

PLAIN = VectorHead()
LAYERS = (DenseLayer(32, 12, True, "tanh"), DenseLayer(12, 8))


def embedder(kind: str = "bert", head: VectorHead = PLAIN, **changes: Any) -> Any:
    """A tiny model that gives vectors, with weights large enough that every unit matters."""
    torch.manual_seed(3)
    model = AutoModelForSentenceEmbedding.from_config(tiny_config(kind, **{SENTENCE_VECTOR: head.to_config()}, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not ("norm" in name.lower() and name.endswith("weight")):
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model.eval()


def vectors(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).sentence_embedding


def write_embedder(folder: Path, head: VectorHead = PLAIN) -> Path:
    """A folder of sentence-transformers with a tiny BERT and the tokenizer of the tests."""
    tokenizer = write_tokenizer(folder)
    model = embedder("bert", head, vocab_size=tokenizer.get_vocab_size(), pad_token_id=0)
    save_file(dict(model.base_model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    write_base_config(model.base_model, folder)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    own = {"model_max_length": 64, "tokenizer_class": "PreTrainedTokenizerFast"} | names
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    write_steps(folder, head, 32)
    write_dense_state(folder, {name: value for name, value in model.state_dict().items() if name.startswith("dense.")})
    return folder


def by_sentence_transformers(folder: Path, texts: list[str]) -> np.ndarray:
    package = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    return np.asarray(package.SentenceTransformer(str(folder), device="cpu").encode(texts, show_progress_bar=False))


def by_us(folder: Path, model: Any, texts: list[str], max_length: int | None = None) -> np.ndarray:
    tokenizer = load_tokenizer(folder)
    if max_length is not None:
        tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(pad_id=0)
    rows = tokenizer.encode_batch(texts)
    inputs = {"input_ids": [row.ids for row in rows], "attention_mask": [row.attention_mask for row in rows]}
    return vectors(model, {name: torch.tensor(value) for name, value in inputs.items()}).numpy()


# -- Poolings ------------------------------------------------------------------------------------------------------------------


def test_poolings_by_hand() -> None:
    states = torch.tensor([[[1.0, -5.0], [3.0, -1.0], [50.0, 50.0]]])
    mask = torch.tensor([[1, 1, 0]])
    found = {mode: pooled(states, mask, mode)[0].tolist() for mode in POOLINGS}
    assert found == {
        "cls": [1.0, -5.0],
        "max": [3.0, -1.0],
        "mean": [2.0, -3.0],
        "mean_sqrt_len_tokens": pytest.approx([4 / 2**0.5, -6 / 2**0.5]),
        "weightedmean": pytest.approx([7 / 3, -7 / 3]),
        "lasttoken": [3.0, -1.0],
    }


@pytest.mark.parametrize("mode", POOLINGS)
def test_padding_changes_no_vector(mode: str) -> None:
    model = embedder(head=VectorHead((mode,), False))
    inputs = batch(model)
    wide = {name: torch.cat([value, torch.zeros_like(value)], 1) for name, value in inputs.items()}
    assert torch.allclose(vectors(model, inputs), vectors(model, wide), atol=1e-5)


@pytest.mark.parametrize(
    "head",
    [
        VectorHead(),
        VectorHead(("lasttoken",), False),
        VectorHead(("max", "cls"), True),
        VectorHead(("weightedmean",), True, LAYERS),
        VectorHead(("mean_sqrt_len_tokens",), False, (DenseLayer(32, 5, False, "relu"),), lower=True, max_length=6),
    ],
    ids=lambda head: "-".join(head.pooling) + f"-{len(head.dense)}",
)
def test_vectors_are_those_of_sentence_transformers(head: VectorHead, tmp_path: Path) -> None:
    folder = write_embedder(tmp_path / "model", head)
    assert read_sentence_folder(folder).head == head
    texts = [text for text, _ in sentences(6, 0)]
    theirs = by_sentence_transformers(folder, [text.upper() for text in texts] if head.lower else texts)
    ours = by_us(folder, checkpoint.load_as(folder, EMBEDDER, {}, 0), texts, head.max_length)
    assert np.allclose(theirs, ours, atol=1e-6)


# -- Reading -------------------------------------------------------------------------------------------------------------------

OLD = {f"pooling_mode_{name}": False for name in ("cls_token", "max_tokens", "mean_sqrt_len_tokens")}
STEPS = [("", "models.Transformer"), ("1_Pooling", "models.Pooling"), ("2_Normalize", "models.Normalize")]
NEW_STEPS = [
    ("", "base.modules.transformer.Transformer"),
    ("1_Pooling", "sentence_transformer.modules.pooling.Pooling"),
    ("2_Normalize", "base.modules.normalize.Normalize"),
]


def described(folder: Path, steps: Any = STEPS, pooling: Any = None, facts: Any = None, sbert: Any = None) -> Path:
    """The facts of a folder, without a model."""
    for path in ("1_Pooling", *(path for path, _ in steps)):
        (folder / path).mkdir(parents=True, exist_ok=True)
    listed = [
        {
            "idx": place,
            "name": str(place),
            "path": path,
            "type": kind if kind.startswith("mine") else f"sentence_transformers.{kind}",
        }
        for place, (path, kind) in enumerate(steps)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling or OLD | {"pooling_mode_mean_tokens": True}))
    if facts is not None:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(facts))
    if sbert is not None:
        name, content = sbert
        (folder / steps[0][0] / name).write_text(json.dumps(content))
    return folder


READ: dict[str, tuple[dict[str, Any], VectorHead]] = {
    "version 2": ({}, VectorHead(("mean",), True)),
    "without normalization": ({"steps": STEPS[:2]}, VectorHead(("mean",), False)),
    "flags of two modes": (
        {"pooling": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}},
        VectorHead(("cls", "mean"), True),
    ),
    "version 6": (
        {"steps": NEW_STEPS, "pooling": {"embedding_dimension": 32, "pooling_mode": "lasttoken", "include_prompt": True}},
        VectorHead(("lasttoken",), True),
    ),
    "version 6, modes joined": ({"pooling": {"pooling_mode": ["cls", "max"]}}, VectorHead(("cls", "max"), True)),
    "prompts": (
        {
            "facts": {
                "prompts": {"query": "query: ", "document": "", "none": None},
                "default_prompt_name": "query",
                "similarity_fn_name": "cosine",
            }
        },
        VectorHead(prompts={"query": "query: "}, default_prompt="query", similarity="cosine"),
    ),
    "another name of its facts": (
        {"sbert": ("sentence_xlm-roberta_config.json", {"max_seq_length": 128, "do_lower_case": True})},
        VectorHead(max_length=128, lower=True),
    ),
    "the length of a call": (
        {"sbert": ("sentence_bert_config.json", {"max_seq_length": 32, "processing_kwargs": {"text": {"max_length": 5}}})},
        VectorHead(max_length=5),
    ),
    "the length of the tokenizer": (
        {"sbert": ("sentence_bert_config.json", {"max_seq_length": 32, "tokenizer_args": {"model_max_length": 8}})},
        VectorHead(max_length=8),
    ),
    "the first numbers": (
        {"facts": {"truncate_dim": 8}, "pooling": {"embedding_dimension": 32, "pooling_mode": ["cls", "mean"]}},
        VectorHead(("cls", "mean"), dense=(DenseLayer(64, 8),)),
    ),
    "the transformer in a folder": (
        {
            "steps": [("0_Transformer", "models.Transformer"), *STEPS[1:2], ("2_Dropout", "models.Dropout")],
            "sbert": ("sentence_bert_config.json", {"max_seq_length": 128}),
        },
        VectorHead(normalize=False, max_length=128),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_the_layouts_of_all_versions_are_read(name: str, tmp_path: Path) -> None:
    options, head = READ[name]
    found = read_sentence_folder(described(tmp_path, **options))
    assert found.head == head
    assert found.encoder == tmp_path / (options.get("steps", STEPS)[0][0])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no pooling": ({"steps": STEPS[:1]}, "names the steps Transformer, and a transformer with one pooling"),
    "normalized before": ({"steps": [STEPS[0], STEPS[2], STEPS[1]]}, "in the order Transformer, Normalize, Pooling"),
    "a strange step": ({"steps": [*STEPS[:2], ("2_LSTM", "models.LSTM")]}, r"models\.LSTM'?, which is not computed here"),
    "code of its own": ({"steps": [*STEPS[:2], ("2_Mine", "mine.Layer")]}, "whose code came with the model and is never run"),
    "a folder outside": ({"steps": [("../other", "models.Transformer"), *STEPS[1:]]}, "leads out of its folder"),
    "a strange pooling": ({"pooling": {"pooling_mode": "attention"}}, "names the pooling 'attention'"),
    "prompts left out": ({"pooling": {"pooling_mode": "mean", "include_prompt": False}}, r"include_prompt: false"),
    "fewer numbers by dot": (
        {"facts": {"truncate_dim": 8, "similarity_fn_name": "dot"}, "pooling": {"embedding_dimension": 32}},
        "truncate_dim: 8, which leaves vectors of other lengths than 1, and compares them by dot",
    ),
    "fewer numbers of nobody knows how many": (
        {"facts": {"truncate_dim": 8}},
        "truncate_dim: 8, of vectors of an unknown number",
    ),
    "fields for the config": (
        {"sbert": ("sentence_bert_config.json", {"config_args": {"num_hidden_layers": 1}})},
        "config_args: num_hidden_layers: 1, which is not followed here",
    ),
    "truncation off": (
        {"sbert": ("sentence_bert_config.json", {"processing_kwargs": {"text": {"truncation": False}}})},
        "processing_kwargs: text: truncation: False",
    ),
    "prompts that are none": ({"facts": {"prompts": ["query: "]}}, "prompts is"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    options, said = REFUSED[name]
    with pytest.raises(ModelError, match=said) as caught:
        read_sentence_folder(described(tmp_path / "model", **options))
    assert "\n" not in caught.value.what


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"activation_function": "mine.Tanh"}, "the activation mine.Tanh"),
        ({"use_residual": True}, "adds its input"),
        ({"module_input_name": "token_embeddings"}, "has module_input_name"),
    ],
)
def test_a_linear_layer_of_another_kind_is_refused(facts: Any, said: str, tmp_path: Path) -> None:
    folder = described(tmp_path, [*STEPS[:2], ("2_Dense", "models.Dense")])
    own = {"in_features": 32, "out_features": 8, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(own | facts))
    with pytest.raises(ModelError, match=said):
        read_sentence_folder(folder)


def test_a_linear_layer_in_a_pickle_is_not_read_and_another_shape_is_refused(tmp_path: Path) -> None:
    folder = write_embedder(tmp_path / "model", VectorHead(dense=LAYERS))
    weights = folder / "3_Dense" / "model.safetensors"
    kept = weights.read_bytes()
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(ModelError, match=r"3_Dense holds no model\.safetensors; pickles are not read"):
        read_sentence_folder(folder)
    weights.write_bytes(kept)
    (folder / "3_Dense" / "config.json").write_text(json.dumps({"in_features": 13, "out_features": 8, "bias": False}))
    with pytest.raises(ModelError, match=r"its config\.json asks for .*\(8, 13\)"):
        checkpoint.load_as(folder, EMBEDDER, {}, 0)


@pytest.mark.parametrize("dense", [(), LAYERS])
@pytest.mark.parametrize("normalize", [True, False])
def test_truncate_dim_keeps_the_first_numbers_of_a_vector(
    normalize: bool, dense: tuple[DenseLayer, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_embedder(tmp_path / "model", VectorHead(normalize=normalize, dense=dense))
    facts = folder / "config_sentence_transformers.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"truncate_dim": 5}))
    texts = [text for text, _ in sentences(4, 0)]
    ours = by_us(folder, checkpoint.load_as(folder, EMBEDDER, {}, 0), texts)
    theirs = by_sentence_transformers(folder, texts)
    if normalize:
        assert "sentence-transformers leaves these shorter" in caplog.text
        theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    assert ours.shape == (4, 5)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_newer_file_of_a_reranker_says_what_becomes_of_its_score(tmp_path: Path) -> None:
    config = {"model_type": "bert", "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
    facts = {"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.activation.Sigmoid"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(facts))
    assert score_activation(checkpoint.read_config(tmp_path)) == "sigmoid"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64}))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"processing_kwargs": {"text": {"max_length": 10}}}))
    with pytest.raises(ModelError, match=r"at most 10 tokens, and tokenizer_config\.json says 64") as caught:
        checkpoint.read_config(tmp_path)
    assert "model_max_length: 10" in caught.value.help


# -- What a person says of a model ---------------------------------------------------------------------------------------------


def told(folder: Path, to: Path, narrows: bool = False, **options: Any) -> VectorHead | None:
    """How the vectors of the copy are made; None if none is needed."""
    write = told_folder(folder, Embedding(data="texts.txt", **options).told_vectors, narrows=narrows)
    if write is None:
        return None
    to.mkdir()
    write(to)
    assert checkpoint.is_tuned(to, EMBEDDER)
    return read_sentence_folder(to).head


def test_a_folder_that_tells_its_vectors_is_used_as_it_is(tmp_path: Path) -> None:
    folder = write_embedder(tmp_path / "model")
    assert told(folder, tmp_path / "to") is None
    assert told(folder, tmp_path / "to", pooling="mean", normalize="yes", dimension=32) is None


def test_an_encoder_needs_its_pooling_and_nothing_is_guessed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_embedder(tmp_path / "model")
    (folder / "modules.json").unlink()
    assert not checkpoint.is_tuned(folder, EMBEDDER)
    with pytest.raises(ModelError, match="nothing says how the hidden states become one vector") as caught:
        told(folder, tmp_path / "to")
    assert "--pooling mean" in caught.value.help
    caplog.set_level("INFO", "slimformer")
    assert told(folder, tmp_path / "to", pooling="last") == VectorHead(("lasttoken",), True)
    assert "lasttoken pooling, and brought to length 1; --pooling and --normalize say otherwise" in caplog.text
    assert told(folder, tmp_path / "short", pooling="mean", normalize="no") == VectorHead(("mean",), False)


def test_a_transformer_in_a_folder_of_its_own_is_brought_to_the_top(tmp_path: Path) -> None:
    flat = write_embedder(tmp_path / "flat", VectorHead(prompts={"query": "q: "}))
    deep = tmp_path / "deep"
    shutil.copytree(flat, deep / "0_Transformer")
    for name in ("modules.json", "config_sentence_transformers.json", "1_Pooling"):
        shutil.move(deep / "0_Transformer" / name, deep / name)
    described(deep, [("0_Transformer", "models.Transformer"), *STEPS[1:]], facts={"prompts": {"query": "q: "}})
    assert told(deep, tmp_path / "to") == read_sentence_folder(deep).head
    texts = [text for text, _ in sentences(4, 0)]
    assert np.array_equal(
        *(by_us(folder, checkpoint.load_as(folder, EMBEDDER, {}, 0), texts) for folder in (flat, tmp_path / "to"))
    )


@pytest.mark.parametrize("dense", [(), LAYERS])
def test_a_dimension_keeps_the_first_numbers_of_a_vector(dense: tuple[DenseLayer, ...], tmp_path: Path) -> None:
    folder = write_embedder(tmp_path / "model", VectorHead(normalize=False, dense=dense))
    head = told(folder, tmp_path / "to", dimension=5)
    assert head is not None
    assert head.dimension(32) == 5
    texts = [text for text, _ in sentences(4, 0)]
    whole, cut = (by_us(item, checkpoint.load_as(item, EMBEDDER, {}, 0), texts) for item in (folder, tmp_path / "to"))
    assert np.allclose(whole[:, :5], cut, atol=1e-6)
    own = 8 if dense else 32
    with pytest.raises(ModelError, match=f"dimension {own + 1} is more than the {own} numbers of the model's vectors"):
        told(folder, tmp_path / "more", dimension=own + 1)


def test_hidden_states_that_get_narrower_have_a_layer_that_restores_the_dimension(tmp_path: Path) -> None:
    folder = write_embedder(tmp_path / "model")
    assert "hidden" not in anatomy_of(checkpoint.load_as(folder, EMBEDDER, {}, 0)).sites
    assert told(folder, tmp_path / "to", narrows=True) == VectorHead(dense=(DenseLayer(32, 32),))
    model = checkpoint.load_as(tmp_path / "to", EMBEDDER, {}, 0)
    texts = [text for text, _ in sentences(4, 0)]
    assert np.allclose(
        *(by_us(item, checkpoint.load_as(item, EMBEDDER, {}, 0), texts) for item in (folder, tmp_path / "to")), atol=1e-6
    )
    small = shrink(model, anatomy_of(model), Plan({"hidden": tuple(range(24))}))
    assert vectors(small, batch(small, 3, 7) | {"input_ids": torch.randint(5, 30, (3, 7))}).shape == (3, 32)
    both = write_embedder(tmp_path / "both", VectorHead(("cls", "mean")))
    with pytest.raises(ModelError, match="2 poolings cannot be made narrower"):
        told(both, tmp_path / "none", narrows=True)


# -- Writing -------------------------------------------------------------------------------------------------------------------

CUTS = {
    "heads and neurons": Plan({"encoder.0.heads": (1, 3), "encoder.1.neurons": (0, 5, 7), "encoder.2.neurons": (1, 2)}),
    "sublayers": Plan({"encoder.0.attention": (), "encoder.2.ffn": (), "encoder.1.heads": (2,)}),
    "layers": Plan({"encoder.1.attention": (), "encoder.1.ffn": ()}),
}


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "electra"])
@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_model_loads_in_plain_shapes_with_the_same_vectors(kind: str, cut: str) -> None:
    model = embedder(kind)
    plan = CUTS[cut]
    if kind == "electra" and cut == "sublayers":
        plan = Plan({"encoder.1.attention": (), "encoder.2.ffn": ()})
    small = shrink(model, anatomy_of(model), plan)
    plain = uniform(small)
    inputs = batch(model)
    assert torch.allclose(vectors(small, inputs), vectors(plain, inputs), atol=1e-5)
    fresh = type(plain)(plain.config)
    assert {n: v.shape for n, v in fresh.state_dict().items()} == {n: v.shape for n, v in plain.state_dict().items()}
    if cut == "layers":
        assert plain.num_parameters() == small.num_parameters()
    if cut == "heads and neurons" and kind == "bert":
        assert plain.config.intermediate_size == 24  # a layer is whole


def test_narrower_hidden_states_are_plain_if_the_heads_fit_into_them() -> None:
    model = embedder(head=VectorHead(dense=(DenseLayer(32, 32),)))
    inputs, few = batch(model), {f"encoder.{layer}.heads": (0, 1) for layer in range(3)}
    for width, heads, fits in ((16, few, True), (24, {}, False), (20, few, False)):
        small = shrink(model, anatomy_of(model), Plan({"hidden": tuple(range(width)), **heads}))
        if fits:
            plain = uniform(small)
            assert plain.num_parameters() == small.num_parameters()
            assert torch.allclose(vectors(small, inputs), vectors(plain, inputs), atol=1e-5)
        else:
            with pytest.raises(PlanError, match=f"hidden states of {width} units with"):
                uniform(small)


def test_a_model_that_loads_nowhere_else_says_so_and_leaves_no_half_folder(tmp_path: Path) -> None:
    source = write_embedder(tmp_path / "source", VectorHead(dense=(DenseLayer(32, 32),)))
    model = checkpoint.load_as(source, EMBEDDER, {}, 0)
    small = shrink(model, anatomy_of(model), Plan({"hidden": tuple(range(20))}))
    (tmp_path / "out" / "model").mkdir(parents=True)
    (note,) = deliver_vectors(small, tmp_path / "out", tokenizer_from=source)
    assert "after `import slimformer`" in note
    assert [item.name for item in (tmp_path / "out").iterdir()] == ["model"]
    assert deliver_vectors(tiny("bert"), tmp_path / "out", tokenizer_from=source) == ()


@pytest.mark.parametrize("cut", [*CUTS, "hidden"])
def test_a_written_folder_loads_in_sentence_transformers_without_us(cut: str, tmp_path: Path) -> None:
    head = VectorHead(prompts={"query": "the "}, max_length=32, dense=(DenseLayer(32, 32),) if cut == "hidden" else ())
    source = write_embedder(tmp_path / "source", head)
    model = checkpoint.load_as(source, EMBEDDER, {}, 0)
    few = {f"encoder.{layer}.heads": (0, 2) for layer in range(3)}
    small = shrink(model, anatomy_of(model), CUTS.get(cut, Plan({"hidden": tuple(range(16)), **few})))
    note = write_sentence_folder(small, tmp_path / "out", tokenizer_from=source)
    assert "loads the folder without slimformer" in note
    again = read_sentence_folder(tmp_path / "out")
    assert (again.head.prompts, again.head.max_length, again.encoder.name) == (head.prompts, 32, "0_Transformer")
    texts = [text for text, _ in sentences(5, 0)]
    assert np.allclose(by_sentence_transformers(tmp_path / "out", texts), by_us(source, small, texts), atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
@pytest.mark.parametrize("pooling", ["mean", "max", "cls"])
@pytest.mark.slow
def test_other_tools_find_the_hidden_states_beside_the_vector(kind: str, pooling: str, tmp_path: Path) -> None:
    """They make the vector themselves. A last layer that computes the first token alone has no others to give."""
    import onnxruntime

    model = embedder(kind, VectorHead((pooling,)))
    inputs = batch(model)
    feeds = {name: value.numpy() for name, value in inputs.items()}
    feeds |= {"token_type_ids": np.zeros_like(feeds["input_ids"])}
    with torch.no_grad():
        wanted = model(**inputs)
    kinds = {variant: tmp_path / item.name for variant, item in Onnx().kinds_for(model).items()}
    Onnx(agreement=0.0).export_all(model, [feeds], kinds, (SENTENCE_VECTOR,))
    for variant, file in kinds.items():
        session = onnxruntime.InferenceSession(str(file))
        shapes = {item.name: item.shape for item in session.get_outputs()}
        assert list(shapes) == [SENTENCE_VECTOR] + ([TOKEN_VECTORS] if pooling != "cls" else [])
        told = dict(zip(shapes, session.run(None, {item.name: feeds[item.name] for item in session.get_inputs()}), strict=True))
        assert OnnxRuntime().load(file, 1)(feeds).keys() == {SENTENCE_VECTOR}
        if variant in (Variant.FLOAT, Variant.FUSED):
            assert np.allclose(told[SENTENCE_VECTOR], wanted.sentence_embedding.numpy(), atol=1e-5)
        if pooling == "cls":
            continue
        states = told[TOKEN_VECTORS]
        assert [size if isinstance(size, int) else None for size in shapes[TOKEN_VECTORS]] == [None, None, 32]
        made = pooled(torch.from_numpy(states), inputs["attention_mask"], pooling).numpy()
        assert np.allclose(made / np.linalg.norm(made, axis=1, keepdims=True), told[SENTENCE_VECTOR], atol=1e-5)
        if variant in (Variant.FLOAT, Variant.FUSED):
            real = inputs["attention_mask"].numpy() == 1
            assert np.allclose(states[real], wanted.last_hidden_state.numpy()[real], atol=1e-4)


@pytest.mark.parametrize("head", [VectorHead(), VectorHead(("cls",), False, LAYERS)], ids=["mean", "cls"])
def test_the_kernels_give_the_same_vectors(head: VectorHead, tmp_path: Path) -> None:
    library = pytest.importorskip("slimformer_kernels", reason="slimformer-kernels is not installed")
    assert library
    from slimformer.exporters._kernels.model_file import save_model_file
    from slimformer.kernels.sessions import session

    model = embedder("bert", head)
    plan = CUTS["sublayers"]
    small = shrink(model, anatomy_of(model), plan)
    save_model_file(small, tmp_path / "slim.onnx")
    inputs = batch(small) | {"token_type_ids": torch.zeros_like(batch(small)["input_ids"])}
    (told,) = session(tmp_path / "slim.onnx", 1).run([SENTENCE_VECTOR], {name: value.numpy() for name, value in inputs.items()})
    wanted = vectors(small, inputs).numpy()
    assert (cosines(told, wanted) > 0.99).all()
    alone = session(tmp_path / "slim.onnx", 1).run(None, {name: value[:1].numpy() for name, value in inputs.items()})[0]
    assert np.abs(alone[0] - told[0]).max() < 1e-6
    with pytest.raises(ExportError, match="no max pooling"):
        save_model_file(embedder("bert", VectorHead(("max",))), tmp_path / "none.onnx")


def test_a_saved_cut_model_gives_the_same_vectors(tmp_path: Path) -> None:
    source = write_embedder(tmp_path / "source", VectorHead(("cls",), dense=LAYERS))
    model = checkpoint.load_as(source, EMBEDDER, {}, 0)
    plan = CUTS["sublayers"]
    small = shrink(model, anatomy_of(model), plan)
    checkpoint.save(small, plan, tmp_path / "cut", tokenizer_from=source)
    assert checkpoint.is_tuned(tmp_path / "cut", EMBEDDER)
    texts = [text for text, _ in sentences(3, 0)]
    again = checkpoint.load(tmp_path / "cut")
    assert np.array_equal(by_us(source, small, texts), by_us(source, again, texts))
    again.save_pretrained(tmp_path / "again")
    assert np.array_equal(by_us(source, small, texts), by_us(source, checkpoint.load(tmp_path / "again"), texts))
