"""Dropping layers evenly: which stay, and how many fit a budget."""

from __future__ import annotations

import pytest

from slimformer.errors import TargetError
from slimformer.methods.base import State
from slimformer.methods.layers import Layers, evenly
from slimformer.testing.checks import tiny_context


@pytest.mark.parametrize(
    ("count", "total", "stay"),
    [(1, 6, [5]), (2, 6, [0, 5]), (3, 6, [0, 2, 5]), (6, 6, [0, 1, 2, 3, 4, 5]), (6, 12, [0, 2, 4, 6, 8, 11])],
)
def test_evenly(count, total, stay):
    assert evenly(count, total) == stay


def test_as_many_layers_stay_as_fit():
    plan = Layers(keep=0.67).decide(State(), tiny_context()).plan
    assert plan.keep == {"encoder.1.attention": (), "encoder.1.ffn": ()}


def test_less_than_one_layer_is_refused_with_the_least():
    with pytest.raises(TargetError, match="one layer costs 33%"):
        Layers(keep=0.1).decide(State(), tiny_context())
