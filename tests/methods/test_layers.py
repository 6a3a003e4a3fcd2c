"""Dropping layers: which stay in each way, how many fit a budget, and the greedy choice against models that were really cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import batch, tiny
from toy_task import with_model

from slimformer.core import cost
from slimformer.core.anatomy import Kind
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.errors import TargetError
from slimformer.families.base import anatomy_of
from slimformer.methods._depth import layers_of
from slimformer.methods.base import State
from slimformer.methods.layers import WAYS, Layers
from slimformer.testing.checks import tiny_context


@pytest.mark.parametrize(
    ("which", "count", "total", "stay"),
    [
        ("even", 1, 6, [5]),
        ("even", 2, 6, [0, 5]),
        ("even", 3, 6, [0, 2, 5]),
        ("even", 6, 12, [0, 2, 4, 6, 8, 11]),
        ("bottom", 2, 6, [0, 1]),
        ("top", 2, 6, [4, 5]),
        ("alternate", 10, 12, [0, 1, 2, 3, 4, 5, 6, 7, 8, 10]),  # 12 and 10 go, counted from 1: their even-alternate
        ("alternate", 6, 12, [0, 2, 4, 6, 8, 10]),
        ("alternate", 5, 12, [0, 2, 4, 6, 8]),
        ("alternate", 1, 6, [2]),
        ("symmetric", 6, 12, [0, 1, 2, 9, 10, 11]),
        ("symmetric", 3, 6, [0, 1, 5]),
        ("symmetric", 1, 6, [0]),
        *((which, 6, 6, [0, 1, 2, 3, 4, 5]) for which in WAYS),
    ],
)
def test_which_layers_stay(which, count, total, stay):
    assert WAYS[which](count, total) == stay


@pytest.mark.parametrize(("which", "gone"), [("even", 1), ("bottom", 2), ("top", 0), ("alternate", 2), ("symmetric", 1)])
def test_as_many_layers_stay_as_fit(which, gone):
    plan = Layers(keep=0.67, which=which).decide(State(), tiny_context()).plan
    assert plan.keep == {f"encoder.{gone}.attention": (), f"encoder.{gone}.ffn": ()}


@pytest.mark.parametrize("which", ["bottom", "chosen"])
def test_a_decoder_may_lose_its_layers_first(which):
    context = tiny_context("marian")
    sublayers = {site.id for site in context.anatomy.of_kind(Kind.SUBLAYER)}

    def left(plan):
        return sorted({name.rpartition(".")[0] for name in sublayers - set(plan.keep)})

    deep = Layers(keep=0.7, which=which, first="decoder").decide(State(), context).plan
    assert [name for name in left(deep) if name.startswith("encoder")] == ["encoder.0", "encoder.1", "encoder.2"]
    assert 0 < len(left(deep)) - 3 < 3
    flat = Layers(keep=0.35, which=which, first="decoder").decide(State(), context).plan
    assert sum(name.startswith("decoder") for name in left(flat)) == 1
    assert 1 <= sum(name.startswith("encoder") for name in left(flat)) < 3
    for plan, keep in ((deep, 0.7), (flat, 0.35)):
        assert context.cost.of(plan, context.anatomy) <= keep * context.cost.dense


@pytest.mark.parametrize("which", ["even", "chosen"])
def test_less_than_one_layer_is_refused_with_the_least(which):
    with pytest.raises(TargetError, match="one layer costs 33%"):
        Layers(keep=0.1, which=which).check(tiny_context().anatomy, tiny_context().cost)
    with pytest.raises(TargetError, match="one layer costs 33%"):
        Layers(keep=0.1, which=which).decide(State(), tiny_context())


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_the_chosen_layers_are_those_that_cut_models_miss_least(model_type, labelled):
    around = tiny_context(model_type)
    model = tiny(model_type, num_hidden_layers=5) if model_type == "bert" else tiny(model_type, n_layers=5)
    anatomy = anatomy_of(model)
    batches = [batch(model, rows=rows, seed=rows) | {"labels": torch.arange(rows) % 3} for rows in (2, 5)]
    if not labelled:
        batches = [{name: value for name, value in item.items() if name != "labels"} for item in batches]
    counted = cost.macs(anatomy, np.array([7]))
    around = replace(with_model(around, model, anatomy), cost=counted, batches=lambda _: iter(batches))

    def loss(gone) -> float:
        small = shrink(model, anatomy, dropping(gone))
        total = 0.0
        for item in batches:
            inputs = {name: value for name, value in item.items() if name != "labels"}
            with torch.no_grad():
                output, whole = small(**inputs), model(**inputs)
            mean = around.task.loss(output, item) if labelled else around.task.divergence(output, whole, item, 1.0)
            total += float(mean) * len(item["input_ids"])
        return total

    def dropping(gone) -> Plan:
        return Plan({f"encoder.{layer}.{part}": () for layer in gone for part in ("attention", "ffn")})

    gone: list[int] = []
    for kept in (4, 3, 2, 1):
        gone.append(min(set(range(5)) - {*gone}, key=lambda layer: loss([*gone, layer])))
        plan = Layers(keep=kept / 5 + 0.01, which="chosen").decide(State(), around).plan
        assert plan == dropping(sorted(gone))
    if (model_type, labelled) == ("bert", True):  # here it makes a difference that each choice looks anew
        assert gone != sorted(range(5), key=lambda layer: loss([layer]))[:4]
    assert Layers(keep=1.0, which="chosen").decide(State(), around).plan == Plan()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_layers_that_are_gone_already_do_not_count():
    around = tiny_context()
    plan = Plan({"encoder.1.attention": (), "encoder.1.ffn": ()})
    small = shrink(around.model, around.anatomy, plan)
    anatomy = anatomy_of(small)
    around = replace(with_model(around, small, anatomy), cost=cost.macs(anatomy, np.array([7])))
    assert layers_of(anatomy) == [[0, 2]]
    for which, gone in (("bottom", 2), ("top", 0), ("even", 0)):
        kept = Layers(keep=0.5, which=which).decide(State(), around).plan.keep
        assert kept == {f"encoder.{gone}.attention": (), f"encoder.{gone}.ffn": ()}
    assert len(Layers(keep=0.5, which="chosen").decide(State(), around).plan.keep) == 2
