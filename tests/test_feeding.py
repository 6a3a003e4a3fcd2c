"""Feeding: passes that begin in the middle give what whole passes give, and leave nothing behind."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from tiny import MODEL_TYPES, batch, tiny

from slimformer.core.anatomy import Kind
from slimformer.families.base import anatomy_of
from slimformer.hooks.feeding import Feed, watching
from slimformer.hooks.gating import gated


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_pass_from_any_layer_is_the_whole_pass(model_type):
    model = tiny(model_type)
    batches = [batch(model, seed=seed) for seed in range(2)]
    anatomy, modules = anatomy_of(model), list(model.modules())
    feed = Feed(model, anatomy, batches)
    with torch.no_grad():
        whole = [model(**inputs).logits for inputs in batches]
        for layer in range(len(anatomy.layers)):
            feed.reach(layer)
            assert all(torch.equal(feed.run(index).logits, expected) for index, expected in enumerate(whole))
    assert feed.layer == len(anatomy.layers) - 1
    assert [id(module) for module in model.modules()] == [id(module) for module in modules]
    assert hooks(model) == 0


def test_what_changes_after_the_reached_layer_is_seen_and_what_changes_before_is_not():
    model = tiny("bert")
    anatomy = anatomy_of(model)
    feed = Feed(model, anatomy, [batch(model)])
    with torch.no_grad():
        feed.reach(1)
        expected = feed.run(0).logits
        with gated(model, anatomy, {"encoder.0.heads": torch.zeros(4)}):
            assert torch.equal(feed.run(0).logits, expected)
        with gated(model, anatomy, {"encoder.2.heads": torch.zeros(4)}):
            assert not torch.equal(feed.run(0).logits, expected)


@contextmanager
def inputs_of_modules(model):
    """What each module reads first while the context lasts."""
    states = []

    def note(_, args):
        states.extend(item for item in args[:1] if isinstance(item, torch.Tensor))

    handles = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_watching_shows_the_residual_and_both_ends_of_the_output_matrix_and_may_end_the_pass(model_type):
    model = tiny(model_type)
    anatomy, inputs = anatomy_of(model), batch(model)
    passed = []
    handle = model.get_submodule(anatomy.layers[-1]).register_forward_hook(lambda *_: passed.append(True))
    with torch.no_grad():
        for site in (*anatomy.of_kind(Kind.HEADS), *anatomy.of_kind(Kind.NEURONS)):
            for stop in (False, True):
                seen: dict[str, torch.Tensor] = {}
                passed.clear()
                read = inputs_of_modules(model)
                with watching(model, anatomy, site, seen, stop=stop), read as states:
                    model(**inputs)
                assert passed == ([] if stop else [True])
                linear = model.get_submodule(site.taps[0].module)
                torch.testing.assert_close(linear(seen[f"{site.id}/x"]), seen[f"{site.id}/y"])
                together = seen[f"{site.id}/r"] + seen[f"{site.id}/y"]
                alike = [state for state in states if state.shape == together.shape]
                assert stop or any(
                    torch.allclose(state, together, atol=1e-5) for state in alike
                )  # what reads the residual stream
    handle.remove()
    assert hooks(model) == 0
