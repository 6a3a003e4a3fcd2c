"""Group lasso: penalty, beta and counts by hand; the choice against brute force; groups that do part when trained."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
import torch
import yaml
from tiny import batch, tiny
from torch import nn
from toy_task import context as toy_context
from toy_task import fit, rows, with_model

from slimformer.core import cost
from slimformer.core.anatomy import Anatomy, Kind, Matrix, Role
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.errors import RecipeError, TargetError
from slimformer.families.base import anatomy_of
from slimformer.hooks.capture import Captured
from slimformer.log import Log
from slimformer.methods.base import Context, Progress, Step
from slimformer.methods.group_lasso import GroupLasso, groups_of
from slimformer.options import named_options
from slimformer.running.reader import parse_recipe
from slimformer.testing.checks import assert_equal, assert_same, tiny_context
from slimformer.training.stage import Train

PATTERNS = ("rows", "columns", "blocks", "block_rows", "block_columns")
TYPES = ("bert", "roberta", "distilbert", "electra")

GRID = torch.tensor(
    [
        [3.0, 4.0, 0.0, 0.0],
        [0.0, 0.0, 6.0, 8.0],
        [1.0, 1.0, 0.0, 2.0],
        [1.0, 1.0, 2.0, 0.0],
    ]
)


class OneMatrix(nn.Module):
    """Nothing but a Linear: enough of a model for groups inside a matrix."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.only = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.only.weight.copy_(weight)

    def context(self) -> Context:
        matrix = Matrix("encoder.0.query", "only", tuple(self.only.weight.shape), Role.QUERY)
        anatomy = Anatomy({}, {matrix.id: matrix}, (), {}, 4)
        return with_model(tiny_context(), self, anatomy)


def taking(context: Context, number: int = 0, total: int = 10) -> Step:
    return Step(context.model, {}, Captured(output={}), None, Progress(number, total), context.task)


NORMS = {
    "rows": [5, 10, math.sqrt(6), math.sqrt(6)],
    "columns": [math.sqrt(11), math.sqrt(18), math.sqrt(40), math.sqrt(68)],
    "blocks": [5, 10, 2, math.sqrt(8)],
    "block_rows": [5, 0, 0, 10, math.sqrt(2), 2, math.sqrt(2), 2],
    "block_columns": [3, 4, 6, 8, math.sqrt(2), math.sqrt(2), 2, 2],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_norms_penalty_and_gradient_by_hand(pattern):
    model = OneMatrix(GRID)
    context = model.context()
    method = GroupLasso(groups=pattern, block=2, strength=3.0, epsilon=0.5)
    (group,) = groups_of(model, context.anatomy, method)
    size = 16 / len(NORMS[pattern])
    rms = [norm / math.sqrt(size) for norm in NORMS[pattern]]
    assert group.size == size
    torch.testing.assert_close(group.rms(), torch.tensor(rms))
    state = method.attach(context)
    model.only.weight.data *= 2  # beta stays that of the weights before
    penalty = method.penalty(state, taking(context))
    assert penalty.item() == pytest.approx(3 * np.mean([2 * value / (value + 0.5) for value in rms]), rel=1e-5)
    penalty.backward()
    # the first weight, 3 doubled, in a group of root mean square r: strength / groups * beta * w / (size * 2 r)
    expected = 3 / len(rms) / (rms[0] + 0.5) * 6 / (size * 2 * rms[0])
    assert model.only.weight.grad[0, 0].item() == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(model.only.weight.grad).all()  # also where a whole group is zero


@pytest.mark.parametrize("block", [1, 2, 4])
def test_strength_means_the_same_for_any_block_and_the_pull_on_a_weight_too(block):
    model = OneMatrix(torch.full((4, 4), 0.5))
    context = model.context()
    method = GroupLasso(groups="blocks", block=block, keep=1, strength=7.0, epsilon=1e-6)
    penalty = method.penalty(method.attach(context), taking(context))
    penalty.backward()
    assert penalty.item() == pytest.approx(7.0, rel=1e-4)
    torch.testing.assert_close(model.only.weight.grad, torch.full((4, 4), 7 / 16 / 0.5), rtol=1e-4, atol=0)


def test_beta_is_renewed_by_hand_at_its_steps():
    model = OneMatrix(GRID)
    context = model.context()
    method = GroupLasso(groups="rows", epsilon=1.0, reweight_every=0.25)
    state = method.attach(context)
    first = 1 / (2.5 + 1)
    assert state.beta(0)[0].item() == pytest.approx(first)
    model.only.weight.data *= 3
    seen = []
    for step in range(1, 9):
        method.advance(state, Progress(step, 8))
        seen.append(state.beta(0)[0].item())
    assert seen == pytest.approx([first] + [1 / (7.5 + 1)] * 7)
    assert set(state.state_dict()) == {"beta_0"}  # so that a resumed run goes on with it


def test_largest_groups_stay_exactly_and_ties_go_by_index():
    context = OneMatrix(GRID).context()
    method = GroupLasso(groups="block_rows", block=2, keep=0.5)  # norms 5 0 0 10 1.4 2 1.4 2: 5, 10 and the two of 2 stay
    decision = method.decide(method.attach(context), context)
    expected = GRID.clone()
    expected[2:, :2] = 0
    assert torch.equal(decision.weights["only.weight"], expected)
    assert decision.plan == Plan()
    even = OneMatrix(torch.ones(4, 4)).context()
    method = GroupLasso(groups="rows", keep=0.75)
    kept = method.decide(method.attach(even), even).weights["only.weight"]
    assert kept.sum(1).tolist() == [4, 4, 4, 0]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("keep", [0.25, 0.5, 0.6])
def test_every_matrix_keeps_its_share(pattern, keep):
    context = tiny_context()
    method = GroupLasso(groups=pattern, block=4, keep=keep)
    decision = method.decide(method.attach(context), context)
    groups = {item.id: item for item in groups_of(context.model, context.anatomy, method)}
    assert len(decision.weights) == 18  # three layers of six; no embeddings
    for name, item in groups.items():
        weight = decision.weights[f"{context.anatomy.matrices[name].module}.weight"]
        assert int((weight != 0).sum()) == math.floor(keep * item.count) * item.size


def test_over_the_model_the_largest_groups_stay_wherever_they_are():
    context = tiny_context()
    with torch.no_grad():
        context.model.get_submodule("bert.encoder.layer.1.attention.self.query").weight.mul_(100)
    method = GroupLasso(groups="blocks", block=8, keep=0.3, over="model")
    decision = method.decide(method.attach(context), context)
    left = {name: int((value != 0).sum()) for name, value in decision.weights.items()}
    assert left["bert.encoder.layer.1.attention.self.query.weight"] == 32 * 32
    assert sum(left.values()) == math.floor(0.3 * 264) * 64  # 264 blocks of 64


@pytest.mark.parametrize("over", ["matrix", "model"])
@pytest.mark.parametrize(("keep", "count"), [(0.29, 29), (0.295, 29), (0.3, 30), (0.01, 1)])
def test_of_single_weights_as_many_stay_as_the_share_says(over, keep, count):
    """0.29 of 100 is a little less than 29 in floating point, and 29 stay."""
    context = OneMatrix(torch.arange(1.0, 101).reshape(10, 10)).context()
    method = GroupLasso(groups="blocks", block=1, keep=keep, over=over)
    left = method.decide(method.attach(context), context).weights["only.weight"]
    assert left[left != 0].tolist() == list(range(101 - count, 101))


# -- As the authors' profiles have it ----------------------------------------------------------------------------------------------

PROFILE = GroupLasso(groups="block_rows", blocks_per_matrix=8, keep=0.2, embeddings=True)
WIDTHS = {"query": 32 // 8, "attention_out": 32 // 8, "ffn_in": 32 // 8, "ffn_out": 24 // 8, "word": 32 // 8}


def test_eight_blocks_per_matrix_whatever_its_width():
    context = tiny_context()
    groups = {item.id: item for item in groups_of(context.model, context.anatomy, PROFILE)}
    assert len(groups) == 19
    for name, item in groups.items():
        rows = context.anatomy.matrices[name].shape[0]
        assert item.count == 8 * rows
        assert item.size == WIDTHS.get(name.rpartition(".")[2], 4)
    out = context.model.bert.encoder.layer[2].output.dense.weight
    third = groups["encoder.2.ffn_out"].rms().reshape(32, 8)[5, 2]
    torch.testing.assert_close(third, out[5, 6:9].square().mean().sqrt())
    across = replace(PROFILE, groups="block_columns", embeddings=False)
    (item,) = (item for item in groups_of(context.model, context.anatomy, across) if item.id == "encoder.2.ffn_in")
    assert (item.count, item.size) == (8 * 32, 3)
    third = item.rms().reshape(8, 32)[2, 7]
    torch.testing.assert_close(
        third, context.model.bert.encoder.layer[2].intermediate.dense.weight[6:9, 7].square().mean().sqrt()
    )


def test_the_paper_s_sum_over_groups_is_the_strength_that_the_docstring_names():
    def groups(width: int, layers: int, table: bool) -> int:
        rows = layers * (4 * width + 4 * width + width) + (30522 if table else 0)
        return 8 * rows

    found = [1e-4 * groups(width, layers, table) for table in (False, True) for width, layers in ((384, 6), (768, 12))]
    assert [round(value) for value in found] == [17, 66, 41, 91]


def test_the_word_table_is_penalised_and_pruned_exactly_if_asked():
    context = tiny_context()
    state = PROFILE.attach(context)
    PROFILE.penalty(state, taking(context)).backward()
    table = context.model.get_input_embeddings().weight
    assert bool((table.grad != 0).all())
    decision = PROFILE.decide(state, context)
    kept = decision.weights["bert.embeddings.word_embeddings.weight"].reshape(99, 8, 4)
    assert int((kept != 0).any(2).sum()) == math.floor(0.2 * 99 * 8)
    norms = table.detach().reshape(99, 8, 4).norm(dim=2)
    alive = (kept != 0).any(2)
    assert norms[alive].min() >= norms[~alive].max()
    small = shrink(context.model, context.anatomy, replace(decision, plan=Plan()))
    assert torch.equal(small.get_input_embeddings().weight, kept.reshape(99, 32))


def test_a_frozen_word_table_is_refused():
    context = tiny_context()
    context.model.get_input_embeddings().requires_grad_(False)
    with pytest.raises(RecipeError, match="the word table, which this stage freezes"):
        PROFILE.attach(context)


def test_matrices_keep_shares_of_their_own():
    shares = {
        "encoder.0.*": 0.75,
        "encoder.[12].ffn_*": 0.5,
        "encoder.0.key": 0.25,
        "encoder.1.value": 1,
        "embeddings.word": 0.6,
    }
    context = tiny_context()
    method = GroupLasso(groups="rows", keep=0.125, shares=shares, embeddings=True)
    state = method.attach(context)
    decision = method.decide(state, context)
    left = {}
    for name, matrix in context.anatomy.matrices.items():
        weight = decision.weights.get(f"{matrix.module}.weight")
        if weight is not None:
            left[name] = int((weight != 0).any(1).sum()) / len(weight)
    assert "encoder.1.value" not in left
    assert left["embeddings.word"] == 59 / 99
    expected = {"encoder.0.query": 0.75, "encoder.0.key": 0.25, "encoder.0.ffn_in": 0.75, "encoder.1.query": 0.125}
    expected |= {"encoder.1.ffn_in": 0.5, "encoder.2.ffn_out": 0.5, "encoder.2.value": 0.125}
    assert {name: left[name] for name in expected} == expected
    method.penalty(state, taking(context)).backward()
    assert context.model.bert.encoder.layer[1].attention.self.value.weight.grad is None  # left alone
    assert repr(method) == repr(replace(method, shares=dict(reversed(shares.items()))))  # the order says nothing


def test_shares_that_fit_nothing_or_two_ways_are_refused():
    for shares, what, help in (
        ({"encoder.0.quary": 0.5}, "no matrix fits 'encoder.0.quary'", "did you mean 'encoder.0.query'"),
        ({"encoder.9.*": 0.5}, r"no matrix fits 'encoder.9.\*'", r"did you mean 'encoder.\d.\*'"),
        ({"*.fnn_in": 0.5}, r"no matrix fits '\*.fnn_in'", r"did you mean '\*.ffn_in'"),
        ({"embeddings.word": 0.5}, "embeddings.word has one, and the word table is left alone", "embeddings: true"),
        ({"*": 1}, "every matrix would be left alone", "below 1"),
        ({"encoder.0.*": 0.5, "*.query": 0.4}, r"'\*.query' and 'encoder.0.\*' both fit encoder.0.query", "its own name"),
    ):
        with pytest.raises(RecipeError, match=what) as caught:
            GroupLasso(groups="rows", shares=shares).check(tiny_context().anatomy, None)
        assert re.search(help, caught.value.help)
    with pytest.raises(TargetError, match=r"keep is 0.01, and one group alone is 0.03125 of the weights \(encoder.2.key\)"):
        GroupLasso(groups="rows", shares={"encoder.2.key": 0.01}).check(tiny_context().anatomy, None)


def test_blocks_of_a_number_that_divides_nothing_are_refused():
    with pytest.raises(RecipeError, match="5 blocks do not divide the 32 columns of encoder.0.query"):
        GroupLasso(groups="block_rows", blocks_per_matrix=5).attach(tiny_context())
    with pytest.raises(RecipeError, match="16 blocks do not divide the 24 columns of encoder.0.ffn_out"):
        GroupLasso(groups="block_rows", blocks_per_matrix=16).attach(tiny_context())


def test_the_profile_comes_back_from_yaml():
    method = replace(PROFILE, shares={"encoder.0.*": 0.4})
    data = yaml.safe_load(yaml.safe_dump(named_options(method)))
    recipe = {"model": "m", "task": "intents", "stages": [{"train": {"methods": [data]}}]}
    assert parse_recipe(recipe).stages[0].methods == (method,)


def test_a_units_norm_spans_all_that_goes_with_it():
    model = tiny("bert")
    anatomy = anatomy_of(model)
    groups = {item.id: item for item in groups_of(model, anatomy, GroupLasso())}
    layer = model.bert.encoder.layer[1]
    into, out = layer.intermediate.dense, layer.output.dense
    neuron = torch.cat([into.weight[5], into.bias[5:6], out.weight[:, 5]])
    assert groups["encoder.1.neurons"].size == len(neuron) == 2 * 32 + 1
    torch.testing.assert_close(groups["encoder.1.neurons"].rms()[5], neuron.square().mean().sqrt())
    own, rows = layer.attention.self, slice(16, 24)
    parts = [getattr(own, name) for name in ("query", "key", "value")]
    head = torch.cat(
        [part.weight[rows].flatten() for part in parts]
        + [part.bias[rows] for part in parts]
        + [layer.attention.output.dense.weight[:, rows].flatten()]
    )
    assert groups["encoder.1.heads"].size == len(head) == 8 * (4 * 32 + 3)
    torch.testing.assert_close(groups["encoder.1.heads"].rms()[2], head.square().mean().sqrt())


def test_units_penalty_reaches_weights_and_biases_of_the_encoder_alone():
    context = tiny_context()
    method = GroupLasso()
    method.penalty(method.attach(context), taking(context)).backward()
    reached = {name for name, parameter in context.model.named_parameters() if parameter.grad is not None}
    assert reached == {piece.param for site in context.anatomy.units for piece in site.slices}
    assert all(parameter.grad.abs().min() > 0 for parameter in context.model.parameters() if parameter.grad is not None)


def test_the_choice_of_units_is_that_of_brute_force():
    model = tiny("bert", num_hidden_layers=1, intermediate_size=6)
    anatomy = anatomy_of(model)
    context = replace(with_model(tiny_context(), model, anatomy), cost=cost.macs(anatomy, np.array([7])))
    method = GroupLasso(keep=0.63, neuron_multiple=1)
    state = method.attach(context)
    plan = method.decide(state, context).plan
    squares = {item.id: (item.rms().detach().double().square() * item.size).numpy() for item in state.groups_of_weights}

    def kept(chosen):
        return sum(squares[name][list(chosen.keep.get(name, range(len(squares[name]))))].sum() for name in squares)

    def some(size):
        return [units for count in range(1, size + 1) for units in combinations(range(size), count)]

    fitting = [
        option
        for heads, neurons in product(some(4), some(6))
        if context.cost.of(option := Plan({"encoder.0.heads": heads, "encoder.0.neurons": neurons}), anatomy)
        <= 0.63 * context.cost.dense
    ]
    assert kept(plan) == pytest.approx(max(kept(option) for option in fitting))


def costs(model, anatomy):
    table = {Kind.HEADS: {1: 0.4, 2: 0.5, 4: 0.9}, Kind.NEURONS: {8: 0.15, 16: 0.22, 24: 0.4}}
    return {
        "macs": cost.macs(anatomy, np.array([7])),
        "parameters": cost.parameters(model, anatomy),
        "latency": cost.latency(anatomy, 0.1, table),
    }


@pytest.mark.parametrize("unit", ["macs", "parameters", "latency"])
@pytest.mark.parametrize("name", TYPES)
def test_units_reach_the_target_from_below_and_masked_is_cut(name, unit):
    model = tiny(name)
    anatomy = anatomy_of(model)
    context = replace(with_model(tiny_context(), model, anatomy), cost=costs(model, anatomy)[unit])
    method = GroupLasso(keep=0.7, cost=unit, neuron_multiple=1)
    plan = method.decide(method.attach(context), context).plan
    share = context.cost.of(plan, anatomy) / context.cost.dense
    assert 0.68 < share <= 0.7
    gates = {
        site: torch.zeros(anatomy.sites[site].size).index_fill(0, torch.tensor(kept), 1) for site, kept in plan.keep.items()
    }
    assert_same(model, anatomy, gates, shrink(model, anatomy, plan))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_units_that_zeros_have_freed_are_cut_and_nothing_changes(name, pattern):
    model = tiny(name)
    anatomy = anatomy_of(model)
    context = with_model(tiny_context(), model, anatomy)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    method = GroupLasso(groups=pattern, block=8, keep=0.3)
    decision = method.decide(method.attach(context), context)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    zeros = shrink(model, anatomy, replace(decision, plan=Plan()))
    cut = shrink(model, anatomy, decision)
    assert_same(zeros, anatomy, {}, cut)
    if pattern == "columns":  # 7 of 24 columns of the second FFN matrix are left, and so many neurons
        assert all(len(decision.plan.keep[f"encoder.{layer}.neurons"]) == 7 for layer in range(3))
    if pattern == "rows":  # a zero W1 row still gives W2 gelu(b1)
        assert not any(site.endswith("neurons") for site in decision.plan.keep)
    if not decision.plan.keep:
        assert_equal(zeros, cut)


def test_a_site_whose_units_are_all_idle_keeps_one():
    context = tiny_context()
    with torch.no_grad():
        context.model.bert.encoder.layer[1].output.dense.weight.zero_()
    method = GroupLasso(groups="columns", keep=1.0)
    decision = method.decide(method.attach(context), context)
    assert decision.plan == Plan({"encoder.1.neurons": (0,)})
    inputs = batch(context.model)
    with torch.no_grad():
        small = shrink(context.model, context.anatomy, decision)
        torch.testing.assert_close(small(**inputs).logits, context.model(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "strength"), [("units", 4.0), ("blocks", 6.0)])
def test_training_parts_the_groups(pattern, strength):
    context = tiny_context()
    model, anatomy = context.model, context.anatomy
    every_other = {site.id: tuple(range(0, site.size, 2)) for site in anatomy.units if site.size > 1}
    goal = shrink(model, anatomy, Plan(every_other))  # what is to be learnt needs half of the units
    inputs = [dict(batch(model, rows=16, seq=8, seed=seed)) for seed in range(8)]
    with torch.no_grad():
        goals = [goal(**item).logits for item in inputs]
    method = GroupLasso(groups=pattern, block=8, strength=strength, neuron_multiple=1, over="model")
    state = method.attach(context)
    assert method.report(state)["quiet"] == 0
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-3)
    for number in range(100):
        error = (model(**inputs[number % 8]).logits - goals[number % 8]).square().mean()
        optimizer.zero_grad()
        (error + method.penalty(state, taking(context, number, 100))).backward()
        optimizer.step()
        method.advance(state, Progress(number + 1, 100))
    decision = method.decide(state, context)
    kept, pruned = [], []
    for item in state.groups_of_weights:
        if pattern == "units":
            stays = torch.zeros(item.count, dtype=torch.bool)
            stays[list(decision.plan.keep.get(item.id, range(item.count)))] = True
        else:
            weight = decision.weights[f"{anatomy.matrices[item.id].module}.weight"]
            stays = weight.reshape(weight.shape[0] // 8, 8, -1, 8).abs().amax((1, 3)).flatten() > 0
        kept.append(item.rms().detach()[stays])
        pruned.append(item.rms().detach()[~stays])
    assert torch.cat(pruned).median() < 0.1 * torch.cat(kept).median()


def test_blocks_that_do_not_divide_are_refused_in_one_line():
    with pytest.raises(RecipeError, match="blocks of 5 x 5 do not divide encoder.0.query, which is 32 x 32"):
        GroupLasso(groups="blocks", block=5).attach(tiny_context())


def test_a_share_that_leaves_no_group_is_refused_and_the_least_is_named():
    with pytest.raises(TargetError, match="0.05, and one group alone is 0.0833") as caught:
        GroupLasso(groups="blocks", block=8, keep=0.05).attach(tiny_context())
    least = float(caught.value.help.split()[2])
    GroupLasso(groups="blocks", block=8, keep=least).attach(tiny_context())
    with pytest.raises(TargetError, match="cannot be reached") as caught:  # units too, before anything is trained
        GroupLasso(keep=0.05).attach(tiny_context())
    assert "of the dense cost or more" in caught.value.help


def test_an_encoder_that_does_not_train_is_refused():
    context = tiny_context()
    for parameter in context.model.bert.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(RecipeError, match="which this stage freezes"):
        GroupLasso().attach(context)


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0},
        {"keep": 1.5},
        {"block": 0},
        {"strength": 0},
        {"strength": math.inf},
        {"reweight_every": 0},
        {"reweight_every": 1.1},
        {"epsilon": 0},
        {"neuron_multiple": 0},
        {"shares": {"*": 0}, "groups": "rows"},
        {"shares": {"*": 0.5}, "groups": "units"},
        {"shares": {"*": 0.5}, "groups": "rows", "over": "model"},
        {"embeddings": True},
        {"blocks_per_matrix": 8},
        {"blocks_per_matrix": 8, "groups": "blocks"},
        {"blocks_per_matrix": 8, "groups": "block_rows", "block": 48},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GroupLasso(**options)


def test_a_training_ends_in_a_decision_within_the_budget(tmp_path):
    features = rows(count=48)
    context = toy_context(features=features)
    method = GroupLasso(keep=0.6, cost="parameters", neuron_multiple=1, reweight_every=0.5)
    settings = Train(steps=6, precision="fp32")
    trained = fit(context, features, [method], settings, tmp_path, Log(None, quiet=True))
    assert 0.58 < context.cost.of(trained.decision.plan, context.anatomy) / context.cost.dense <= 0.6
