"""A subject: what is known of a model, the batch it reads, and eval mode for a while."""

from __future__ import annotations

import numpy as np
import pytest
import torch

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


def test_each_module_is_trained_or_not_as_before_also_after_an_error() -> None:
    model = tiny("bert").train()
    model.classifier.eval()
    with pytest.raises(ZeroDivisionError), subject_of(model).evaluating():
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert model.training
    assert not model.classifier.training
