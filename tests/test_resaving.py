"""A loaded model that was cut saves itself: save_pretrained, Trainer, push_to_hub and copies write folders that load again."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
import torch
from tiny import batch, tiny
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments

import slimformer
from slimformer.core.plan import Plan
from slimformer.core.ranges import Range, Ranges
from slimformer.core.shrink import shrink
from slimformer.errors import ModelError
from slimformer.families.base import anatomy_of
from slimformer.forms.kronecker import Kronecker
from slimformer.saving import checkpoint

PLAN = Plan({"encoder.0.heads": (1, 3), "encoder.1.attention": (), "encoder.2.neurons": (0, 5, 6)})
FACTORED = Plan({"encoder.0.heads": (1, 3)}, {"encoder.1.ffn_in": Kronecker((4, 4))})
RANGES = Ranges({"embeddings.sum": Range(-1.0, 2.0)})


def cut(folder: Path, kind: str = "bert", plan: Plan = PLAN, ranges: Ranges | None = None, **changes: object) -> Path:
    model = tiny(kind, **changes)
    checkpoint.save(shrink(model, anatomy_of(model), plan), plan, folder, tokenizer_from=folder, ranges=ranges)
    return folder


def assert_same(folder: Path, model) -> None:
    again, own = slimformer.load(folder), model.state_dict()
    assert type(again) is type(model)
    assert own.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor.float(), again.state_dict()[name]) for name, tensor in own.items())


@pytest.mark.parametrize("plan", [PLAN, FACTORED, Plan()], ids=["cut", "factored", "whole"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra"])
def test_a_loaded_model_saves_itself(tmp_path, kind, plan):
    model = slimformer.load(cut(tmp_path / "small", kind, plan, RANGES))
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path / "again")
    assert_same(tmp_path / "again", model)
    assert slimformer.load_plan(tmp_path / "again") == plan if hasattr(slimformer, "load_plan") else True
    assert checkpoint.load_plan(tmp_path / "again") == plan
    assert checkpoint.load_ranges(tmp_path / "again") == RANGES
    assert json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))["model_type"] == f"slimformer_{kind}"
    assert not list((tmp_path / "again").glob(".part-*"))


@pytest.mark.slow
def test_copies_cuts_and_pickles_of_it_too(tmp_path):
    model = slimformer.load(cut(tmp_path / "small"))
    later = Plan({"encoder.0.heads": (1,), "encoder.0.neurons": (3, 4)})
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for number, other in enumerate(
        (copy.deepcopy(model), copy.deepcopy(model).half(), copy.deepcopy(model).bfloat16(), shrink(model, anatomy_of(model), later),
         torch.load(file, weights_only=False), AutoModelForSequenceClassification.from_pretrained(tmp_path / "small"))
    ):  # fmt: skip
        with torch.no_grad():
            next(other.parameters()).mul_(2)
        other.save_pretrained(str(tmp_path / str(number)))
        assert_same(tmp_path / str(number), other)
    assert checkpoint.load_plan(tmp_path / "3") == PLAN.then(later)


def test_the_encoder_alone_saves_itself(tmp_path):
    model = AutoModel.from_pretrained(cut(tmp_path / "small"))
    model.save_pretrained(tmp_path / "encoder")
    assert_same(tmp_path / "encoder", model)
    assert type(AutoModel.from_pretrained(tmp_path / "encoder")).__name__ == "BertModel"


def test_shards_and_what_was_there_before(tmp_path):
    model = slimformer.load(cut(tmp_path / "small", ranges=RANGES))
    model.save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "tokenizer.json").write_text("{}", encoding="utf-8")
    model.save_pretrained(tmp_path / "again", max_shard_size="12KB")
    assert not (tmp_path / "again" / "model.safetensors").exists()
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 2
    assert_same(tmp_path / "again", model)
    model.save_pretrained(tmp_path / "again")
    assert not list((tmp_path / "again").glob("model-*"))
    assert (tmp_path / "again" / "tokenizer.json").is_file()
    assert_same(tmp_path / "again", model)


def test_tied_weights(tmp_path):
    model = tiny("bert", auto_class="AutoModelForMaskedLM")
    checkpoint.save(shrink(model, anatomy_of(model), PLAN), PLAN, tmp_path / "small", tokenizer_from=tmp_path)
    small = slimformer.load(tmp_path / "small")
    small.save_pretrained(tmp_path / "again", state_dict=small.state_dict())
    assert_same(tmp_path / "again", small)


def test_a_model_of_other_shapes_than_its_plan_is_not_written(tmp_path):
    model = slimformer.load(cut(tmp_path / "small"))
    model.resize_token_embeddings(120)
    model.save_pretrained(tmp_path / "longer")  # its config says so too
    assert slimformer.load(tmp_path / "longer").config.vocab_size == 120
    model.classifier = torch.nn.Linear(32, 9)
    with pytest.raises(ModelError, match=r"no longer follow from its config and its plan: 'classifier.bias' differs"):
        model.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_pushing_takes_the_same_way(tmp_path, monkeypatch):
    """What push_to_hub would upload is what save_pretrained wrote; nothing is sent here."""
    model, sent = slimformer.load(cut(tmp_path / "small")), {}
    monkeypatch.setattr(type(model), "push_to_hub", lambda self, **options: sent.update(options, model=self))
    model.save_pretrained(tmp_path / "again", push_to_hub=True, commit_message="m")
    assert (sent["repo_id"], sent["commit_message"], sent["model"]) == ("again", "m", model)
    assert_same(tmp_path / "again", model)


def test_a_plain_model_saves_itself_as_ever(tmp_path):
    tiny("bert").save_pretrained(tmp_path / "plain")
    slimformer.load(tmp_path / "plain").save_pretrained(tmp_path / "again")
    assert sorted(item.name for item in (tmp_path / "again").iterdir()) == ["config.json", "model.safetensors"]
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "plain" / "config.json").read_text()


def test_a_cut_model_without_its_plan_says_how_to_save_it(tmp_path):
    model = tiny("bert")
    shrink(model, anatomy_of(model), PLAN).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"do not match config.json[\s\S]*a model that was cut is saved with slimformer.save"):
        slimformer.load(tmp_path)


def test_options_of_the_auto_classes(tmp_path):
    folder = cut(tmp_path / "small" / "model").parent
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        subfolder="model",
        dtype=torch.bfloat16,
        attn_implementation="eager",
        output_hidden_states=True,
        hidden_dropout_prob=0.3,
    )
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert model.bert.embeddings.dropout.p == 0.3
    assert len(model(**batch(model)).hidden_states) == 4
    whole, info = AutoModelForSequenceClassification.from_pretrained(folder / "model", output_loading_info=True)
    assert not any(info.values())
    assert whole.dtype == torch.float32
    with pytest.raises(ModelError, match="do not match"):
        AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=7)


class Rows(torch.utils.data.Dataset):
    def __init__(self, model) -> None:
        self.rows = batch(model, rows=8)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int):
        return {name: values[row] for name, values in self.rows.items()} | {"labels": torch.tensor(row % 3)}


@pytest.mark.slow
def test_a_trainer_saves_resumes_and_finds_its_best_again(tmp_path):
    model = slimformer.load(cut(tmp_path / "small"))
    first = copy.deepcopy(model).state_dict()
    options = dict(  # noqa: C408
        output_dir=str(tmp_path / "runs"), per_device_train_batch_size=4, eval_strategy="epoch", save_strategy="epoch", report_to=[],
        load_best_model_at_end=True, learning_rate=1e-2, use_cpu=True, disable_tqdm=True, logging_steps=1, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        model, TrainingArguments(num_train_epochs=2, **options), train_dataset=Rows(model), eval_dataset=Rows(model)
    )
    trainer.train()
    assert not torch.equal(model.classifier.weight, first["classifier.weight"])
    trainer.save_model(str(tmp_path / "tuned"))
    assert_same(tmp_path / "tuned", model)
    again = slimformer.load(tmp_path / "tuned")
    assert torch.equal(again(**batch(model)).logits, model.eval()(**batch(model)).logits)
    checkpoints = sorted((tmp_path / "runs").glob("checkpoint-*"), key=lambda folder: int(folder.name[11:]))
    assert [checkpoint.load_plan(folder) for folder in checkpoints] == [PLAN, PLAN]
    later = Trainer(
        slimformer.load(tmp_path / "small"),
        TrainingArguments(num_train_epochs=3, **options),
        train_dataset=Rows(model),
        eval_dataset=Rows(model),
    )
    later.train(resume_from_checkpoint=str(checkpoints[-1]))
    assert_same(checkpoints[-1].with_name("checkpoint-6"), slimformer.load(checkpoints[-1].with_name("checkpoint-6")))
