"""What is seen inside a forward pass is what transformers itself shows, and looking leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from tiny import ENCODERS, HEAD_DIM, HEADS, LAYERS, SEPARATE, batch, tiny
from torch import nn

from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.families.base import anatomy_of, family_of
from slimformer.hooks import attention
from slimformer.hooks.capture import Capture, capturing


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("model_type", ENCODERS)
def test_hidden_states_are_those_of_a_separate_eager_model(model_type: str) -> None:
    model = tiny(model_type)
    other = tiny(model_type)
    other.set_attn_implementation("eager")
    inputs = batch(model)
    with torch.no_grad(), capturing(model, anatomy_of(model), {Capture.HIDDEN}) as recorder:
        output = model(**inputs)
        seen = recorder.take({"logits": output.logits})
        theirs = other(**inputs, output_hidden_states=True)
    assert len(seen.hidden) == len(theirs.hidden_states) == LAYERS + 1
    real = inputs["attention_mask"].bool()  # what stands on padding is of no use to anybody
    norm = anatomy_of(model).stacks[0].norm  # theirs behind the last layer have passed it
    last = seen.hidden[-1] if norm is None else model.get_submodule(norm)(seen.hidden[-1])
    for mine, his in zip((*seen.hidden[:-1], last), theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine[real], his[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen.output["logits"], theirs.logits, atol=1e-5, rtol=1e-5)
    assert seen.scores == {}


ASKING = [family_of(kind).skeleton.attention for kind in SEPARATE]  # scores are those of the hidden states, and of nothing else


@pytest.mark.parametrize(
    "model_type",
    [kind for kind, own in zip(SEPARATE, ASKING, strict=True) if not (own.shares_bias or own.terms) and own.asking is None],
)
def test_scores_are_queries_times_keys_and_explain_the_probabilities(model_type: str) -> None:
    model = tiny(model_type)
    other = tiny(model_type)
    other.set_attn_implementation("eager")
    anatomy, inputs = anatomy_of(model), batch(model)
    queries = [m.module for m in anatomy.matrices.values() if m.role == "query"]
    keys = [m.module for m in anatomy.matrices.values() if m.role == "key"]
    with torch.no_grad():
        with capturing(model, anatomy, {Capture.SCORES, Capture.HIDDEN}) as recorder:
            seen = recorder.take({"logits": model(**inputs).logits})
        theirs = other(**inputs, output_attentions=True)
        for layer in range(LAYERS):
            state = seen.hidden[layer]
            query, key = (
                model.get_submodule(name)(state).view(*state.shape[:2], HEADS, HEAD_DIM).transpose(1, 2)
                for name in (queries[layer], keys[layer])
            )
            by_hand = query @ key.transpose(2, 3) / math.sqrt(HEAD_DIM)  # (batch, heads, seq, seq)
            torch.testing.assert_close(seen.scores[f"encoder.{layer}.heads"], by_hand, atol=1e-4, rtol=1e-4)
            blind = inputs["attention_mask"][:, None, None, :] == 0
            probabilities = by_hand.masked_fill(blind, -math.inf).softmax(-1)
            torch.testing.assert_close(probabilities, theirs.attentions[layer], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen.output["logits"], theirs.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ENCODERS)
def test_padding_has_no_say_while_scores_are_seen(model_type: str) -> None:
    model = tiny(model_type)
    inputs = batch(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[model.config.pad_token_id] = 0.0  # a MobileBERT's last word sees what is behind it
    row = int(inputs["attention_mask"].sum(1).argmin())
    length = int(inputs["attention_mask"][row].sum())
    assert length < inputs["input_ids"].shape[1]
    with torch.no_grad(), capturing(model, anatomy_of(model), {Capture.SCORES}):
        padded = model(**inputs).logits[row]
        alone = model(**{name: value[row : row + 1, :length] for name, value in inputs.items()}).logits[0]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


def test_a_layer_without_attention_has_no_scores() -> None:
    model = tiny("bert")
    anatomy = anatomy_of(model)
    plan = Plan({"encoder.1.attention": (), "encoder.0.heads": (0, 2, 3), "encoder.2.attention": (), "encoder.2.ffn": ()})
    small = shrink(model, anatomy, plan)
    with torch.no_grad(), capturing(small, anatomy_of(small), {Capture.SCORES, Capture.HIDDEN}) as recorder:
        inputs = batch(small)
        seen = recorder.take({"logits": small(**inputs).logits})
    assert {name: score.shape[1] for name, score in seen.scores.items()} == {"encoder.0.heads": 3}
    assert len(seen.hidden) == LAYERS + 1
    assert torch.equal(seen.hidden[3], seen.hidden[2])  # the last layer is empty


def test_gradients_flow_through_what_is_seen() -> None:
    model = tiny("bert")
    with capturing(model, anatomy_of(model), {Capture.SCORES, Capture.HIDDEN}) as recorder:
        seen = recorder.take({"logits": model(**batch(model)).logits})
    (seen.scores["encoder.1.heads"].square().mean() + seen.hidden[1].square().mean()).backward()
    assert float(model.bert.encoder.layer[1].attention.self.query.weight.grad.abs().sum()) > 0
    assert model.bert.encoder.layer[1].attention.self.value.weight.grad is None


@pytest.mark.parametrize("failing", [False, True])
def test_looking_leaves_no_trace(failing: bool) -> None:
    model = tiny("bert")
    inputs = batch(model)
    with torch.no_grad():
        before = model(**inputs).logits
    for needs in ({Capture.LOGITS}, {Capture.HIDDEN}, {Capture.SCORES}):
        try:
            with torch.no_grad(), capturing(model, anatomy_of(model), needs):
                assert hooks(model) == (LAYERS + 1 if Capture.HIDDEN in needs else 0)
                assert (model.config._attn_implementation == "sdpa") == (Capture.SCORES not in needs)
                model(**inputs)
                if failing:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        assert hooks(model) == 0
        assert model.config._attn_implementation == "sdpa"
        assert not attention._SLOTS
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


def test_two_models_are_watched_at_once_each_by_its_own() -> None:
    left, right = tiny("bert"), tiny("bert", seed=1)
    inputs = batch(left)
    with (
        torch.no_grad(),
        capturing(left, anatomy_of(left), {Capture.SCORES}) as mine,
        capturing(right, anatomy_of(right), {Capture.SCORES}) as theirs,
    ):
        outputs = left(**inputs).logits, right(**inputs).logits
        seen = mine.take({"logits": outputs[0]}), theirs.take({"logits": outputs[1]})
        assert not torch.allclose(*(item.scores["encoder.0.heads"] for item in seen))
        mine.listening = False
        left(**inputs)
        assert mine.take({}).scores == {}


def test_taking_without_a_forward_pass_is_our_mistake() -> None:
    model = tiny("bert")
    with capturing(model, anatomy_of(model), {Capture.HIDDEN}) as recorder, pytest.raises(RuntimeError, match="0 of 4"):
        recorder.take({})
