"""The head that the weights hold is used, whatever class config.json names; of a model for something else the encoder is taken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from tiny import batch, tiny

import slimformer
from slimformer.errors import ModelError
from slimformer.saving import checkpoint

WEIGHTS = "model.safetensors"
CLASSIFY, TAG, ANSWER, FILL, TRANSLATE = (
    f"AutoModelFor{name}"
    for name in ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM", "Seq2SeqLM")
)
KINDS = ("bert", "roberta", "camembert", "xlm-roberta", "electra", "distilbert")


def change(folder: Path, **entries: object) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text(encoding="utf-8")) | entries
    file.write_text(json.dumps({name: value for name, value in content.items() if value != "gone"}), encoding="utf-8")


def rename(folder: Path, new) -> None:
    """Gives each tensor the name that `new` makes of it; None leaves it out."""
    state = {new(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file({name: tensor for name, tensor in state.items() if name}, folder / WEIGHTS, metadata={"format": "pt"})


def saved(folder: Path, kind: str = "bert", head: str = CLASSIFY, **changes: object):
    """A tiny model of that type with that head, saved in `folder`."""
    if head == ANSWER:
        changes["num_labels"] = 2
    model = tiny(kind, auto_class=head, **changes)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", [CLASSIFY, TAG, ANSWER, FILL])
def test_the_head_is_found_without_a_word_of_config(tmp_path, kind, head, caplog):
    model = saved(tmp_path, kind, head)
    change(tmp_path, architectures="gone")
    again = slimformer.load(tmp_path)
    if not (kind == "bert" and head == TAG):
        assert f"the head of {type(again).__name__}" in caplog.text
    assert type(again) is type(model)
    assert checkpoint.is_tuned(tmp_path, head)
    assert not checkpoint.is_tuned(tmp_path, TAG if head == CLASSIFY else CLASSIFY)
    assert torch.equal(again(**batch(model))[0], model(**batch(model))[0])


@pytest.mark.parametrize("stated", [["BertForMaskedLM"], ["BertModel"], ["RobertaForSequenceClassification"], ["MyBert"], []])
def test_a_wrong_class_in_config_is_told(tmp_path, stated, caplog):
    model = saved(tmp_path)
    change(tmp_path, architectures=stated)
    assert checkpoint.is_tuned(tmp_path, CLASSIFY)
    assert torch.equal(slimformer.load(tmp_path).classifier.weight, model.classifier.weight)
    assert "the weights hold the head of BertForSequenceClassification" in caplog.text
    assert checkpoint.model_config(tmp_path)["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}


@pytest.mark.parametrize("head", [TAG, ANSWER, FILL])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_a_head_for_something_else_leaves_its_encoder(tmp_path, kind, head, caplog):
    """Also if its classifier has the very shape that the new one needs."""
    model = saved(tmp_path, kind, head, num_labels=2)
    changes = {"num_labels": 2, "id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    fresh = checkpoint.load_dense(tmp_path, CLASSIFY, changes)
    assert (
        f"it is a {type(model).__name__}; its encoder is taken, and the head of the {type(fresh).__name__} is new"
        in caplog.text
    )
    assert fresh.config.id2label == {0: "bad", 1: "good"}
    own, taken = model.base_model.state_dict(), fresh.base_model.state_dict()
    assert all(torch.equal(tensor, taken[name]) for name, tensor in own.items())
    if head == TAG:
        assert not torch.equal(model.classifier.weight, getattr(fresh.classifier, "out_proj", fresh.classifier).weight)


def test_tags_tell_a_tagger_from_a_classifier(tmp_path):
    saved(tmp_path, id2label={0: "O", 1: "B-PER", 2: "I-PER"}, label2id={"O": 0, "B-PER": 1, "I-PER": 2})
    change(tmp_path, architectures="gone")
    assert checkpoint.is_tuned(tmp_path, TAG)


def test_labels_come_from_the_head_if_config_names_none(tmp_path, caplog):
    saved(tmp_path)
    change(tmp_path, id2label="gone", label2id="gone")
    assert slimformer.load(tmp_path).config.num_labels == 3
    assert checkpoint.model_config(tmp_path)["num_labels"] == 3
    assert "config.json names no labels, and the head has 3" in caplog.text


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, "names 2 labels, and the head has 3"),
        ({"id2label": "gone", "label2id": "gone", "num_labels": 5}, "names 5 labels, and the head has 3"),
        ({"id2label": "gone", "num_labels": 10**9}, "num_labels is 1000000000"),
        ({"id2label": 5}, "id2label is 5"),
        ({"id2label": {"0": "a", "2": "b", "3": "c"}}, "must run from 0"),
        ({"architectures": 5}, "architectures is 5"),
        ({"architectures": {"a": 1}}, "not a list of names"),
    ],
)
def test_what_contradicts_the_head_is_refused(tmp_path, entries, said):
    saved(tmp_path)
    change(tmp_path, **entries)
    with pytest.raises(ModelError, match=said):
        slimformer.load(tmp_path)


def test_a_head_that_is_named_and_not_there(tmp_path, caplog):
    saved(tmp_path)
    rename(tmp_path, lambda name: None if name.startswith("classifier") else name)
    assert not checkpoint.is_tuned(tmp_path, CLASSIFY)
    with pytest.raises(
        ModelError, match=r"BertForSequenceClassification, and the weights hold no such head \(classifier.bias\)"
    ):
        slimformer.load(tmp_path)
    assert checkpoint.load_dense(tmp_path, CLASSIFY, {"num_labels": 2}).config.num_labels == 2
    assert "the head of the BertForSequenceClassification is new" in caplog.text


def test_half_a_head_is_a_damaged_file(tmp_path):
    saved(tmp_path, "distilbert")
    rename(tmp_path, lambda name: None if name == "classifier.bias" else name)
    with pytest.raises(ModelError, match=r"1 missing[\s\S]*classifier.bias"):
        slimformer.load(tmp_path)


def test_a_class_that_nobody_knows_with_a_head_that_nobody_reads(tmp_path):
    saved(tmp_path)
    change(tmp_path, architectures=["JointBert"])
    rename(tmp_path, lambda name: name.replace("classifier", "slot_head"))
    with pytest.raises(
        ModelError, match=r"JointBert, which transformers does not have, and no other class reads slot_head.bias"
    ):
        slimformer.load(tmp_path)


@pytest.mark.parametrize(
    ("wrapper", "said"),
    [("module.", "module."), ("_orig_mod.", "_orig_mod."), ("model.", "model."), ("_orig_mod.module.", "_orig_mod."),
     ("module.model.", "model."), ("_fsdp_wrapped_module.", "_fsdp_wrapped_module."), ("base_model.model.", "base_model.model."),
     ("backbone.", "backbone.")],
)  # fmt: skip
def test_names_from_inside_a_wrapper(tmp_path, wrapper, said, caplog):
    model = saved(tmp_path)
    rename(tmp_path, lambda name: wrapper + name)
    state = load_file(tmp_path / WEIGHTS) | {"loss_fn.weight": torch.ones(3)}
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert torch.equal(slimformer.load(tmp_path).classifier.weight, model.classifier.weight)
    assert f"with '{said}'" in caplog.text or f"hold '{said}'" in caplog.text
    assert "1 tensors belong to no head of transformers and are not read, the first is loss_fn.weight" in caplog.text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("bert.", "bert._orig_mod."),
        ("layer.1.", "layer.1._checkpoint_wrapped_module."),
        ("bert.", "encoder."),  # a person's own module around a BertModel
        ("classifier.", "classifier.modules_to_save.default."),  # a head that PEFT trained beside its merged adapter
    ],
)
def test_names_with_a_wrapper_inside(tmp_path, old, new, caplog):
    model = saved(tmp_path)
    rename(tmp_path, lambda name: name.replace(old, new, 1))
    again = slimformer.load(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert "which is left out" in caplog.text or "modules_to_save" in new


def _without(name):
    return None


def _with_adapter(name):
    return name.replace("query.weight", "query.base_layer.weight")


@pytest.mark.parametrize(
    ("new", "extra", "said"),
    [
        (_with_adapter, {"bert.encoder.layer.0.attention.self.query.lora_A.default.weight": (2, 32)}, "hold an adapter.*base_layer"),
        (None, {"bert.encoder.layer.0.output.adapters.sst.adapter_down.0.weight": (4, 32)}, "hold an adapter"),
        (lambda name: "base_model.model." + _with_adapter(name), {}, "hold an adapter"),
        (lambda name: name if name.startswith("classifier") else None, {}, "nothing of the encoder of a bert model.*classifier.bias"),
        (_without, {"encoder.block.0.layer.0.SelfAttention.q.weight": (4, 4)}, "nothing of the encoder of a bert"),
        (_without, {}, "hold no tensor"),
        (_without, {"bert.embeddings.word_embeddings.weight": (0,), "classifier.weight": (0,)}, "all 2 tensors .*empty.*ZeRO"),
        (lambda name: "bert/" + name.replace(".", "/") + ":0", {}, "are TensorFlow's .*from_tf"),
        (lambda name: name.replace("weight", "kernel"), {}, "are Flax's .*from_flax"),
        (None, {"bert.pooler.dense.weight_mask": (32, 32)}, "torch.nn.utils.prune.*prune.remove"),
        (None, {"bert.pooler.dense.weight_g": (32, 1)}, "remove_weight_norm"),
        (lambda name: name.replace("classifier", "fc"), {}, r"no such head \(classifier.bias\), but fc.bias, which no class"),
    ],
)  # fmt: skip
def test_weights_that_are_no_whole_model_are_named_for_what_they_are(tmp_path, new, extra, said):
    saved(tmp_path)
    rename(tmp_path, new or (lambda name: name))
    state = load_file(tmp_path / WEIGHTS) | {name: torch.zeros(shape) for name, shape in extra.items()}
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"(?s){said}"):
        slimformer.load(tmp_path)


@pytest.mark.parametrize(
    ("entries", "names", "said"),
    [
        ({"label2id": {"x": 0, "y": 1, "z": 2}}, "xyz", "names its labels in label2id alone"),
        ({"id2label": "gone", "label2id": {"x": "0", "y": "1", "z": "2"}}, "xyz", "names its labels in label2id alone"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 2, "b": 1, "c": 0}}, "abc", "id 0 is 'a' in id2label, and 'c'"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}, "num_labels": 2}, "abc", ""),  # the names count
    ],
)  # fmt: skip
def test_label2id_helps_and_its_contradictions_are_told(tmp_path, entries, names, said, caplog):
    saved(tmp_path)
    change(tmp_path, **entries)
    assert list(slimformer.load(tmp_path).config.id2label.values()) == list(names)
    assert said in caplog.text


@pytest.mark.parametrize("kind", ["roberta", "electra", "distilbert"])
def test_weights_of_another_type_than_config_says(tmp_path, kind):
    saved(tmp_path, kind)
    change(tmp_path, model_type="bert", architectures=["BertForSequenceClassification"])
    with pytest.raises(ModelError, match=f"weights are those of an? {kind} model .*'{kind}\\.'.*says that it is a bert"):
        slimformer.load(tmp_path)


def test_a_type_that_is_not_the_one_of_its_class_is_the_cause(tmp_path):
    saved(tmp_path)
    change(tmp_path, model_type="roberta")
    with pytest.raises(ModelError, match=r"those of a bert model .*says that it is a roberta"):
        slimformer.load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "usual", "own"),
    [("modernbert", "model.", "modernbert."), ("xlm-roberta", "roberta.", "xlm_roberta."), ("t5", "", "t5."), ("bart", "", "bart."),
     ("distilbert", "distilbert.", "distilbert.distilbert."), ("xlm-roberta", "roberta.", "roberta.roberta.")],
)  # fmt: skip
def test_a_module_named_like_the_type_is_one_like_any_other(tmp_path, kind, usual, own):
    model = saved(tmp_path, kind, TRANSLATE if kind in ("t5", "bart") else CLASSIFY)
    rename(tmp_path, lambda name: own + name.removeprefix(usual) if name.startswith(usual) else name)
    again = slimformer.load(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("kind", "head"), [("t5", TRANSLATE), ("bart", TRANSLATE), ("roberta", FILL), ("modernbert", FILL)])
def test_a_tied_table_under_another_of_its_names(tmp_path, kind, head):
    model = saved(tmp_path, kind, head)
    (tmp_path / WEIGHTS).unlink()
    save_model(model, str(tmp_path / WEIGHTS))  # keeps one name of each, and not the one that transformers keeps
    assert set(model.all_tied_weights_keys.values()) - set(load_file(tmp_path / WEIGHTS))
    again = slimformer.load(tmp_path)
    assert torch.equal(again(**batch(model))[0], model(**batch(model))[0])
    if head == FILL:
        tuned = checkpoint.load_dense(tmp_path, CLASSIFY)
        assert torch.equal(tuned.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_of_two_copies_the_plain_one_is_taken(tmp_path, caplog):
    model = saved(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    save_file(state | {f"module.{name}": tensor + 1 for name, tensor in state.items()}, tmp_path / WEIGHTS)
    assert torch.equal(slimformer.load(tmp_path).classifier.weight, model.classifier.weight)
    assert "are there twice, such as module.bert" in caplog.text


def test_a_head_under_another_name_is_to_be_renamed(tmp_path):
    saved(tmp_path)
    rename(tmp_path, lambda name: name.replace("classifier", "classifier.1"))
    with pytest.raises(
        ModelError, match=r"but classifier\.1\.bias[\s\S]*rename its tensors to classifier.bias and classifier.weight"
    ):
        slimformer.load(tmp_path)


def test_a_class_that_is_guessed_is_called_a_guess(tmp_path, caplog):
    saved(tmp_path / "alike", "modernbert", TAG)
    saved(tmp_path / "apart", "bert", CLASSIFY)
    for name in ("alike", "apart"):
        change(tmp_path / name, architectures="gone")
    slimformer.load(tmp_path / "apart")
    assert "That is a guess" not in caplog.text
    slimformer.load(tmp_path / "alike")
    assert "That is a guess: the tensors of ModernBertForTokenClassification and" in caplog.text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_named(tmp_path, encoding):
    saved(tmp_path)
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(text, encoding=encoding)
    with pytest.raises(ModelError, match="byte order mark"):
        slimformer.load(tmp_path)


def test_names_of_old_checkpoints(tmp_path):
    model = saved(tmp_path)
    rename(
        tmp_path, lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    )
    state = load_file(tmp_path / WEIGHTS) | {"bert.embeddings.position_ids": torch.arange(64)[None]}
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    change(tmp_path, model_type="gone")
    again = slimformer.load(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_tensors_that_nobody_reads(tmp_path, caplog):
    saved(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    save_file(state | {"crf.transitions": torch.zeros(3, 3)}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    slimformer.load(tmp_path)
    assert "1 tensors belong to no head of transformers and are not read, the first is crf.transitions" in caplog.text
    save_file(
        state | {"bert.encoder.layer.3.output.dense.weight": torch.zeros(3, 3)}, tmp_path / WEIGHTS, metadata={"format": "pt"}
    )
    with pytest.raises(ModelError, match=r"1 unknown[\s\S]*encoder.layer.3"):
        slimformer.load(tmp_path)


def test_an_encoder_without_a_pooler_gets_no_random_one(tmp_path):
    tiny("bert").base_model.save_pretrained(tmp_path)
    rename(tmp_path, lambda name: None if name.startswith("pooler") else name)
    assert slimformer.load(tmp_path).pooler is None


FIRST = (
    "from slimformer.saving.heads import parts_for",
    "from transformers import MarianConfig",  # its module loads the Auto classes before it has its class
    "import transformers; transformers.AutoConfig.for_model('marian')",
    "from slimformer.running.fresh import Fresh; Fresh('marian')",
)


@pytest.mark.slow
@pytest.mark.parametrize("first", FIRST)
def test_all_types_are_known_whatever_is_imported_first(first: str) -> None:
    code = f"""
import slimformer
{first}
import wave  # whatever is imported next
from slimformer.saving.heads import parts_for
from transformers import AutoModel
known = {{config.model_type for config in AutoModel._model_mapping._extra_content}}
assert {{"slimformer_marian", "slimformer_t5", "slimformer_bilstm", "bilstm", "static"}} <= known, known
assert parts_for("AutoModelForSequenceClassification", "bilstm") is not None
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
