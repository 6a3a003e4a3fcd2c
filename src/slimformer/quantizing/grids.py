"""Fake quantization: puts values on a grid of 2^bits steps; gradients pass straight through, except where values are clamped.

Prato, Charlaix, Rezagholizadeh: Fully Quantized Transformer for Machine Translation (Findings of EMNLP 2020), section
3: s = (max - min) / (2^b - 1), q = round((clamp(x; min, max) - min) / s), x~ = q s + min; running estimates with
momentum 0.9; the gradient of a clamped value is 0. Differences: a grid may hold 0 exactly (min moves to the nearest
whole step: integer kernels need it, and the paper's own treatment of zeros was not at hand), or be symmetric (no zero
point, as int8 weights are in files); an estimate begins with the first batch, not with 0; padding is never counted.
Ranges have no gradients: nothing is learned here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Point, PointRole
from slimformer.core.ranges import NARROWEST, Range, check_bits

SLACK = 1e-3  # of a step: the extreme itself, divided and rounded, is not outside
MOMENTUM = 0.9  # section 3.1


@dataclass(frozen=True)
class Grid:
    """The values k * step + offset for whole k from `first` to `last`; tensors that broadcast against the quantized one."""

    step: Tensor
    offset: Tensor
    first: Tensor
    last: Tensor

    def integers(self, values: Tensor) -> Tensor:
        """The nearest k of each value, clamped; ties go to even k, as ONNX's QuantizeLinear does."""
        return torch.round((values - self.offset) / self.step).clamp(self.first, self.last)

    def values(self, integers: Tensor) -> Tensor:
        return integers * self.step + self.offset


def affine(low: Tensor, high: Tensor, bits: int, *, exact_zero: bool) -> Grid:
    """2^bits values from `low` to `high`. `exact_zero`: spanning 0 too, and moved by less than a step so that 0 is one
    of them."""
    check_bits("bits", bits, most=16)
    top = 2**bits - 1
    if exact_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    step = ((high - low) / top).clamp_min(NARROWEST)
    if not exact_zero:
        return Grid(step, low, torch.zeros_like(step), torch.full_like(step, top))
    zero = torch.round(-low / step).clamp(0, top)
    return Grid(step, torch.zeros_like(step), -zero, top - zero)


def point_grid(point: Point, low: Tensor, high: Tensor, bits: int, *, exact_zero: bool = True) -> Grid:
    """The grid of the activation at a point whose values run from `low` to `high`.

    That of a denominator need not hold 0, which it never is and which is far from it; that of another part of a softmax begins at
    0, as in the paper: what is masked stays exactly 0.
    """
    divisor = point.side == "denominator"
    if point.role is PointRole.SOFTMAX and not divisor:
        low = torch.zeros_like(low)
    return affine(low, high, bits, exact_zero=exact_zero and not divisor)


def symmetric(largest: Tensor, bits: int) -> Grid:
    """2^bits - 1 values around 0, as far out as `largest`; if that is 0 the step is 1."""
    check_bits("bits", bits, most=16)
    top = 2 ** (bits - 1) - 1
    step = largest / top
    step = torch.where(step == 0, torch.ones_like(step), step)
    return Grid(step, torch.zeros_like(step), torch.full_like(step, -top), torch.full_like(step, top))


def weight_grid(weight: Tensor, bits: int, *, rows: bool, even: bool, exact_zero: bool = True) -> Grid:
    """The grid of a weight from its own extremes, a bucket per row (the output dimension, or a word) or one for a matrix."""
    weight = weight.detach()
    along = -1 if rows else tuple(range(-min(weight.ndim, 2), 0))  # of several terms each is a matrix
    low, high = weight.amin(along, keepdim=True), weight.amax(along, keepdim=True)
    return symmetric(torch.maximum(-low, high), bits) if even else affine(low, high, bits, exact_zero=exact_zero)


class _Straight(torch.autograd.Function):
    """The values of a grid; the gradient of a value passes if it lies within the grid."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, offset: Tensor, first: Tensor, last: Tensor) -> Tensor:
        ratio = (values.float() - offset) / step
        ctx.save_for_backward((ratio >= first - SLACK) & (ratio <= last + SLACK))
        return (torch.round(ratio).clamp(first, last) * step + offset).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None, None


def fake(values: Tensor, grid: Grid) -> Tensor:
    """`values` on the grid; backward, the identity inside it and 0 outside."""
    return cast(Tensor, _Straight.apply(values, grid.step, grid.offset, grid.first, grid.last))  # type: ignore[no-untyped-call]


class RunningRange(nn.Module):
    """Running extremes of an activation, of all its values or per feature; buffers, so that they are saved with a run.

    `observe` gathers extremes, as often as values pass, and `settle` moves the running ones by them once. The products of a
    sum, which each read a tensor of their own, and the processes of a training thus share one range that spans all of them.
    """

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, features: int | None = None, momentum: float = MOMENTUM) -> None:
        super().__init__()
        shape = () if features is None else (features,)
        self.momentum = momentum
        self.register_buffer("low", torch.zeros(shape))
        self.register_buffer("high", torch.zeros(shape))
        self.register_buffer("seen", torch.tensor(False))
        self._gathered: tuple[Tensor, Tensor] | None = None

    @property
    def gathered(self) -> tuple[Tensor, Tensor]:
        """The lowest and highest values since the last `settle`; infinite if there were none."""
        if self._gathered is None:
            return torch.full_like(self.low, torch.inf), torch.full_like(self.high, -torch.inf)
        return self._gathered

    @gathered.setter
    def gathered(self, ends: tuple[Tensor, Tensor]) -> None:
        self._gathered = ends

    @torch.no_grad()
    def observe(self, values: Tensor, mask: Tensor | None = None) -> None:
        """Gathers the extremes of `values` (batch, seq, features), (batch, heads, seq, keys) or (batch, features).

        `mask` (batch, seq) is 1 at real tokens; values at padding are left out.
        """
        if not values.numel():
            return
        values = values.detach().float()
        if self.low.ndim:
            low = high = values  # (..., features)
        else:
            low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)  # (..., 1)
        real = _real(values, mask)
        if real is not None:
            low, high = low.masked_fill(~real, torch.inf), high.masked_fill(~real, -torch.inf)
        low, high = low.reshape(-1, low.shape[-1]).amin(0), high.reshape(-1, high.shape[-1]).amax(0)
        lowest, highest = self.gathered
        self.gathered = torch.minimum(lowest, low.reshape(lowest.shape)), torch.maximum(highest, high.reshape(highest.shape))

    @torch.no_grad()
    def settle(self) -> None:
        """Moves the running extremes towards those gathered, and forgets these; nothing moves if there are none."""
        if self._gathered is None:
            return
        real = torch.stack([torch.isfinite(end) for end in self._gathered]).any()  # a batch may be nothing but padding
        for mine, now in zip((self.low, self.high), self._gathered, strict=True):
            now = torch.where(torch.isfinite(now), now, mine)
            mine.copy_(torch.where(self.seen, self.momentum * mine + (1 - self.momentum) * now, now))
        self.seen |= real
        self._gathered = None

    def ranges(self) -> tuple[Range, ...]:
        """The running range of each feature, or the one of all, as numbers; one of no width gets a step at its upper end."""
        ends = zip(self.low.flatten().tolist(), self.high.flatten().tolist(), strict=True)
        return tuple(Range(low, high if high > low else low + max(NARROWEST, abs(low) * 1e-6)) for low, high in ends)


def _real(values: Tensor, mask: Tensor | None) -> Tensor | None:
    """True at real tokens, to be broadcast along the last axis of `values`; None if these have no axis of tokens."""
    if mask is None:
        return None
    if values.ndim == 3 and values.shape[:2] == mask.shape:
        return mask.bool()[:, :, None]
    if values.ndim == 4 and (values.shape[0], values.shape[2]) == tuple(mask.shape):
        return mask.bool()[:, None, :, None]
    return None
