"""A subject: what is known of a model, the batch it reads, and eval mode for a while."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import T5EncoderModel

from slimformer import inspect
from slimformer.errors import ModelError
from slimformer.families.base import anatomy_of, subject_of
from slimformer.testing.tiny import batch, tiny


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert"])
def test_a_batch_is_reduced_to_what_the_model_reads(model_type: str) -> None:
    model = tiny(model_type)
    subject = subject_of(model)
    assert subject.anatomy == anatomy_of(model)
    arrays = {name: tensor.numpy() for name, tensor in batch(model).items()}
    arrays |= {"token_type_ids": np.zeros((3, 7), dtype=np.int64), "labels": np.zeros(3)}
    fed = subject.feed(arrays)
    assert tuple(fed) == subject.inputs
    assert all(isinstance(tensor, torch.Tensor) for tensor in fed.values())
    assert torch.equal(model(**fed).logits, model(**batch(model)).logits)


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_an_encoder_decoder_that_writes_no_text_is_named(kind: str) -> None:
    model = tiny(kind, auto_class="AutoModelForSequenceClassification")
    said = f"{type(model).__name__}, and of the type {kind} only models for translation and summarization"
    with pytest.raises(ModelError, match=said):
        subject_of(model)


@pytest.mark.parametrize("decodes", [True, False])  # transformers 4 writes True, transformers 5 False
def test_an_encoder_without_its_decoder_is_named(decodes: bool, tmp_path: Path) -> None:
    T5EncoderModel(tiny("t5").config).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"is_encoder_decoder": decodes}))
    with pytest.raises(ModelError, match="T5EncoderModel, and of the type t5 only models for translation"):
        inspect(tmp_path)


def test_each_module_is_trained_or_not_as_before_also_after_an_error() -> None:
    model = tiny("bert").train()
    model.classifier.eval()
    with pytest.raises(ZeroDivisionError), subject_of(model).evaluating():
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert model.training
    assert not model.classifier.training
