"""Reweighted proximal pruning: the step by hand, who reaches 0, how many are left, and that zeros are held."""

from __future__ import annotations

import pytest
import torch

from slimformer.methods.base import Progress
from slimformer.methods.reweighted_proximal import EPSILON, ReweightedProximal, amounts, largest, pushed
from slimformer.testing.checks import tiny_context


def test_the_proximal_step_by_hand():
    weight, amount = torch.tensor([0.5, -0.5, 0.2, -0.1, 0.0]), torch.tensor([0.1, 0.1, 0.3, 0.1, 0.2])
    torch.testing.assert_close(pushed(weight, amount), torch.tensor([0.4, -0.4, 0.0, 0.0, 0.0]))


def test_the_proximal_step_minimises_its_penalty():
    weight, amount = torch.tensor(0.37), torch.tensor(0.21)
    grid = torch.linspace(-1, 1, 20001)
    best = grid[((grid - weight).square() / 2 + amount * grid.abs()).argmin()]
    assert pushed(weight, amount).item() == pytest.approx(best.item(), abs=1e-4)


def test_small_weights_are_pushed_hard():
    weight = torch.tensor([[3.0, -4.0, 0.0, 0.0]])  # root mean square of what is not 0: 3.5355
    scale = 12.5**0.5
    expected = [12.5 / (size + EPSILON * scale) for size in (3, 4, 0, 0)]
    torch.testing.assert_close(amounts(weight), torch.tensor([expected]))
    assert torch.equal(amounts(torch.zeros(2, 2)), torch.zeros(2, 2))


@pytest.mark.parametrize(("whole", "left"), [(True, [0, 3]), (False, [2, 2])])
def test_the_largest_of_each_matrix_or_of_all(whole, left):
    small, big = torch.tensor([[0.1, 0.3], [0.3, 0.2]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    masks = largest([small, big], 0.375 if whole else 0.5, whole=whole)
    assert [int(mask.sum()) for mask in masks] == left
    if not whole:
        assert masks[0].tolist() == [[False, True], [True, False]]


def run(method, steps=40):
    around = tiny_context()
    state = method.attach(around)
    zeros = []
    for step in range(1, steps + 1):
        method.advance(state, Progress(step, steps))
        zeros.append(method.report(state)["zeros"])
    decision = method.decide(state, around)
    state.close()
    return around, state, zeros, decision


@pytest.mark.slow
def test_without_gradients_those_below_a_bar_reach_zero():
    around = tiny_context()
    name = "bert.encoder.layer.0.output.dense.weight"
    before = dict(around.model.named_parameters())[name].detach().clone()
    _, state, zeros, decision = run(ReweightedProximal(keep=None, strength=0.5, updates=1000, cooldown=0.0), steps=400)
    scale = before.square().mean().sqrt()
    after = decision.weights[name]
    gone = before.abs()[after == 0] / scale
    stay = before.abs()[after != 0] / scale
    assert zeros == sorted(zeros)
    assert gone.max() < 1.35  # the square root of 2 * 0.5 is 1; the average grows as small ones go
    assert stay.min() > 0.9
    assert torch.equal(after.sign()[after != 0], before.sign()[after != 0])
    assert state.names == [f"{matrix.module}.weight" for matrix in around.anatomy.encoder_matrices()]


@pytest.mark.parametrize("scope", ["matrix", "model"])
def test_exactly_the_share_is_left_and_zeros_are_held(scope):
    around, state, _, decision = run(ReweightedProximal(keep=0.2, scope=scope, strength=0.1))
    left = sum(int((weight != 0).sum()) for weight in decision.weights.values())
    whole = sum(weight.numel() for weight in decision.weights.values())
    assert left == pytest.approx(0.2 * whole, rel=0.01)
    each = {round(float((weight != 0).float().mean()), 2) for weight in decision.weights.values()}
    assert (each == {0.2}) == (scope == "matrix")
    held = state.held()[0]
    assert not held.all()
    assert around.model.training is False


def test_nothing_is_pushed_in_the_last_share_of_the_steps():
    around = tiny_context()
    method = ReweightedProximal(keep=0.5, cooldown=0.5)
    state = method.attach(around)
    for step in range(1, 6):
        method.advance(state, Progress(step, 10))
    held = [weight.detach().clone() for weight in state.weights]
    for step in range(6, 11):
        method.advance(state, Progress(step, 10))
    assert all(torch.equal(before, after) for before, after in zip(held, state.weights, strict=True))
    state.close()
