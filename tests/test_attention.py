"""Attention while training on a CPU: the same numbers as transformers' own, whichever of the two ways is taken, and no trace."""

from __future__ import annotations

import pytest
import torch
from tiny import HEADS, batch, tiny

from slimformer.hooks import attention
from slimformer.hooks.attention import Slot, attending, quick_attention

TYPES = ("bert", "roberta", "electra", "distilbert")


def gradients(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of one padded batch, and all gradients of their squares' sum."""
    inputs = batch(model)
    inputs["attention_mask"][0, -3:] = 0
    model.zero_grad()
    logits = model(**inputs).logits
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("largest", [0, attention.MOST_SCORES])
@pytest.mark.parametrize("model_type", TYPES)
def test_both_ways_give_the_numbers_of_the_model_alone(model_type: str, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(model_type)
    before, slopes = gradients(model)
    monkeypatch.setattr(attention, "MOST_SCORES", largest)
    with quick_attention(model):
        after, others = gradients(model)
    assert torch.allclose(before, after, atol=1e-6)
    assert slopes.keys() == others.keys()
    for name, slope in slopes.items():
        assert torch.allclose(slope, others[name], atol=1e-5), name


def test_the_products_are_taken_up_to_the_limit_and_only_for_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("bert")
    taken: list[int] = []
    real = attention._softmax
    monkeypatch.setattr(attention, "_softmax", lambda scores: (taken.append(scores.numel()), real(scores))[1])
    inputs = batch(model)
    with quick_attention(model):
        with torch.no_grad():
            model(**inputs)
        assert not taken
        model(**inputs)
        assert len(taken) == model.config.num_hidden_layers
        monkeypatch.setattr(attention, "MOST_SCORES", taken[0] - 1)
        taken.clear()
        model(**inputs)
        assert not taken


def test_it_is_gone_afterwards_also_after_an_error() -> None:
    model = tiny("bert")
    named = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="on purpose"), quick_attention(model):
        assert model.config._attn_implementation == attention.ATTENTION_NAME
        raise RuntimeError("on purpose")
    assert model.config._attn_implementation == named


@pytest.mark.parametrize("inner_sees", [True, False])
def test_slots_nest_in_any_order(inner_sees: bool) -> None:
    model = tiny("bert")
    name = "bert.encoder.layer.1.attention.self"
    seen: list[torch.Tensor] = []
    sees = {name: Slot(see_scores=seen.append)}
    evens = {name: Slot(softmax=lambda scores: torch.full_like(scores, 1 / scores.shape[-1]))}
    plain = model(**batch(model)).logits
    with attending(model, evens):
        alone = model(**batch(model)).logits
    with (
        attending(model, evens if inner_sees else sees),
        quick_attention(model),
        attending(model, sees if inner_sees else evens),
    ):
        both = model(**batch(model)).logits
    assert len(seen) == 1
    assert seen[0].shape == (3, HEADS, 7, 7)
    assert torch.equal(both, alone)
    assert not torch.allclose(alone, plain, atol=1e-3)
    assert torch.equal(model(**batch(model)).logits, plain)
