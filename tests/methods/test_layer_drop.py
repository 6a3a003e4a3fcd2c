"""LayerDrop: what is left out together, how often, and only in training."""

from __future__ import annotations

import pytest
import torch
from tiny import batch
from toy_task import without_dropout

from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.methods.layer_drop import LayerDrop, dropped_together
from slimformer.testing.checks import tiny_context


@pytest.mark.parametrize("model_type", ["bert", "bart"])
def test_all_are_left_out_at_a_rate_of_one_and_none_in_evaluation(model_type):
    around = tiny_context(model_type)
    model, inputs = without_dropout(around.model), batch(around.model)
    none = Plan({site.id: () for site in around.anatomy.sites.values() if site.skips})
    with torch.no_grad():
        whole = model.eval()(**inputs).logits
        empty = shrink(model, around.anatomy, none)(**inputs).logits
        state = LayerDrop(rate=1.0).attach(around)
        torch.testing.assert_close(model(**inputs).logits, whole)
        torch.testing.assert_close(model.train()(**inputs).logits, empty)
        state.close()
        torch.testing.assert_close(model.eval()(**inputs).logits, whole, atol=0, rtol=0)


def test_a_layer_goes_as_one_and_sublayers_by_themselves():
    anatomy = tiny_context().anatomy
    assert dropped_together(anatomy, "layers")[1] == ("encoder.1.attention", "encoder.1.ffn")
    assert dropped_together(anatomy, "sublayers")[:2] == [("encoder.0.attention",), ("encoder.0.ffn",)]


def test_as_often_as_the_rate_says():
    around = tiny_context()
    state = LayerDrop(rate=0.2, units="sublayers").attach(around)
    torch.manual_seed(0)
    draws = []
    for _ in range(1000):
        state._draw(0.2)
        draws.append(torch.cat(state._gates))
    state.close()
    assert torch.stack(draws).mean(0).tolist() == pytest.approx([0.8] * 6, abs=0.05)
