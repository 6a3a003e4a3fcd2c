"""The only code that reaches activations at points: each passes through a function while a context lasts.

Inputs and outputs of modules are reached by hooks, the parts of a LayerNorm by computing it in parts, those of a softmax in
`attention.py`. Observers and quantizers are such functions. Nothing is left when the context ends.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Point, PointRole
from slimformer.core.asking import positions_unheard
from slimformer.core.ranges import Ranges
from slimformer.errors import PlanError, nearest
from slimformer.hooks.attention import Slot, attending
from slimformer.hooks.weights import Change, computing
from slimformer.quantizing.grids import fake, point_grid


@contextmanager
def touched(model: nn.Module, anatomy: Anatomy, changes: Mapping[str, Change]) -> Iterator[None]:
    """Passes the activation at each named point through its function while the context lasts.

    A tensor that several modules read is passed once. Raises PlanError for a point that does not exist.
    """
    parts: dict[str, dict[str, Change]] = {}  # module -> part -> function
    norms, attentions = set[str](), set[str]()
    with ExitStack() as stack:
        stack.enter_context(positions_unheard(model))
        for name, change in changes.items():
            point = anatomy.points.get(name)
            if point is None:
                raise PlanError(f"no point '{name}' in this model.", help=nearest(name, anatomy.points))
            if point.side == "input":
                once = _Once(change, len(point.modules))
                for module in point.modules:
                    hook = model.get_submodule(module).register_forward_pre_hook(once)
                    stack.callback(hook.remove)
            elif point.side == "output" and point.role is not PointRole.NORM:
                stack.callback(model.get_submodule(point.modules[0]).register_forward_hook(_after(change)).remove)
            else:
                parts.setdefault(point.modules[0], {})[point.side] = change
                (attentions if point.role is PointRole.SOFTMAX else norms).add(point.modules[0])
        stack.enter_context(computing(model, {name: _norm(parts[name]) for name in norms}))
        if attentions:
            stack.enter_context(attending(model, {name: Slot(softmax=_softmax(parts[name])) for name in attentions}))
        yield


def quantized_inputs(
    model: nn.Module,
    anatomy: Anatomy,
    ranges: Ranges,
    floats: Collection[str] = (),
    roles: Collection[PointRole] = (PointRole.MATRIX,),
) -> AbstractContextManager[None]:
    """Quantizes the inputs of a model's Linears while the context lasts, so that it computes as its int8 files do.

    The weights must be on their grids already. `floats`: points whose matrices stay in float. `roles`: of an encoder the last
    Linear stays in float too, of an encoder-decoder it does not.
    """
    chosen = [point for point in anatomy.points.values() if point.role in roles and point.id not in floats]
    return _quantized(model, anatomy, ranges, [point for point in chosen if point.id in ranges.activations], True)


def quantized_points(model: nn.Module, anatomy: Anatomy, ranges: Ranges) -> AbstractContextManager[None]:
    """Quantizes all points that have learned ranges while the context lasts, so that the model computes as it was trained.

    Files compute what is no input of a Linear more exactly. The weights must be on their grids already.
    """
    known = {**ranges.activations, **ranges.features}
    chosen = [point for point in anatomy.points.values() if point.id in known]
    return _quantized(model, anatomy, ranges, chosen, ranges.exact_zero)


def _quantized(
    model: nn.Module, anatomy: Anatomy, ranges: Ranges, points: Sequence[Point], exact_zero: bool
) -> AbstractContextManager[None]:
    def change(point: Point) -> Change:
        spans = ranges.features.get(point.id)
        pairs = [(span.low, span.high) for span in spans or (ranges.activations[point.id],)]
        low, high = (torch.tensor(side if spans else side[0]) for side in zip(*pairs, strict=True))

        def quantize(values: Tensor) -> Tensor:
            ends = low.to(values.device), high.to(values.device)
            return fake(values, point_grid(point, *ends, ranges.activation_bits, exact_zero=exact_zero))

        return quantize

    return touched(model, anatomy, {point.id: change(point) for point in points})


class _Once:
    """Changes the first input of a module; of several modules that read one tensor, once for all."""

    def __init__(self, change: Change, readers: int) -> None:
        self.change, self.readers = change, readers
        self.latest: tuple[Tensor, Tensor] | None = None  # an input and its change
        self.uses = 0

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.latest is None or self.latest[0] is not args[0]:
            self.latest, self.uses = (args[0], self.change(args[0])), 0
        result = self.latest[1]
        self.uses += 1
        if self.uses >= self.readers:
            self.latest = None  # an activation must not outlive its step
        return (result, *args[1:])


def _after(change: Change) -> Any:
    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return change(output)

    return hook


def _norm(parts: Mapping[str, Change]) -> Any:
    """LayerNorm over the last axis, part by part; one of another class neither centres nor adds a bias, as RMSNorm."""

    def same(values: Tensor) -> Tensor:
        return values

    numerator, denominator, quotient, output = (
        parts.get(side, same) for side in ("numerator", "denominator", "quotient", "output")
    )

    def forward(module: Any, values: Tensor) -> Tensor:
        with torch.autocast(values.device.type, enabled=False):
            wide = values.float()
            if isinstance(module, nn.LayerNorm):
                above, spread = wide - wide.mean(-1, keepdim=True), wide.var(-1, unbiased=False, keepdim=True) + module.eps
            else:
                above, spread = wide, wide.square().mean(-1, keepdim=True) + module.variance_epsilon
            above, below = numerator(above), denominator(spread.sqrt())  # (..., 1)
            result = quotient(above / below) * module.weight
            bias = getattr(module, "bias", None)
            return output(result if bias is None else result + bias).to(values.dtype)

    return forward


def _softmax(parts: Mapping[str, Change]) -> Change:
    """Softmax over the last axis, part by part."""

    def same(values: Tensor) -> Tensor:
        return values

    numerator, denominator, quotient = (parts.get(side, same) for side in ("numerator", "denominator", "quotient"))

    def softmax(scores: Tensor) -> Tensor:
        wide = scores.float()
        above = numerator((wide - wide.amax(-1, keepdim=True).detach()).exp())  # (batch, heads, seq, seq), 0 where masked
        below = denominator(above.sum(-1, keepdim=True))  # (batch, heads, seq, 1)
        return quotient(above / below).to(scores.dtype)

    return softmax
