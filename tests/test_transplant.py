"""A BERT in another family's class computes the same: encoder, heads where the classes agree, and the saved folder."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny import HEAD_DIM, VOCABULARY, batch, tiny, tiny_config
from tiny_folder import write_model

from slimformer.core.anatomy import Kind
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.data.tokenizer import load_tokenizer, max_length_of
from slimformer.errors import ExtraError, ModelError
from slimformer.families.base import anatomy_of
from slimformer.saving import checkpoint
from slimformer.testing.checks import assert_equal

sys.path.insert(0, str(Path(__file__).parents[1] / "results"))

from transplant import CLASSES, save, transplant

TARGETS = tuple(CLASSES)


def bert(shape: str, **changes):
    """A tiny BERT with another head, its weights as large as those of `tiny`."""
    torch.manual_seed(1)
    model = getattr(transformers, f"Bert{shape}")(tiny_config("bert", **changes))
    model.base_model.load_state_dict(tiny("bert", **changes).base_model.state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("bert."):
                parameter.normal_()
    return model.eval()


def same(one, other, inputs, *names):
    """Whether both give the same at real tokens."""
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        first, second = one(**inputs), other(**inputs)
    for name in names:
        left, right = first[name], second[name]
        if left.shape[:2] == real.shape:
            left, right = left[real], right[real]
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pad", [0, 1, 3])
@pytest.mark.parametrize("to", TARGETS)
def test_the_encoder_gives_the_same(to, pad):
    model = tiny("bert", pad_token_id=pad).base_model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = transplant(model, to).model
    assert made.config.model_type == to
    inputs = batch(model)
    inputs["input_ids"][inputs["attention_mask"] == 0] = pad
    same(model, made, inputs, "last_hidden_state")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("to", TARGETS)
def test_the_last_position_is_carried_too(to):
    model = tiny("bert").base_model
    made = transplant(model, to).model
    full = {"input_ids": torch.randint(5, VOCABULARY, (1, 64)), "attention_mask": torch.ones(1, 64, dtype=torch.long)}
    same(model, made, full, "last_hidden_state")


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize(
    ("shape", "outputs"), [("ForQuestionAnswering", ("start_logits", "end_logits")), ("ForTokenClassification", ("logits",))]
)
def test_heads_on_each_token_follow(to, shape, outputs):
    model = bert(shape, num_labels=2)
    made = transplant(model, to)
    assert made.fresh == ()
    assert type(made.model).__name__ == CLASSES[to] + shape
    same(model, made.model, batch(model), *outputs)


def test_classification_follows_to_roberta():
    model = tiny("bert", id2label={0: "no", 1: "maybe", 2: "yes"}, label2id={"no": 0, "maybe": 1, "yes": 2})
    made = transplant(model, "roberta")
    assert made.fresh == ()
    assert made.model.config.id2label == model.config.id2label
    same(model, made.model, batch(model), "logits")


@pytest.mark.parametrize(("to", "first"), [("distilbert", "pre_classifier.weight"), ("electra", "classifier.dense.weight")])
def test_a_classifier_of_another_function_starts_fresh_and_says_so(to, first):
    model = tiny("bert")
    made = transplant(model, to)
    assert made.fresh[0] == first
    assert len(made.fresh) == 4
    same(model.base_model, made.model.base_model, batch(model), "last_hidden_state")
    assert_equal(made.model, transplant(model, to).model)  # fresh, and yet the same each time


def test_electra_keeps_both_segments():
    model = tiny("bert").base_model
    inputs = batch(model)
    inputs["token_type_ids"] = (torch.arange(7)[None, :] > 2).long() * inputs["attention_mask"]
    same(model, transplant(model, "electra").model, inputs, "last_hidden_state")


def test_the_pooler_follows_to_roberta():
    model = tiny("bert").base_model
    made = transplant(model, "roberta")
    assert made.fresh == ()
    same(model, made.model, batch(model), "pooler_output")


@pytest.mark.parametrize("to", TARGETS)
def test_what_is_made_can_be_cut(to):
    model = tiny("bert")
    made = transplant(model, to).model
    plan = Plan({"encoder.0.heads": (0, 3), "encoder.1.neurons": (1, 5, 7), "encoder.2.ffn": ()})
    small = shrink(made.base_model, anatomy_of(made.base_model), plan)
    same(shrink(model.base_model, anatomy_of(model.base_model), plan), small, batch(model), "last_hidden_state")
    assert {site.taps[0].unit for site in anatomy_of(made).of_kind(Kind.HEADS)} == {HEAD_DIM}


@pytest.mark.parametrize("to", TARGETS)
def test_the_saved_folder_loads_with_its_tokenizer(to, tmp_path):
    source = write_model(tmp_path / "bert", trained=False)
    model = checkpoint.load(source)
    made = transplant(model, to).model
    save(made, tmp_path / to, tokenizer_from=source)
    assert_equal(made, checkpoint.load(tmp_path / to))
    assert load_tokenizer(tmp_path / to).encode("the film").ids == load_tokenizer(source).encode("the film").ids
    assert max_length_of(tmp_path / to) == max_length_of(source)


def test_what_cannot_be_carried_is_refused():
    model = tiny("bert")
    with pytest.raises(ModelError, match="no way from BERT to 'robertta'.\n.*did you mean 'roberta'"):
        transplant(model, "robertta")
    with pytest.raises(ModelError, match="a RobertaForSequenceClassification cannot be carried"):
        transplant(tiny("roberta"), "electra")
    with pytest.raises(ModelError, match="epsilon 1e-12, this model's have 1e-05"):
        transplant(tiny("bert", layer_norm_eps=1e-5), "distilbert")
    for plan in (Plan({"encoder.0.neurons": (1,)}), Plan({"encoder.1.ffn": ()})):
        for to in TARGETS:
            with pytest.raises(ModelError, match="transplant first, cut after"):
                transplant(shrink(model, anatomy_of(model), plan), to)


@pytest.mark.slow
@pytest.mark.parametrize("to", TARGETS)
def test_a_real_encoder_gives_the_same(to):
    from slimformer.demo import encoder

    try:
        folder = encoder()
    except ExtraError as error:
        pytest.skip(str(error))
    model = checkpoint.load_dense(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.no_truncation()
    tokenizer.enable_padding(pad_id=0)
    rows = tokenizer.encode_batch(
        ["A short one.", "The film was, all in all, rather good; we would see it again.", "word " * 90]
    )
    inputs = {
        "input_ids": torch.from_numpy(np.array([row.ids for row in rows])),
        "attention_mask": torch.from_numpy(np.array([row.attention_mask for row in rows])),
    }
    same(model, transplant(model, to).model, inputs, "last_hidden_state")
