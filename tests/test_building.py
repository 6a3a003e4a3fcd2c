"""A config.json that says anything: what it means is bounded by the weights, and each mistake is one message with its cause."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny

import slimformer
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.errors import ModelError, SlimformerError
from slimformer.families.base import anatomy_of
from slimformer.saving import checkpoint

WEIGHTS = "model.safetensors"
PLAN = Plan({"encoder.0.heads": (1, 3), "encoder.1.attention": (), "encoder.2.neurons": (0, 5, 6)})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model dense and cut."""
    home, model = tmp_path_factory.mktemp("models"), tiny("bert")
    model.save_pretrained(home / "dense")
    checkpoint.save(shrink(model, anatomy_of(model), PLAN), PLAN, home / "cut", tokenizer_from=home, sparse=False)
    return home


@pytest.fixture(params=["dense", "cut"])
def folder(request, folders, tmp_path):
    return Path(shutil.copytree(folders / request.param, tmp_path / request.param))


def change(folder: Path, **entries: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | entries), encoding="utf-8")


WRONG = [
    ({"hidden_size": "32"}, "hidden_size"),
    ({"hidden_size": 10**7}, "hidden_size: 10000000, and the weights hold no tensor larger"),
    ({"hidden_size": 31}, None),
    ({"hidden_size": 0}, None),
    ({"num_attention_heads": 0}, None),
    ({"num_attention_heads": 5}, None),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers: 1000000, and the weights hold only"),
    ({"num_hidden_layers": 10**18}, "num_hidden_layers"),
    ({"num_hidden_layers": 2}, "unknown|plan"),
    ({"num_hidden_layers": -1}, None),
    ({"num_hidden_layers": 2.5}, None),
    ({"vocab_size": 10**10}, "vocab_size: 10000000000"),
    ({"max_position_embeddings": 10**10}, "max_position_embeddings"),
    ({"max_position_embeddings": 63}, r"shape: bert.embeddings.position_embeddings"),
    ({"type_vocab_size": 10**12}, "type_vocab_size"),
    ({"intermediate_size": 10**9}, "intermediate_size"),
    ({"pad_token_id": 500}, "pad_token_id: 500, and its vocabulary has 99"),
    ({"hidden_act": "gelo"}, "activation 'gelo'.*transformers does not have"),
    ({"hidden_act": 5}, None),
    ({"hidden_dropout_prob": 7}, None),
    ({"layer_norm_eps": -1}, "layer_norm_eps: -1"),
    ({"layer_norm_eps": float("nan")}, "layer_norm_eps"),
    ({"id2label": 5}, "id2label is 5"),
    ({"id2label": {"0": "a"}}, None),
    ({"is_decoder": True}, "is_decoder: True"),
    ({"add_cross_attention": True}, "add_cross_attention"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type: 'relative_key'"),
    ({"position_embedding_type": "alibi"}, "alibi"),
    ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ({"model_type": "gpt2"}, "no family|names the class"),
    ({"model_type": "t5"}, "hold nothing of the encoder of a t5 model"),
    ({"architectures": [7]}, None),
    ({"architectures": ["BertForNothing", "B"]}, None),
    ({"initializer_range": "x"}, None),
    ({"chunk_size_feed_forward": -3}, None),
    ({"chunk_size_feed_forward": 0.5}, None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("entries", "said"), WRONG, ids=[f"{name}={value}"[:40] for entries, _ in WRONG for name, value in entries.items()]
)
def test_every_wrong_field_is_one_message_and_costs_no_time(folder, entries, said, caplog):
    change(folder, **entries)
    begin = time.monotonic()
    try:
        model = slimformer.load(folder)
    except SlimformerError as error:
        assert said is None or __import__("re").search(said, str(error)), error
        assert "\n" not in error.what
        assert error.help
    else:
        assert said is None
        assert model.config.num_labels == 3
        assert model(torch.tensor([[2, 4, 5, 3]])).logits.shape == (1, 3)
        assert caplog.text or next(iter(entries)) in ("chunk_size_feed_forward", "hidden_dropout_prob")
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32_with_a_word(folder, dtype, caplog):
    state = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    again = slimformer.load(folder).state_dict()
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor, state[name].float()) for name, tensor in again.items())
    assert f"stored as {str(dtype).removeprefix('torch.')}; they are computed with as float32" in caplog.text


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_what_is_no_float_is_refused(folder, dtype):
    state = load_file(folder / WEIGHTS)
    name = "bert.encoder.layer.0.output.dense.weight"
    save_file(state | {name: state[name].to(dtype)}, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"'{name}' is stored as {str(dtype).removeprefix('torch.')}"):
        slimformer.load(folder)


@pytest.mark.parametrize("suffix", ["SCB", "qweight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"])
def test_quantized_weights_are_refused_also_without_a_word_in_config(folders, tmp_path, suffix):
    shutil.copytree(folders / "dense", tmp_path / "eight")
    state = load_file(tmp_path / "eight" / WEIGHTS) | {f"bert.encoder.layer.0.output.dense.{suffix}": torch.ones(3)}
    save_file(state, tmp_path / "eight" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="quantized by another tool"):
        slimformer.load(tmp_path / "eight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_told_and_refused(folder, value, caplog):
    state = load_file(folder / WEIGHTS)
    state["classifier.bias"][0] = value
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    slimformer.load(folder)
    assert "1 tensors hold values that are not finite (nan or inf), the first is classifier.bias" in caplog.text
    with pytest.raises(ModelError, match=r"not finite[\s\S]*classifier.bias"):
        checkpoint.check_weights(folder)


@pytest.mark.parametrize("name", ["config.json", "plan.json", "ranges.json"])
@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"[1", b"[" * 100_000, b"5", b""])
def test_json_files_that_are_none(folders, tmp_path, name, content):
    shutil.copytree(folders / "cut", tmp_path / "cut")
    (tmp_path / "cut" / name).write_bytes(content)
    with pytest.raises(SlimformerError, match=name):
        slimformer.load(tmp_path / "cut")


def test_an_unlike_number_of_labels_waits_for_no_list_of_names(tmp_path):
    tiny("bert").base_model.save_pretrained(tmp_path)
    change(tmp_path, num_labels=10**9)
    with pytest.raises(ModelError, match="num_labels is 1000000000"):
        checkpoint.load_dense(tmp_path, "AutoModelForSequenceClassification", {"num_labels": 2})


@pytest.mark.parametrize(
    "entry", [{"shape": [float("inf"), 3]}, {"data_offsets": [0, float("inf")]}, {"shape": None}, {"dtype": 5}]
)
def test_a_header_that_says_anything_is_one_message(folder, entry):
    data = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["classifier.bias"] |= entry
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(ModelError, match="model.safetensors (has no readable|cannot be read)"):
        slimformer.load(folder)
