"""Masked weights: one rule for shapes against brute force, plain names throughout, no trace, and which units zeros set free."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny import batch, tiny
from torch import nn

from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.errors import PlanError, RecipeError
from slimformer.families.base import anatomy_of
from slimformer.hooks.weights import changed_weights, computing, expand, grid_of, liveliness, masked, masked_weights

OWN = "bert.encoder.layer.1.attention.self"
OUT = "bert.encoder.layer.1.attention.output.dense"
FFN_IN = "bert.encoder.layer.1.intermediate.dense"
FFN_OUT = "bert.encoder.layer.1.output.dense"


@pytest.mark.parametrize("grid", [(6, 4), (3, 2), (2, 4), (6, 1), (1, 4), (1, 1)])
def test_an_entry_of_a_mask_covers_a_block(grid):
    generator = torch.Generator().manual_seed(0)
    weight, mask = torch.randn(6, 4, generator=generator), torch.rand(grid, generator=generator)
    full = torch.tensor([[mask[i * grid[0] // 6, j * grid[1] // 4] for j in range(4)] for i in range(6)])
    assert torch.equal(expand(mask, weight.shape), full)
    assert torch.equal(masked(weight, mask), weight * full)


def test_a_bias_takes_an_entry_for_several_rows():
    assert masked(torch.arange(1.0, 7), torch.tensor([True, False, True])).tolist() == [1, 2, 0, 0, 5, 6]


def test_a_linear_computes_with_weight_times_mask_and_both_learn():
    linear = nn.Linear(4, 2)
    weight = linear.weight
    mask = torch.tensor([[1.0, 0.0]], requires_grad=True)  # one entry for two columns
    inputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with masked_weights(linear, {"weight": lambda: mask, "bias": torch.tensor([1.0, 0.0])}):
        output = linear(inputs)
        assert dict(linear.named_parameters())["weight"] is weight
    with torch.no_grad():
        full = torch.tensor([1.0, 1.0, 0.0, 0.0])
        expected = inputs @ (weight * full).T + linear.bias * torch.tensor([1.0, 0.0])
    torch.testing.assert_close(output.detach(), expected)
    output.sum().backward()
    along = inputs.sum(0)  # dL/dW' is this in each row
    torch.testing.assert_close(weight.grad, (along * full).expand(2, 4))
    torch.testing.assert_close(mask.grad, (weight.detach() * along).reshape(2, 2, 2).sum((0, 2))[None, :])


def test_nothing_is_left_when_it_ends_or_a_forward_pass_fails():
    model = tiny("bert")
    before = list(model.state_dict()), [dict(vars(module)) for module in model.modules()]
    linear = model.get_submodule(FFN_IN)
    with pytest.raises(RuntimeError), masked_weights(model, {f"{FFN_IN}.weight": torch.zeros(1, 1)}):
        assert list(model.state_dict()) == before[0]
        linear(torch.zeros(1, 5))
    assert list(model.state_dict()) == before[0]
    assert [vars(module).keys() for module in model.modules()] == [held.keys() for held in before[1]]
    assert isinstance(linear.weight, nn.Parameter)


def test_contexts_overlap_and_end_in_any_order():
    linear = nn.Linear(2, 1, bias=False)
    ones = torch.eye(2)
    first = masked_weights(linear, {"weight": torch.tensor([[2.0, 1.0]])})
    second = masked_weights(linear, {"weight": torch.tensor([[1.0, 3.0]])})
    plain = linear(ones).detach()
    first.__enter__()
    second.__enter__()
    torch.testing.assert_close(linear(ones), plain * torch.tensor([[2.0], [3.0]]))
    first.__exit__(None, None, None)
    torch.testing.assert_close(linear(ones), plain * torch.tensor([[1.0], [3.0]]))
    second.__exit__(None, None, None)
    torch.testing.assert_close(linear(ones), plain)
    assert "forward" not in vars(linear)


def test_a_module_computes_in_another_way_with_its_changed_weights():
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Identity())
    plain = model(torch.eye(2)).detach()
    with computing(model, {"0": lambda module, values: 10 * values @ module.weight.T}):
        torch.testing.assert_close(model(torch.eye(2)), 10 * plain)
        with changed_weights(model, {"0.weight": lambda weight: 3 * weight}):
            torch.testing.assert_close(model(torch.eye(2)), 30 * plain)
        torch.testing.assert_close(model(torch.eye(2)), 10 * plain)
        with pytest.raises(AssertionError, match="0 computes in another way already"), computing(model, {"1": abs, "0": abs}):
            pass
        assert "forward" not in vars(model[1])
    torch.testing.assert_close(model(torch.eye(2)), plain)
    assert "forward" not in vars(model[0])


def test_a_copy_made_meanwhile_masks_its_own_weights():
    linear = nn.Linear(2, 1, bias=False)
    with masked_weights(linear, {"weight": torch.tensor([[0.0, 1.0]])}):
        other = copy.deepcopy(linear)
    with torch.no_grad():
        other.weight.fill_(5.0)
        assert other(torch.eye(2)).tolist() == [[0.0], [5.0]]


def test_what_does_not_fit_is_refused():
    model = tiny("bert")
    with pytest.raises(PlanError, match="did you mean"), masked_weights(model, {f"{FFN_IN}.weigh": torch.ones(1, 1)}):
        pass
    with (
        pytest.raises(PlanError, match=r"\(5, 1\) does not fit .* \(24, 32\)"),
        masked_weights(model, {f"{OUT}.weight": torch.ones(1, 1), f"{FFN_IN}.weight": torch.ones(5, 1)}),
    ):
        pass
    assert "forward" not in vars(model.get_submodule(OUT))  # put on before the one that fails


def test_blocks_must_divide():
    assert grid_of((24, 32), (8, 16), "x") == (3, 2)
    with pytest.raises(RecipeError, match="blocks of 16 x 8 do not divide encoder.0.ffn_in, which is 24 x 32"):
        grid_of((24, 32), (16, 8), "encoder.0.ffn_in")


def test_zeros_set_a_unit_free_exactly_where_the_output_does_not_change():
    model = tiny("bert")  # 4 heads of 8, 24 neurons
    anatomy = anatomy_of(model)
    head = {index: slice(8 * index, 8 * index + 8) for index in range(4)}
    with torch.no_grad():
        of = dict(model.named_parameters())
        of[f"{OWN}.value.weight"][head[0]] = 0  # its bias stays: not free
        of[f"{OWN}.value.weight"][head[1]] = 0
        of[f"{OWN}.value.bias"][head[1]] = 0
        of[f"{OUT}.weight"][:, head[2]] = 0
        of[f"{OWN}.query.weight"][head[3]] = 0  # an average of values: not free
        of[f"{OWN}.query.bias"][head[3]] = 0
        of[f"{FFN_IN}.weight"][:2] = 0
        of[f"{FFN_IN}.bias"][0] = 0
        of[f"{FFN_OUT}.weight"][:, 5] = 0
    lives = liveliness(anatomy, {name: value.detach().abs() for name, value in model.named_parameters()})
    assert torch.nonzero(lives["encoder.1.heads"] == 0).flatten().tolist() == [1, 2]
    assert torch.nonzero(lives["encoder.1.neurons"] == 0).flatten().tolist() == [0, 5]
    inputs = batch(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        for name in ("encoder.1.heads", "encoder.1.neurons"):
            for unit, life in enumerate(lives[name].tolist()):
                kept = tuple(int(other) for other in np.setdiff1d(range(anatomy.sites[name].size), unit))
                cut = shrink(model, anatomy, Plan({name: kept}))(**inputs).logits
                assert torch.allclose(cut, expected, atol=1e-5) == (life == 0), f"{name} {unit}"


def test_a_bar_in_blocks_that_straddle_heads():
    anatomy = anatomy_of(tiny("bert"))
    value = torch.zeros(2, 1)  # two blocks of 16 rows: two heads of 8 each
    value[1] = 3.0
    lives = liveliness(anatomy, {f"{OWN}.value.weight": value, f"{OUT}.weight": torch.tensor([[1.0, 2.0, 4.0, 5.0]])})
    assert lives["encoder.1.heads"].tolist() == [0, 0, 3, 3]
    assert lives["encoder.0.heads"].tolist() == [torch.inf] * 4
