"""The quantizer equals integers worked by hand; gradients stop where it clamps; running ranges follow their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import tensor

from slimformer.core.ranges import Range
from slimformer.exporters._onnx import int8
from slimformer.quantizing.grids import RunningRange, affine, fake, symmetric, weight_grid


def test_the_papers_quantizer_worked_by_hand():
    grid = affine(tensor(-1.0), tensor(2.0), 2, exact_zero=False)  # s = 3 / 3
    values = tensor([-5.0, -1.0, -0.6, 0.4, 0.6, 1.4, 2.0, 9.0])
    assert grid.integers(values).tolist() == [0, 0, 0, 1, 2, 2, 3, 3]
    assert fake(values, grid).tolist() == [-1, -1, -1, 0, 1, 1, 2, 2]
    grid = affine(tensor(0.1), tensor(0.7), 2, exact_zero=False)  # s = 0.2; 0 is not on it
    assert grid.integers(tensor([0.0, 0.15, 0.25, 0.45, 0.65])).tolist() == [0, 0, 1, 2, 3]
    torch.testing.assert_close(fake(tensor([0.0, 0.25]), grid), tensor([0.1, 0.3]))


def test_an_exact_zero_moves_the_grid_by_less_than_a_step():
    grid = affine(tensor(-1.0), tensor(3.0), 2, exact_zero=True)  # s = 4/3, -low / s = 0.75: the zero point is 1
    assert fake(tensor([0.0]), grid).item() == 0.0
    torch.testing.assert_close(fake(tensor([-9.0, 1.0, 9.0]), grid), tensor([-4 / 3, 4 / 3, 8 / 3]))
    assert affine(tensor(1.0), tensor(3.0), 2, exact_zero=True).values(tensor([0.0, 3.0])).tolist() == [0.0, 3.0]


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_it_is_the_grid_that_files_use(bits):
    generator = torch.Generator().manual_seed(0)
    for low, high in ((-0.17, 3.3), (-2.0, 1.5), (0.2, 5.0), (-4.0, -1.0)):
        step, zero = Range(low, high).grid(bits)
        values = torch.randn(500, generator=generator) * 3
        mine = affine(tensor(low), tensor(high), bits, exact_zero=True)
        theirs = np.clip(np.rint(values.numpy() / step) + zero, 0, 2**bits - 1)  # QuantizeLinear
        np.testing.assert_array_equal(mine.integers(values).numpy() + zero, theirs)
    weight = torch.randn(5, 7, generator=generator)
    integers, scales = int8.quantize_weight(weight.numpy(), 0, int8.WeightCoding(bits))
    grid = weight_grid(weight, bits, rows=True, even=True)
    np.testing.assert_array_equal(grid.integers(weight).numpy(), integers)
    again, _ = int8.quantize_weight(fake(weight, grid).numpy(), 0, int8.WeightCoding(bits))
    np.testing.assert_array_equal(again, integers)  # what lies on a grid is found there again
    np.testing.assert_array_equal(grid.step[:, 0].numpy(), scales)
    whole = weight_grid(weight, bits, rows=False, even=True)
    for axis in (0, 1):
        again, scales = int8.quantize_weight(fake(weight, whole).numpy(), axis, int8.WeightCoding(bits, whole=True))
        np.testing.assert_array_equal(again, whole.integers(weight).numpy())
        np.testing.assert_array_equal(scales, np.full(weight.shape[axis], whole.step.item(), dtype=np.float32))
    terms = torch.stack([weight, 3 * weight])
    assert weight_grid(terms, bits, rows=False, even=True).step.shape == (2, 1, 1)


def test_symmetric_grids_worked_by_hand():
    grid = symmetric(tensor(7.0), 4)  # -7 .. 7
    assert fake(tensor([-9.0, -6.6, 0.5, 1.5, 7.0]), grid).tolist() == [-7, -7, 0, 2, 7]  # ties go to even
    assert fake(tensor([0.0]), symmetric(tensor(0.0), 4)).item() == 0.0
    weight = tensor([[7.0, 1.2], [0.7, 0.12]])
    torch.testing.assert_close(fake(weight, weight_grid(weight, 4, rows=True, even=True)), tensor([[7.0, 1.0], [0.7, 0.1]]))
    torch.testing.assert_close(fake(weight, weight_grid(weight, 4, rows=False, even=True)), tensor([[7.0, 1.0], [1.0, 0.0]]))


def test_affine_weights_reach_their_extremes():
    weight = tensor([[-1.0, 2.0, 0.4], [0.0, 3.0, 1.4]])
    found = fake(weight, weight_grid(weight, 2, rows=True, even=False, exact_zero=False))
    assert found.tolist() == [[-1, 2, 0], [0, 3, 1]]


def test_gradients_pass_inside_and_stop_where_values_are_clamped():
    values = tensor([-1.5, -1.0, 0.3, 2.0, 2.4], requires_grad=True)
    weights = tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    (fake(values, affine(tensor(-1.0), tensor(2.0), 2, exact_zero=False)) * weights).sum().backward()
    assert values.grad.tolist() == [0, 2, 3, 4, 0]


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("even", [True, False])
def test_no_weight_loses_its_gradient_on_a_grid_of_its_own_extremes(bits, even):
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
    fake(weight, weight_grid(weight, bits, rows=True, even=even, exact_zero=False)).sum().backward()
    assert bool((weight.grad == 1).all())


@pytest.mark.parametrize("bits", [1, 40])
def test_bits_that_no_grid_has_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must be from 2 to 16, got {bits}"):
        affine(tensor(0.0), tensor(1.0), bits, exact_zero=True)
    with pytest.raises(ValueError, match=f"bits must be from 2 to 16, got {bits}"):
        symmetric(tensor(1.0), bits)


def test_running_ranges_begin_with_the_first_batch_and_leave_padding_out():
    running = RunningRange(momentum=0.9)
    running.observe(tensor([[[-1.0, 4.0], [100.0, -100.0]]]), tensor([[1, 0]]))
    running.settle()
    assert (float(running.low), float(running.high)) == (-1.0, 4.0)
    running.observe(tensor([[[-2.0, 3.0]]]), tensor([[1]]))
    running.settle()
    assert (float(running.low), float(running.high)) == pytest.approx((-1.1, 3.9))
    running.observe(tensor([[[9.0, 9.0]]]), tensor([[0]]))  # nothing but padding
    running.settle()
    running.observe(torch.zeros(0, 2))
    running.settle()
    (found,) = running.ranges()
    assert (found.low, found.high) == pytest.approx((-1.1, 3.9))


def test_what_passes_between_two_settlings_moves_a_range_once():
    running = RunningRange(momentum=0.9)
    for values in ([[-1.0, 0.5]], [[0.0, 4.0]]):
        running.observe(tensor(values))
    assert not bool(running.seen)
    running.settle()
    assert (float(running.low), float(running.high)) == (-1.0, 4.0)
    for values in ([[-0.5, 2.0]], [[-2.0, 0.0]], [[0.0, 3.0]]):
        running.observe(tensor(values))
    running.settle()
    running.settle()  # nothing passed
    assert (float(running.low), float(running.high)) == pytest.approx((-1.1, 3.9))


def test_running_ranges_of_attention_count_the_rows_of_real_tokens():
    running = RunningRange()
    scores = tensor([[[[0.5, 0.2], [9.0, 9.0]]]])  # (batch, heads, queries, keys): the second query is padding
    running.observe(scores, tensor([[1, 0]]))
    running.settle()
    assert (float(running.low), float(running.high)) == pytest.approx((0.2, 0.5))
    running = RunningRange()
    running.observe(tensor([[1.0, 2.0]]), tensor([[1, 0]]))  # (batch, features): no tokens to leave out
    running.settle()
    assert (float(running.low), float(running.high)) == (1.0, 2.0)


def test_running_ranges_per_feature():
    running = RunningRange(features=2)
    running.observe(tensor([[[1.0, 5.0], [3.0, -5.0], [50.0, 50.0]]]), tensor([[1, 1, 0]]))
    running.settle()
    assert running.low.tolist() == [1, -5]
    assert running.high.tolist() == [3, 5]


def test_a_constant_activation_gets_a_range_with_a_width():
    running = RunningRange()
    running.observe(torch.zeros(1, 3))
    running.settle()
    (found,) = running.ranges()
    assert found.low == 0.0 < found.high
    grid = affine(running.low, running.high, 8, exact_zero=True)
    assert bool(torch.isfinite(fake(tensor([0.0, 1.0]), grid)).all())
