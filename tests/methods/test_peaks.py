"""Neurons that never get large: their running maximum, the spread in a layer, and what may go without a trace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from slimformer.core.anatomy import Kind
from slimformer.core.shrink import shrink
from slimformer.families.base import subject_of
from slimformer.methods.peaks import Peaks, maxima, standing_out
from slimformer.testing.checks import tiny_context
from slimformer.testing.tiny import tiny


def relu_context():
    return replace(tiny_context("marian"), subject=subject_of(tiny("marian", activation_function="relu")))


def test_a_maximum_is_counted_in_the_spread_of_its_layer() -> None:
    """0, 2, 4, 2 have the standard deviation sqrt(2); where all are alike none stands below the others."""
    found = standing_out({"a": np.array([0.0, 2.0, 4.0, 2.0]), "b": np.full(3, 7.0)})
    np.testing.assert_allclose(found["a"], np.array([0, 2, 4, 2]) / np.sqrt(2))
    assert np.isinf(found["b"]).all()
    around = relu_context()
    heights = {site.id: np.full(site.size, 3.0) for site in around.anatomy.of_kind(Kind.NEURONS)}
    heights["encoder.1.neurons"][:5] = 0.9
    heights["decoder.0.neurons"][:] = 0.9
    plan = Peaks(z=1.0, neuron_multiple=1).choose(around.anatomy, around.cost, heights)
    assert plan.keep == {"encoder.1.neurons": tuple(range(5, 24)), "decoder.0.neurons": (0,)}  # one stays
    plan = Peaks(z=1.0, neuron_multiple=1, sublayers=True).choose(around.anatomy, around.cost, heights)
    assert plan.keep == {"encoder.1.neurons": tuple(range(5, 24)), "decoder.0.ffn": ()}


def test_running_maxima_are_those_of_each_batch_at_real_tokens() -> None:
    around = relu_context()
    batches = list(around.batches(32))
    assert len(batches) > 2
    found = maxima(replace(around, batches=lambda _: iter(batches)), 32, momentum=0.9)
    for side, mask in (("encoder", "attention_mask"), ("decoder", "decoder_attention_mask")):
        layer = getattr(around.model.model, side).layers[1]
        expected = None
        for batch in batches:
            seen = {}
            handle = layer.fc2.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(x=args[0]))
            with torch.no_grad():
                around.model(**around.subject.feed(batch))
            handle.remove()
            most = seen["x"][batch[mask].bool()].amax(0)
            expected = most if expected is None else 0.9 * expected + 0.1 * most
        np.testing.assert_allclose(found[f"{side}.1.neurons"], expected.numpy(), rtol=1e-5, atol=1e-6)


def test_neurons_that_are_never_open_go_without_a_trace() -> None:
    around = relu_context()
    for layer in (around.model.model.encoder.layers[0], around.model.model.decoder.layers[2]):
        with torch.no_grad():
            layer.fc1.bias[:8] = -1e3
    decision = Peaks(z=1e-6, neuron_multiple=1).decide(None, around)  # type: ignore[arg-type]
    for name in ("encoder.0.neurons", "decoder.2.neurons"):
        assert 0 < len(decision.plan.keep[name]) <= 16
        assert min(decision.plan.keep[name]) >= 8
    small = shrink(around.model, around.anatomy, decision)
    batch = next(around.batches(4))
    with torch.no_grad():
        whole, cut = (model(**around.subject.feed(batch)).logits for model in (around.model, small))
    torch.testing.assert_close(cut, whole, atol=1e-5, rtol=1e-5)


def test_a_budget_stands_for_the_threshold_that_leaves_it() -> None:
    around = relu_context()
    plan = Peaks(z=None, keep=0.85, neuron_multiple=1).decide(None, around).plan  # type: ignore[arg-type]
    share = around.cost.of(plan, around.anatomy) / around.cost.dense
    assert 0.83 < share <= 0.85
    heights = standing_out(maxima(around, 2048, 0.9))
    kept = [heights[name][unit] for name, units in plan.keep.items() for unit in units]
    gone = [heights[name][unit] for name, units in plan.keep.items() for unit in set(range(24)) - set(units)]
    assert max(gone) <= min(kept)
    for options in ({"z": None}, {"keep": 0.5}):
        with pytest.raises(ValueError, match="give one of them"):
            Peaks(**options)  # type: ignore[arg-type]
