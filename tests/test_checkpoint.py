"""Model folders: strict loading, every broken folder in words, the Auto classes, no pickle."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import batch, tiny
from transformers import AutoConfig, AutoModel, AutoModelForQuestionAnswering, AutoModelForSequenceClassification

import slimformer
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.errors import ModelError
from slimformer.families.base import anatomy_of
from slimformer.saving import checkpoint

PLAN = Plan({"encoder.0.heads": (1, 3), "encoder.1.attention": (), "encoder.2.neurons": (0, 5, 6)})


@pytest.fixture
def folder(tmp_path):
    model = tiny("bert")
    checkpoint.save(shrink(model, anatomy_of(model), PLAN), PLAN, tmp_path / "small", tokenizer_from=tmp_path)
    return tmp_path / "small"


@pytest.fixture
def dense(tmp_path):
    tiny("bert").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def change(file, **entries):
    data = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(data | entries), encoding="utf-8")


def test_auto_classes_load_it_once_slimformer_is_imported(folder):
    model = slimformer.load(folder)
    inputs = batch(model)
    again = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(again) is type(model)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert type(AutoModel.from_pretrained(folder)).__name__ == "BertModel"
    assert AutoConfig.from_pretrained(folder).model_type == "slimformer_bert"
    with pytest.raises(ModelError, match="not one that ends in ForQuestionAnswering"):
        AutoModelForQuestionAnswering.from_pretrained(folder)


@pytest.mark.slow
def test_plain_transformers_refuses_it(folder):
    code = f"from transformers import AutoModel; AutoModel.from_pretrained({str(folder)!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert "slimformer_bert" in found.stderr


@pytest.mark.slow
def test_import_order_does_not_matter(folder):
    for first, second in (("slimformer", "transformers"), ("transformers", "slimformer")):
        code = (
            f"import {first}, {second}; from transformers import AutoModelForSequenceClassification as A; "
            f"print(type(A.from_pretrained({str(folder)!r})).__name__)"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert found.stdout.strip() == "BertForSequenceClassification"


def test_a_plain_folder_loads_too(dense):
    model = slimformer.load(dense)
    expected = tiny("bert")
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert checkpoint.load_plan(dense) == Plan()


def test_no_folder_no_config_no_type(tmp_path):
    with pytest.raises(ModelError, match="is not a folder with a model"):
        slimformer.load(tmp_path / "nothing")
    with pytest.raises(ModelError, match="is empty"):
        slimformer.load(tmp_path)
    (tmp_path / "notes.txt").write_text("", encoding="utf-8")
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        slimformer.load(tmp_path)
    (tmp_path / "config.json").write_text("[1", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be read"):
        slimformer.load(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="names no model_type"):
        slimformer.load(tmp_path)


def test_an_architecture_without_a_family_names_those_there_are(folder):
    change(folder / "config.json", model_type="slimformer_gpt2")
    known = r"bert, bilstm, camembert, cnn, deberta-v2, distilbert, electra"
    with pytest.raises(ModelError, match=rf"no family knows the architecture 'gpt2'[\s\S]*{known}"):
        slimformer.load(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -5])
def test_truncated_weights(folder, dense, keep):
    for place in (folder, dense):
        file = place / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[:keep])
        with pytest.raises(ModelError, match="cut off|truncated"):
            slimformer.load(place)


def test_weights_that_do_not_match(folder):
    state = load_file(folder / "model.safetensors")
    first = "bert.encoder.layer.0.attention.self.query.weight"
    state[first] = torch.zeros(8, 32)
    state["surplus"] = state.pop("classifier.bias")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 missing, 1 unknown, 1 of another shape") as caught:
        slimformer.load(folder)
    assert f"shape: {first} is (8, 32), expected (16, 32)" in caught.value.facts


def test_weights_that_do_not_match_a_plain_config(dense):
    change(dense / "config.json", intermediate_size=30)
    with pytest.raises(ModelError, match="does not load|do not match"):
        slimformer.load(dense)
    change(dense / "config.json", intermediate_size=24, num_hidden_layers=4)
    with pytest.raises(ModelError, match="do not match"):
        slimformer.load(dense)


def test_pickle_only_is_refused_with_the_way_out(dense):
    (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only as pickle[\s\S]*save_pretrained"):
        slimformer.load(dense)


def test_another_plan_is_refused(folder):
    (folder / "plan.json").write_text(Plan().to_json(), encoding="utf-8")
    with pytest.raises(ModelError, match="is not the plan of this model"):
        slimformer.load(folder)
    (folder / "plan.json").unlink()
    with pytest.raises(ModelError, match=r"holds no plan\.json"):
        slimformer.load(folder)


def test_a_saved_folder_holds_no_pickle_and_no_code(folder):
    assert sorted(item.name for item in folder.iterdir()) == ["config.json", "model.safetensors", "plan.json"]


def test_a_fresh_head_is_that_of_its_seed(tmp_path):
    """Else a run that was cut off while it tuned an encoder would not know its own start again."""
    tiny("bert").base_model.save_pretrained(tmp_path / "encoder")
    before = torch.get_rng_state()

    def head(seed):
        torch.rand(3)  # whatever was drawn before
        model = checkpoint.load_dense(tmp_path / "encoder", "AutoModelForSequenceClassification", {"num_labels": 5}, seed)
        return model.classifier.weight

    assert torch.equal(head(17), head(17))
    assert not torch.equal(head(17), head(18))
    torch.set_rng_state(before)
    with torch.random.fork_rng():
        checkpoint.load_dense(tmp_path / "encoder", "AutoModelForSequenceClassification", {"num_labels": 5})
        assert torch.equal(torch.get_rng_state(), before)


def test_a_head_may_be_fresh_an_encoder_may_not(tmp_path):
    tiny("bert").base_model.save_pretrained(tmp_path / "encoder")
    assert not checkpoint.is_tuned(tmp_path / "encoder", "AutoModelForSequenceClassification")
    model = checkpoint.load_dense(tmp_path / "encoder", "AutoModelForSequenceClassification", {"num_labels": 5})
    assert model.classifier.weight.shape[0] == 5
    state = load_file(tmp_path / "encoder" / "model.safetensors")
    del state["encoder.layer.1.output.dense.weight"]
    save_file(state, tmp_path / "encoder" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="do not match"):
        checkpoint.load_dense(tmp_path / "encoder", "AutoModelForSequenceClassification", {"num_labels": 5})
