"""MPNet: a bias for positions that all attentions share, of which a cut one takes the columns of its own heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import batch, tiny, tiny_config

from slimformer import registry
from slimformer.core.plan import Plan
from slimformer.core.pooling import SENTENCE_VECTOR
from slimformer.core.shrink import shrink
from slimformer.errors import TargetError
from slimformer.exporters.base import Variant
from slimformer.exporters.onnx import Onnx
from slimformer.families._embedder import embedder_class
from slimformer.families.base import anatomy_of
from slimformer.hooks.attention import quick_attention
from slimformer.hooks.capture import Capture, capturing
from slimformer.runtimes.onnxruntime import OnnxRuntime
from slimformer.saving import checkpoint
from slimformer.saving.uniform import uniform
from slimformer.testing.checks import tiny_context

CUT = Plan(
    {"encoder.0.heads": (1, 3), "encoder.1.attention": (), "encoder.2.heads": (0, 2, 3), "encoder.2.neurons": tuple(range(9))}
)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("mpnet")


def logits(model: Any, inputs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return model(**{name: torch.as_tensor(value) for name, value in inputs.items()}).logits


def test_an_attention_takes_its_part_of_the_bias_and_the_table_stays(model: Any) -> None:
    """What heads 1 and 3 add to their scores, cut twice, is what the whole table says of them."""
    anatomy, inputs = anatomy_of(model), batch(model, 2, 9)
    once = shrink(model, anatomy, Plan({"encoder.0.heads": (1, 2, 3)}))
    twice = shrink(once, anatomy_of(once), Plan({"encoder.0.heads": (0, 2)}))
    assert torch.equal(twice.mpnet.encoder.relative_attention_bias.weight, model.mpnet.encoder.relative_attention_bias.weight)
    with torch.no_grad():
        bias = model.mpnet.encoder.compute_position_bias(torch.zeros(1, 9, 32))[0]  # (heads, seq, seq)
        seen = {}
        for small in (model, twice):
            with capturing(small, anatomy_of(small), {Capture.SCORES, Capture.HIDDEN}) as recorder:
                seen[small] = recorder.take({"logits": small(**inputs).logits})
        state, attention = seen[twice].hidden[0], twice.mpnet.encoder.layer[0].attention.attn
        query, key = (part(state).view(2, 9, 2, 8).transpose(1, 2) for part in (attention.q, attention.k))
    scores = query @ key.transpose(2, 3) / 8**0.5 + bias[[1, 3]]
    torch.testing.assert_close(seen[twice].scores["encoder.0.heads"], scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen[model].scores["encoder.0.heads"][:, [1, 3]], scores, atol=1e-5, rtol=1e-4)
    assert float(bias.abs().max()) > 0.1


def test_hidden_units_leave_the_table_of_the_bias_alone(model: Any) -> None:
    site = anatomy_of(model).sites["hidden"]
    assert not any("relative_attention_bias" in piece.param for piece in site.slices)


def test_the_attention_is_its_own_again_after_a_context(model: Any) -> None:
    small = shrink(model, anatomy_of(model), CUT)
    inputs, classes = batch(small), [type(module) for module in small.modules()]
    expected = logits(small, inputs)
    with quick_attention(small):
        assert [type(module) for module in small.modules()] != classes
        with quick_attention(small):
            torch.testing.assert_close(logits(small, inputs), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits(small, inputs), expected, atol=1e-5, rtol=1e-5)
    assert [type(module) for module in small.modules()] == classes
    assert not any("asked" in vars(module) for module in small.modules())
    assert torch.equal(logits(small, inputs), expected)


@pytest.mark.slow
def test_files_hold_the_bias_of_the_heads_that_are_left(tmp_path: Path) -> None:
    """The vectors of texts, from all words of a longer text than the table's buckets tell apart one by one; and a folder."""
    torch.manual_seed(0)
    whole = embedder_class("mpnet")(tiny_config("mpnet")).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    small = shrink(whole, anatomy_of(whole), CUT)
    seen = [{name: value.numpy() for name, value in batch(small, rows, seq).items()} for rows, seq in ((3, 7), (1, 5), (2, 40))]
    draft = Onnx().draft(small, seen, (SENTENCE_VECTOR,))
    for variant in (Variant.FLOAT, Variant.FUSED):
        artifact = draft.write(tmp_path / f"{variant}.onnx", variant)
        run = OnnxRuntime().load(artifact.path, threads=1)
        for rows, seq in ((2, 3), (1, 62), (5, 12)):
            inputs = batch(small, rows, seq, seed=3)
            with torch.no_grad():
                expected = small(**inputs)[SENTENCE_VECTOR].numpy()
            np.testing.assert_allclose(run({n: v.numpy() for n, v in inputs.items()})[SENTENCE_VECTOR], expected, atol=2e-5)
    checkpoint.save(small, CUT, tmp_path / "model", tokenizer_from=tmp_path)
    with torch.no_grad():
        again = checkpoint.load(tmp_path / "model")(**inputs)[SENTENCE_VECTOR].numpy()
        plain = uniform(small)(**inputs)[SENTENCE_VECTOR].numpy()
    np.testing.assert_array_equal(again, expected)
    np.testing.assert_allclose(plain, expected, atol=2e-5)


@pytest.mark.parametrize("name", ["adaptive_span", "decomposed_attention", "elastic", "fixed_attention", "word_elimination"])
def test_methods_that_know_no_bias_refuse_in_one_line(name: str) -> None:
    context = tiny_context("mpnet")
    method = registry.find("methods", name)()
    with pytest.raises(TargetError, match=r"bias for positions[^\n]*\.\n.*help"):
        method.check(context.anatomy, context.cost)
